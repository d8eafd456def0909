"""What a device waited for: the times in which it did not compute, and the activities during them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Activity", "BackendTime", "device_times", "merge", "overlap", "subtract"]

#: Start and end, in any unit.
Interval = tuple[int, int]


class Activity(NamedTuple):
    """Something that took time: a launch, a copy, a read."""

    what: str  #: ``compute``, the reason of a copy, ``read`` or ``plan``
    src: str  #: the backend that computes, or from which bytes are copied
    dst: str  #: the backend to which bytes are copied; otherwise empty
    start: int
    end: int


class BackendTime(NamedTuple):
    """How a backend spent its time; the parts add up to ``total``."""

    backend: str
    total: int
    computing: int
    waits: dict[str, int]  #: by the activity during the wait, in the order of `_claims`


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals, ascending, without empty ones.

    Examples
    --------
    >>> merge([(4, 6), (0, 2), (1, 3), (5, 5)])
    [(0, 3), (4, 6)]
    """
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Return the intersection of two unions.

    Examples
    --------
    >>> overlap([(0, 3), (4, 6)], [(2, 5)])
    [(2, 3), (4, 5)]
    """
    found: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Return the part of one union that is not in another.

    Examples
    --------
    >>> subtract([(0, 6)], [(1, 2), (5, 9)])
    [(0, 1), (2, 5)]
    """
    left: list[Interval] = []
    j = 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        k, at = j, start
        while k < len(b) and b[k][0] < end:
            if b[k][0] > at:
                left.append((at, b[k][0]))
            at = max(at, b[k][1])
            k += 1
        if at < end:
            left.append((at, end))
    return left


def _claims(activity: Activity, backend: str) -> tuple[int, str] | None:
    """Return rank and name of an activity as the reason why an idle backend waits; None if it is not one.

    Of several activities the one with the lowest rank counts: copies to the backend, then reads from it, then
    work of other backends.
    """
    what, src, dst, *_ = activity
    copies = ("experts", "weight", "activation", "input")
    if what in copies:
        if dst == backend:
            return copies.index(what), what
        return (5, "out") if src == backend else (7, "elsewhere")
    if what == "read":
        return (4, "out") if src == backend else (7, "elsewhere")
    if what == "compute":
        return (6, f"compute {src}") if src != backend else None
    return 8, what


def device_times(
    activities: Sequence[Activity], backends: Iterable[str], windows: Sequence[Interval]
) -> list[BackendTime]:
    """Return how each backend spent its time within windows.

    Parameters
    ----------
    activities : sequence of Activity
        Of all backends, in any order.
    backends : iterable of str
        Names of the backends.
    windows : sequence of (int, int)
        The times to count: a union from `merge`.

    Examples
    --------
    >>> copy, work = Activity("experts", "CPU", "GPU", 0, 6), Activity("compute", "GPU", "", 5, 8)
    >>> device_times([copy, work], ["GPU"], [(0, 10)])
    [BackendTime(backend='GPU', total=10, computing=3, waits={'experts': 5, 'host': 2})]
    """
    total = _length(windows)
    times = []
    for backend in backends:
        own = merge((a.start, a.end) for a in activities if a.what == "compute" and a.src == backend)
        idle = subtract(windows, own)
        by_claim: dict[tuple[int, str], list[Interval]] = {}
        for activity in activities:
            claim = _claims(activity, backend)
            if claim is not None:
                by_claim.setdefault(claim, []).append((activity.start, activity.end))
        computing = total - _length(idle)
        waits: dict[str, int] = {}
        for (_, what), intervals in sorted(by_claim.items()):
            meanwhile = merge(intervals)
            n = _length(overlap(idle, meanwhile))
            if n:
                waits[what] = waits.get(what, 0) + n
                idle = subtract(idle, meanwhile)
        if idle:
            waits["host"] = _length(idle)
        times.append(BackendTime(backend, total, computing, waits))
    return times


def _length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)
