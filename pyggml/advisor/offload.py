"""From how many tokens of a micro-batch it pays to copy host weights to a device, on the simulated machine."""

from __future__ import annotations

from dataclasses import replace

from ..foresight import Setting
from ..foresight.estimate import predict
from ..simulation import simulate_batch
from .search import Search, without_cache

__all__ = ["pays_from"]

#: llama.cpp's own threshold: below it nothing is copied.
_LEAST = 32
_MOST = 4096
#: Rounds of two or three micro-batches each, after which what is known must do.
_MOST_ROUNDS = 12


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
    guess = _guess(search, setting, most)
    gains: dict[int, float] = {}
    low, high = _LEAST - 1, most + 1  # it pays not at the lower end, and does at the upper one, as far as is known
    at, step = most if guess is None else guess, 1
    for _ in range(_MOST_ROUNDS):
        asked = [n for n in (at, at - 1) if n not in gains and _LEAST <= n <= most]
        gains |= _gains(search, setting, asked)
        for n in (at - 1, at):
            if n in gains and gains[n] > 0 and n < high:
                high = n
            elif n in gains and gains[n] <= 0 and low < n < high:
                low = n
        if high - low == 1:
            break
        if high > most:  # none is known that pays
            if low >= most:
                break
            at, step = min(most, max(low + 1, round(low * (1.0 + 0.03 * step)))), 4 * step
        elif low < _LEAST:  # none is known that does not
            at, step = max(_LEAST, min(high - 1, round(high / (1.0 + 0.03 * step)))), 4 * step
        else:
            share = gains[low] / (gains[low] - gains[high])
            at = min(high - 1, max(low + 2, low + round(share * (high - low)))) if high - low > 2 else low + 1
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


def _gains(search: Search, setting: Setting, sizes: list[int]) -> dict[int, float]:
    """Return by how many seconds micro-batches of some sizes are faster with copies."""
    if not sizes:
        return {}
    size = max(setting.n_ubatch, *sizes)
    seconds: list[list[float]] = []
    for on in (False, True):
        planner = search.memory.planner(
            replace(setting, op_offload=on, n_ubatch=size, n_batch=max(size, setting.n_batch))
        )
        made = (simulate_batch(planner, n, routing=search.shape.routing) for n in sizes)
        seconds.append([m.seconds or 0.0 for m in made])
    return {n: without - copied for n, without, copied in zip(sizes, *seconds, strict=True)}
