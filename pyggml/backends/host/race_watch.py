"""Hazards: memory of a simulated device, or of the host, that two pieces of work touch, at least one writes, and no wait orders.

Whether work happens to be done in a wrong order depends on the seed; whether anything orders it does not. So each piece
of work leaves what it touches, and the next that touches the same is checked against the waits alone: those of the host,
and those of streams for each other. What the host has waited for is forgotten. Each device watches its own memory; `HOST`
watches the host's, which streams read and write behind the host's back, and tells the devices whose streams did.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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
    """Two uses of the same memory in no order."""

    earlier: str  #: what was given first: who reads or writes which tensor
    later: str
    missing: str  #: the wait that would order them

    def __str__(self) -> str:
        return f"{self.later}, but {self.earlier}, and {self.missing}"


class Access(NamedTuple):
    """Bytes that a piece of work reads or writes."""

    what: str  #: whose bytes, for people
    start: int
    end: int
    is_write: bool
    by: str  #: the node that is computed; empty for a copy

    def text(self, who: str) -> str:
        """Return who does what, for people."""
        verb = "writes" if self.is_write else "reads"
        return f"{who} {verb} {self.what}" + (f" in {self.by}" if self.by else "")


class _Sorted:
    """Accesses by where they begin, so that those which meet another are found at once."""

    __slots__ = ("accesses", "ends", "starts")

    def __init__(self, accesses: Iterable[Access]) -> None:
        self.accesses = sorted(accesses, key=lambda access: access.start)
        self.starts = [access.start for access in self.accesses]
        self.ends = list(accumulate((access.end for access in self.accesses), max))  # the largest so far

    def meeting(self, other: Access) -> Iterator[Access]:
        """Yield those that share a byte with another."""
        i = bisect_left(self.starts, other.end) - 1
        while i >= 0 and self.ends[i] > other.start:
            if self.accesses[i].end > other.start:
                yield self.accesses[i]
            i -= 1


class Stream:
    """What orders the work of one stream.

    Attributes
    ----------
    n_host : int
        Pieces of work that the host has waited for.
    waits : list of (int, Stream, int)
        Which piece waits for another stream, and for how much of it.
    watch : HazardWatch or None
        Of its device.
    """

    __slots__ = ("__weakref__", "n_host", "name", "waits", "watch")

    def __init__(self, name: str, watch: HazardWatch | None = None) -> None:
        self.name, self.watch = name, watch
        self.n_host = 0
        self.waits: list[tuple[int, Stream, int]] = []

    def host_waits(self, n: int) -> None:
        """Take note that the host waits for n pieces, and so for all that they waited for."""
        if not self.waits:
            self.n_host = max(self.n_host, n)
            return
        for stream, reached in self.before(n).items():
            stream.n_host = max(stream.n_host, reached)
            stream.waits = [wait for wait in stream.waits if wait[0] > reached]

    def before(self, n: int) -> dict[Stream, int]:
        """Return how much of each stream is done once n pieces of this one are, by waits of streams alone."""
        found: dict[Stream, int] = {}
        todo: list[tuple[Stream, int]] = [(self, n)]
        while todo:
            stream, reached = todo.pop()
            if found.get(stream, -1) < reached:
                found[stream] = reached
                todo += [(other, m) for at, other, m in stream.waits if at <= reached]
        return found


class HazardWatch:
    """What work that the host did not wait for does with the memory of one device.

    Attributes
    ----------
    hazards : list of Hazard
        Found so far, each once.
    """

    def __init__(self) -> None:
        self.hazards: list[Hazard] = []
        self._pending: WeakKeyDictionary[Stream, deque[tuple[int, Access]]] = WeakKeyDictionary()

    def by_stream(self, stream: Stream, n: int, accesses: Iterable[Access]) -> None:
        """Take note of what the n-th piece of work of a stream does."""
        kept = list(accesses)
        self._check(kept, stream.before(n), stream)
        self._pending.setdefault(stream, deque()).extend((n, access) for access in kept)

    def by_host(self, accesses: Sequence[Access]) -> None:
        """Take note of what the host does now; all work that comes later comes after it."""
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

    def _found(self, hazard: Hazard, earlier: Stream, later: Stream | None) -> None:
        self.add(hazard)

    def add(self, hazard: Hazard) -> None:
        """Keep a hazard, once."""
        if hazard not in self.hazards:
            self.hazards.append(hazard)


class HostWatch(HazardWatch):
    """What streams of all devices do with the host's memory while the host does not wait for them."""

    @property
    def is_busy(self) -> bool:
        """Whether there is such work; if not, nothing that the host does matters."""
        return bool(self._pending)

    def _found(self, hazard: Hazard, earlier: Stream, later: Stream | None) -> None:
        for stream in (earlier, later):
            if stream is not None and stream.watch is not None:
                stream.watch.add(hazard)


#: Of this process; streams are in it only while a device that works late has work.
HOST = HostWatch()


def accesses_of(graph: GraphView) -> list[Access]:
    """Return what computing a range of nodes reads and writes."""
    found: dict[Access, None] = {}
    for node in graph.nodes:
        if node.flags & TensorFlag.COMPUTE and not node.op.is_empty and not node.is_empty:
            by = f"{node.op_desc} '{node.name}'"
            for src in node.src:
                if src is not None and not src.is_empty:
                    found[access_to(src, is_write=False, by=by)] = None
            found[access_to(node, is_write=True, by=by)] = None
    return list(found)


def access_to(tensor: Tensor, *, is_write: bool, offset: int = 0, size: int | None = None, by: str = "") -> Access:
    """Return the use of some bytes of a tensor, of all if no size is given."""
    assert tensor.data is not None
    start = tensor.data + offset
    return Access(f"'{tensor.name}'", start, start + (tensor.nbytes if size is None else size), is_write, by)


def host_access(address: int, size: int, tensor: Tensor, *, is_write: bool) -> Access:
    """Return the use of host memory at the other end of a copy from or to a device's tensor."""
    way = "from" if is_write else "for"
    return Access(f"host memory {way} '{tensor.name}'", address, address + size, is_write, "")
