"""`pyggml races`: find missing waits in llama.cpp's scheduler, with simulated devices that work late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from ._console import print_json, progress, report, table
from ._options import choice, count, json_option
from ._values import ModelPath

if TYPE_CHECKING:
    from rich.table import Table

    from ..llama.races import RaceReport

__all__ = ["command"]

#: As `pyggml.llama.races.WAITS`, for the text of help, which imports no model.
WAITS = ("synchronize", "event_record", "event_wait", "event_synchronize")
#: Hazards of a world that are printed; JSON has all.
_MOST_SHOWN = 8

EXAMPLES = """
\b
Examples:
  pyggml races moe.gguf
  pyggml races moe.gguf --seeds 200 --json | jq .hazards
  pyggml races moe.gguf --drop event_synchronize       # check that a missing wait is found
"""


@cloup.command("races", epilog=EXAMPLES)
@click.argument("model", type=ModelPath())
@count("--seeds", least=1, shown=10, help="Runs of each world; each seed gives another order of work.")
@choice("--drop", values=WAITS, multiple=True, help="Make devices skip this wait, to check that it is found.")
@count("-t", "--threads", least=1, shown=1, help="Threads of the kernels.")
@json_option("Print the report as JSON.")
@click.pass_context
def command(ctx: click.Context, model: Path, seeds: int, drop: tuple[str, ...], threads: int, as_json: bool) -> None:
    """Run a GGUF model in the real llama.cpp on simulated devices that work late, and list hazards.

    Worlds: one and two devices, with pipeline copies and used-expert copies. A hazard is two accesses to the same memory, at
    least one of them a write, that no wait orders. Exit status 1: there are hazards or wrong results. Needs the packages of
    the `llama` extra.
    """
    from ..llama.races import find_races

    with progress() as bar:
        task = bar.add_task("", total=None)

        def told(world: str, done: int, total: int) -> None:
            bar.update(task, description=world, completed=done, total=total)

        found = find_races(model, seeds=range(1, seeds + 1), dropped=drop, threads=threads, progress=told)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    if found.n_hazards or any(w.n_wrong or w.n_failed for w in found.worlds):
        ctx.exit(1)


def _print(found: RaceReport) -> None:
    console = report()
    without = f", without {', '.join(found.dropped)}" if found.dropped else ""
    console.print(f"{Path(found.model).name}: llama.cpp {found.build} ({Path(found.library).name}){without}")
    console.print(_table(found))
    for world in found.worlds:
        if world.hazards or world.error:
            console.print(f"\n{world.world.name}:")
        for hazard in world.hazards[:_MOST_SHOWN]:
            console.print(f"  {hazard} (in {hazard.n_runs} of {world.n_runs} runs)", markup=False, highlight=False)
        if len(world.hazards) > _MOST_SHOWN:
            console.print(f"  and {len(world.hazards) - _MOST_SHOWN} more; --json has all")
        if world.error:
            console.print(f"  {world.n_failed} runs failed; the first: {world.error}", markup=False, highlight=False)


def _table(found: RaceReport) -> Table:
    columns = ("runs", "hazards", "wrong", "failed")
    made = table("llama.cpp's scheduler on late devices", "world", *columns, "splits", right=columns, free=("splits",))
    for w in found.worlds:
        splits = ", ".join(f"{n} × {name}" for name, n in w.splits.items())
        made.add_row(w.world.name, str(w.n_runs), str(len(w.hazards)), str(w.n_wrong), str(w.n_failed), splits)
    return made
