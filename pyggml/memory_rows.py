"""`Memory`: the bytes of one buffer type in a session or a plan; `MemoryRows`: of all."""

from __future__ import annotations

from dataclasses import dataclass

from .notebook import html_table

__all__ = ["Memory", "MemoryRows"]


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes that a session uses, or a plan would use, of one buffer type."""

    buft: str
    weights: int
    cache: int
    compute: int
    policy: int = 0  #: memory of the copy policy

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return self.weights + self.cache + self.compute + self.policy


class MemoryRows(list[Memory]):
    """The memory of a session or plan, one row for each buffer type; notebooks show a table."""

    def _repr_html_(self) -> str:
        """Return the rows as a table, for notebooks."""
        own = ("copy policy",) if any(m.policy for m in self) else ()
        columns = ("buffer type", "weights", "KV cache", "compute", *own, "total")
        parts = [(m.buft, m.weights, m.cache, m.compute, *([m.policy] if own else []), m.total) for m in self]
        rows = ((buft, *(f"{n:,}" for n in sizes)) for buft, *sizes in parts)
        return html_table("Memory, bytes", columns, rows, n_rows=len(self), right=columns[1:])
