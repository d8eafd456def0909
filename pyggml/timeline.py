"""Records as a timeline that Perfetto and Chrome open: lanes for the host, each link and each backend.

Times are the host's. Work that a backend does after its call returned shows as the call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .record import AllocRecord, ComputeRecord, CopyRecord, Record, UsedExpertsRecord, WaitRecord

__all__ = ["trace_events", "write_timeline"]

Event = dict[str, Any]  # of JSON's values


def trace_events(records: Iterable[Record]) -> list[Event]:
    """Return events of the Trace Event Format, times in microseconds from the first.

    Examples
    --------
    >>> events = trace_events([ComputeRecord(0, "CPU", 3, "x", 1.0, 1.5)])
    >>> events[-1]["name"], events[-1]["dur"]
    ('split 0', 500000.0)
    """
    timed = [r for r in records if isinstance(r, (CopyRecord, ComputeRecord, WaitRecord))]
    used = {(r.split, r.tensor): r for r in records if isinstance(r, UsedExpertsRecord)}
    zero_s = min((r.start_s for r in timed), default=0.0)
    lanes: dict[str, int] = {}
    events: list[Event] = []
    for record in timed:
        lane, name, kind, args = _describe(record, used)
        events.append(
            {
                "name": name,
                "cat": kind,
                "ph": "X",
                "ts": round((record.start_s - zero_s) * 1e6, 3),
                "dur": round((record.end_s - record.start_s) * 1e6, 3),
                "pid": 1,
                "tid": lanes.setdefault(lane, len(lanes) + 1),
                "args": args,
            }
        )
    names: list[Event] = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "pyggml"}}]
    names += [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": lane}} for lane, i in lanes.items()
    ]
    return names + events


def _describe(
    record: CopyRecord | ComputeRecord | WaitRecord, used: dict[tuple[int, str], UsedExpertsRecord]
) -> tuple[str, str, str, dict[str, Any]]:
    """Return lane, name, category and details of one record."""
    if isinstance(record, CopyRecord):
        args: dict[str, Any] = {
            "split": record.split,
            "bytes": record.size_bytes,
            "offset": record.offset_bytes,
            "tensor_bytes": record.tensor_bytes,
            "reason": record.reason,
        }
        experts = used.get((record.split, record.tensor))
        if experts is not None:
            args |= {"experts_used": len(experts.used), "n_expert": experts.n_expert}
        return f"link {record.src} → {record.dst}", record.tensor, "copy", args
    if isinstance(record, ComputeRecord):
        args = {"split": record.split, "nodes": record.n_nodes, "first": record.first}
        return f"{record.backend} compute", f"split {record.split}", "compute", args
    return "host", f"{record.what} {record.backend}", "wait", {"split": record.split}


def write_timeline(path: Path, records: Iterable[Record]) -> None:
    """Write records as one JSON file.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    kept = list(records)
    compute_bytes = {r.backend: r.size_bytes for r in kept if isinstance(r, AllocRecord)}
    whole = {"traceEvents": trace_events(kept), "displayTimeUnit": "ms", "otherData": {"compute_bytes": compute_bytes}}
    path.write_text(json.dumps(whole), encoding="utf-8")
