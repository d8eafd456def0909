"""Adds causes to records of llama.cpp's scheduler, from pyggml's plan of the same batch.

Builds of ggml do not keep causes. pyggml's passes over the same graph do; a cause is used only if both put the node on
the same backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import PyggmlError
from ..models.batch import Outputs
from ..planning import Planner
from ..record import AssignRecord, ComputeRecord, MicroBatchRecord, Record, Recording, SplitInput, SplitRecord

__all__ = ["Causes"]

Planned = dict[str, tuple[str, str]]  #: backend and cause, by name of a node


class Causes:
    """Adds causes to records.

    Parameters
    ----------
    planner : Planner
        A planner of the same model and flags; ``recording`` is its recorder.

    Attributes
    ----------
    n_known, n_unknown : int
        Nodes whose cause was found, and those that the plan has on another backend or not at all.
    """

    def __init__(self, planner: Planner, recording: Recording) -> None:
        self.planner, self._recording = planner, recording
        self._planned: dict[tuple[int, Outputs], Planned] = {}
        self._now: Planned = {}
        self._by_split: list[tuple[tuple[str, int], ...]] = []
        self._assigned: list[AssignRecord] = []
        self.n_known = self.n_unknown = 0

    def fill(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records with causes."""
        for record in records:
            yield self._fill(record)

    def _fill(self, record: Record) -> Record:
        if isinstance(record, MicroBatchRecord):
            self._now = self._plan(record)
        elif isinstance(record, AssignRecord):
            if self._by_split:
                self._by_split, self._assigned = [], []
            cause = self._cause(record.tensor, record.backend)
            self.n_known, self.n_unknown = self.n_known + bool(cause), self.n_unknown + (not cause)
            record = replace(record, cause=cause)
            self._assigned.append(record)
        elif isinstance(record, SplitRecord):
            own, self._assigned = self._assigned[: record.n_nodes], self._assigned[record.n_nodes :]
            counts = Counter(r.cause for r in own if r.cause)
            self._by_split.append(tuple(counts.items()))
            inputs = tuple(self._input(i, record.backend) for i in record.inputs)
            record = replace(record, cause=self._cause(record.first, record.backend), inputs=inputs)
        elif isinstance(record, ComputeRecord) and record.split < len(self._by_split):
            record = replace(record, causes=self._by_split[record.split])
        return record

    def _cause(self, name: str, backend: str) -> str:
        where, cause = self._now.get(name, ("", ""))
        return cause if where == backend else ""

    def _input(self, given: SplitInput, backend: str) -> SplitInput:
        return replace(given, cause=self._cause(given.tensor, given.src), user_cause=self._cause(given.user, backend))

    def _plan(self, batch: MicroBatchRecord) -> Planned:
        """Return the plan of a batch with the same number of tokens, made once; empty if planning fails."""
        outputs: Outputs = "all" if batch.n_outputs == batch.n_tokens > 1 else "last"
        key = batch.n_tokens, outputs
        found = self._planned.get(key)
        if found is None:
            self._recording.clear()
            found = {}
            try:
                self.planner.plan_batch(batch.n_tokens, outputs=outputs)
            except PyggmlError:  # without a plan, records have no causes
                self._recording.clear()
            for record in self._recording.records:
                if isinstance(record, AssignRecord):
                    found[record.tensor] = record.backend, record.cause
                elif isinstance(record, SplitRecord):
                    found.update({i.tensor: (i.src, i.cause) for i in record.inputs if i.cause})
            self._planned[key] = found
        return found

    def close(self) -> None:
        """Close the planner."""
        self.planner.close()
