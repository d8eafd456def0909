"""The lane, kind and name of each record, for the page and for Perfetto."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

from ..record import CallbackRecord, ComputeRecord, CopyReason, CopyRecord, EventRecord, ReadRecord, WaitRecord

__all__ = ["HOST", "KINDS", "Lane", "Shown", "compute_lane", "link_lane", "shown"]

#: Kinds of events; the page has a colour for each.
KINDS = (*get_args(CopyReason), "compute", "read", "wait", "callback", "event", "plan", "other")


class Lane(NamedTuple):
    """A line of the timeline."""

    kind: str  #: host, link, compute or waits
    name: str  #: as the page shows it
    backend: str  #: the lane's backend, for a link the target; empty for the host

    @property
    def perfetto_name(self) -> str:
        """The lane's name in Perfetto."""
        if self.kind == "link":
            return f"link {self.name}"
        return f"{self.backend} compute" if self.kind == "compute" else self.name


HOST = Lane("host", "host", "")


class Shown(NamedTuple):
    """How one record is shown."""

    kind: str  #: one of `KINDS`
    lane: Lane
    name: str


def link_lane(src: str, dst: str) -> Lane:
    """Return the lane of copies from one backend to another."""
    return Lane("link", f"{src} → {dst}", dst)


def compute_lane(backend: str) -> Lane:
    """Return the lane of a backend's work."""
    return Lane("compute", f"{backend} computes", backend)


def shown(record: Any) -> Shown:  # any record with times, also of kinds made later
    """Return the kind, lane and name of a record that has times."""
    if isinstance(record, CopyRecord):
        return Shown(record.reason, link_lane(record.src, record.dst), record.tensor)
    if isinstance(record, ComputeRecord):
        return Shown("compute", compute_lane(record.backend), record.first)
    if isinstance(record, ReadRecord):
        return Shown("read", HOST if record.backend == "CPU" else link_lane(record.backend, "CPU"), record.tensor)
    if isinstance(record, WaitRecord):
        is_stream = record.what == "event_wait"
        lane = Lane("waits", f"{record.backend} waits", record.backend) if is_stream else HOST
        return Shown("wait", lane, f"{record.what} {record.backend}")
    if isinstance(record, CallbackRecord):
        return Shown("callback", HOST, record.tensor)
    if isinstance(record, EventRecord):
        return Shown("event", compute_lane(record.backend), f"event {record.copy}")
    return Shown("other", HOST, type(record).__name__.removesuffix("Record"))
