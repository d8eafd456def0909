"""`pyggml splits --dialect OLD,NEW`: what an upgrade of ggml changes, as a table or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..dialect import Dialect
from ._console import n_bytes, n_seconds, print_json, report, table

if TYPE_CHECKING:
    from ..models.batch import Outputs
    from ..routing import Routing
    from ..upgrade import DialectCost, OpenPlanner

__all__ = ["print_upgrades"]

_COLUMNS = ("splits", "copies", "bytes", "waits", "seconds", "compute buffers")


def print_upgrades(
    open_planner: OpenPlanner,
    sizes: Sequence[int],
    dialects: Sequence[Dialect],
    *,
    outputs: Outputs,
    routing: Routing,
    as_json: bool,
) -> None:
    """Print what changes from each version to the next."""
    from ..upgrade import compare_dialects

    upgrades = list(compare_dialects(open_planner, sizes, dialects, outputs=outputs, routing=routing))
    if as_json:
        print_json({"routing": str(routing), "upgrades": [u.as_dict() for u in upgrades]})
        return
    made = table("What an upgrade of ggml changes", "tokens", "version or rule", *_COLUMNS, right=("tokens", *_COLUMNS))
    silent: dict[str, None] = {}
    for i, u in enumerate(upgrades):
        if i and upgrades[i - 1].n_tokens != u.n_tokens:
            made.add_section()
        if not i or upgrades[i - 1].n_tokens != u.n_tokens:
            made.add_row(f"{u.n_tokens:,}", u.old, *_cells(u.before))
        for effect in u.effects:
            made.add_row("", f"  {effect.rule}: {_word(effect.before)} to {_word(effect.after)}",
                         *_changes(effect.without, u.after), style="dim")  # fmt: skip
        made.add_row("", u.new, *_cells(u.after))
        silent.update(dict.fromkeys(u.silent))
    for u in upgrades:  # what shows at one batch size is not silent
        for effect in u.effects:
            silent.pop(effect.rule, None)
    console = report()
    console.print(made)
    console.print("A rule's line compares the new version with and without that rule. Rules can influence each other.")
    if silent:
        console.print(f"Rules without effect on this plan: {', '.join(silent)}.")
    console.print(f"Virtual time and bytes of experts assume routing {routing}.")


def _word(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _cells(cost: DialectCost) -> list[str]:
    seconds = "-" if cost.seconds is None else n_seconds(cost.seconds)
    return [
        f"{cost.splits:,}", f"{cost.copies:,}", n_bytes(cost.bytes), f"{cost.waits:,}", seconds,
        n_bytes(cost.compute_buffer_bytes),
    ]  # fmt: skip


def _changes(before: DialectCost, after: DialectCost) -> list[str]:
    """Return the signed change of each measure; empty if it does not change."""
    cells = []
    for name in ("splits", "copies", "bytes", "waits", "seconds", "compute_buffer_bytes"):
        change = after.change(before, name)
        sign = "-" if change < 0 else "+"
        size = abs(change)
        text = n_seconds(size) if name == "seconds" else n_bytes(int(size)) if "bytes" in name else f"{size:,.0f}"
        cells.append(f"{sign}{text}" if change else "")
    return cells
