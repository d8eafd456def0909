"""`VirtualClock`: when things would happen on simulated devices.

The host makes calls in order, and each backend does its work in order. A link carries one copy at a time in each direction,
or one copy in total if the device has a single copy engine. Two devices can have a link of their own (`DeviceProfile.peer`); other
copies between devices pass through the links of both to the host. The clock receives every call of the scheduler and keeps the
times of the host, of each backend's stream and of each link. It does not depend on the machine that it runs on, so the
same calls give the same times.

Assumptions: the host waits while the CPU computes. A copy from pinned memory to a device runs in the device's stream while
the host continues; for a copy from pageable memory the host waits until it is staged; for a read the host waits until the
bytes arrive. Launches take time on the device, not on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from .cost import DeviceProfile, LinkProfile
from .hardware.formulas import Work, pageable_rate
from .hardware.hosts import Host
from .opset import NOTHING, UsedExperts, node_work
from .tensor import Tensor

__all__ = ["Reading", "Span", "VirtualClock"]

#: Calls that change the times, for `VirtualClock.taped`; those that lengthen a stream or not by what happened before; where the
#: backend is not the first argument.
_TAPED = (
    "_send", "_send_to_peer", "_read", "_copy_within", "spend", "synchronize", "event_record", "event_wait", "event_synchronize",
    "wait_until",
)  # fmt: skip
_MAY_WAIT = {"event_wait", "wait_until"}
_BACKEND_OF = {"_send": 1, "_send_to_peer": 1}
_TIMES = (
    "n_resets", "host_s", "stream_s", "busy_s", "to_device_busy_s", "from_device_busy_s", "_to_device_s", "_from_device_s",
    "_peer_s", "link_bytes", "_events", "_queue_s",
)  # fmt: skip


#: Most different works whose times are kept.
_N_WORKS = 10_000


class Span(NamedTuple):
    """An interval of virtual time, in seconds since the clock's start."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """The length of the interval."""
        return self.end_s - self.start_s


#: ``Span(start, end)`` in a third of the time, for calls that are made thousands of times.
_new = tuple.__new__


class Reading(NamedTuple):
    """A clock's numbers at one moment, or between two moments; see `VirtualClock`."""

    host_s: float
    busy_s: tuple[float, ...]
    to_device_busy_s: tuple[float, ...]
    from_device_busy_s: tuple[float, ...]

    def plus(self, after: Reading, before: Reading, weight: float = 1.0) -> Reading:
        """Return this reading plus the difference of two readings, so many times."""

        def add(own: Sequence[float], new: Sequence[float], old: Sequence[float]) -> tuple[float, ...]:
            return tuple(a + weight * (b - c) for a, b, c in zip(own, new, old, strict=True))

        return Reading(
            self.host_s + weight * (after.host_s - before.host_s),
            add(self.busy_s, after.busy_s, before.busy_s),
            add(self.to_device_busy_s, after.to_device_busy_s, before.to_device_busy_s),
            add(self.from_device_busy_s, after.from_device_busy_s, before.from_device_busy_s),
        )

    @classmethod
    def zero(cls, n: int) -> Reading:
        """Return the reading of a new clock for ``n`` backends."""
        zeros = (0.0,) * n
        return cls(0.0, zeros, zeros, zeros)


class VirtualClock:
    """The virtual times of a host and its backends.

    Parameters
    ----------
    profiles : sequence of DeviceProfile
        The profile of each backend of a scheduler, in order; the last is the host's.

    Attributes
    ----------
    host_s : float
        The host's time.
    stream_s : list of float
        When each backend will have done all submitted work.
    busy_s : list of float
        The time for which each backend computed.
    to_device_busy_s, from_device_busy_s : list of float
        The time for which each backend's link was busy, by direction.
    link_bytes : dict of (int, int) to int
        Bytes that passed between two backends, by source and target.

    Examples
    --------
    >>> from pyggml.cost import CPU_PROFILE, PROFILES
    >>> clock = VirtualClock([PROFILES["rtx4090-pcie4"], CPU_PROFILE])
    >>> span = clock.copy(1, 0, 252_000_000, is_async=True, is_pinned=True)
    >>> round(span.end_s * 1e3, 2), clock.host_s       # the link is busy for ten milliseconds; the host continues
    (9.64, 0.0)
    >>> _ = clock.synchronize(0)
    >>> round(clock.host_s * 1e3, 2)
    9.64
    """

    def __init__(self, profiles: Sequence[DeviceProfile]) -> None:
        self.profiles = list(profiles)
        self.cpu = len(self.profiles) - 1
        sheet = self.profiles[-1].sheet
        assert isinstance(sheet, Host), "the last backend is the host"
        self._pageable = pageable_rate(sheet, self.profiles[-1].rates)
        self._has_slow_host = sheet.isa == "neon"
        self._has_one_engine = [p.copy_engines == 1 for p in self.profiles]
        self._work_s: list[dict[Work, float]] = [{} for _ in self.profiles]  # of each backend
        self.n_resets = -1  #: how often it was set back since it was made
        self.reset()

    def reset(self) -> None:
        """Start again at zero."""
        self.n_resets += 1
        n = len(self.profiles)
        self.host_s = 0.0
        self.stream_s = [0.0] * n
        self.busy_s = [0.0] * n
        self.to_device_busy_s = [0.0] * n
        self.from_device_busy_s = [0.0] * n
        self._to_device_s = [0.0] * n  # when each link is free
        self._from_device_s = [0.0] * n
        self._peer_s: dict[tuple[int, int], float] = {}  # when each link between two devices is free, by direction
        self.link_bytes: dict[tuple[int, int], int] = {}
        self._events: dict[tuple[int, int], float] = {}
        self._queue_s: dict[tuple[int, int], float] = {}  # when each second queue of a backend is done

    def reading(self) -> Reading:
        """Return the current times."""
        return Reading(self.host_s, tuple(self.busy_s), tuple(self.to_device_busy_s), tuple(self.from_device_busy_s))

    def times(self) -> dict[str, Any]:
        """Return all times, for a clock of the same profiles; see `set_times`."""
        return {name: getattr(self, name) for name in _TIMES}

    def set_times(self, times: dict[str, Any]) -> None:
        """Set all times to those of another clock; the two share them afterwards."""
        vars(self).update(times)

    # -- copies --------------------------------------------------------------

    def copy(
        self,
        src: int,
        dst: int,
        n_bytes: int,
        *,
        is_async: bool,
        is_pinned: bool,
        slow_src: float = 1.0,
        slow_dst: float = 1.0,
        queue: int = 0,
    ) -> Span:
        """Copy bytes from the memory of one backend to that of another.

        Parameters
        ----------
        src, dst : int
            Indices of the backends; the last is the host.
        is_async : bool
            Whether the copy is in the receiving backend's stream; otherwise the host waits until it is done.
        is_pinned : bool
            Whether host memory at one end is pinned.
        slow_src, slow_dst : float
            The factor by which the link at either end is slower than its profile.
        queue : int
            The number of the receiving backend's queue; 0: its own stream.
        """
        at_most = math.inf if is_pinned or self.cpu not in (src, dst) else self._pageable
        if src == self.cpu != dst:  # most copies
            seconds = self.profiles[dst].link.seconds(n_bytes, at_most=at_most) * slow_dst
            host_waits = not is_async or not is_pinned
            return self._send(src, dst, seconds, queue, is_async=is_async, host_waits=host_waits, n_bytes=n_bytes)
        if dst == self.cpu:
            seconds = self.profiles[src].from_device.seconds(n_bytes, at_most=at_most) * slow_src
            return self._read(src, seconds, n_bytes=n_bytes)
        if src == dst:
            return self._copy_within(dst, n_bytes, queue, is_async=is_async)
        peer = self.peer_link(src, dst)
        if peer is not None:
            seconds = peer.seconds(n_bytes) * max(slow_src, slow_dst)
            return self._send_to_peer(src, dst, seconds, queue, is_async=is_async, n_bytes=n_bytes)
        there_s = self.profiles[dst].link.seconds(n_bytes, at_most=at_most) * slow_dst
        # through both links, at the pace of the slower
        seconds = max(there_s, self.profiles[src].from_device.seconds(n_bytes) * slow_src)
        return self._send(src, dst, seconds, queue, is_async=is_async, host_waits=not is_async, n_bytes=n_bytes)

    def _send(
        self, src: int, dst: int, seconds: float, queue: int, *, is_async: bool, host_waits: bool, n_bytes: int
    ) -> Span:
        """Copy to a device by its link to the host."""
        self.link_bytes[src, dst] = self.link_bytes.get((src, dst), 0) + n_bytes
        ready_s = self.stream_s[dst] if queue == 0 else self._queue_s.get((dst, queue), 0.0)
        start, free_s = self.host_s, self._to_device_s[dst]
        start = max(start, free_s)
        if is_async and ready_s > start:
            start = ready_s
        if src != self.cpu:
            start = max(start, self._from_device_s[src], self.stream_s[src])
            self._use_link(src, self._from_device_s, start + seconds)
            self.from_device_busy_s[src] += seconds
        end = start + seconds
        self.to_device_busy_s[dst] += seconds
        self._use_link(dst, self._to_device_s, end)
        if queue:
            self._queue_s[dst, queue] = max(ready_s, end)
        elif end > ready_s:
            self.stream_s[dst] = end
        if host_waits:
            self.host_s = end
        return _new(Span, (start, end))

    def peer_link(self, src: int, dst: int) -> LinkProfile | None:
        """Return the link that two devices have beside those to the host; None if there is none."""
        ends = [None if i == self.cpu else self.profiles[i].peer for i in (src, dst)]
        return (
            None if src == dst or None in ends else min((e for e in ends if e is not None), key=lambda e: e.bytes_per_s)
        )

    def _send_to_peer(self, src: int, dst: int, seconds: float, queue: int, *, is_async: bool, n_bytes: int) -> Span:
        """Copy from device to device by their own link."""
        self._count(src, dst, n_bytes)
        start = max(self.host_s, self._peer_s.get((src, dst), 0.0), self.stream_s[src])
        if is_async:
            start = max(start, self.ready_s(dst, queue))
        end = self._peer_s[src, dst] = start + seconds
        self._set_ready(dst, queue, max(self.ready_s(dst, queue), end))
        if not is_async:
            self.host_s = end
        return Span(start, end)

    def _count(self, src: int, dst: int, n_bytes: int) -> None:
        self.link_bytes[src, dst] = self.link_bytes.get((src, dst), 0) + n_bytes

    def engines(self, src: int, dst: int) -> list[tuple[int, int]]:
        """Return the copy engines for a copy between two backends, each as backend and engine number.

        A copy within a device uses its memory and no engine.
        """
        if src == dst:
            return []
        ends = [(dst, 0), (src, 0 if self.profiles[src].copy_engines == 1 else 1)]
        if self.peer_link(src, dst) is not None:
            ends = ends[1:]  # the source's engine writes to the other device
        return [(backend, engine) for backend, engine in ends if backend != self.cpu]

    def _copy_within(self, backend: int, n_bytes: int, queue: int, *, is_async: bool) -> Span:
        """Copy within a device: its memory reads and writes the bytes, without a link."""
        seconds = self.profiles[backend].seconds(Work(read_bytes=2.0 * n_bytes))
        start = max(self.host_s, self.ready_s(backend, queue))
        end = start + seconds
        self.busy_s[backend] += seconds
        self._set_ready(backend, queue, end)
        if not is_async:
            self.host_s = end
        return Span(start, end)

    def ready_s(self, backend: int, queue: int = 0) -> float:
        """Return when a backend's stream, or one of its other queues, will have done all submitted work."""
        return self.stream_s[backend] if queue == 0 else self._queue_s.get((backend, queue), 0.0)

    def _set_ready(self, backend: int, queue: int, when_s: float) -> None:
        if queue == 0:
            self.stream_s[backend] = when_s
        else:
            self._queue_s[backend, queue] = when_s

    def _use_link(self, backend: int, way: list[float], until_s: float) -> None:
        """Use a link in one direction; with a single copy engine the other direction is busy as well."""
        way[backend] = until_s
        if self._has_one_engine[backend]:
            self._to_device_s[backend] = self._from_device_s[backend] = until_s

    def _read(self, src: int, seconds: float, *, n_bytes: int) -> Span:
        """Copy to the host, which waits for it."""
        start = self.host_s
        if src != self.cpu:
            self._count(src, self.cpu, n_bytes)
            start = max(start, self._from_device_s[src])
        end = start + seconds
        if src != self.cpu:
            self._use_link(src, self._from_device_s, end)
            self.from_device_busy_s[src] += end - start
        self.host_s = end
        return Span(start, end)

    # -- work ----------------------------------------------------------------

    def compute(self, backend: int, nodes: Iterable[Tensor], used_experts: UsedExperts) -> Span:
        """Submit nodes to a backend."""
        return self.spend(backend, self.seconds(backend, nodes, used_experts))

    def spend(self, backend: int, seconds: float) -> Span:
        """Submit work of a given time to a backend."""
        if backend == self.cpu:
            start = self.host_s
            self.host_s = self.stream_s[backend] = start + seconds
        else:
            start = max(self.host_s, self.stream_s[backend])
            self.stream_s[backend] = start + seconds
        self.busy_s[backend] += seconds
        return _new(Span, (start, start + seconds))

    def seconds(self, backend: int, nodes: Iterable[Tensor], used_experts: UsedExperts) -> float:
        """Return the time that a backend needs for nodes."""
        known, total = self._work_s[backend], 0.0
        for node in nodes:
            work = NOTHING if node.op.is_empty else node_work(node, used_experts)
            if work is not NOTHING:
                seconds = known.get(work)
                total += self._keep_seconds(backend, work) if seconds is None else seconds
        return total

    def _keep_seconds(self, backend: int, work: Work) -> float:
        """Return how long a backend needs for work; equal layers have equal work."""
        known = self._work_s[backend]
        if len(known) >= _N_WORKS:
            known.clear()
        seconds = known[work] = self.profiles[backend].seconds(work, slow_host=self._has_slow_host)
        return seconds

    def copy_seconds(self, backend: int, n_bytes: int, *, is_pinned: bool) -> float:
        """Return how long one copy from host memory to a backend takes on an idle link."""
        at_most = math.inf if is_pinned else self._pageable
        return self.profiles[backend].link.seconds(n_bytes, at_most=at_most)

    # -- waits ---------------------------------------------------------------

    def synchronize(self, backend: int) -> Span:
        """Make the host wait for all submitted work of a backend."""
        start, when_s = self.host_s, self.stream_s[backend]
        if when_s > start:
            self.host_s = when_s
        return _new(Span, (start, self.host_s))

    def event_record(self, backend: int, copy: int) -> Span:
        """Mark the work that a backend has so far, and return the moment at which it will be done."""
        when_s = self._events[backend, copy] = self.stream_s[backend]
        return Span(when_s, when_s)

    def event_wait(self, backend: int, of: int, copy: int) -> Span:
        """Make a backend wait for a mark."""
        start = self.stream_s[backend]
        self.stream_s[backend] = max(start, self._events.get((of, copy), 0.0))
        return Span(start, self.stream_s[backend])

    def event_synchronize(self, backend: int, copy: int) -> Span:
        """Make the host wait for a mark."""
        return self._host_until(self._events.get((backend, copy), 0.0))

    def wait_until(self, backend: int | None, when_s: float, queue: int = 0) -> Span:
        """Make a backend's stream or queue, or the host (None), wait until a time."""
        if backend is None:
            return self._host_until(when_s)
        start = self.ready_s(backend, queue)
        self._set_ready(backend, queue, max(start, when_s))
        return Span(start, max(start, when_s))

    def _host_until(self, when_s: float) -> Span:
        start = self.host_s
        if when_s > start:
            self.host_s = when_s
        return Span(start, self.host_s)

    @contextmanager
    def taped(self) -> Iterator[list[Callable[[], Span]]]:
        """Collect the calls within the block, so that the same can be made again.

        Yields
        ------
        list of callable
            The calls, without waits for a stream that has no new work since the last one.
        """
        calls: list[Callable[[], Span]] = []
        waited: set[int] = set()  # backends for all of whose work the host has waited

        def taping(name: str) -> Callable[..., Span]:
            method: Callable[..., Span] = getattr(self, name)

            def call(*args: Any, **more: Any) -> Span:
                span = method(*args, **more)
                backend = args[_BACKEND_OF.get(name, 0)]
                if name != "synchronize" or backend not in waited:
                    calls.append(partial(method, *args, **more))
                if backend in waited and (name in _MAY_WAIT or self.stream_s[backend] > self.host_s):
                    waited.remove(backend)
                elif name == "synchronize":
                    waited.add(backend)
                return span

            return call

        vars(self).update({name: taping(name) for name in _TAPED})
        try:
            yield calls
        finally:
            for name in _TAPED:
                del vars(self)[name]
