"""What a scheduler keeps from one graph to the next: backend ids by position, and the latest allocation."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from ..buffer import BufferType
from ..graph import Graph
from .plan import Plan

__all__ = ["IdTable", "KeptAlloc"]

_flags_of = attrgetter("flags")


def _flags(graph: Graph) -> list[int]:
    """Return the leafs' flags; those of nodes are in the scheduler's `Snapshot`."""
    return list(map(_flags_of, graph.leafs))


class KeptAlloc:
    """An allocation that `reset` removed, with the conditions under which it is still valid."""

    __slots__ = ("buffers", "flags", "plan", "rules", "version")

    def __init__(self, plan: Plan, rules: tuple[object, ...]) -> None:
        self.plan, graph = plan, plan.graph
        self.version = graph.version
        self.flags = _flags(graph)
        self.buffers = [leaf.buffer for leaf in graph.leafs]
        self.rules = rules

    def serves(self, graph: Graph, rules: tuple[object, ...]) -> bool:
        """Return whether nothing has changed since. Pins apply to one graph only."""
        return (
            self.plan.graph is graph
            and self.version == graph.version
            and not self.plan.assignment.has_pins
            and self.rules == rules
            and self.flags == _flags(graph)
            and self.buffers == [leaf.buffer for leaf in graph.leafs]
        )


class IdTable:
    """Backend ids by position in the graph, like upstream's arrays: a shorter graph leaves the rest unchanged."""

    __slots__ = ("ids",)

    def __init__(self) -> None:
        self.ids: list[int] = []

    def write(self, ids: Sequence[int]) -> None:
        """Write the ids of a graph over those of the previous graph."""
        self.ids[: len(ids)] = ids

    def moved(self, previous: IdTable, n: int, bufts: Sequence[BufferType]) -> bool:
        """Return whether one of the first n positions has another buffer type than in the previous graph.

        No backend (-1) counts as another buffer type: upstream reads before its array, where there is no buffer type.
        """
        if self.ids[:n] == previous.ids[:n]:
            return False
        before = previous.ids[:n] + [0] * (n - len(previous.ids))
        return any(
            a != b and (min(a, b) < 0 or bufts[a] is not bufts[b]) for a, b in zip(self.ids[:n], before, strict=True)
        )
