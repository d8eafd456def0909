"""`Tape`: what a compute did on devices that only count; its times are calculated afterwards, also for later graphs.

Without data and observers a compute has no effect but counts and virtual times. `compute_splits` then writes a tape, which is
played to statistics and clock. A later graph of the same structure makes the same calls in the same order, with other bytes
and seconds: the tape is played for it, and `compute_splits` does not run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import chain, compress, count
from operator import ne
from typing import TYPE_CHECKING, Any

from ..buffer import Buffer
from ..clock import VirtualClock
from ..graph import GraphView
from ..record import CopyReason
from ..tensor import Tensor
from .compute import SplitRun, compute_splits
from .log import RunLog
from .policies import FullCopier, UsedExpertCopier

if TYPE_CHECKING:
    from .plan import Plan
    from .precedent import Precedent
    from .transfer import Transfer

__all__ = ["Tape", "compute_with_tape"]

#: `copy` of policies that copy everything whole that is not of kind "experts".
_WHOLE = FullCopier.copy, UsedExpertCopier.copy
_WAIT, _COPY, _LAUNCH = range(3)


def compute_with_tape(run: SplitRun, precedent: Precedent | None) -> None:
    """Compute all splits of an allocated graph as `compute_splits` does, with a tape where one can stand for it.

    Parameters
    ----------
    precedent : Precedent or None
        That of the graph.
    """
    plan, log, policy = run.plan, run.log, type(run.policy)
    if (
        log.clock is None
        or log.observers is not None
        or run.eval_callback is not None
        or type(run) is not SplitRun
        or plan.n_copies > 1
        or policy.copy not in _WHOLE
        or policy.overrides("before_split")
        or policy.overrides("after_split")
        or not all(b.device.only_counts for b in run.machine.backends)
    ):
        compute_splits(run)
        return
    inputs = _Inputs(plan)
    tapes = plan.tapes if precedent is None else precedent.tapes
    tape = tapes.get(run.repairs)
    if tape is not None and inputs.are_plain:
        run.ids.begin()
        tape.play(plan, log, inputs, precedent)
    elif plan.expert_transfers() or not inputs.are_plain:
        compute_splits(run)
    else:
        tape = Tape()
        try:
            compute_splits(_TapedRun(run, tape, inputs))
        finally:
            tape.play(plan, log, inputs, precedent, is_new=True)
        tapes[run.repairs] = tape


class _Inputs:
    """The inputs of a plan's splits in a fixed order, with their input copies, memory and bytes."""

    __slots__ = ("copies", "sizes", "sources", "storages")

    def __init__(self, plan: Plan) -> None:
        self.sources = sources = [source for source, by_backend in plan.copies.items() for _ in by_backend]
        self.copies = [made[0] for by_backend in plan.copies.values() for made in by_backend.values()]
        self.storages = [(s if s.view_src is None else s.view_src).buffer for s in sources]
        self.sizes = [s.nbytes for s in sources]

    @property
    def are_plain(self) -> bool:
        """Whether no copy can be refused: sources have memory in which nothing else was computed, and whole blocks."""
        return not any(
            s is None or s.is_closed or (s.tenancy is not None and s.tenancy.is_over) for s in set(self.storages)
        ) and not any(s.view_src is not None and s.type.block_size > 1 for s in self.sources)

    def count_traffic(self, copied: Iterable[int]) -> None:
        """Count copies in the buffers."""
        by_way: dict[tuple[Buffer | None, Buffer | None], list[int]] = {}
        for i in copied:
            if size := self.sizes[i]:
                by_way.setdefault((self.storages[i], self.copies[i].buffer), []).append(size)
        for (origin, target), sizes in by_way.items():
            assert origin is not None
            assert target is not None
            origin.count_out(sum(sizes), len(sizes))
            target.count_in(sum(sizes), len(sizes))


class _TapedRun(SplitRun):
    """A compute that writes a tape and moves nothing."""

    __slots__ = ("_at", "_busy", "_tape")

    def __init__(self, run: SplitRun, tape: Tape, inputs: _Inputs) -> None:
        super().__init__(
            run.plan, cur_copy=run.cur_copy, events=run.events, policy=run.policy, repairs=run.repairs, ids=run.ids,
            eval_callback=None, log=run.log, resources=run.resources,
        )  # fmt: skip
        self._tape = tape
        self._at = {copy: i for i, copy in enumerate(inputs.copies)}
        self._busy = set(range(len(run.machine.backends)))  # may have work that the host has not waited for

    def synchronize(self, i_split: int, backend_id: int, place: str) -> None:
        """Note a wait of the host; without new work since the last one it takes no time."""
        self._tape.n_waits += 1
        if backend_id in self._busy:
            self._busy.remove(backend_id)
            self._tape.steps.append((_WAIT, backend_id, 0))

    host_wait = stream_wait = synchronize  # there are no events

    def copy(self, source: Tensor, copy: Tensor) -> None:
        """Do nothing: there are no bytes."""

    def report_whole(
        self, transfer: Transfer, i_split: int, reason: CopyReason, start_s: float, *, is_async: bool
    ) -> None:
        """Note a copy of an input."""
        i = self._at[transfer.copy]
        self._tape.steps.append((_COPY, transfer.backend_id, i, transfer.source_id, is_async))
        self._tape.copied.setdefault((reason, is_async), []).append(i)
        if is_async:
            self._busy.add(transfer.backend_id)

    def launch(self, i_split: int, backend_id: int, graph: GraphView) -> None:
        """Note a launch of a split; the backend checks that it could compute it."""
        self.machine.backends[backend_id].graph_compute(graph)
        self._tape.n_launches += 1
        self._tape.steps.append((_LAUNCH, backend_id, i_split))
        if backend_id != self.machine.cpu:
            self._busy.add(backend_id)


class Tape:
    """The copies, waits and launches of a compute."""

    __slots__ = ("_clock", "_offsets", "_precedent", "_seconds", "copied", "n_launches", "n_waits", "steps")

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.n_waits = self.n_launches = 0
        self.copied: dict[tuple[CopyReason, bool], list[int]] = {}  # inputs, by reason and whether in a stream
        #: of the latest play, with its seconds of each split and what these follow from
        self._clock: VirtualClock | None = None
        self._seconds: list[float | None] = []
        self._precedent: Precedent | None = None
        self._offsets: list[int] = []

    def play(
        self, plan: Plan, log: RunLog, inputs: _Inputs, precedent: Precedent | None, *, is_new: bool = False
    ) -> None:
        """Count all steps for a plan, and advance the clock; ``is_new``: copies in streams were made, without bytes, and counted."""
        clock, stats, splits, sizes = log.clock, log.stats, plan.splits, inputs.sizes
        assert clock is not None
        seconds = self._known_seconds(plan, precedent, clock)
        is_pinned = {s: log.is_pinned(s) for s in set(inputs.storages)}
        pinned = [is_pinned[s] for s in inputs.storages]
        spend, synchronize, copy = clock.spend, clock.synchronize, clock.copy
        for step in self.steps:
            kind, b, i = step[:3]
            if kind == _LAUNCH:
                known = seconds[i]
                if known is None:
                    graph = splits[i].graph
                    known = log.seconds_of(clock, b, graph)
                    if not graph.memo["work"][2]:  # else it follows from the experts that tokens choose
                        seconds[i] = known
                spend(b, known)
            elif kind == _WAIT:
                synchronize(b)
            else:
                copy(step[3], b, sizes[i], is_async=step[4], is_pinned=pinned[i])
        stats.n_waits += self.n_waits
        stats.n_launches += self.n_launches
        for (reason, is_async), copied in self.copied.items():
            if not (is_new and is_async):
                inputs.count_traffic(copied)
            n_bytes = sum([sizes[i] for i in copied])
            stats.count_copy(n_bytes, n_bytes, reason, n_copies=len(copied))

    def _known_seconds(self, plan: Plan, precedent: Precedent | None, clock: VirtualClock) -> list[float | None]:
        """Return the seconds of each split in the latest play; None for those with a node whose work may be another."""
        graph, was, old = plan.graph, self._precedent, self._offsets
        self._offsets = [t.view_offs for t in chain(graph.leafs, graph.nodes)]
        if self._clock is not clock or not old:
            self._seconds = [None] * len(plan.splits)
        elif precedent is not None and was is not None:
            changed = set(compress(count(), map(ne, self._offsets, old)))
            changed |= precedent.changed_near(was, changed)
            n_leafs = len(graph.leafs)
            starts = [split.i_start for split in plan.splits]
            for i in changed:
                if i >= n_leafs:
                    self._seconds[bisect_right(starts, i - n_leafs) - 1] = None
        self._clock, self._precedent = clock, precedent
        return self._seconds
