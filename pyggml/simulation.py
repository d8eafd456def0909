"""Computing a plan without data: what a decode would copy, and how long it would take on a simulated machine.

It uses the scheduler's own `compute_splits`; only the experts that tokens choose come from a `Routing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .buffer import tensor_memset
from .clock import Reading
from .errors import SchedError
from .graph import Graph
from .hardware.cards import Card
from .hardware.formulas import overlapped
from .hardware.ranges import Speed, spread_of
from .models.batch import Outputs
from .moe_cache import MAX_CACHED_TOKENS, prefetch_of
from .opset import expert_sources
from .record import CopyReason
from .routing import Routing, routing_of
from .sched.experts import layer_of
from .sched.ids import IdsSource
from .tensor import Tensor
from .types import TensorFlag

if TYPE_CHECKING:
    from .clock import VirtualClock
    from .models.batch import MicroBatch
    from .planning import Planner
    from .sched.compute import SplitRun

__all__ = ["RoutedIds", "SimulatedBatch", "can_simulate", "simulate_batch", "simulate_generation", "simulate_prompt"]

#: A generation of more tokens is sampled, at about so many of them.
_MOST_TOKENS, _N_TOKENS = 64, 32
#: A prompt of more micro-batches is sampled, at so many of each size.
_MOST_MICRO_BATCHES, _N_MICRO_BATCHES = 8, 5
#: The factor within which the misses of recorded texts are those of the assumed routing (`docs/accuracy.md`).
_MISSES = 2.0


@dataclass(slots=True)
class SimulatedBatch:
    """The result of a simulated decode.

    Attributes
    ----------
    n_micro_batches : int
        How many were carried out; of a sample, all numbers are those of the whole.
    seconds : float or None
        Virtual time; None without a clock.
    compute_s : dict
        The part of ``seconds`` in which each backend computed.
    copy_to_s, copy_from_s : dict
        The part of ``seconds`` in which the link of each device was busy, by direction.
    link_bytes : dict
        Bytes that passed each link, such as ``"CPU to SIM0"``; without a clock none.
    bytes_copied, bytes_full : int
        Copied between backends, and bytes if every input had been copied whole.
    bytes_by_reason : dict
        ``bytes_copied`` by reason.
    range_factor : float
        How far the speed may be off, up or down, in four cases of five.
    overlap : float
        The fraction of ``seconds`` that remains where several devices compute different micro-batches at once, as fitted;
        virtual time has them one after the other.
    """

    n_tokens: int
    n_micro_batches: int = 0
    seconds: float | None = None
    bytes_copied: int = 0
    bytes_full: int = 0
    bytes_by_reason: dict[CopyReason, int] = field(default_factory=dict)
    compute_s: dict[str, float] = field(default_factory=dict)
    copy_to_s: dict[str, float] = field(default_factory=dict)
    copy_from_s: dict[str, float] = field(default_factory=dict)
    link_bytes: dict[str, int] = field(default_factory=dict)

    range_factor: float = 1.0
    overlap: float = 1.0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of virtual time, less the overlap."""
        return self.n_tokens / (self.seconds * self.overlap) if self.seconds else None

    @property
    def speed(self) -> Speed | None:
        """Tokens a second, and between what the truth is in four cases of five."""
        mid = self.tokens_per_s
        return None if mid is None else Speed.around(mid, self.range_factor)


class RoutedIds(IdsSource):
    """The experts that a batch uses by a stated routing, if there are no ids to read.

    Reading takes the same virtual time as with data, and the copy policy is called as in a run.

    Parameters
    ----------
    routing : Routing
        Which experts tokens choose.
    n_lead : int
        The number of layers before the first with experts; a routing does not count them.

    Attributes
    ----------
    tokens, outputs : sequence of int
        Positions of the tokens of the next micro-batch, and of those whose logits are computed: the last
        layer computes only these.
    """

    def __init__(self, routing: Routing, *, n_lead: int = 0) -> None:
        super().__init__()
        self.routing = routing
        self._n_lead = n_lead
        self.tokens: Sequence[int] = ()
        self.outputs: Sequence[int] = ()
        self._latest: tuple[Tensor, int | None, set[int]] | None = None

    def begin(self) -> None:
        """Start a compute: discard the ids that were read."""
        super().begin()
        self._latest = None

    def forget(self, roots: set[Tensor]) -> None:
        """Do nothing: without data no ids are rewritten."""

    def used(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor) -> set[int]:
        """Return the experts of the routing; reading ids takes the same virtual time as with data."""
        n_expert = weight.ne[2] if run.machine.dialect.ids_by_n_expert else None
        if self._latest is None or self._latest[:2] != (ids, n_expert):
            run.read(i_split, ids, backend_id, None)
            self._latest = (ids, n_expert, self.choose(ids, weight))
        return self._latest[2]

    def rows(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor, n_used: int) -> list[int]:
        """Return the ids that the routing names, token by token; reading them takes the time that it takes with data."""
        run.read(i_split, ids, backend_id, None)
        n_token = math.prod(ids.ne) // n_used
        tokens = self.tokens if n_token == len(self.tokens) else self.outputs
        layer = layer_of(weight.name)
        chosen = self.routing.rows(0 if layer is None else layer - self._n_lead, tokens, weight.ne[2], n_used)
        return [expert for row in chosen for expert in row]

    def count(self, node: Tensor) -> float:
        """Return how many experts a node reads, also if its weight is not copied."""
        weight, ids = expert_sources(node)
        known = self._known(ids)
        if known is None:
            known = self._counts[ids] = len(self.choose(ids, weight))
        return known

    def ids_of(self, layer: int, n_expert: int, n_used: int) -> list[int]:
        """Return the ids that the next tokens choose in a layer."""
        chosen = self.routing.rows(layer - self._n_lead, self.tokens, n_expert, n_used)
        return [expert for row in chosen for expert in row]

    def choose(self, ids: Tensor, weight: Tensor) -> set[int]:
        """Return the experts of a weight that its layer's tokens choose."""
        layer = layer_of(weight.name)
        tokens = self.tokens if ids.ne[1] == len(self.tokens) else self.outputs
        return self.routing.experts(0 if layer is None else layer - self._n_lead, tokens, weight.ne[2], ids.ne[0])


def can_simulate(planner: Planner) -> bool:
    """Return whether neither the planner nor any of its devices has data."""
    return not planner.data and not any(b.device.has_data for b in planner.backends)


def simulate_batch(
    planner: Planner,
    n_tokens: int,
    *,
    outputs: Outputs = "last",
    depth: int = 0,
    routing: Routing | None = None,
    is_generated: bool = False,
    weights: Mapping[int, float] | None = None,
) -> SimulatedBatch:
    """Simulate a decode of ``n_tokens`` tokens; an expert cache is emptied first.

    Parameters
    ----------
    planner : Planner
        A planner without data.
    outputs : str
        The tokens whose logits are computed: ``"last"`` or ``"all"``.
    depth : int
        Tokens of the sequence that are in the cache before.
    routing : Routing, optional
        Which experts the tokens choose, where the scheduler would read ids; `routing_of` the model, if not given.
    is_generated : bool
        One token per step, with logits for each.
    weights : mapping of int to float, optional
        Carry out only these micro-batches, by index, each for so many alike. The others take their turn in the expert
        cache without a copy, and take no time.

    Raises
    ------
    SchedError
        The planner, or one of its devices, has data.
    CacheFullError
        The tokens do not fit in the context.
    OutOfMemoryError
        A device has too little memory for the compute buffers.
    """
    if not can_simulate(planner):
        raise SchedError(
            f"{planner!r} has data and cannot be simulated without",
            hint="open it with data=False and name all devices, including the CPU",
        )
    sched = planner.sched
    clock = sched.clock
    result = SimulatedBatch(n_tokens)
    kept = sched.ids_source
    sched.ids_source = routed = RoutedIds(
        routing or routing_of(planner.file.tensors), n_lead=planner.hparams.n_layer_dense_lead
    )
    planner.reserve()
    if planner.expert_cache is not None:
        planner.expert_cache.clear(counters=True)
    if (prefetch := prefetch_of(sched.policy)) is not None:
        prefetch.clear()
    totals = _Totals(planner)
    n_before, allocated, n_all = depth, None, 0
    parts = planner.micro_batches(n_tokens, outputs=outputs, depth=depth, is_generated=is_generated)
    try:
        for i, (part, build) in enumerate(parts):
            n_all += 1
            routed.tokens = range(n_before, n_before + part.n_tokens)
            routed.outputs = [n_before + i for i in _outputs(part)]
            if weights is not None and i not in weights:
                if planner.expert_cache is not None and part.n_tokens <= MAX_CACHED_TOKENS:
                    planner.expert_cache.advance(routed.ids_of)
                n_before += part.n_tokens
                continue
            graph = build()
            sched.announce(part.n_tokens, n_before, part.n_outputs)
            if graph is not allocated:
                sched.alloc_graph(graph.graph)
                allocated = graph
            _set_inputs(graph.graph)
            sched.compute_async(graph.graph)
            if part.n_outputs:
                _read_logits(planner, graph.logits)
            sched.synchronize()
            if weights is not None:
                totals.add(weights[i])
            n_before += part.n_tokens
            result.n_micro_batches += 1
    finally:
        sched.ids_source = kept
        sched.reset()
    if weights is None:
        totals.add(1.0)
    result.bytes_copied, result.bytes_full = round(totals.bytes_copied), round(totals.bytes_full)
    result.bytes_by_reason = {k: round(n) for k, n in totals.bytes_by_reason.items()}
    if clock is not None:
        names = [b.name for b in planner.backends]
        took = totals.took
        result.seconds = took.host_s
        if sched.n_copies > 1 and not is_generated:
            at_work = {*planner.placement.layers, planner.placement.output}
            result.overlap = overlapped(n_all, len(at_work), clock.profiles[-1].rates)
        result.compute_s = dict(zip(names, took.busy_s, strict=True))
        result.link_bytes = {f"{names[src]} to {names[dst]}": round(n) for (src, dst), n in totals.link_bytes.items()}
        result.copy_to_s = dict(zip(names[:-1], took.to_device_busy_s, strict=False))
        result.copy_from_s = dict(zip(names[:-1], took.from_device_busy_s, strict=False))
        result.range_factor = _range_factor(planner, clock, result, is_generated=is_generated)
    return result


def simulate_generation(
    planner: Planner, n_tokens: int, *, depth: int = 0, routing: Routing | None = None
) -> SimulatedBatch:
    """Simulate a generation, token by token, from an empty expert cache on; see `simulate_batch`.

    Notes
    -----
    Of more than 64 tokens about 32 are carried out, evenly spaced; the expert cache sees all. With a prefetch all are.
    """
    weights = None
    if n_tokens > _MOST_TOKENS and prefetch_of(planner.sched.policy) is None:
        every = -(-n_tokens // _N_TOKENS)
        chosen = range(every // 2, n_tokens, every)
        weights = dict.fromkeys(chosen, n_tokens / len(chosen))
    return simulate_batch(planner, n_tokens, depth=depth, routing=routing, is_generated=True, weights=weights)


def simulate_prompt(
    planner: Planner, n_tokens: int, *, outputs: Outputs = "last", depth: int = 0, routing: Routing | None = None
) -> SimulatedBatch:
    """Simulate a decode as `simulate_batch` does; of more than 8 micro-batches a sample.

    Notes
    -----
    Of each size of a micro-batch the first, the last and three between are carried out, and times and bytes between two of
    them are those on a line: attention grows with the tokens before, and all else is alike but for the experts that tokens
    choose. A recorder sees all micro-batches.
    """
    n_batch, n_ubatch = planner.params.n_batch, planner.params.n_ubatch
    batches = [min(n_batch, n_tokens - at) for at in range(0, n_tokens, n_batch)]
    sizes = [min(n_ubatch, n - at) for n in batches for at in range(0, n, n_ubatch)]
    weights = None
    if len(sizes) > _MOST_MICRO_BATCHES and planner.options.recorder is None:
        weights = sample_weights(sizes, _N_MICRO_BATCHES)
    return simulate_batch(planner, n_tokens, outputs=outputs, depth=depth, routing=routing, weights=weights)


def sample_weights(sizes: Sequence[int], n_samples: int) -> dict[int, float]:
    """Return which of some things are sampled, and the weight of each in a sum over all that is linear between samples.

    Things of different sizes are sampled separately.

    Examples
    --------
    >>> sample_weights([512] * 9 + [100], 3)
    {0: 2.5, 4: 4.0, 8: 2.5, 9: 1.0}
    """
    weights: dict[int, float] = {}
    for size in dict.fromkeys(sizes):
        alike = [i for i, s in enumerate(sizes) if s == size]
        last, n = len(alike) - 1, min(n_samples, len(alike))
        at = [round(j * last / max(n - 1, 1)) for j in range(n)]
        own = dict.fromkeys(at, 0.0)
        for k in range(len(alike)):
            low = max(a for a in at if a <= k)
            high = min((a for a in at if a >= k), default=low)
            share = 0.0 if high == low else (k - low) / (high - low)
            own[low] += 1.0 - share
            own[high] += share
        weights |= {alike[a]: w for a, w in own.items()}
    return dict(sorted(weights.items()))


class _Totals:
    """Sums of what a planner's scheduler and clock count, with weights, from one `add` to the next."""

    def __init__(self, planner: Planner) -> None:
        self._stats, self._clock = planner.sched.stats, planner.sched.clock
        self.bytes_copied = self.bytes_full = 0.0
        self.bytes_by_reason: dict[CopyReason, float] = {}
        self.link_bytes: dict[tuple[int, int], float] = {}
        self.took = Reading.zero(len(planner.backends))
        self._mark()

    def _mark(self) -> None:
        stats, clock = self._stats, self._clock
        self._from = stats.bytes_copied, stats.bytes_full, dict(stats.bytes_by_reason)
        self._read = None if clock is None else clock.reading()
        self._links = {} if clock is None else dict(clock.link_bytes)

    def add(self, weight: float) -> None:
        """Add what was counted since the last time."""
        stats, (copied, full, reasons) = self._stats, self._from
        self.bytes_copied += weight * (stats.bytes_copied - copied)
        self.bytes_full += weight * (stats.bytes_full - full)
        for reason, n in stats.bytes_by_reason.items():
            self.bytes_by_reason[reason] = self.bytes_by_reason.get(reason, 0.0) + weight * (n - reasons[reason])
        if self._clock is not None and self._read is not None:
            self.took = self.took.plus(self._clock.reading(), self._read, weight)
            for link, n in self._clock.link_bytes.items():
                self.link_bytes[link] = self.link_bytes.get(link, 0.0) + weight * (n - self._links.get(link, 0))
        self._mark()


def _range_factor(planner: Planner, clock: VirtualClock, made: SimulatedBatch, *, is_generated: bool) -> float:
    """Return the factor of the range of a speed; with an expert cache the misses may be off as well."""
    cards = [p.sheet for p in clock.profiles if isinstance(p.sheet, Card)]
    has_host_weights = any(w.buft.is_host and w.info.name.startswith("blk.") for w in planner.placement.weights)
    is_prompt = made.n_tokens > 1 and not is_generated
    factor = spread_of(cards, is_prompt=is_prompt, has_host_weights=has_host_weights)
    if planner.expert_cache is None or is_prompt or not made.seconds:
        return factor
    uploads = min(sum(made.copy_to_s.values()) / made.seconds, 1.0)
    return math.exp(math.hypot(math.log(factor), uploads * math.log(_MISSES)))


def _set_inputs(graph: Graph) -> None:
    """Write the inputs of a graph, as a session does before each compute. There are no bytes."""
    for leaf in graph.leafs:
        if leaf.flags & TensorFlag.INPUT and leaf.storage is not None:
            tensor_memset(leaf, 0, 0, leaf.nbytes)


def _outputs(part: MicroBatch) -> list[int]:
    return [int(i) for i in part.outputs.nonzero()[0]]


def _read_logits(planner: Planner, logits: Tensor) -> None:
    """Advance the clock as a session that reads the logits."""
    sched = planner.sched
    backend = sched.tensor_backend(logits)
    assert backend is not None
    log = sched.new_log()
    log.was_read(None, logits, planner.backends.index(backend), log.now())
