"""Numbers the records of old timeline files, which have neither graph nor run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..record import (
    AllocRecord,
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyRecord,
    MicroBatchRecord,
    ReadRecord,
    Record,
    SplitRecord,
    UsedExpertsRecord,
    WaitRecord,
)

__all__ = ["number_records"]


def number_records(records: Iterable[Record]) -> list[Record]:
    """Return records with the graph, run and clock that they most likely belong to.

    Parameters
    ----------
    records : iterable of Record
        Records of a file of layout 1, in order.

    Notes
    -----
    A run begins at a micro-batch or, without any, at a split before the latest one. A graph begins when nodes are
    assigned after another record. A virtual clock was reset when the host's time decreases.
    """
    i_graph = i_run = -1
    i_clock, host_s, split, n_experts = 0, 0.0, -1, 0
    is_planning = is_announced = has_work = False
    experts: dict[tuple[int, str], int] = {}
    numbered: list[Record] = []
    for record in records:
        is_plan = isinstance(record, AssignRecord | SplitRecord)
        if isinstance(record, AssignRecord) and not is_planning:
            i_graph += 1
        if isinstance(record, AssignRecord | SplitRecord):
            is_planning = True
        elif not isinstance(record, AllocRecord):
            is_planning = False
        if isinstance(record, MicroBatchRecord):
            i_run, is_announced, has_work, split, experts = i_run + 1, True, False, -1, {}
        elif isinstance(record, CopyRecord | ComputeRecord | UsedExpertsRecord):
            if i_run < 0 or (not is_announced and record.split < split):
                i_run, experts = i_run + 1, {}
            split, has_work = record.split, True
        span = getattr(record, "virtual", None)
        if span is not None and _is_hosts(record):
            i_clock, host_s = i_clock + (span[1] < host_s), span[1]
        run = -1 if is_plan and (has_work or not is_announced) else i_run
        made = replace(record, i_graph=i_graph, i_run=run, i_clock=i_clock)
        if isinstance(made, UsedExpertsRecord):
            experts[made.split, made.tensor] = n_experts
            made = replace(made, i_experts=n_experts)
            n_experts += 1
        elif isinstance(made, CopyRecord) and made.reason == "experts":
            made = replace(made, i_experts=experts.get((made.split, made.tensor), -1))
        numbered.append(made)
    return numbered


def _is_hosts(record: Record) -> bool:
    """Return whether the end of a record's virtual times is the host's time."""
    if isinstance(record, WaitRecord):
        return record.what != "event_wait"
    return isinstance(record, AssignRecord | AllocRecord | CallbackRecord | ReadRecord)
