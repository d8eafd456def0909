"""Tables that several commands show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._console import Bar, n_bytes, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..plan_report import MemoryFit

__all__ = ["memory_table", "too_large"]


def memory_table(fits: Sequence[MemoryFit]) -> Table:
    """Return the memory of each buffer type, and its share of the device's memory."""
    has_sizes = any(f.total_bytes for f in fits)
    own = ("copy policy",) if any(fit.memory.policy for fit in fits) else ()
    columns = ("buffer type", "weights", "KV cache", "compute", *own, "total", "of device")
    made = table("Memory", *columns, *([""] if has_sizes else []), right=columns[1:])
    for f in fits:
        m = f.memory
        sizes = [
            n_bytes(n) if n else "-" for n in (m.weights, m.cache, m.compute, *([m.policy] if own else []), m.total)
        ]
        share = None if f.total_bytes is None else f.needed_bytes / f.total_bytes
        style = "red" if f.missing_bytes else None
        made.add_row(m.buft, *sizes, *(("-", "") if share is None else (f"{share:.1%}", Bar(share))), style=style)
    return made


def too_large(fits: Sequence[MemoryFit]) -> list[str]:
    """Return a sentence for each device with too little memory."""
    return [
        f"Does not fit: {f.backend} has {n_bytes(f.total_bytes)}, the plan needs {n_bytes(f.needed_bytes)}: "
        f"{n_bytes(f.missing_bytes)} are missing."
        for f in fits
        if f.missing_bytes and f.total_bytes is not None
    ]
