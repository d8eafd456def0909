"""From how many tokens of a micro-batch it pays to copy host weights to a device, on the simulated machine."""

from __future__ import annotations

import math
from dataclasses import replace

from ..foresight import Setting
from ..foresight.estimate import predict
from ..simulation import simulate_batch
from .search import Search, without_cache

__all__ = ["pays_from"]

#: llama.cpp's own threshold: below it nothing is copied.
_LEAST = 32
_MOST = 4096
#: Micro-batches that are tried, after which what is known must do.
_MOST_ASKED = 24


def pays_from(search: Search, setting: Setting) -> int | None:
    """Return the number of tokens from which copying host weights to the device is faster than computing on the CPU.

    Returns
    -------
    int or None
        A micro-batch of so many tokens is faster with copies, and one of a token less is not, by the clock of `splits`
        (``--batches N``, with and without ``--no-op-offload``). None if it never is up to 4096 tokens, or if nothing is on
        the host.

    Notes
    -----
    Formulas guess; the simulated machine decides. Times are not smooth, because the experts that one more token uses differ,
    so there may be other such numbers close by. Micro-batches of so many tokens bypass an expert cache.
    """
    if not search.machine.cards or (setting.n_cpu_moe == 0 and setting.n_gpu_layers < 0 and not setting.overrides):
        return None
    routing = search.shape.routing
    known = None if routing is None else routing.n_tokens
    most = min(_MOST, search.memory.n_ctx, known or _MOST)
    if most < _LEAST:
        return None
    setting = without_cache(setting)
    gains: dict[int, float] = {}
    low, high = _LEAST - 1, most + 1  # it pays not at the lower end, and does at the upper one, as far as is known
    at = _guess(search, setting, most) or most
    for _ in range(_MOST_ASKED):
        on_cpu, copied = _seconds(search, setting, at, copies_first=len(gains) % 2 > 0)
        gains[at] = on_cpu - copied
        low, high = (low, at) if gains[at] > 0 else (at, high)
        if high - low == 1:
            break
        if low >= _LEAST and high <= most:
            nearest = math.ceil(low + gains[low] / (gains[low] - gains[high]) * (high - low))
        else:  # the CPU's time is about in proportion to the tokens, that of copies about constant
            nearest = math.floor(at * copied / on_cpu) if gains[at] > 0 else math.ceil(at * copied / on_cpu)
        at = max(low + 1, min(high - 1, nearest))
    return high if high <= most else None


def _guess(search: Search, setting: Setting, most: int) -> int | None:
    """Return the number by formulas; None if copying never is faster."""

    def is_faster(n: int) -> bool:
        at = replace(setting, n_ubatch=n, n_batch=n)
        copied, on_cpu = (
            predict(search.shape, search.machine, replace(at, op_offload=on), n, 0, is_prompt=True)
            for on in (True, False)
        )
        return copied < on_cpu

    low, high = _LEAST, most
    if not is_faster(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle + 1, high)
    return low


def _seconds(search: Search, setting: Setting, n: int, *, copies_first: bool) -> tuple[float, float]:
    """Return the time of a micro-batch on the CPU, and with copies; ``copies_first``: the planner is at that setting."""
    size = max(setting.n_ubatch, n)
    seconds: dict[bool, float] = {}
    for on in (copies_first, not copies_first):
        planner = search.memory.planner(
            replace(setting, op_offload=on, n_ubatch=size, n_batch=max(size, setting.n_batch))
        )
        seconds[on] = simulate_batch(planner, n, routing=search.shape.routing).seconds or 0.0
    return seconds[False], seconds[True]
