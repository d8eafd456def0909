"""`Ranges`: the copied bytes of an input copy."""

from __future__ import annotations

from bisect import bisect_right

__all__ = ["Ranges"]


class Ranges:
    """Bytes of a copy, as ascending ranges that do not touch."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Add bytes ``start .. end - 1``."""
        i = bisect_right(self.starts, start)
        if i > 0 and self.ends[i - 1] >= start:
            i -= 1
            start = self.starts[i]
        j = i
        while j < len(self.starts) and self.starts[j] <= end:
            end = max(end, self.ends[j])
            j += 1
        self.starts[i:j] = [start]
        self.ends[i:j] = [end]

    def first_hole(self, start: int, end: int) -> int | None:
        """Return the first missing byte of ``start .. end - 1``; None if all were added."""
        i = bisect_right(self.starts, start) - 1
        reached = max(start, self.ends[i]) if i >= 0 else start
        return None if reached >= end else reached
