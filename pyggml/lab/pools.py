"""`Pools`: which experts share a cache; `Capacity`: its size; `RequestKeys`: the events of a request as keys of pools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import GraphError
from ..kernels.lab import stack
from .trace import Phase, Trace

__all__ = ["CONTRACTS", "PHASES", "SCOPES", "Capacity", "Pools", "RequestKeys", "parse_capacities", "request_keys"]

Ints = npt.NDArray[np.int64]

SCOPES = ("layer", "global", "group")
PHASES = ("decode", "prefill", "all")
CONTRACTS = ("event", "bigmoeonedge", "sequential")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)i?B", re.IGNORECASE)
#: llama.cpp aligns each bank of its cache to this, in a CUDA buffer.
_BANK_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Capacity:
    """The size of a cache: a fraction of the experts, slots of each pool, or bytes of all pools.

    Examples
    --------
    >>> Capacity.parse("10%").json(), Capacity.parse("6").json(), Capacity.parse("0.5GiB").json()
    ({'fraction': 0.1}, {'slots': 6}, {'bytes': 536870912})
    """

    fraction: float | None = None
    slots: int | None = None
    n_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Capacity:
        """Parse a capacity: ``10%``, ``6`` (slots of each pool) or ``512MiB``.

        Raises
        ------
        GraphError
            The text is none of these.
        """
        text = text.strip()
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if 0 < share <= 1:
                    return cls(fraction=share)
            elif text.isdecimal() and 0 < int(text) < 1 << 40:
                return cls(slots=int(text))
            elif found := _BYTES.fullmatch(text):
                return cls(n_bytes=int(float(found[1]) * _UNITS[found[2].upper()]))
        except ValueError:
            pass
        raise GraphError(f"'{text}' is no capacity", hint="10% of the experts, 6 slots a pool, or 512MiB in all")

    def json(self) -> dict[str, float | int]:
        """Return the capacity as `--json` prints it."""
        if self.fraction is not None:
            return {"fraction": self.fraction}
        return {"slots": self.slots} if self.slots is not None else {"bytes": self.n_bytes or 0}

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{self.fraction * 100:g}%"
        if self.slots is not None:
            return f"{self.slots} slots"
        return f"{(self.n_bytes or 0) / (1 << 20):g} MiB"


def parse_capacities(text: str) -> list[Capacity]:
    """Parse a list such as ``10%,20%,512MiB``."""
    return [Capacity.parse(part) for part in text.split(",") if part.strip()]


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Experts that share slots.

    A key is the number of an expert within its pool: the layer's index in the pool times ``n_expert``, plus the expert.

    Attributes
    ----------
    scope : str
        ``layer``: a pool per layer; ``global``: one pool; ``group``: a pool per set of layers whose experts have equal
        bytes in every projection, as in llama.cpp.
    layers : list of list of int
        The layers of each pool.
    n_expert : int
    sizes : int64, (n_pool, n_key)
        Bytes of each key; 0 if unknown.
    """

    scope: str
    layers: list[list[int]]
    n_expert: int
    sizes: Ints
    projections: list[Ints]  #: bytes of an expert by projection, of each pool's first layer

    @classmethod
    def of(cls, trace: Trace, scope: str) -> Pools:
        """Return the pools of a trace's layers."""
        if scope == "layer":
            layers = [[layer] for layer in trace.layers]
        elif scope == "global":
            layers = [trace.layers]
        elif scope == "group":
            alike: dict[tuple[int, ...], list[int]] = {}
            for layer in trace.layers:
                key = () if trace.expert_bytes is None else tuple(int(n) for n in trace.expert_bytes[layer])
                alike.setdefault(key, []).append(layer)
            layers = list(alike.values())
        else:
            raise GraphError(f"there is no scope '{scope}'", hint=f"one of {', '.join(SCOPES)}")
        width = max(map(len, layers)) * trace.n_expert
        sizes = np.zeros((len(layers), width), np.int64)
        of_layer = trace.bytes_of_layer
        for p, members in enumerate(layers):
            sizes[p, : len(members) * trace.n_expert] = np.repeat(of_layer[members], trace.n_expert)
        first = [
            np.zeros(1, np.int64) if trace.expert_bytes is None else trace.expert_bytes[members[0]]
            for members in layers
        ]
        return cls(scope, layers, trace.n_expert, sizes, first)

    @property
    def n_pool(self) -> int:
        """Number of pools."""
        return len(self.layers)

    @property
    def n_key(self) -> int:
        """Number of keys of the largest pool."""
        return int(self.sizes.shape[1])

    @property
    def is_sized(self) -> bool:
        """Whether the experts' bytes are known."""
        return bool((self.sizes[:, 0] > 0).all())

    def is_even(self, p: int) -> bool:
        """Whether all experts of a pool have the same size."""
        row = self.sizes[p, : len(self.layers[p]) * self.n_expert]
        return bool((row == row[0]).all())

    def place(self) -> tuple[Ints, Ints]:
        """Return each layer's pool and its index there: int64, (n_layer,) each; -1 for layers without experts."""
        n = 1 + max(layer for members in self.layers for layer in members)
        pool, at = np.full(n, -1, np.int64), np.zeros(n, np.int64)
        for p, members in enumerate(self.layers):
            for i, layer in enumerate(members):
                pool[layer], at[layer] = p, i
        return pool, at

    def slots(self, capacity: Capacity) -> Ints | None:
        """Return the slots of each pool: int64, (n_pool,); None for bytes if experts of a pool differ in size.

        A fraction applies to each pool's experts, rounded. Bytes are divided as in llama.cpp: in proportion to the
        bytes of each pool's experts. In scope ``group`` each bank is aligned and has one spare slot.

        Raises
        ------
        GraphError
            The capacity is in bytes, and the experts' bytes are unknown.
        """
        n_experts = [len(members) * self.n_expert for members in self.layers]
        if capacity.fraction is not None:
            return np.array([min(n, round(capacity.fraction * n)) for n in n_experts], np.int64)
        if capacity.slots is not None:
            return np.array([min(n, capacity.slots) for n in n_experts], np.int64)
        budgets = self.budgets(capacity)
        if not all(self.is_even(p) for p in range(self.n_pool)):
            return None
        slots = []
        for p, n in enumerate(n_experts):
            if self.scope == "group":
                slots.append(min(n, _banked(self.projections[p], int(budgets[p]))))
            else:
                slots.append(min(n, int(budgets[p]) // int(self.sizes[p, 0])))
        return np.array(slots, np.int64)

    def budgets(self, capacity: Capacity) -> Ints:
        """Return the bytes of each pool for a capacity in bytes: int64, (n_pool,)."""
        if not self.is_sized:
            raise GraphError("bytes of experts are not known", hint="state them: --expert-bytes 12.6MiB")
        assert capacity.n_bytes is not None
        weights = self.sizes.sum(axis=1)
        return np.array([capacity.n_bytes * int(w) // int(weights.sum()) for w in weights], np.int64)

    def n_bytes(self, slots: Ints) -> int:
        """Return the bytes of slots, by each pool's mean expert."""
        means = [float(self.sizes[p, : len(m) * self.n_expert].mean()) for p, m in enumerate(self.layers)]
        return round(float(np.dot(slots, means)))


def _banked(projections: Ints, budget: int) -> int:
    """Return the slots that fit into a budget, with a bank per projection and llama.cpp's spare slot."""
    sizes = [int(n) for n in projections]

    def needed(slots: int) -> int:
        return sum(-(-n * (slots + 1) // _BANK_ALIGNMENT) * _BANK_ALIGNMENT for n in sizes)

    low, high = 0, budget // max(1, int(projections.sum())) + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= budget else (low, middle - 1)
    return low


@dataclass(frozen=True, slots=True, eq=False)
class RequestKeys:
    """The events of one request as distinct keys of pools, for a cache that starts empty.

    Attributes
    ----------
    offsets, keys : int64, (n_event + 1,) and int32, (n_touch,)
        Keys of event ``i`` are ``keys[offsets[i]:offsets[i + 1]]``, each once, in the order of their last slot.
    pool, layer, step : int64, (n_event,)
    is_counted : bool, (n_touch,)
        Whether a touch is of the requested phase; others only warm the cache.
    n_token : int
        Tokens of the requested phase.
    """

    request: int
    offsets: Ints
    keys: npt.NDArray[np.int32]
    pool: Ints
    layer: Ints
    step: Ints
    is_counted: npt.NDArray[np.bool_]
    n_token: int

    @property
    def touch_pool(self) -> Ints:
        """The pool of each touch: int64, (n_touch,)."""
        return np.repeat(self.pool, np.diff(self.offsets))

    def most(self) -> Ints:
        """Return the most keys of an event, by pool: int64, for each pool with events."""
        most = np.zeros(int(self.pool.max(initial=0)) + 1, np.int64)
        np.maximum.at(most, self.pool, np.diff(self.offsets))
        return most


def request_keys(
    trace: Trace, pools: Pools, *, phase: str = "decode", contract: str = "event", by_first: bool = False
) -> Iterator[RequestKeys]:
    """Yield the keys of a trace: one object per request, or one in all if requests interleave or the contract keeps the cache.

    Raises
    ------
    GraphError
        The phase or contract is unknown, or the trace has no events of the phase.
    """
    if phase not in PHASES or contract not in CONTRACTS:
        raise GraphError(
            f"there is no phase '{phase}' or contract '{contract}'",
            hint=f"phases: {', '.join(PHASES)}; contracts: {', '.join(CONTRACTS)}",
        )
    wanted = np.ones(trace.n_event, bool) if phase == "all" else trace.phase == Phase[phase.upper()]
    if not wanted.any():
        raise GraphError(
            f"{trace.source or 'the trace'} has no events of phase {phase}", hint="phase all takes every event"
        )
    if contract != "bigmoeonedge":  # that one replays the prompt to warm the cache
        trace, wanted = trace.select(wanted), wanted[wanted]
    together = contract == "bigmoeonedge" or are_interleaved(trace.request)
    group = np.zeros(trace.n_event, np.int64) if together else trace.request
    of_pool, at = pools.place()
    for request in np.unique(group):
        events = group == request
        part, counted = trace.select(events), wanted[events]
        offsets, experts = stack.distinct(part.first_row, part.ids, part.n_expert, by_first)
        n = np.diff(offsets)
        keys = (np.repeat(at[part.layer] * pools.n_expert, n) + experts).astype(np.int32)
        layer, pool, step = part.layer, of_pool[part.layer], part.step
        is_counted = np.repeat(counted, n)
        if contract == "sequential":
            offsets = np.arange(len(keys) + 1, dtype=np.int64)
            layer, pool, step = np.repeat(layer, n), np.repeat(pool, n), np.repeat(step, n)
        first = part.layer == trace.layers[0]
        n_token = int(np.diff(part.first_row)[first & counted].sum())
        yield RequestKeys(int(request), offsets, keys, pool, layer, step, is_counted, n_token)


def are_interleaved(request: Ints) -> bool:
    """Return whether events of requests interleave, so that the requests share a cache."""
    changes = int((np.diff(request) != 0).sum())
    return changes + 1 > len(np.unique(request))
