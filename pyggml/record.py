"""Records of what the scheduler did, and the `Recorder` that takes them.

Reports, traces and timelines are made from records and from nothing else. A record is a value; whoever keeps it keeps
no memory alive but the names in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = [
    "AllocRecord",
    "ComputeRecord",
    "CopyRecord",
    "NullRecorder",
    "Record",
    "Recorder",
    "Recording",
    "Statistics",
    "UsedExpertsRecord",
    "WaitRecord",
]

#: Why bytes were copied: a user's input, a result of another backend, a whole weight, or the used experts of one.
CopyReason = Literal["input", "activation", "weight", "experts"]


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """Bytes of one split input that went to the split's backend, in one piece."""

    split: int
    tensor: str
    src: str  #: backend that the input is assigned to
    dst: str  #: backend of the split
    offset_bytes: int  #: in the tensor
    size_bytes: int
    tensor_bytes: int  #: what a whole copy would have moved
    reason: CopyReason
    start_s: float  #: of the host's clock, `time.perf_counter`
    end_s: float


@dataclass(frozen=True, slots=True)
class UsedExpertsRecord:
    """The experts of one weight that a split needs; the records of their copies follow."""

    split: int
    tensor: str
    ids: str  #: the tensor they were read from
    used: tuple[int, ...]
    n_expert: int
    expert_bytes: int
    tensor_bytes: int  #: what a whole copy would have moved; 0 if experts are added to an earlier copy


@dataclass(frozen=True, slots=True)
class ComputeRecord:
    """Nodes of one split given to its backend (the whole split, or a part under an eval callback)."""

    split: int
    backend: str
    n_nodes: int
    first: str  #: name of the first node
    start_s: float
    end_s: float  #: when the call returned; the work may go on


@dataclass(frozen=True, slots=True)
class WaitRecord:
    """The host, or a backend, waited."""

    split: int
    what: Literal["synchronize", "event_synchronize", "event_wait"]
    backend: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class AllocRecord:
    """Compute buffers after a reserve or an allocation."""

    graph: str
    backend: str
    buft: str
    size_bytes: int


Record = CopyRecord | UsedExpertsRecord | ComputeRecord | WaitRecord | AllocRecord


class Recorder(Protocol):
    """Takes records, in the order in which things happened."""

    def record(self, record: Record) -> None:
        """Take one record; must not raise."""


class NullRecorder:
    """Takes nothing."""

    __slots__ = ()

    def record(self, record: Record) -> None:
        """Do nothing."""


class Recording:
    """Keeps every record in a list.

    Examples
    --------
    >>> recording = Recording()
    >>> recording.record(AllocRecord("g", "CPU", "CPU", 64))
    >>> len(recording.records)
    1
    """

    __slots__ = ("records",)

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records: list[Record] = list(records)

    def record(self, record: Record) -> None:
        """Keep one record."""
        self.records.append(record)

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()


class Statistics:
    """Counts made from records.

    Attributes
    ----------
    n_copies, bytes_copied : int
        Copies to split backends, and their bytes.
    bytes_full : int
        Bytes that whole copies of the same inputs would have moved.
    bytes_by_reason : dict
        Bytes copied, by `CopyReason`.
    n_launches, n_waits : int
        Graphs given to backends; waits of host and backends.
    """

    __slots__ = ("bytes_by_reason", "bytes_copied", "bytes_full", "n_copies", "n_launches", "n_waits")

    n_copies: int
    bytes_copied: int
    bytes_full: int
    bytes_by_reason: dict[CopyReason, int]
    n_launches: int
    n_waits: int

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start counting anew."""
        self.n_copies = self.bytes_copied = self.bytes_full = self.n_launches = self.n_waits = 0
        self.bytes_by_reason = {"input": 0, "activation": 0, "weight": 0, "experts": 0}

    def record(self, record: Record) -> None:
        """Count one record."""
        if isinstance(record, CopyRecord):
            self.n_copies += 1
            self.bytes_copied += record.size_bytes
            self.bytes_by_reason[record.reason] += record.size_bytes
            if record.reason != "experts":
                self.bytes_full += record.tensor_bytes
        elif isinstance(record, UsedExpertsRecord):
            self.bytes_full += record.tensor_bytes
        elif isinstance(record, ComputeRecord):
            self.n_launches += 1
        elif isinstance(record, WaitRecord):
            self.n_waits += 1

    def __repr__(self) -> str:
        return (
            f"<Statistics: {self.bytes_copied:,} bytes in {self.n_copies} copies, {self.bytes_full:,} if whole, "
            f"{self.n_launches} launches>"
        )
