"""`pyggml selftest`: test a device: results, copies, races, then speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..files import aside
from ..selftest import STAGES, Report, Result, Verdict, is_there, run
from ._console import print_json, progress, report, table
from ._kernels import warm_up
from ._options import count, file_option, json_option, option

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command"]


@click.command("selftest", short_help="Test a device: results, copies, races, then speed.")
@option("-dev", "--device", shown="cuda:0", metavar="DEVICE",
     help="Device to test: cuda:0, libggml:CUDA0, libggml:CPU, sim:NAME, cpu, or emulator (pyggml's CUDA kernels, emulated).")  # fmt: skip
@option("--beside", metavar="DEVICE",
     help="Time this device, too. By default ggml's own for the same card or CPU, if its library is there; 'none' for none.")  # fmt: skip
@option("--stages", shown=",".join(STAGES), metavar="S,S", help="Stages to run, in order.")
@count("--budget", least=1, metavar="SECONDS", shown=180,
     help="Start no kernel case after this time; the other stages take about a minute.")  # fmt: skip
@file_option("-o", "--output", dir_okay=False, metavar="FILE.json",
     help="Write the report to this file, and a page of the same name.  [selftest-DEVICE.json]")  # fmt: skip
@json_option("Print the report as JSON and write no files.")
@click.pass_context
def command(
    ctx: click.Context,
    device: str,
    beside: str | None,
    stages: str,
    budget: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Test a device in under five minutes.

    Compares every kernel with its definition, small models with the CPU, used-expert copies with full copies, and
    repeated runs with each other; then measures the speed. Ctrl-C keeps the results so far. Exit status: 0 correct,
    1 a wrong result, 4 no such device, 5 correct but slow.

    Please post the page or the JSON file if you test a GPU: the kernels were written without one.
    """
    chosen = tuple(name.strip() for name in stages.split(","))
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise click.UsageError(f"there is no stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    if is_there(device):
        warm_up()
    with progress() as bar:
        task = bar.add_task("starting", total=None)

        def tell(stage: str, what: str, done: int, total: int | None) -> None:
            bar.update(task, description=f"{stage}: {what}"[:48].ljust(48), completed=done, total=total)

        found = run(
            device,
            beside="" if beside == "none" else beside,
            stages=chosen,
            budget_s=budget,
            on_progress=tell,
        )
    if as_json:
        print_json(found.as_json())
    else:
        _print(found)
        if not found.missing:
            _write(found, output or Path(f"selftest-{device.replace(':', '-')}.json"))
    ctx.exit(found.verdict.value)


def _write(found: Report, path: Path) -> None:
    from ..selftest.page import page_html

    page = path.with_suffix(".html")
    with aside(path) as part:
        part.write_text(json.dumps(found.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with aside(page) as part:
        part.write_text(page_html(found), encoding="utf-8")
    report().print(f"Written: {path} and {page}")


def _print(found: Report) -> None:
    out = report()
    if found.missing:
        out.print(found.sentence(), style="bold")
        return
    out.print(f"{found.device}: {found.description}", style="bold")
    out.print(_outcomes(found))
    if found.rates:
        out.print()
        out.print(_rates(found))
    for note in found.notes:
        out.print(f"Note: {note}.")
    for what in found.slow:
        out.print(f"Slow: {what}.")
    style = {Verdict.PASSED: "bold green", Verdict.WRONG: "bold red"}.get(found.verdict, "bold yellow")
    out.print(f"{found.sentence()} ({found.seconds:.0f} s)", style=style)


def _outcomes(found: Report) -> Table:
    """Return a row for each case that did not pass, and the number of passed cases for each stage."""
    made = table("", "stage", "check", "result", "found", right=(), free=("found",))
    for stage in STAGES:
        outcomes = [o for o in found.outcomes if o.stage == stage]
        shown = [o for o in outcomes if stage != "kernels" or o.result in (Result.WRONG, Result.FAILED)]
        for o in shown:
            style = "red" if o.result in (Result.WRONG, Result.FAILED) else None
            made.add_row(stage, o.name, o.result.value, o.detail, style=style)
        if stage == "kernels" and outcomes:
            n = {result: [o for o in outcomes if o.result is result] for result in Result}
            made.add_row(stage, f"{len(n[Result.PASSED])} ops", "passed", "within upstream's bounds of the definition")
            if n[Result.UNSUPPORTED]:
                names = ", ".join(o.name for o in n[Result.UNSUPPORTED])
                made.add_row(stage, f"{len(n[Result.UNSUPPORTED])} ops", "unsupported", names)
    return made


def _rates(found: Report) -> Table:
    from ..selftest.page import shown_rate

    others = [found.beside, "ratio"] if found.beside else []
    columns = ["time", "rate", "of the best", *others]
    made = table("", "work", *columns, right=tuple(columns), free=("work",))
    for rate in found.rates:
        beside = [] if not others else ["", ""] if rate.other_s is None else [
            f"{rate.other_s * 1e3:,.3f} ms", f"{rate.other_s / rate.seconds:.2f}"
        ]  # fmt: skip
        share = "" if rate.share is None else f"{rate.share:.0%}"
        made.add_row(rate.what, f"{rate.seconds * 1e3:,.3f} ms", shown_rate(rate.per_s, rate.unit), share, *beside)
    return made
