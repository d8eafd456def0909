"""Finds hazards: two accesses to memory of a simulated device or the host, at least one a write, that no wait orders.

The order in which late work is done depends on the seed, but the waits do not. So the accesses of each piece of work
are recorded, and a later access to the same bytes is checked against the waits of the host and of streams. Work that
the host has waited for is forgotten. Each device has a watch of its own memory; `HOST` watches host memory, which
streams access while the host continues, and reports hazards to the devices of these streams.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ...graph import GraphView
from ...tensor import Tensor
from ...types import TensorFlag

__all__ = ["HOST", "Access", "Hazard", "HazardWatch", "HostWatch", "Stream", "access_to", "accesses_of", "host_access"]


@dataclass(frozen=True, slots=True)
class Hazard:
    """Two accesses to the same memory that no wait orders."""

    earlier: str  #: the access that was submitted first: who reads or writes which tensor
    later: str
    missing: str  #: the wait that would order them

    def __str__(self) -> str:
        return f"{self.later}, but {self.earlier}, and {self.missing}"


class Access(NamedTuple):
    """Bytes that a piece of work reads or writes."""

    what: str  #: name of the tensor, for people
    start: int
    end: int
    is_write: bool
    by: str  #: the node that is computed; empty for a copy

    def text(self, who: str) -> str:
        """Return a description of the access by ``who``, for people."""
        verb = "writes" if self.is_write else "reads"
        return f"{who} {verb} {self.what}" + (f" in {self.by}" if self.by else "")


class _Sorted:
    """Accesses sorted by their first byte, with fast look-up of overlaps."""

    __slots__ = ("accesses", "ends", "starts")

    def __init__(self, accesses: Iterable[Access]) -> None:
        self.accesses = sorted(accesses, key=lambda access: access.start)
        self.starts = [access.start for access in self.accesses]
        self.ends = list(accumulate((access.end for access in self.accesses), max))  # the largest end so far

    def meeting(self, other: Access) -> Iterator[Access]:
        """Yield the accesses that overlap ``other``."""
        i = bisect_left(self.starts, other.end) - 1
        while i >= 0 and self.ends[i] > other.start:
            if self.accesses[i].end > other.start:
                yield self.accesses[i]
            i -= 1


class Stream:
    """The waits that order the work of a stream.

    Attributes
    ----------
    n_host : int
        Pieces of work that the host has waited for.
    waits : list of (int, Stream, int)
        A piece of work, the stream that it waits for, and the number of that stream's pieces.
    watch : HazardWatch or None
        The watch of its device.
    """

    __slots__ = ("__weakref__", "n_host", "name", "waits", "watch")

    def __init__(self, name: str, watch: HazardWatch | None = None) -> None:
        self.name, self.watch = name, watch
        self.n_host = 0
        self.waits: list[tuple[int, Stream, int]] = []

    def host_waits(self, n: int) -> None:
        """Record that the host waits for n pieces, and for all work that these waited for."""
        if not self.waits:
            self.n_host = max(self.n_host, n)
            return
        for stream, reached in self.before(n).items():
            stream.n_host = max(stream.n_host, reached)
            stream.waits = [wait for wait in stream.waits if wait[0] > reached]

    def before(self, n: int) -> dict[Stream, int]:
        """Return the pieces of each stream that are done once n pieces of this one are, by waits between streams."""
        found: dict[Stream, int] = {}
        todo: list[tuple[Stream, int]] = [(self, n)]
        while todo:
            stream, reached = todo.pop()
            if found.get(stream, -1) < reached:
                found[stream] = reached
                todo += [(other, m) for at, other, m in stream.waits if at <= reached]
        return found


class HazardWatch:
    """Accesses to one device's memory by work that the host has not waited for.

    Attributes
    ----------
    hazards : list of Hazard
        Hazards found so far, each once.
    is_busy : bool
        Whether there may be such work; without it, accesses of the host need no check.
    """

    def __init__(self) -> None:
        self.hazards: list[Hazard] = []
        self.is_busy = False
        self._pending: WeakKeyDictionary[Stream, deque[tuple[int, Access]]] = WeakKeyDictionary()

    def by_stream(self, stream: Stream, n: int, accesses: Iterable[Access]) -> None:
        """Record the accesses of the n-th piece of work of a stream."""
        kept = list(accesses)
        self._check(kept, stream.before(n), stream)
        self._pending.setdefault(stream, deque()).extend((n, access) for access in kept)
        self.is_busy = True

    def by_host(self, accesses: Sequence[Access]) -> None:
        """Check accesses of the host; all later work is ordered after them."""
        self._check(accesses, {}, None)

    def _check(self, accesses: Sequence[Access], before: dict[Stream, int], stream: Stream | None) -> None:
        who = "the host" if stream is None else stream.name
        ranges: _Sorted | None = None
        for other, pending in list(self._pending.items()):
            while pending and pending[0][0] <= other.n_host:
                pending.popleft()
            if not pending:
                del self._pending[other]
            if other is stream:
                continue
            reached = before.get(other, 0)
            if ranges is None:
                ranges = _Sorted(accesses)
            for n, first in pending:
                if n <= reached:
                    continue
                for then in ranges.meeting(first):
                    if first.is_write or then.is_write:
                        missing = f"{who} does not wait for {other.name}"
                        self._found(Hazard(first.text(other.name), then.text(who), missing), other, stream)
        self.is_busy = bool(self._pending)

    def _found(self, hazard: Hazard, earlier: Stream, later: Stream | None) -> None:
        self.add(hazard)

    def add(self, hazard: Hazard) -> None:
        """Add a hazard, unless it is known."""
        if hazard not in self.hazards:
            self.hazards.append(hazard)


class HostWatch(HazardWatch):
    """Accesses to host memory by streams of all devices that the host has not waited for."""

    def _found(self, hazard: Hazard, earlier: Stream, later: Stream | None) -> None:
        for stream in (earlier, later):
            if stream is not None and stream.watch is not None:
                stream.watch.add(hazard)


#: The watch of this process's memory; it has streams only while a late device has work.
HOST = HostWatch()


#: One part: all bytes.
_WHOLE: Sequence[tuple[int, int | None]] = ((0, None),)


def accesses_of(graph: GraphView, parts_read: Mapping[Tensor, Sequence[tuple[int, int]]] | None = None) -> list[Access]:
    """Return the accesses of computing a range of nodes; of some tensors only parts are read (offset, size)."""
    found: dict[Access, None] = {}
    for node in graph.nodes:
        if node.flags & TensorFlag.COMPUTE and not node.op.is_empty and not node.is_empty:
            by = f"{node.op_desc} '{node.name}'"
            for src in node.src:
                if src is None or src.is_empty:
                    continue
                for offset, size in parts_read.get(src, _WHOLE) if parts_read else _WHOLE:
                    found[access_to(src, is_write=False, offset=offset, size=size, by=by)] = None
            found[access_to(node, is_write=True, by=by)] = None
    return list(found)


def access_to(tensor: Tensor, *, is_write: bool, offset: int = 0, size: int | None = None, by: str = "") -> Access:
    """Return the access to bytes of a tensor, by default to all."""
    assert tensor.data is not None
    start = tensor.data + offset
    return Access(f"'{tensor.name}'", start, start + (tensor.nbytes if size is None else size), is_write, by)


def host_access(address: int, size: int, tensor: Tensor, *, is_write: bool) -> Access:
    """Return the access to host memory of a copy from or to a device's tensor."""
    way = "from" if is_write else "for"
    return Access(f"host memory {way} '{tensor.name}'", address, address + size, is_write, "")
