"""Policies for what may enter a cache; each is an `Admission`. A miss that may not enter is read but not kept."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from ..errors import GraphError
from ..kernels.lab import slots as compiled
from .cache import Admission

__all__ = ["AtMost", "Hotter", "NOfM", "NextStep", "parse_admission"]


class NOfM(Admission):
    """A key enters at its ``n``-th use within the last ``m`` events of the pool."""

    must_admit = False

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self._uses: dict[int, deque[int]] = {}
        self._t = -1

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Count the uses of an event's keys."""
        self._t += 1
        for key in keys:
            uses = self._uses.setdefault(key, deque())
            uses.append(self._t)
            while uses[0] <= self._t - self.m:
                uses.popleft()

    def numbers(self) -> tuple[int, int, int, float]:
        """Return the numbers of the compiled replay."""
        return compiled.N_OF_M, self.n, self.m, 1.0

    def may_enter(self, key: int, victim: int | None) -> bool:
        """Return whether a key was used often enough."""
        return len(self._uses.get(key, ())) >= self.n


class Hotter(Admission):
    """A key enters if it was used more than the victim, counts halving every ``half_life`` events of the pool."""

    must_admit = False

    def __init__(self, half_life: float = 64.0) -> None:
        self.half_life = half_life
        self._heat: dict[int, tuple[float, int]] = {}
        self._t = -1

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Add a use to each key of an event."""
        self._t += 1
        for key in keys:
            self._heat[key] = (self._now(key) + 1.0, self._t)

    def numbers(self) -> tuple[int, int, int, float]:
        """Return the numbers of the compiled replay."""
        return compiled.HOTTER, 1, 1, self.half_life

    def may_enter(self, key: int, victim: int | None) -> bool:
        """Return whether there is room, or a colder victim."""
        return victim is None or self._now(key) > self._now(victim)

    def _now(self, key: int) -> float:
        heat, t = self._heat.get(key, (0.0, 0))
        return heat * math.exp2((t - self._t) / self.half_life)


class AtMost(Admission):
    """At most ``n`` keys enter in a step."""

    must_admit = False

    def __init__(self, n: int) -> None:
        self.n = n
        self._step: int | None = None
        self._entered = 0

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Start counting again with each step."""
        if step != self._step:
            self._step, self._entered = step, 0

    def numbers(self) -> tuple[int, int, int, float]:
        """Return the numbers of the compiled replay."""
        return compiled.AT_MOST, self.n, 1, 1.0

    def may_enter(self, key: int, victim: int | None) -> bool:
        """Return whether the step has let in fewer."""
        if self._entered >= self.n:
            return False
        self._entered += 1
        return True


class NextStep(Admission):
    """Misses are loaded during the step and can be hit from the next step on."""

    must_admit = False
    publishes_next_step = True

    def numbers(self) -> tuple[int, int, int, float]:
        """Return the numbers of the compiled replay."""
        return compiled.NEXT_STEP, 1, 1, 1.0


def parse_admission(text: str) -> Admission:
    """Return the admission that a text names: ``always``, ``2of8``, ``hotter``, ``hotter:64``, ``atmost:2`` or ``next``.

    Raises
    ------
    GraphError
        There is no such admission.
    """
    kind, _, value = text.partition(":")
    try:
        if text in ("", "always"):
            return Admission()
        if text == "next":
            return NextStep()
        if kind == "hotter" and (not value or float(value) > 0):
            return Hotter(float(value) if value else 64.0)
        if kind == "atmost" and int(value) > 0:
            return AtMost(int(value))
        n, of, m = text.partition("of")
        if of and 0 < int(n) <= int(m):
            return NOfM(int(n), int(m))
    except ValueError:
        pass
    raise GraphError(f"there is no admission '{text}'", hint="always, 2of8, hotter, hotter:64, atmost:2, next")
