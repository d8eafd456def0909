"""The report of a self test as one page without scripts, to post or to keep."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..viz.page import html_page
from .report import Outcome, Rate, Report, Result, Verdict
from .run import STAGES

__all__ = ["page_html", "shown_rate"]

_STYLE = """
main { max-width: 1080px; }
.verdict { font-size: 18px; font-weight: 600; border-left: 6px solid var(--activation); padding: 6px 12px; }
.verdict.bad { border-color: var(--weight); } .verdict.warn { border-color: var(--experts); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.bad td:first-child { box-shadow: inset 3px 0 var(--weight); padding-left: 8px; }
"""
_TITLES = {
    "kernels": "Kernels, op by op",
    "models": "Whole models",
    "copies": "Used-expert copies",
    "races": "Repeated runs",
    "times": "Times",
}


def page_html(report: Report) -> str:
    """Return the page: verdict, what is wrong, outcomes by stage, and measured times."""
    kind = {Verdict.PASSED: "", Verdict.WRONG: " bad"}.get(report.verdict, " warn")
    facts = [
        ("device", report.description or report.device),
        *report.facts.items(),
        ("took", f"{report.seconds:.0f} s"),
    ]
    body = [
        f"<h1>Self test of {escape(report.device)}</h1>",
        f'<p class="verdict{kind}">{escape(report.sentence())}</p>',
        f'<p class="about">{" · ".join(f"{escape(k)} {escape(v)}" for k, v in facts)}</p>',
        *(f'<p class="hint">{escape(note)}</p>' for note in report.notes),
    ]
    for stage in STAGES:
        outcomes = [o for o in report.outcomes if o.stage == stage]
        if outcomes:
            ordered = sorted(outcomes, key=lambda o: o.result not in (Result.WRONG, Result.FAILED))
            body.append(_section(_TITLES[stage], _outcomes(ordered)))
    if report.rates:
        peaks = ", ".join(f"{shown_rate(value, unit)}" for unit, value in report.peaks.items())
        body.append(_section("Measured rates", _rates(report), f"Best of this device in this run: {peaks}."))
    return html_page(f"pyggml selftest: {report.device}", _STYLE, body)


def _section(title: str, table: str, hint: str = "") -> str:
    words = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f'<section>\n<h2>{escape(title)}</h2>\n{words}<div class="scroll">{table}</div>\n</section>'


def _table(columns: Sequence[tuple[str, bool]], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    """Return a table; a column is its title and whether it holds numbers, a row whether it is bad and its cells."""
    head = "".join(f"<th{' class=n' if number else ''}>{escape(name)}</th>" for name, number in columns)
    lines = []
    for is_bad, cells in rows:
        shown = zip(cells, columns, strict=True)
        made = "".join(f"<td{' class=n' if number else ''}>{escape(cell)}</td>" for cell, (_, number) in shown)
        lines.append(f"<tr{' class=bad' if is_bad else ''}>{made}</tr>")
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def _outcomes(outcomes: Sequence[Outcome]) -> str:
    rows = [
        (
            o.result in (Result.WRONG, Result.FAILED),
            (o.name, o.result.value, o.detail, _error(o.error), _error(o.bound)),
        )
        for o in outcomes
    ]
    return _table((("check", False), ("result", False), ("found", False), ("error", True), ("allowed", True)), rows)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _rates(report: Report) -> str:
    columns = [("work", False), ("time", True), ("rate", True), ("of the best", True)]
    if report.beside:
        columns += [(report.beside, True), ("ratio", True)]
    rows = []
    for rate in report.rates:
        cells = [rate.what, f"{rate.seconds * 1e3:,.3f} ms", shown_rate(rate.per_s, rate.unit), _share(rate)]
        if report.beside:
            cells += (
                ["", ""]
                if rate.other_s is None
                else [f"{rate.other_s * 1e3:,.3f} ms", f"{rate.other_s / rate.seconds:.2f}"]
            )
        rows.append((rate.what in report.slow, cells))
    return _table(columns, rows)


def _share(rate: Rate) -> str:
    return "" if rate.share is None else f"{rate.share:.0%}"


def shown_rate(per_s: float, unit: str) -> str:
    """Return a rate as people read it."""
    if unit == "B/s":
        return f"{per_s / 1e9:,.2f} GB/s"
    return f"{per_s / 1e12:,.2f} Top/s" if per_s >= 1e12 else f"{per_s / 1e9:,.2f} Gop/s"
