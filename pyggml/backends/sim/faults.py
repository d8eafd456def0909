"""Faults of a simulated device: the moments at which it fails, and slow links."""

from __future__ import annotations

from typing import Any, Literal, get_args

from ...errors import GraphError

__all__ = ["Faults", "Moment"]

#: Calls that are counted and can fail: allocations, copies, computes; ``lost`` is before any of them.
Moment = Literal["alloc", "copy", "compute", "lost"]


class Faults:
    """The pending faults, and the counts so far.

    Attributes
    ----------
    counts : dict
        How often each moment has come.
    is_quiet : bool
        Whether no fault is pending.
    """

    def __init__(self) -> None:
        self.counts: dict[Moment, int] = dict.fromkeys(get_args(Moment), 0)
        self.is_quiet = True
        self._pending: dict[Moment, set[int]] = {moment: set() for moment in self.counts}
        self._slow_from: dict[int, float] = {}  #: factors, by the copy from which on they hold
        self._slowdown, self._n_carried = 1.0, 0

    def ask(self, moment: Moment, after: int) -> None:
        """Make a moment fail once, after ``after`` more of its kind.

        Raises
        ------
        GraphError
            There is no such moment, or ``after`` is negative.
        """
        if moment not in self._pending:
            raise GraphError(f"nothing fails at {moment!r}", hint=f"there are {', '.join(self._pending)}")
        if after < 0:
            raise GraphError(f"nothing can fail {-after} calls ago")
        self._pending[moment].add(self.counts[moment] + after)
        self.is_quiet = False

    def comes(self, moment: Moment) -> bool:
        """Count a moment, and return whether it fails."""
        count = self.counts[moment]
        self.counts[moment] = count + 1
        if count not in self._pending[moment]:
            return False
        self._pending[moment].remove(count)
        self.is_quiet = not any(self._pending.values())
        return True

    def slow_down(self, factor: float, after: int) -> None:
        """Make copies take ``factor`` times as long, after ``after`` more copies."""
        self._slow_from[self._n_carried + after] = factor

    def next_slowdown(self) -> float:
        """Count a copy, and return its slow-down factor."""
        self._slowdown = self._slow_from.pop(self._n_carried, self._slowdown)
        self._n_carried += 1
        return self._slowdown

    @property
    def is_clear(self) -> bool:
        """Whether no fault is pending and links have their speed."""
        return self.is_quiet and not self._slow_from and self._slowdown == 1.0

    def counters(self) -> list[tuple[Any, str]]:
        """Return what is counted: an object and the name of the attribute, or a dict and the key."""
        return [(self.counts, moment) for moment in self.counts] + [(self, "_n_carried")]

    def clear(self) -> None:
        """Remove all pending faults, and restore the speed of the link."""
        for pending in self._pending.values():
            pending.clear()
        self.is_quiet = True
        self._slow_from.clear()
        self._slowdown = 1.0
