"""The columns of a view: records in their order, each string and each set once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..record import (
    AllocRecord,
    AssignRecord,
    ComputeRecord,
    CopyRecord,
    MicroBatchRecord,
    ReadRecord,
    Record,
    SplitRecord,
    UsedExpertsRecord,
)
from .lanes import HOST, KINDS, Shown, compute_lane, link_lane, shown
from .runs import RecordedRun, Runs

__all__ = ["Columns", "Interval"]

_COLUMNS = ("kind", "lane", "name", "run", "split", "amount", "offset", "whole", "ref", "engines")

#: Start and end in seconds.
Interval = tuple[float, float]


class _Described(NamedTuple):
    """What an event shows in addition to its times."""

    how: Shown
    split: int
    amount: int = 0
    offset_bytes: int = 0
    whole_bytes: int = 0
    ref: int = -1
    engines: int = -1


@dataclass(slots=True)
class _Table:
    """Different values, each with its number."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def __call__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))


@dataclass(slots=True)
class Columns:
    """Collects the columns of a view from records.

    Attributes
    ----------
    events : dict of str to list of int
        Columns by name: ``kind``, an index of `KINDS`; ``lane``; ``name``, an index of ``strings``; ``run``; ``split``;
        ``amount``: bytes of a copy or a read, nodes of a launch; ``offset`` and ``whole``: bytes of the tensor;
        ``ref``: for copied experts an index of ``experts``, for launches of ``cause_sets``; ``engines``: for copies and
        reads an index of ``engine_sets``. -1: none.
    wall, virtual : list of (float, float) or None
        Times of each event.
    """

    strings: _Table = field(default_factory=_Table)
    lanes: _Table = field(default_factory=_Table)
    used_sets: _Table = field(default_factory=_Table)
    cause_sets: _Table = field(default_factory=_Table)
    engine_sets: _Table = field(default_factory=_Table)
    runs: Runs = field(default_factory=Runs)
    events: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    wall: list[Interval | None] = field(default_factory=list)
    virtual: list[Interval | None] = field(default_factory=list)
    backends: _Table = field(default_factory=_Table)
    experts: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    activities: list[tuple[int, str, str, str]] = field(default_factory=list)  #: event, what, source, target
    _experts: dict[tuple[int, int], int] = field(default_factory=dict)  # by run, and number in it
    _planned_at: float | None = None
    _run: int = -1  # of the current record
    _clock: int = 0  # the virtual clock of the latest record
    _clock_start_s: float = 0.0  # added to its times: each clock continues where the previous one ended
    _virtual_end_s: float = 0.0

    def take(self, record: Record) -> None:
        """Add one record."""
        self._run = self.runs.take(record)
        if record.i_clock != self._clock:
            self._clock, self._clock_start_s = record.i_clock, self._virtual_end_s
        if isinstance(record, UsedExpertsRecord):
            self._take_experts(record)
        elif isinstance(record, AssignRecord):
            virtual = self._place_virtual(record)
            if record.end_s > record.start_s and record.start_s != self._planned_at:
                self._planned_at = record.start_s
                cut = _Described(Shown("plan", HOST, "assign and cut"), -1)
                self._add(cut, self._run, (record.start_s, record.end_s), virtual)
        elif isinstance(record, AllocRecord):
            self._take_memory(record)
        elif not isinstance(record, SplitRecord | MicroBatchRecord):
            described = self._describe(record)
            if described is not None:
                self._add(described, self._run, (record.start_s, record.end_s), self._place_virtual(record))

    def _take_experts(self, r: UsedExpertsRecord) -> None:
        self._experts[r.i_run, r.i_experts] = len(self.experts)
        self.experts.append(
            {
                "run": self._run, "split": r.split, "tensor": self.strings(r.tensor), "ids": self.strings(r.ids),
                "used": self.used_sets(r.used), "n_expert": r.n_expert, "expert_bytes": r.expert_bytes,
                "whole": r.tensor_bytes,
            }
        )  # fmt: skip

    def _take_memory(self, r: AllocRecord) -> None:
        virtual = self._place_virtual(r)
        self.memory.append(
            {
                "after": len(self.wall), "backend": r.backend, "buft": r.buft, "purpose": r.purpose,
                "bytes": r.size_bytes, "graph": r.graph, "wall": r.end_s if r.end_s else None,
                "virtual": None if virtual is None else virtual[1],
            }
        )  # fmt: skip

    def _describe(self, r: Any) -> _Described | None:  # any record with times, also of kinds made later
        if not hasattr(r, "start_s") or not hasattr(r, "end_s"):
            return None
        how = shown(r)
        if isinstance(r, CopyRecord):
            self.activities.append((len(self.wall), r.reason, r.src, r.dst))
            ref = -1 if r.i_experts < 0 else self._experts.get((r.i_run, r.i_experts), -1)
            return _Described(how, r.split, r.size_bytes, r.offset_bytes, r.tensor_bytes, ref, self._engines(r))
        if isinstance(r, ComputeRecord):
            self.backends(r.backend)
            self.activities.append((len(self.wall), "compute", r.backend, ""))
            return _Described(how, r.split, r.n_nodes, ref=self.cause_sets(r.causes))
        if isinstance(r, ReadRecord):
            self.activities.append((len(self.wall), "read", r.backend, ""))
            return _Described(how, -1, r.size_bytes, whole_bytes=r.size_bytes, engines=self._engines(r))
        return _Described(how, _split(r))

    def _engines(self, r: CopyRecord | ReadRecord) -> int:
        return self.engine_sets(r.engines) if r.engines else -1

    def _add(self, d: _Described, run: int, wall: Interval | None, virtual: Interval | None) -> None:
        values = (
            KINDS.index(d.how.kind), self.lanes(d.how.lane), self.strings(d.how.name), run, d.split, d.amount,
            d.offset_bytes, d.whole_bytes, d.ref, d.engines,
        )  # fmt: skip
        for column, value in zip(self.events.values(), values, strict=True):
            column.append(value)
        self.wall.append(wall)
        self.virtual.append(virtual)

    def _place_virtual(self, record: Any) -> Interval | None:
        """Return virtual times; those of another clock continue at the end of the previous one."""
        span = getattr(record, "virtual", None)
        if span is None:
            return None
        start_s, end_s = float(span[0]), float(span[1])
        placed = (self._clock_start_s + start_s, self._clock_start_s + end_s)
        self._virtual_end_s = max(self._virtual_end_s, placed[1])
        return placed

    def add_plan(self) -> None:
        """Add an event for each input and each split of the planned graphs."""
        for i, graph in enumerate(self.runs.graphs):
            self.runs.runs.append(RecordedRun(graph=i))
            for split in graph.splits:
                for given in split.inputs:
                    how = Shown(given.kind, link_lane(given.src, split.backend), given.tensor)
                    n = given.size_bytes
                    self._add(_Described(how, split.split, n, 0, n), i, None, None)
                how = Shown("compute", compute_lane(split.backend), split.first)
                n_nodes = split.i_end - split.i_start
                causes = self.cause_sets(((split.cause, split.n_nodes),) if split.cause else ())
                self._add(_Described(how, split.split, n_nodes, ref=causes), i, None, None)


def _split(record: Any) -> int:
    split = getattr(record, "split", None)
    return -1 if split is None else int(split)
