"""The graphs and runs of records, each once."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..record import AssignRecord, ComputeRecord, CopyRecord, MicroBatchRecord, Record, SplitRecord

__all__ = ["RecordedGraph", "RecordedRun", "Runs"]


@dataclass(frozen=True, slots=True)
class RecordedGraph:
    """A graph as it was assigned and cut."""

    nodes: tuple[AssignRecord, ...]
    splits: tuple[SplitRecord, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Key that equals that of the same graph planned at another time."""
        nodes = tuple((n.tensor, n.op, n.backend, n.cause) for n in self.nodes)
        return nodes, tuple((s.backend, s.i_start, s.i_end, s.cause, s.inputs) for s in self.splits)


@dataclass(slots=True)
class RecordedRun:
    """One compute of a graph."""

    batch: MicroBatchRecord | None = None  #: None: it was not announced
    graph: int | None = None  #: index in `Runs.graphs`; None: its plan was not recorded


@dataclass(slots=True)
class Runs:
    """Collects graphs and runs by the numbers of records (`Identified`).

    Attributes
    ----------
    graphs : list of RecordedGraph
        Each different graph once; complete after `settle`.
    runs : list of RecordedRun
        In the order of their first records.
    """

    graphs: list[RecordedGraph] = field(default_factory=list)
    runs: list[RecordedRun] = field(default_factory=list)
    _indices: dict[int, int] = field(default_factory=dict)  # index of a run, by its number
    _plans: dict[int, tuple[list[AssignRecord], list[SplitRecord]]] = field(default_factory=dict)
    _graph_of: dict[int, int] = field(default_factory=dict)  # number of a run's graph, by the run's index

    def take(self, record: Record) -> int:
        """Add the next record and return the index of its run; -1 if it has none."""
        if isinstance(record, AssignRecord):
            self._plan(record.i_graph)[0].append(record)
        elif isinstance(record, SplitRecord):
            self._plan(record.i_graph)[1].append(record)
        if record.i_run < 0:
            return -1
        i = self._indices.setdefault(record.i_run, len(self.runs))
        if i == len(self.runs):
            self.runs.append(RecordedRun())
        if isinstance(record, MicroBatchRecord):
            self.runs[i].batch = record
        elif isinstance(record, CopyRecord | ComputeRecord):
            self._graph_of[i] = record.i_graph
        return i

    def _plan(self, i_graph: int) -> tuple[list[AssignRecord], list[SplitRecord]]:
        return self._plans.setdefault(i_graph, ([], []))

    def settle(self) -> None:
        """Complete `graphs` after the last record. Graphs without a run are left out if there are runs."""
        used = set(self._graph_of.values()) & self._plans.keys() or self._plans.keys()
        known: dict[tuple[object, ...], int] = {}
        index: dict[int, int] = {}
        for number, (nodes, splits) in self._plans.items():
            if number in used:
                graph = RecordedGraph(tuple(nodes), tuple(splits))
                index[number] = known.setdefault(graph.key, len(self.graphs))
                if index[number] == len(self.graphs):
                    self.graphs.append(graph)
        for i, run in enumerate(self.runs):
            run.graph = index.get(self._graph_of.get(i, -1))
