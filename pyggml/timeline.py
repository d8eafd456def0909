"""Writes records as a timeline for Perfetto and Chrome: lanes for the host, each link and each backend.

The first process of the timeline shows this machine's times; if a backend works on after a call returned, it shows only
the call. If the records have virtual times, a second process shows the simulated machine: links in both directions, work
when it would be done, and arrows from each copy to the split that reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from .errors import FormatError
from .files import aside, read_json
from .record import (
    AllocPurpose,
    AllocRecord,
    CallbackRecord,
    ComputeRecord,
    CopyRecord,
    EventRecord,
    ReadRecord,
    Record,
    UsedExpertsRecord,
    WaitRecord,
)
from .viz.lanes import shown
from .viz.store import pack_records, unpack_records

__all__ = ["read_timeline", "trace_events", "write_timeline"]

Event = dict[str, Any]  # values of JSON
_Timed = CopyRecord | ComputeRecord | WaitRecord | ReadRecord | EventRecord | CallbackRecord
#: Kinds of records that are shown as moments.
_MOMENTS = ("callback", "event")
_PURPOSES: tuple[str, ...] = get_args(AllocPurpose)
_Used = dict[tuple[int, int], UsedExpertsRecord]

#: The key of the records in the file; Perfetto ignores unknown keys.
_RECORDS_KEY = "pyggml"

#: Process ids in the timeline.
_WALL, _VIRTUAL = 1, 2


class _Slice(NamedTuple):
    lane: str
    name: str
    kind: str
    args: dict[str, Any]


def trace_events(records: Iterable[Record]) -> list[Event]:
    """Return events in the Trace Event Format; times are microseconds from the first.

    Examples
    --------
    >>> events = trace_events([ComputeRecord(0, "CPU", 3, "x", 1.0, 1.5)])
    >>> events[-1]["name"], events[-1]["dur"]
    ('split 0', 500000.0)
    """
    kept = list(records)
    used: _Used = {}
    timed: list[tuple[_Timed, _Slice]] = []
    for record in kept:
        if isinstance(record, UsedExpertsRecord):
            used[record.i_run, record.i_experts] = record
        elif isinstance(record, _Timed):
            timed.append((record, _describe(record, used)))
    allocs = [r for r in kept if isinstance(r, AllocRecord)]
    is_virtual = any(r.virtual is not None for r, _ in timed)
    zero_s = min([r.start_s for r, _ in timed] + [r.end_s for r in allocs], default=0.0)
    events = _memory(_WALL, [(r, r.end_s - zero_s) for r in allocs])
    events += _process(_WALL, "this machine (wall time)" if is_virtual else "pyggml", _wall(timed, zero_s))
    if is_virtual:
        events += _memory(_VIRTUAL, [(r, r.virtual.end_s) for r in allocs if r.virtual is not None])
        events += _process(_VIRTUAL, "simulated machine (virtual time)", _virtual(timed))
        events += _arrows(timed, events)
    return events


def _memory(pid: int, allocs: Sequence[tuple[AllocRecord, float]]) -> list[Event]:
    """Return counters of the memory on each backend's device, by purpose."""
    held: dict[str, dict[tuple[str, str], int]] = {}
    events: list[Event] = []
    for record, when_s in allocs:
        own = held.setdefault(record.backend, {})
        own[record.purpose, record.buft] = record.size_bytes
        args = dict.fromkeys(_PURPOSES, 0)
        for (purpose, _), size in own.items():
            args[purpose] += size
        events.append({"name": f"memory {record.backend}", "ph": "C", "ts": _us(when_s), "pid": pid, "args": args})
    return events


_Placed = tuple[_Slice, float, float]


def _wall(timed: Sequence[tuple[_Timed, _Slice]], zero_s: float) -> list[_Placed]:
    return [(s, r.start_s - zero_s, r.end_s - r.start_s) for r, s in timed]


def _virtual(timed: Sequence[tuple[_Timed, _Slice]]) -> list[_Placed]:
    """Return slices of virtual time. Copies are also on the lanes of their copy engines; waits of no duration are left out."""
    placed: list[_Placed] = []
    for record, slice_ in timed:
        span = record.virtual
        if span is None or (span.end_s <= span.start_s and slice_.kind == "wait"):
            continue
        when = (span.start_s, span.end_s - span.start_s)
        placed.append((slice_, *when))
        if isinstance(record, CopyRecord | ReadRecord):
            args = {"bytes": record.size_bytes}
            placed += [(_Slice(engine, slice_.name, "engine", args), *when) for engine in record.engines]
    return placed


def _process(pid: int, name: str, placed: Sequence[_Placed]) -> list[Event]:
    """Return the names of a process's lanes, then its slices."""
    lanes: dict[str, int] = {}
    slices: list[Event] = []
    for s, start_s, duration_s in placed:
        tid = lanes.setdefault(s.lane, len(lanes) + 1)
        event: Event = {"name": s.name, "cat": s.kind, "ts": _us(start_s), "pid": pid, "tid": tid, "args": s.args}
        # "t": shown only on its own lane
        slices.append(event | ({"ph": "i", "s": "t"} if s.kind in _MOMENTS else {"ph": "X", "dur": _us(duration_s)}))
    names: list[Event] = [{"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}]
    names += [
        {"name": "thread_name", "ph": "M", "pid": pid, "tid": i, "args": {"name": lane}} for lane, i in lanes.items()
    ]
    return names + slices


def _arrows(timed: Sequence[tuple[_Timed, _Slice]], events: Sequence[Event]) -> list[Event]:
    """Return flows from the end of each copy to the start of the work that reads it."""
    tids = {e["args"]["name"]: e["tid"] for e in events if e["pid"] == _VIRTUAL and e["name"] == "thread_name"}
    arrows: list[Event] = []
    waiting: list[tuple[CopyRecord, _Slice]] = []
    n_arrows = 0
    for record, slice_ in timed:
        if isinstance(record, CopyRecord):
            waiting.append((record, slice_))
        elif isinstance(record, ComputeRecord) and record.virtual is not None:
            for copy, copied in waiting:
                if copy.split != record.split or copy.virtual is None:
                    continue
                n_arrows += 1
                flow = {"name": copy.tensor, "cat": "flow", "id": n_arrows, "pid": _VIRTUAL}
                # the arrow starts inside the copy's slice, because viewers attach it to the slice at its time
                middle_s = (copy.virtual.start_s + copy.virtual.end_s) / 2
                arrows.append({**flow, "ph": "s", "ts": _us(middle_s), "tid": tids[copied.lane]})
                start = _us(record.virtual.start_s)
                arrows.append({**flow, "ph": "f", "bp": "e", "ts": start, "tid": tids[slice_.lane]})
            waiting.clear()
    return arrows


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _describe(record: _Timed, used: _Used) -> _Slice:
    """Return the lane, name, category and details of one record."""
    how = shown(record)
    kind, name = how.kind, how.name
    args: dict[str, Any] = {}
    if not isinstance(record, ReadRecord):
        args["split"] = record.split
    if isinstance(record, CopyRecord):
        kind = "copy"
        args |= {"bytes": record.size_bytes, "offset": record.offset_bytes, "tensor_bytes": record.tensor_bytes}
        args["reason"] = record.reason
        experts = used.get((record.i_run, record.i_experts)) if record.i_experts >= 0 else None
        if experts is not None:
            args |= {"experts_used": len(experts.used), "n_expert": experts.n_expert}
    elif isinstance(record, ReadRecord):
        args["bytes"] = record.size_bytes
    elif isinstance(record, ComputeRecord):
        name = f"split {record.split}"
        args |= {"nodes": record.n_nodes, "first": record.first, "causes": dict(record.causes)}
    elif isinstance(record, CallbackRecord):
        name = f"callback {record.tensor}"
        args |= {"asked": record.asked, "answer": record.answer}
    elif isinstance(record, EventRecord):
        args["copy"] = record.copy
    return _Slice(how.lane.perfetto_name, name, kind, args)


def write_timeline(path: Path, records: Iterable[Record], *, about: Mapping[str, Any] | None = None) -> None:
    """Write records as one JSON file that contains the events for Perfetto and the records themselves.

    Parameters
    ----------
    path : Path
        Replaced once it is whole.
    records : iterable of Record
        In the order in which things happened.
    about : mapping, optional
        Facts that are not in the records, as JSON values: the model, the devices, the options.

    Raises
    ------
    PyggmlError
        The file cannot be written; what was there is kept.
    """
    kept = list(records)
    compute_bytes = {r.backend: r.size_bytes for r in kept if isinstance(r, AllocRecord) and r.purpose == "compute"}
    whole = {
        "traceEvents": trace_events(kept),
        "displayTimeUnit": "ms",
        "otherData": {"compute_bytes": compute_bytes},
        _RECORDS_KEY: {"about": dict(about or {}), "records": pack_records(kept)},
    }
    with aside(path) as part:
        part.write_text(json.dumps(whole, separators=(",", ":")), encoding="utf-8")


def read_timeline(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """Return the records in a file of `write_timeline`, and the facts about them.

    Raises
    ------
    FormatError
        The file cannot be read, is not such a timeline, or has no records.
    """
    whole = read_json(path, hint="give a file that --timeline wrote")
    if not isinstance(whole, dict) or "traceEvents" not in whole:
        raise FormatError(str(path), "it is not a timeline", hint="give a file that --timeline wrote")
    kept = whole.get(_RECORDS_KEY)
    if not isinstance(kept, dict) or not isinstance(kept.get("records"), dict):
        raise FormatError(
            str(path),
            "it has events for Perfetto, but no records",
            hint="another program or an older pyggml wrote it: record it again with --timeline",
        )
    about = kept.get("about")
    return unpack_records(kept["records"], str(path)), about if isinstance(about, dict) else {}
