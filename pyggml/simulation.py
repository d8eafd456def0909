"""A plan carried out without data: what a decode would copy, and how long it would take on a simulated machine.

Everything passes the scheduler's own `compute_splits`; only what experts the tokens choose comes from a `Routing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .clock import Reading
from .errors import SchedError
from .hardware.cards import Card
from .hardware.ranges import Speed, spread_of
from .models.batch import Outputs
from .record import CopyReason, MicroBatchRecord
from .routing import Routing, routing_of
from .sched.experts import layer_of
from .sched.ids import IdsSource
from .tensor import Tensor

if TYPE_CHECKING:
    from .clock import VirtualClock
    from .models.batch import MicroBatch
    from .planning import Planner
    from .sched.compute import SplitRun

__all__ = ["RoutedIds", "SimulatedBatch", "can_simulate", "simulate_batch"]


@dataclass(slots=True)
class SimulatedBatch:
    """What a decode of so many tokens from an empty cache came to, without data.

    Attributes
    ----------
    seconds : float or None
        Virtual; None without a clock.
    compute_s : dict
        How long each backend computed, of ``seconds``.
    copy_to_s, copy_from_s : dict
        How long the link of each device carried something, each way.
    bytes_copied, bytes_full : int
        Between backends; and what whole copies would have moved.
    bytes_by_reason : dict
        Of ``bytes_copied``.
    range_factor : float
        How far the speed may be off, up or down, in four cases of five.
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

    range_factor: float = 1.0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a virtual second."""
        return self.n_tokens / self.seconds if self.seconds else None

    @property
    def speed(self) -> Speed | None:
        """Tokens a second, and between what the truth is in four cases of five."""
        return Speed.around(self.n_tokens / self.seconds, self.range_factor) if self.seconds else None


class RoutedIds(IdsSource):
    """Tells which experts a batch uses by a stated routing, where there are no ids to be read.

    Reading takes the virtual time that it takes with data; the user's policy is asked as in a run.

    Parameters
    ----------
    routing : Routing
        Who tells.
    n_lead : int
        Layers before the first with experts, which a routing does not count.

    Attributes
    ----------
    tokens, outputs : sequence of int
        Positions of the tokens of the micro-batch that comes next, and of those whose logits are wanted: the last
        layer computes no others.
    """

    def __init__(self, routing: Routing, *, n_lead: int = 0) -> None:
        super().__init__()
        self.routing = routing
        self._n_lead = n_lead
        self.tokens: Sequence[int] = ()
        self.outputs: Sequence[int] = ()
        self._latest: tuple[Tensor, int | None, set[int]] | None = None

    def begin(self) -> None:
        """Forget the ids that were asked for: a computing starts."""
        super().begin()
        self._latest = None

    def forget(self, roots: set[Tensor]) -> None:
        """Keep what was chosen: no ids are rewritten where there is no data."""

    def used(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor) -> set[int]:
        """Return the experts that the routing names; reading ids takes the time that it takes with data."""
        n_expert = weight.ne[2] if run.machine.dialect.ids_by_n_expert else None
        if self._latest is None or self._latest[:2] != (ids, n_expert):
            run.read(i_split, ids, backend_id, None)
            self._latest = (ids, n_expert, self.choose(ids, weight))
        return self._latest[2]

    def count(self, node: Tensor) -> float:
        """Return how many experts a MUL_MAT_ID reads, also of weights that are not copied."""
        weight, ids = node.src[0], node.src[2]
        assert ids is not None
        assert weight is not None
        known = self._counts.get(ids)
        if known is None:
            known = self._counts[ids] = len(self.choose(ids, weight))
        return known

    def choose(self, ids: Tensor, weight: Tensor) -> set[int]:
        """Return the experts of a weight that ids of its layer name."""
        layer = layer_of(weight.name)
        tokens = self.tokens if ids.ne[1] == len(self.tokens) else self.outputs
        return self.routing.experts(0 if layer is None else layer - self._n_lead, tokens, weight.ne[2], ids.ne[0])


def can_simulate(planner: Planner) -> bool:
    """Whether neither the planner nor any of its devices has data."""
    return not planner.data and not any(b.device.has_data for b in planner.backends)


def simulate_batch(
    planner: Planner, n_tokens: int, *, outputs: Outputs = "last", routing: Routing | None = None
) -> SimulatedBatch:
    """Return what a decode of so many tokens would do, from an empty cache.

    Parameters
    ----------
    planner : Planner
        Opened without data.
    outputs : str
        Whose logits are wanted: ``"last"`` or ``"all"``.
    routing : Routing, optional
        Which experts the tokens choose, where the scheduler would read ids; `routing_of` the model, if not given.

    Raises
    ------
    SchedError
        The planner, or one of its devices, has data.
    CacheFullError
        So many tokens do not fit into the context.
    OutOfMemoryError
        A device has not enough memory for the compute buffers alone.
    """
    if not can_simulate(planner):
        raise SchedError(
            f"{planner!r} has data, so it cannot be carried out without",
            hint="open it with data=False, and devices by name: the CPU too",
        )
    sched = planner.sched
    clock = sched.clock
    result = SimulatedBatch(n_tokens)
    kept = sched.ids_source
    sched.ids_source = routed = RoutedIds(
        routing or routing_of(planner.file.tensors), n_lead=planner.hparams.n_layer_dense_lead
    )
    planner.reserve()
    began = None if clock is None else clock.reading()
    before = (sched.stats.bytes_copied, sched.stats.bytes_full, dict(sched.stats.bytes_by_reason))
    n_before, allocated = 0, None
    try:
        for part, graph in planner.micro_batches(n_tokens, outputs=outputs):
            routed.tokens = range(n_before, n_before + part.n_tokens)
            routed.outputs = [n_before + i for i in _outputs(part)]
            sched.record(MicroBatchRecord(part.n_tokens, n_before, part.n_outputs))
            if graph is not allocated:
                sched.alloc_graph(graph.graph)
                allocated = graph
            sched.compute_async(graph.graph)
            if part.n_outputs:
                _read_logits(planner, graph.logits)
            sched.synchronize()
            n_before += part.n_tokens
            result.n_micro_batches += 1
    finally:
        sched.ids_source = kept
        sched.reset()
    stats = sched.stats
    result.bytes_copied, result.bytes_full = stats.bytes_copied - before[0], stats.bytes_full - before[1]
    result.bytes_by_reason = {k: n - before[2][k] for k, n in stats.bytes_by_reason.items()}
    if clock is not None and began is not None:
        names = [b.name for b in planner.backends]
        took = Reading.zero(len(planner.backends)).plus(clock.reading(), began)
        result.seconds = took.host_s
        result.range_factor = _range_factor(planner, clock, n_tokens)
        result.compute_s = dict(zip(names, took.busy_s, strict=True))
        result.copy_to_s = dict(zip(names[:-1], took.to_device_busy_s, strict=False))
        result.copy_from_s = dict(zip(names[:-1], took.from_device_busy_s, strict=False))
    return result


def _range_factor(planner: Planner, clock: VirtualClock, n_tokens: int) -> float:
    """Return how far the speed of so many tokens may be off."""
    cards = [p.sheet for p in clock.profiles if isinstance(p.sheet, Card)]
    has_host_weights = any(w.buft.is_host and w.info.name.startswith("blk.") for w in planner.placement.weights)
    return spread_of(cards, is_prompt=n_tokens > 1, has_host_weights=has_host_weights)


def _outputs(part: MicroBatch) -> list[int]:
    return [int(i) for i in part.outputs.nonzero()[0]]


def _read_logits(planner: Planner, logits: Tensor) -> None:
    """Let time pass as a session that reads the logits."""
    sched = planner.sched
    backend = sched.tensor_backend(logits)
    assert backend is not None
    log = sched.new_log()
    log.was_read(None, logits, planner.backends.index(backend), log.now())
