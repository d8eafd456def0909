"""`estimate`: one answer for a model, a machine and flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..catalog import find_model
from ..errors import DeviceUnavailableError, FormatError
from ..gguf import GGUFFile
from ..hardware.cards import Card, find_card
from ..hardware.hosts import DEFAULT_HOST, Host, parse_host
from .estimate import Machine, Placed, Setting, host_weight_bytes, place, predict
from .links import link_of
from .ranges import spread_of
from .shape import ModelShape

__all__ = ["Estimate", "MemoryUse", "Speed", "estimate", "machine_of", "model_shape"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second: what is expected, and between what the truth is in four cases of five."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of a device, or of the host (the last)."""

    device: str
    weights: int
    cache: int
    compute: int
    of_bytes: int  #: 0: not known

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.compute

    @property
    def fits(self) -> bool:
        """Whether the device has so much."""
        return not self.of_bytes or self.total <= self.of_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """Speeds and memory of one setting.

    Attributes
    ----------
    prompt, generation : Speed
    memory : tuple of MemoryUse
        Of each card, then of the host.
    host_weight_bytes : int
        Weights of layers in host memory.
    """

    prompt: Speed
    generation: Speed
    memory: tuple[MemoryUse, ...]
    host_weight_bytes: int

    @property
    def fits(self) -> bool:
        """Whether everything has room."""
        return all(use.fits for use in self.memory)


@lru_cache(maxsize=64)
def model_shape(model: str) -> ModelShape:
    """Return the shape of a file, or of ``NAME[:QUANT]`` of the table.

    Raises
    ------
    FormatError
        There is neither a file nor a model of that name.
    """
    if os.path.lexists(model):
        with GGUFFile.open(model) as file:
            return ModelShape.from_header(file.metadata, file.tensors, str(file.metadata.get("general.name", model)))
    name, _, quant = model.partition(":")
    sizes = find_model(name)
    if sizes is None:
        raise FormatError(
            model, "there is no such file, and no such model in the table", hint="`pyggml models` lists them"
        )
    return ModelShape.from_sizes(sizes, quant)


def machine_of(devices: str | Sequence[str] = (), host: str | Host = "", *, pcie: str = "") -> Machine:
    """Return a machine of cards and a host by name.

    Parameters
    ----------
    devices : str or sequence of str
        ``"rtx3090"``, ``"rtx3090,rtx3090"``; ``sim:`` before a name changes nothing, and neither does ``-pcie4`` after it.
    host : str or Host
        See `parse_host`; empty: the default host.
    pcie : str
        ``"4.0 x8"``, if it is not the cards' own.

    Raises
    ------
    DeviceUnavailableError
        A card or a part of the host is not known.
    """
    names = [part.strip() for part in devices.split(",")] if isinstance(devices, str) else list(devices)
    cards: list[Card] = []
    for name in filter(None, names):
        card = find_card(name.removeprefix("sim:").split("-pcie")[0])
        if card is None:
            raise DeviceUnavailableError(name, "no card of this name is known", hint="`pyggml devices` lists them")
        cards.append(card)
    found = host if isinstance(host, Host) else parse_host(host) if host else DEFAULT_HOST
    return Machine(cards, [link_of(card, pcie) for card in cards], found)


def estimate(
    model: str | ModelShape,
    machine: Machine,
    setting: Setting | None = None,
    *,
    n_prompt: int = 512,
    n_generate: int = 128,
    n_ctx: int = 4096,
    depth: int = 0,
) -> Estimate:
    """Return how fast a model is on a machine with some flags, and what memory it takes.

    Parameters
    ----------
    model : str or ModelShape
        A file, ``NAME[:QUANT]``, or what `model_shape` returned.
    machine : Machine
        Of `machine_of`.
    setting : Setting, optional
        Flags; llama.cpp's defaults if not given.
    n_prompt, n_generate : int
        Tokens of the prompt and of the answer.
    n_ctx : int
        Cells of the cache.
    depth : int
        Tokens in the cache before the prompt.

    Examples
    --------
    >>> answer = estimate("qwen3-30b-a3b:Q4_K_M", machine_of("rtx3090", "ddr4-3200x2,cores=8,64GiB"))
    >>> answer.generation.low < answer.generation.mid < answer.generation.high, answer.fits
    (True, True)
    """
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    s = setting or Setting()
    placed = place(shape, s, len(machine.cards))

    def speed(n: int, at: int, is_prompt: bool) -> Speed:
        mid = 1.0 / predict(shape, machine, s, n, at, is_prompt=is_prompt)
        factor = spread_of(machine, s, placed, is_prompt=is_prompt)
        return Speed(mid / factor, mid, mid * factor)

    return Estimate(
        speed(max(n_prompt, 1), depth, True),
        speed(max(n_generate, 1), depth + n_prompt, False),
        _memory(shape, machine, s, placed, n_ctx),
        host_weight_bytes(shape, placed),
    )


def _memory(shape: ModelShape, m: Machine, s: Setting, placed: list[Placed], n_ctx: int) -> tuple[MemoryUse, ...]:
    """Return the memory of each card and of the host; compute buffers by their largest tensors."""
    n = len(m.cards)
    weights, cache = [0] * (n + 1), [0] * (n + 1)
    kv_bytes = (s.type_k.row_size(256) + s.type_v.row_size(256)) / 512
    for p in placed:
        at = p.device if p.device >= 0 else n
        weights[n if p.experts_on_host else at] += p.count * p.layer.expert_bytes
        weights[at] += p.count * p.layer.other_bytes
        a, state = p.layer.attention, p.layer.state
        if a is not None:
            cells = n_ctx if not a.window else min(n_ctx, -(-(a.window + s.n_ubatch) // 256) * 256)
            cache[at if s.kv_offload else n] += int(p.count * cells * a.n_cached * kv_bytes)
        if state is not None:
            cache[at] += p.count * state.nbytes
    on_host = not n or s.no_gpu or s.n_gpu_layers == 0
    weights[n if on_host else n - 1] += shape.output.nbytes
    weights[n] += shape.table_bytes
    rows = min(s.n_ubatch, s.n_batch, n_ctx)
    widest = max((p.n_out for layer in set(shape.layers) for p in layer.products if not p.is_expert), default=0)
    compute = 4 * rows * (shape.output.n_out + 2 * widest + 4 * shape.n_embd)
    own = max((p.layer.expert_bytes // 3 for p in placed if p.experts_on_host), default=0)
    uses = [
        MemoryUse(card.name, weights[i], cache[i], compute + own, card.memory_bytes) for i, card in enumerate(m.cards)
    ]
    host_compute = 4 * rows * 2 * shape.n_embd
    if m.cards and m.cards[0].is_unified:  # one memory: what the host holds is the card's, too
        return (*uses, MemoryUse("host", weights[n], cache[n], host_compute, m.cards[0].memory_bytes))
    return (*uses, MemoryUse("host", weights[n], cache[n], host_compute, m.host.memory_bytes))
