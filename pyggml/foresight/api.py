"""`estimate`: the speeds of a model on a machine with some flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..catalog import find_model
from ..cost import link_of
from ..errors import DeviceUnavailableError, FormatError
from ..gguf import GGUFFile
from ..hardware.cards import Card, find_card
from ..hardware.hosts import Host, assumed_host, parse_host
from ..hardware.ranges import Speed, spread_of
from .estimate import Machine, Placed, Setting, place, predict
from .shape import ModelShape

__all__ = ["Estimate", "Speed", "estimate", "machine_of", "model_shape", "range_of", "speed_of"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Speeds of one setting, in tokens/s. For memory, see `Planner.memory`."""

    prompt: Speed
    generation: Speed


@lru_cache(maxsize=64)
def model_shape(model: str) -> ModelShape:
    """Return the shape of a model file, or of a known model ``NAME[:QUANT]``.

    Raises
    ------
    FormatError
        There is neither a file nor a known model of that name.
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
    """Return a machine with cards and a host, by name.

    Parameters
    ----------
    devices : str or sequence of str
        ``"rtx3090"``, ``"rtx3090,rtx3090"``; a prefix ``sim:`` and a suffix such as ``-pcie4`` are ignored.
    host : str or Host
        See `parse_host`; empty: see `assumed_host`.
    pcie : str
        Link of the cards, such as ``"4.0 x8"``; by default the cards' own.

    Raises
    ------
    DeviceUnavailableError
        A card or a part of the host is unknown.
    """
    names = [part.strip() for part in devices.split(",")] if isinstance(devices, str) else list(devices)
    cards: list[Card] = []
    for name in filter(None, names):
        card = find_card(name.removeprefix("sim:").split("-pcie")[0])
        if card is None:
            raise DeviceUnavailableError(name, "no card of this name is known", hint="`pyggml devices` lists them")
        cards.append(card)
    found = host if isinstance(host, Host) else parse_host(host) if host else assumed_host(cards)
    return Machine(cards, [link_of(card, pcie) for card in cards], found)


def estimate(
    model: str | ModelShape,
    machine: Machine,
    setting: Setting | None = None,
    *,
    n_prompt: int = 512,
    n_generate: int = 128,
    depth: int = 0,
) -> Estimate:
    """Predict the speeds of a model on a machine with some flags.

    Parameters
    ----------
    model : str or ModelShape
        A file, ``NAME[:QUANT]``, or the result of `model_shape`.
    machine : Machine
        The result of `machine_of`.
    setting : Setting, optional
        Flags; by default llama.cpp's defaults.
    n_prompt, n_generate : int
        Tokens of the prompt and of the answer.
    depth : int
        Tokens in the KV cache before the prompt.

    Examples
    --------
    >>> answer = estimate("qwen3-30b-a3b:Q4_K_M", machine_of("rtx3090", "ddr4-3200x2,cores=8,64GiB"))
    >>> answer.generation.low < answer.generation.mid < answer.generation.high
    True
    """
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    s = setting or Setting()
    return Estimate(
        speed_of(shape, machine, s, max(n_prompt, 1), depth, is_prompt=True),
        speed_of(shape, machine, s, max(n_generate, 1), depth + n_prompt, is_prompt=False),
    )


def speed_of(
    shape: ModelShape, machine: Machine, setting: Setting, n_tokens: int, depth: int, *, is_prompt: bool
) -> Speed:
    """Predict the speed of a prompt or of generation, with its range."""
    where = place(shape, setting, [c.memory_bytes for c in machine.cards])
    mid = 1.0 / predict(shape, machine, setting, n_tokens, depth, is_prompt=is_prompt, placed=where)
    return Speed.around(mid, range_of(machine, setting, where, is_prompt=is_prompt))


def range_of(machine: Machine, setting: Setting, placed: list[Placed], *, is_prompt: bool) -> float:
    """Return the factor by which a prediction is multiplied and divided to give its range."""
    has_host_weights = any(p.has_host_weights for p in placed)
    return spread_of(machine.cards, is_prompt=is_prompt, has_host_weights=has_host_weights, backend=setting.backend)
