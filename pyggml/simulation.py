"""A plan carried out without data: what a decode would copy, and how long it would take on a simulated machine.

Everything passes the scheduler's own `compute_splits`; only what experts the tokens choose comes from a `Routing`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .clock import Reading
from .dialect import Repairs
from .errors import SchedError
from .models.batch import Outputs
from .record import CopyReason, MicroBatchRecord
from .routing import DEFAULT_ROUTING, Routing
from .sched.policies import UpstreamCopier, UsedExpertCopier
from .tensor import Tensor
from .types import Op

if TYPE_CHECKING:
    from .models.batch import MicroBatch
    from .planning import Planner
    from .sched.compute import SplitRun

__all__ = ["RoutedCopier", "SimulatedBatch", "can_simulate", "simulate_batch"]


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

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a virtual second."""
        return self.n_tokens / self.seconds if self.seconds else None


class RoutedCopier(UsedExpertCopier):
    """Copies used experts as the default does, but is told which they are.

    Attributes
    ----------
    routing : Routing
        Who tells.
    tokens, outputs : sequence of int
        Positions of the tokens of the micro-batch that comes next, and of those whose logits are wanted: the last
        layer computes no others.
    """

    def __init__(self, routing: Routing, *, like: UpstreamCopier, n_lead: int = 0) -> None:
        super().__init__(like.repairs if isinstance(like, UsedExpertCopier) else Repairs.strict())
        self.routing = routing
        self._n_lead = n_lead  # layers before the first with experts, which a routing does not count
        self.tokens: Sequence[int] = ()
        self.outputs: Sequence[int] = ()
        self._read: tuple[Tensor, int | None, set[int]] | None = None

    def begin(self) -> None:
        """Forget the ids that were asked for."""
        super().begin()
        self._read = None

    def _used(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor) -> set[int]:
        """Return the experts that the routing names; reading ids takes the time that it takes with data."""
        n_expert = weight.ne[2] if run.machine.dialect.ids_by_n_expert else None
        if self._read is None or self._read[:2] != (ids, n_expert):
            start_s = run.log.now()
            run.machine.backends[backend_id].synchronize()
            run.log.was_read(i_split, ids, backend_id, start_s)
            self._read = (ids, n_expert, self.choose(ids, weight))
        return self._read[2]

    def before_compute(self, run: SplitRun, i_split: int) -> None:
        """Tell the log how many experts are read of weights that are not copied."""
        super().before_compute(run, i_split)
        for node in run.splits[i_split].graph.nodes:
            if node.op is Op.MUL_MAT_ID:
                weight, ids = node.src[0], node.src[2]
                if weight is not None and ids is not None and ids not in run.log.used:
                    run.log.used[ids] = len(self.choose(ids, weight))

    def choose(self, ids: Tensor, weight: Tensor) -> set[int]:
        """Return the experts of a weight that ids of its layer name."""
        found = re.search(r"blk\.(\d+)\.", weight.name)
        tokens = self.tokens if ids.ne[1] == len(self.tokens) else self.outputs
        return self.routing.experts(int(found[1]) - self._n_lead if found else 0, tokens, weight.ne[2], ids.ne[0])


def can_simulate(planner: Planner) -> bool:
    """Whether neither the planner nor any of its devices has data."""
    return not planner.data and not any(b.device.has_data for b in planner.backends)


def simulate_batch(
    planner: Planner, n_tokens: int, *, outputs: Outputs = "last", routing: Routing = DEFAULT_ROUTING
) -> SimulatedBatch:
    """Return what a decode of so many tokens would do, from an empty cache.

    Parameters
    ----------
    planner : Planner
        Opened without data.
    outputs : str
        Whose logits are wanted: ``"last"`` or ``"all"``.
    routing : Routing
        Which experts the tokens choose, where the scheduler would read ids.

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
    kept = sched.copier
    n_lead = planner.hparams.n_layer_dense_lead
    routed = RoutedCopier(routing, like=kept, n_lead=n_lead) if isinstance(kept, UpstreamCopier) else None
    if routed is not None:
        sched.copier = routed
    planner.reserve()
    began = None if clock is None else clock.reading()
    before = (sched.stats.bytes_copied, sched.stats.bytes_full, dict(sched.stats.bytes_by_reason))
    n_before, allocated = 0, None
    try:
        for part, graph in planner.micro_batches(n_tokens, outputs=outputs):
            if routed is not None:
                routed.tokens = range(n_before, n_before + part.n_tokens)
                routed.outputs = [n_before + i for i in _outputs(part)]
            if sched.recorder is not None:
                sched.recorder.record(MicroBatchRecord(part.n_tokens, n_before, part.n_outputs))
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
        sched.copier = kept
        sched.reset()
    stats = sched.stats
    result.bytes_copied, result.bytes_full = stats.bytes_copied - before[0], stats.bytes_full - before[1]
    result.bytes_by_reason = {k: n - before[2][k] for k, n in stats.bytes_by_reason.items()}
    if clock is not None and began is not None:
        names = [b.name for b in planner.backends]
        took = Reading.zero(len(planner.backends)).plus(clock.reading(), began)
        result.seconds = took.host_s
        result.compute_s = dict(zip(names, took.busy_s, strict=True))
        result.copy_to_s = dict(zip(names[:-1], took.to_device_busy_s, strict=False))
        result.copy_from_s = dict(zip(names[:-1], took.from_device_busy_s, strict=False))
    return result


def _outputs(part: MicroBatch) -> list[int]:
    return [int(i) for i in part.outputs.nonzero()[0]]


def _read_logits(planner: Planner, logits: Tensor) -> None:
    """Let time pass as a session that reads the logits."""
    sched = planner.sched
    backend = sched.tensor_backend(logits)
    assert backend is not None
    log = sched.new_log()
    log.was_read(None, logits, planner.backends.index(backend), log.now())
