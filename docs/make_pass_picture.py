"""The picture of tutorial 4: what each pass decides, from the page's own graph. `make docs` runs this.

The page's code is run block by block; after each block that calls a pass, the assignment is what the picture shows.
"""

from __future__ import annotations

import html
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorials/04-splits.md"
sys.path.append(str(ROOT / "tests"))
from test_tutorials import blocks_of  # the page is read as its test reads it

#: The call in a block, and the column's title.
PASSES = {
    "passes.assign_from_location(": "1 location",
    "passes.expand(": "2 expand",
    "passes.upgrade(": "3 upgrade",
    "passes.inherit(": "4 inherit",
}
CUT = "sched.split_graph("
COLOURS = {"SIM0": "#61afef", "CPU": "#e5a03b"}
NAMES, COLUMN, CUT_COLUMN, ROW, TOP, LEFT = 190, 104, 216, 24, 44, 16
STYLE = """
text { font: 13px "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #dee2e8 }
.head { font-weight: bold; fill: #61afef } .dim { fill: #939ba8 } .in { fill: #1e2127 }
"""


def assignments() -> tuple[list[Any], list[dict[str, tuple[str, str]]], list[Any], Any]:
    """Run the page and return nodes, backend and cause of each after each pass, the splits and the scheduler."""
    namespace: dict[str, Any] = {"__name__": PAGE.stem}
    columns: list[dict[str, tuple[str, str]]] = []
    for block in blocks_of(PAGE.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            exec(block.text, namespace)  # noqa: S102  # our own page
        graph, sched = namespace.get("graph"), namespace.get("sched")
        if any(call in block.text for call in PASSES):
            asg = namespace["asg"]
            columns.append(
                {
                    t.name: (sched.backends[asg.get(t)].name, asg.cause(t).value)
                    for t in graph.nodes
                    if asg.get(t) is not None
                }
            )
        if len(columns) == len(PASSES) and CUT in block.text:
            return list(graph.nodes), columns, sched.splits, sched
    raise SystemExit(f"{PAGE.name} does not call all passes")


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Return one line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}">{html.escape(words)}</text>'


def draw() -> str:
    """Return the picture."""
    nodes, columns, splits, sched = assignments()
    width, height = LEFT * 2 + NAMES + COLUMN * len(columns) + CUT_COLUMN, TOP + ROW * len(nodes) + 40
    parts = [
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e2127"/>',
        text(LEFT, 30, "after pass", "dim"),
    ]
    for i, node in enumerate(nodes):
        y = TOP + ROW * i
        parts += [text(LEFT, y + 16, node.name), text(LEFT + 70, y + 16, node.op.name, "dim")]
    for c, (title, column) in enumerate(zip(PASSES.values(), columns, strict=True)):
        x, before = LEFT + NAMES + COLUMN * c, columns[c - 1] if c else {}
        parts.append(text(x + 4, 30, title, "head"))
        for i, node in enumerate(nodes):
            y = TOP + ROW * i
            if node.name not in column:
                parts.append(
                    f'<rect x="{x + 2}" y="{y + 1}" width="{COLUMN - 8}" height="{ROW - 4}" rx="3" fill="none" stroke="#4b515c"/>'
                )
                continue
            backend, cause = column[node.name]
            is_new = column[node.name] != before.get(node.name)
            parts.append(
                f'<rect x="{x + 2}" y="{y + 1}" width="{COLUMN - 8}" height="{ROW - 4}" rx="3" '
                f'fill="{COLOURS[backend]}" opacity="{1 if is_new else 0.35}"/>'
            )
            parts.append(text(x + 8, y + 16, f"{backend} {cause}" if is_new else backend, "in" if is_new else "dim"))
    x, rows = LEFT + NAMES + COLUMN * len(columns) + 8, {node.name: i for i, node in enumerate(nodes)}
    parts.append(text(x + 4, 30, "5 cut", "head"))
    for i, split in enumerate(splits):
        first, last = (rows[split.graph.nodes[k].name] for k in (0, -1))
        y, backend = TOP + ROW * first, sched.backends[split.backend_id].name
        inputs = ", ".join(t.name for t in split.inputs)
        parts.append(
            f'<rect x="{x}" y="{y + 1}" width="{CUT_COLUMN - 12}" height="{ROW * (last - first + 1) - 4}" rx="6" fill="none" '
            f'stroke="{COLOURS[backend]}" stroke-width="2"/>'
        )
        parts += [text(x + 10, y + 20, f"split {i}: {backend}"), text(x + 10, y + 42, f"copied: {inputs}", "dim")]
    y = height - 14
    for k, (name, colour) in enumerate(COLOURS.items()):
        parts += [
            f'<rect x="{LEFT + 90 * k}" y="{y - 11}" width="12" height="12" rx="2" fill="{colour}"/>',
            text(LEFT + 90 * k + 18, y, name),
        ]
    parts.append(text(LEFT + NAMES, y, "bright: decided in this pass, with its cause; hollow: not yet", "dim"))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    os.environ.pop("GGML_SCHED_DEBUG", None)
    (ROOT / "docs/img/passes.svg").write_text(draw(), encoding="utf-8")
