"""`Tape`: what a compute did on devices that only count; its times are calculated afterwards, also for later graphs.

Without data and observers a compute has no effect but counts and virtual times. `compute_splits` then writes a tape, which is
played to statistics and clock. A later graph of the same structure makes the same calls in the same order, with other bytes
and seconds: the tape is played for it, and `compute_splits` does not run.
"""

from __future__ import annotations

from itertools import chain, compress, count
from operator import ne
from typing import TYPE_CHECKING, Any

from ..graph import GraphView
from ..record import CopyReason
from ..tensor import Tensor
from .compute import SplitRun, compute_splits
from .log import RunLog, Wait
from .policies import FullCopier, UsedExpertCopier
from .transfer import Transfer

if TYPE_CHECKING:
    from .plan import Plan
    from .precedent import Precedent
    from .state import Assignment
    from .transfer import Feed

__all__ = ["Tape", "compute_with_tape"]

#: `copy` of policies that copy everything whole that is not of kind "experts".
_WHOLE = FullCopier.copy, UsedExpertCopier.copy
_WAIT, _COPY, _LAUNCH = range(3)

#: Input copies of a plan with their sources.
_Inputs = list[tuple[Tensor, Tensor]]


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
    inputs = [(source, by_b[b][0]) for source, by_b in plan.copies.items() for b in by_b]
    tapes = plan.tapes if precedent is None else precedent.tapes
    tape = tapes.get(run.repairs)
    if tape is not None and _are_plain(inputs):
        run.ids.begin()
        for source, copy in inputs:
            n_bytes, origin, target = source.nbytes, source.storage, copy.buffer
            if n_bytes and origin is not None and target is not None:
                origin.count_out(n_bytes)
                target.count_in(n_bytes)
        tape.play(plan, log, inputs)
    elif plan.expert_transfers() or not _are_plain(inputs):
        compute_splits(run)
    else:
        tape = Tape()
        run.log = _Taping(tape, run, inputs)
        try:
            compute_splits(run)
        finally:
            tape.play(plan, log, inputs)
        tapes[run.repairs] = tape


def _are_plain(inputs: _Inputs) -> bool:
    """Return whether no copy of an input can be refused: they have memory in which nothing else was computed, and whole blocks."""
    places = {source.storage for source, _ in inputs}
    return not any(s is None or s.is_closed or (s.tenancy is not None and s.tenancy.is_over) for s in places) and all(
        source.view_src is None or source.type.block_size == 1 for source, _ in inputs
    )


class _Taping(RunLog):
    """A log that writes a tape."""

    __slots__ = ("_at", "_busy", "_tape")

    def __init__(self, tape: Tape, run: SplitRun, inputs: _Inputs) -> None:
        log = run.log
        super().__init__(log.machine, log.stats, None, log.clock, log.ids)
        self._tape = tape
        self._at = {copy: i for i, (_, copy) in enumerate(inputs)}
        self._busy = set(
            range(len(log.machine.backends))
        )  # backends that may have work that the host has not waited for

    def copied(self, transfer: Feed, i_split: int, src: int, reason: CopyReason, start_s: float, offset: int, n_bytes: int,
               tensor_bytes: int, *, is_async: bool, number: int = 0, is_own: bool = False) -> None:  # fmt: skip
        """Note a copy of a whole input."""
        assert isinstance(transfer, Transfer)
        self._tape.steps.append((_COPY, transfer.backend_id, self._at[transfer.copy], src, is_async, reason))
        if is_async:
            self._busy.add(transfer.backend_id)

    def waited(self, i_split: int | None, what: Wait, backend_id: int, copy: int | None, start_s: float) -> None:
        """Note a wait of the host; without new work since the last one it takes no time."""
        self._tape.n_waits += 1
        if backend_id in self._busy:
            self._busy.remove(backend_id)
            self._tape.steps.append((_WAIT, backend_id))

    def launched(self, i_split: int, backend_id: int, graph: GraphView, asg: Assignment, start_s: float) -> None:
        """Note a launch of a split."""
        self._tape.steps.append((_LAUNCH, backend_id, i_split))
        if backend_id != self.machine.cpu:
            self._busy.add(backend_id)


class Tape:
    """The copies, waits and launches of a compute."""

    __slots__ = ("_facts", "_users", "_works", "n_waits", "steps")

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self.n_waits = 0
        self._facts: list[list[Any]] = []  # of all tensors: what the work of nodes depends on
        self._users: list[list[int]] = []  # of each tensor: those that read or view it
        self._works: list[Any] = []  # of each split: what `RunLog.seconds_of` has worked out

    def play(self, plan: Plan, log: RunLog, inputs: _Inputs) -> None:
        """Count all steps for a plan, and advance the clock."""
        clock, stats, splits, seconds_of = log.clock, log.stats, plan.splits, log.seconds_of
        assert clock is not None
        self._carry_works(plan)
        stats.n_waits += self.n_waits
        sizes = [source.nbytes for source, _ in inputs]
        pinned = {source.storage: log.is_pinned(source) for source, _ in inputs}
        for step in self.steps:
            kind, b = step[:2]
            if kind == _LAUNCH:
                stats.n_launches += 1
                clock.spend(b, seconds_of(clock, b, splits[step[2]].graph))
            elif kind == _WAIT:
                clock.synchronize(b)
            else:
                _, _, i, src, is_async, reason = step
                stats.count_copy(sizes[i], sizes[i], reason)
                clock.copy(src, b, sizes[i], is_async=is_async, is_pinned=pinned[inputs[i][0].storage])
        self._works = [split.graph.memo.get("work") for split in splits]

    def _carry_works(self, plan: Plan) -> None:
        """Give splits the work that was worked out for an earlier graph, unless it may be another."""
        graph, was, splits = plan.graph, self._facts, plan.splits
        tensors = [*graph.leafs, *graph.nodes]
        self._facts = [[t._op_params for t in tensors], [t.layout_id for t in tensors], [t.view_offs for t in tensors]]
        if not self._works:
            return
        if not self._users:
            self._users = _users_of(plan, tensors)
        changed = {i for now, old in zip(self._facts, was, strict=True) for i in compress(count(), map(ne, now, old))}
        for _ in range(2):  # rules look at sources, and at what these show
            changed.update(chain.from_iterable(map(self._users.__getitem__, list(changed))))
        n_leafs = len(graph.leafs)
        is_same = [True] * len(graph.nodes)
        for i in changed:
            if i >= n_leafs:
                is_same[i - n_leafs] = False
        for split, work in zip(splits, self._works, strict=True):
            if work is not None and not work[2] and all(is_same[split.i_start : split.i_end]):
                split.graph.memo.setdefault("work", work)


def _users_of(plan: Plan, tensors: list[Tensor]) -> list[list[int]]:
    """Return, for each tensor of a graph, the positions of those that read or view it, also by an input copy."""
    position: dict[Tensor | None, int] = {tensor: i for i, tensor in enumerate(tensors)}
    for source, by_backend in plan.copies.items():
        position |= {copy: position[source] for made in by_backend.values() for copy in made}
    users: list[list[int]] = [[] for _ in tensors]
    for i, tensor in enumerate(tensors):
        for read in (tensor.view_src, *tensor.src):
            at = position.get(read)
            if at is not None:
                users[at].append(i)
    return users
