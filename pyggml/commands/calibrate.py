"""`pyggml calibrate`: compare predictions with llama-bench's measurements, and fit the machine to them."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import cloup

from ._console import print_json, report, table
from ._options import cards_option, file_option, json_option, option
from ._page import check_outputs
from ._values import ModelPath

if TYPE_CHECKING:
    from rich.table import Table

    from ..advisor import Calibration, Comparison

__all__ = ["command"]

EXAMPLES = """
\b
Examples:
  llama-bench -m model.gguf -ncmoe 0,20,40 -p 512,2048 -n 128 -fa 1 -o json > runs.json
  pyggml calibrate model.gguf runs.json -dev rtx3090 --host ddr4-3200x2,cores=8 -o mine.json
  pyggml plan gpt-oss-120b --device mine.json --host mine.json
"""


@cloup.command("calibrate", epilog=EXAMPLES)
@click.argument("model", type=ModelPath())
@click.argument("runs", type=click.Path(path_type=Path))
@cloup.option_group(
    "The machine that was measured",
    cards_option(
         help="Cards, separated by commas; cpu for no card; or a profile FILE.json. [default: those found in this machine]"),
    option("--host", default="", metavar="SPEC", help="RAM type x channels, cores, size: ddr4-3200x2,cores=8,64GiB."),
)  # fmt: skip
@cloup.option_group(
    "Output",
    file_option("-o", "--output", metavar="FILE.json", help="Write the fitted machine, for --device and --host."),
    json_option("Print the comparison as JSON."),
)
def command(model: Path, runs: Path, device: str | None, host: str, output: Path | None, as_json: bool) -> None:
    """Compare predictions with measurements, and fit the machine to them.

    MODEL is the measured model: a GGUF file (only its header is read) or NAME[:QUANT] from `pyggml models`. RUNS is
    the output of `llama-bench -o json` or `-o jsonl`.
    """
    from ..advisor import calibrate, read_bench
    from ..advisor.advice import open_machine, this_machine
    from ..hardware.files import ProfileFile, write_profile

    for source in (model, runs):
        check_outputs(source, output)
    measured = read_bench(runs)
    notes: list[str] = []
    devices: Any = device
    around: Any = host
    if device is None:
        devices, around, notes = this_machine(host)
    _, machine = open_machine(devices, around)
    found = calibrate(str(model), machine, measured)
    if output is not None:
        best = found.machine
        card, link = (best.cards[0], best.links[0].bytes_per_s) if best.cards else (None, 0.0)
        about = {
            "model": str(model),
            "runs": len(measured),
            "factors": found.factors,
            "left_out_error": _left_out(found),
        }
        write_profile(output, ProfileFile(best.host, card, link, link), about)
    if as_json:
        print_json(_as_dict(found))
        return
    out = report()
    for note in notes:
        out.print(f"assumed: {note}", style="dim")
    out.print(_table(found))
    out.print()
    moved = [f"{part} {factor:.2f}" for part, factor in found.factors.items() if abs(factor - 1) > 0.005]
    out.print(f"Times what the description says: {', '.join(moved) or 'nothing moved'}")
    if (error := _left_out(found)) is not None:
        out.print(f"Each run predicted from the others: median error {error:.1%}")
    if output is not None:
        out.print(
            f"Written to {output}: use it as --device {output} --host {output}"
            if machine.cards
            else f"Written to {output}: use it as --host {output}"
        )


def _left_out(found: Calibration) -> float | None:
    return median(max(r, 1 / r) - 1 for r in found.left_out) if found.left_out else None


def _row(c: Comparison) -> dict[str, Any]:
    return {
        "predicted": c.predicted.mid,
        "low": c.predicted.low,
        "high": c.predicted.high,
        "ratio": c.ratio,
        "in_range": c.holds,
    }


def _as_dict(found: Calibration) -> dict[str, Any]:
    rows = [
        {"test": b.run.test, "flags": b.run.label, "measured": b.run.tokens_per_s, "before": _row(b), "after": _row(a)}
        for b, a in zip(found.before, found.after, strict=True)
    ]
    return {"runs": rows, "factors": found.factors, "left_out": found.left_out, "left_out_error": _left_out(found)}


def _table(found: Calibration) -> Table:
    columns = ("measured", "predicted", "from", "to", "off by", "fitted", "off by ")
    made = table("Tokens/s: measured, predicted, and by the fitted machine", "test", "flags", *columns, right=columns)
    for b, a in zip(found.before, found.after, strict=True):
        cells = [_number(v) for v in (b.run.tokens_per_s, b.predicted.mid, b.predicted.low, b.predicted.high)]
        made.add_row(b.run.test, b.run.label, *cells, f"{b.ratio - 1:+.0%}", _number(a.predicted.mid), f"{a.ratio - 1:+.0%}",
                     style=None if b.holds else "yellow")  # fmt: skip
    return made


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
