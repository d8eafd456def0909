"""The table of a plan's expert cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._console import n_bytes, n_seconds, report, table

if TYPE_CHECKING:
    from ..cache_plan import ExpertCachePlan

__all__ = ["print_cache"]

_COLUMNS = ("layers", "slots", "of experts", "memory", "hits", "uploads/token", "on the link")


def print_cache(plan: ExpertCachePlan) -> None:
    """Print slots, memory and expected hits of each group."""
    console = report()
    console.print()
    title = f"llama.cpp's expert cache, {n_bytes(plan.size_bytes)}, {plan.eviction}: generation with the routing above"
    made = table(title, "device", "type", *_COLUMNS, right=_COLUMNS)
    for f in plan.groups:
        g, c = f.group, f.counters
        made.add_row(
            f.device, str(g.experts[-1].layout[0]), str(len(g.layers)), f"{g.n_slots:,}", f"{g.share:.1%}",
            n_bytes(f.bank_bytes), "-" if c.hit_rate is None else f"{c.hit_rate:.1%}",
            "-" if not f.n_tokens else n_bytes(c.uploaded_bytes // f.n_tokens),
            "-" if f.upload_s is None else n_seconds(f.upload_s),
        )  # fmt: skip
    console.print(made)
    n = max((f.n_tokens for f in plan.groups), default=0)
    console.print(
        f"Over {n} tokens from an empty cache, one per step. Its memory is counted with the KV cache. "
        "The splits, copies and times above do not use the cache."
    )
