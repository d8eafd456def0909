"""The page of `pyggml plan`: memory against speed and prompt against answer, with a point for each setting."""

from __future__ import annotations

import math
from html import escape

from ..foresight import Speed
from ..viz.page import html_page
from .answer import Advice, Recommendation

__all__ = ["page_html"]

_STYLE = """
main { max-width: 1180px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 16px; }
figure { margin: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line-strong); }
circle { fill: var(--compute); fill-opacity: 0.55; cursor: pointer; }
circle:hover, circle:focus, circle.chosen { fill: var(--experts); fill-opacity: 1; outline: none; stroke: var(--text); }
circle.cached { fill: var(--input); }
circle.plan { fill: var(--activation); fill-opacity: 1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.n b { color: var(--bad); font-weight: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; font: 12.5px ui-monospace, monospace; }
pre .w { white-space: nowrap; }
#shown { min-height: 3.2em; }
@media (max-width: 640px) {
  .plans, .plans tbody, .plans td { display: block; }
  .plans tr.head { display: none; }
  .plans tr { display: grid; grid-template-columns: auto auto; gap: 2px 16px; padding: 12px 0; border-bottom: 1px solid var(--line-strong); }
  .plans td { border: 0; padding: 0; overflow-wrap: anywhere; }
  .plans td:first-child, .plans td:last-child { grid-column: 1 / -1; }
  .plans td.n { text-align: left; }
  .plans td.n::before { content: attr(data-label); display: block; color: var(--muted); font-size: 12px; }
  .plots { grid-template-columns: 1fr; }
  svg text { font-size: 15px; }
  circle { stroke: transparent; stroke-width: 6px; }
}
"""
_SCRIPT = """
for (const point of document.querySelectorAll("circle")) {
  const show = () => {
    document.getElementById("shown").textContent = point.dataset.says;
    for (const other of document.querySelectorAll("circle"))
      other.classList.toggle("chosen", other.dataset.says === point.dataset.says);
  };
  point.addEventListener("click", show);
  point.addEventListener("focus", show);
}
"""
_W, _H, _LEFT, _BOTTOM = 460, 300, 56, 40
_GB = 2**30


def page_html(advice: Advice) -> str:
    """Return the page."""
    goal = advice.goal
    points = [(b / _GB, pp, tg, flags) for b, pp, tg, flags in advice.points]
    chosen = {" ".join(plan.flags) for plan in advice.plans}
    says = [
        f"{flags}   prompt {pp:,.0f} t/s, answer {tg:,.1f} t/s, {gib:.1f} GiB on devices"
        for gib, pp, tg, flags in points
    ]
    plots = [
        ("Memory and prompt", "GiB on devices", "prompt tokens/s", [(p[0], p[1]) for p in points]),
        ("Memory and answer", "GiB on devices", "answer tokens/s", [(p[0], p[2]) for p in points]),
        ("Prompt and answer", "prompt tokens/s", "answer tokens/s", [(p[1], p[2]) for p in points]),
    ]
    if not any(p[0] for p in points):  # no card
        del plots[:2]
    marks = ["plan" if flags in chosen else "cached" if "--moe-cache-mib" in flags else "" for *_, flags in points]
    title = f"Flags for {advice.model}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(advice.machine)}. Prompt {goal.prompt}, answer {goal.generate}, context {goal.context} tokens.</p>',
        *(f'<p class="hint">Assumed: {escape(line)}.</p>' for line in advice.assumed),
        _plans(advice),
    ]
    if points:
        cached = " Purple: with an expert cache, of its best size." if "cached" in marks else ""
        shown = "".join(
            f"<figure><figcaption>{escape(name)}</figcaption>{_plot(x, y, at, says, marks)}</figure>"
            for name, x, y, at in plots
        )
        body.append(
            f"<section><h2>{len(points)} setting{'s that fit' if len(points) > 1 else ' that fits'}</h2><p id=shown class=hint>Click a point to see its flags. Green: the recommendations above.{cached} Speeds are those of the formulas that rank settings.</p>"
            f'<div class="plots">{shown}</div></section>'
        )
    helps = "".join(
        f"<li>{escape(h.change)}: {h.speedup:.2f} times as fast</li>" for h in advice.helps if h.speedup > 1.01
    )
    if advice.pays_line:
        helps += f"<li>{escape(advice.pays_line)}</li>"
    if helps:
        body.append(f"<section><h2>What would help</h2><ul>{helps}</ul></section>")
    return html_page(title, _STYLE, body, script=_SCRIPT)


def _plans(advice: Advice) -> str:
    nothing = f"<p><b>{escape(advice.nothing_fits)}</b></p>" if advice.nothing_fits else ""
    if not advice.shown:
        return nothing
    rows = []
    for plan in advice.shown:
        memory = "<br>".join(
            f"{escape(m.device)} {m.bytes / _GB:.1f}"
            + (f" of {m.of_bytes / _GB:.0f}" if m.of_bytes else "")
            + (" GiB" if m.fits else f" GiB<br><b>lacks {m.missing_bytes / _GB:.1f} GiB</b>")
            for m in plan.memory
        )
        speeds = "".join(
            f'<td class=n data-label="{label}">{"-" if plan.refused else _speed(s)}</td>'
            for label, s in (("prompt t/s", plan.pp_tps), ("answer t/s", plan.tg_tps))
        )
        rows.append(
            f"<tr><td><b>{escape(plan.title)}</b><pre>{_command(plan.command)}</pre>{_for_ik(plan)}{escape(_said(plan))}"
            f'{_chosen_by(advice, plan)}</td>{speeds}<td class=n data-label="memory">{memory}</td></tr>'
        )
    head = "<tr class=head><th>recommendation</th><th class=n>prompt t/s</th><th class=n>answer t/s</th><th class=n>memory</th></tr>"
    return f'{nothing}<section><div class="scroll"><table class=plans>{head}{"".join(rows)}</table></div></section>'


def _command(line: str) -> str:
    """Return a command line whose flags stay with their values where a line ends; long patterns may be broken."""
    words: list[str] = []
    for word in line.split(" "):
        if words and words[-1].startswith("-") and not word.startswith("-") and " " not in words[-1]:
            words[-1] += f" {word}"
        else:
            words.append(word)
    return " ".join(f"<span class=w>{escape(w)}</span>" if len(w) < 32 else escape(w) for w in words)


def _speed(speed: Speed) -> str:
    return f"{_number(speed.mid)}<br><small>{_number(speed.low)} to {_number(speed.high)}</small>"


def _number(speed: float) -> str:
    return f"{speed:,.{0 if speed >= 100 else 1 if speed >= 1 else 2}f}"


def _chosen_by(advice: Advice, plan: Recommendation) -> str:
    if plan is not advice.fit:
        return ""
    note = f" It falls short: {advice.fit_note}." if advice.fit_note else ""
    return f"<br><small>Chosen by {escape(advice.fit_by)}.{escape(note)}</small>"


def _said(plan: Recommendation) -> str:
    if plan.refused:
        return f"llama.cpp cannot run this: {plan.refused}."
    return " ".join(filter(None, (plan.bottleneck, plan.cache_line)))


def _for_ik(plan: Recommendation) -> str:
    if plan.ik_command in ("", plan.command):
        return ""
    note = f", {plan.ik_note}" if plan.ik_note else ""
    return f"<details><summary>for ik_llama.cpp{note}</summary><pre>{_command(plan.ik_command)}</pre></details>"


def _plot(x_name: str, y_name: str, at: list[tuple[float, float]], says: list[str], marks: list[str]) -> str:
    """Return a scatter plot; plans are drawn last, so that they are on top."""
    x_max, y_max = (1.05 * max((p[i] for p in at), default=1.0) or 1.0 for i in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / x_max * (_W - _LEFT - 10), (_H - _BOTTOM) * (1 - y / y_max) + 8

    (x0, y0), (x1, y1) = place(0, 0), place(x_max, y_max)
    parts = [f'<path class="axis" fill="none" d="M{x0} {y1}V{y0}H{x1}"/>']
    for x in _ticks(x_max):
        parts.append(f'<text x="{place(x, 0)[0]:.0f}" y="{y0 + 16:.0f}" text-anchor="middle">{x:,g}</text>')
    for y in _ticks(y_max):
        parts.append(f'<text x="{x0 - 6}" y="{place(0, y)[1] + 4:.0f}" text-anchor="end">{y:,g}</text>')
    parts.append(f'<text x="{(x0 + x1) / 2:.0f}" y="{_H - 4}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text x="12" y="{_H / 2:.0f}" transform="rotate(-90 12 {_H / 2:.0f})" text-anchor="middle">{escape(y_name)}</text>'
    )
    for i in sorted(range(len(at)), key=lambda i: marks[i] == "plan"):
        px, py = place(*at[i])
        kind = f'class="{marks[i]}" ' if marks[i] else ""
        kind, r = (f'{kind}tabindex="0" ', 6) if marks[i] == "plan" else (kind, 3.5)
        parts.append(
            f'<circle {kind}cx="{px:.1f}" cy="{py:.1f}" r="{r}" data-says="{escape(says[i])}"><title>{escape(says[i])}</title></circle>'
        )
    return f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(y_name)} by {escape(x_name)}">{"".join(parts)}</svg>'


def _ticks(most: float) -> list[float]:
    """Return two to five round numbers up to the end of an axis."""
    size = 10.0 ** math.floor(math.log10(most))
    step = next(size * part for part in (0.2, 0.5, 1.0, 2.0) if most / (size * part) < 6)
    return [round(step * i, 10) for i in range(1, int(most / step) + 1)]
