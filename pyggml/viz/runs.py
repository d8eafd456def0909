"""Which computing of which graph each record belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..record import AssignRecord, ComputeRecord, CopyRecord, MicroBatchRecord, Record, SplitRecord, UsedExpertsRecord

__all__ = ["RecordedGraph", "Run", "Runs"]


@dataclass(frozen=True, slots=True)
class RecordedGraph:
    """A graph as it was assigned and cut."""

    nodes: tuple[AssignRecord, ...]
    splits: tuple[SplitRecord, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """What it has in common with the same graph planned at another time."""
        return tuple((n.tensor, n.op, n.backend, n.cause) for n in self.nodes), self.splits


@dataclass(slots=True)
class Run:
    """One computing of a graph."""

    batch: MicroBatchRecord | None = None  #: None: nobody told
    graph: int | None = None  #: index in `Runs.graphs`; None: its plan was not recorded


@dataclass(slots=True)
class Runs:
    """Follows records; ask `run` after each `take`.

    A computing begins where a session says so. Without one it begins where a split comes that was computed already: a
    copy for it, or the same nodes again.

    Attributes
    ----------
    graphs : list of RecordedGraph
        Each different graph once.
    runs : list of Run
        In their order.
    run : int
        Index of the run that the latest record belongs to; -1 before the first.
    is_empty : bool
        Whether that one has begun, with no copy and no work yet.
    """

    graphs: list[RecordedGraph] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    run: int = -1
    is_empty: bool = False
    _known: dict[tuple[object, ...], int] = field(default_factory=dict)
    _nodes: list[AssignRecord] = field(default_factory=list)
    _splits: list[SplitRecord] = field(default_factory=list)
    _planned: int | None = None
    _split: int = -1
    _firsts: set[str] = field(default_factory=set)  # first nodes of what was computed of the split

    def take(self, record: Record) -> None:
        """Take the next record."""
        if isinstance(record, AssignRecord):
            if self._splits:
                self.settle()
            self._nodes.append(record)
        elif isinstance(record, SplitRecord):
            if self._splits and record.split <= self._splits[-1].split:
                self.settle()
            self._splits.append(record)
        elif isinstance(record, MicroBatchRecord):
            self._begin(record)
        elif isinstance(record, CopyRecord | ComputeRecord | UsedExpertsRecord):
            self._work(record)

    def settle(self) -> None:
        """Take the plan as complete: what comes next is no part of it."""
        if not self._nodes and not self._splits:
            return
        graph = RecordedGraph(tuple(self._nodes), tuple(self._splits))
        self._planned = self._known.setdefault(graph.key, len(self.graphs))
        if self._planned == len(self.graphs):
            self.graphs.append(graph)
        self._nodes, self._splits = [], []

    def forget_unused(self) -> None:
        """Drop the graphs that were planned and not computed, if any was computed."""
        used = sorted({r.graph for r in self.runs if r.graph is not None})
        if used:
            self.graphs = [self.graphs[i] for i in used]
            for run in self.runs:
                run.graph = None if run.graph is None else used.index(run.graph)

    def _begin(self, batch: MicroBatchRecord | None) -> None:
        self.runs.append(Run(batch))
        self.run = len(self.runs) - 1
        self.is_empty = True

    def _work(self, record: CopyRecord | ComputeRecord | UsedExpertsRecord) -> None:
        was_planned = bool(self._nodes or self._splits)
        self.settle()
        is_repeated = record.split < self._split or (
            record.split == self._split
            and bool(self._firsts)
            and (not isinstance(record, ComputeRecord) or record.first in self._firsts)
        )
        if self.run < 0 or (not self.is_empty and (was_planned or is_repeated)):
            self._begin(None)
        if self.is_empty:
            self.runs[self.run].graph = self._planned
            self.is_empty = False
            self._split = -1
        if record.split != self._split:
            self._split = record.split
            self._firsts = set()
        if isinstance(record, ComputeRecord):
            self._firsts.add(record.first)
