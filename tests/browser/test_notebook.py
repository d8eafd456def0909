"""Tables of objects, as a notebook shows them, in light and dark, on a phone and on a desktop."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import DESKTOP, PHONE, OpenPage, overflow

import pyggml as ggml


def notebook(path: Path, *objects: object) -> Path:
    """Write a page that shows objects as a notebook does: each in a box of its own that scrolls."""
    boxes = "".join(f'<div style="overflow-x:auto">{o._repr_html_()}</div>' for o in objects)  # type: ignore[attr-defined]
    path.write_text(
        '<!doctype html><meta charset="utf-8"><style>:root{color-scheme:light dark} body{font:13px sans-serif}</style>'
        f"<title>notebook</title>{boxes}",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_tables(open_page: OpenPage, tmp_path: Path, size: tuple[int, int], dark: bool) -> None:
    """Tables fit their page and are legible on its own colour."""
    graph = ggml.Graph()
    with graph:
        y = ggml.exp(graph.input("f32", (8, 2), name="x")).named("y")
    graph.expand(y)
    page = open_page(notebook(tmp_path / "notebook.html", y, graph, ggml.Statistics()), size, dark=dark)
    assert page.locator("table").count() == 3
    assert page.get_by_role("cell", name="EXP", exact=True).count() == 2
    assert overflow(page) == 0
    ink = page.locator("td").first.evaluate("e => getComputedStyle(e).color")
    assert ink == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)")


def test_bars(open_page: OpenPage, tmp_path: Path) -> None:
    """A bar is as long within its track as its share says, and numbers stand to the right."""
    stats = ggml.Statistics()
    stats.count_copy(1000, 4000, "experts")
    stats.count_experts(4000)
    page = open_page(notebook(tmp_path / "notebook.html", stats))
    row = page.locator("tr", has=page.get_by_role("cell", name="experts", exact=True))
    width = "e => e.getBoundingClientRect().width"
    track, fill = row.locator("span > span").locator(".."), row.locator("span > span")
    assert fill.evaluate(width) / track.evaluate(width) == pytest.approx(0.25)
    assert row.locator("td").nth(1).evaluate("e => getComputedStyle(e).textAlign") == "right"


def test_a_page_inside_a_notebook(open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is shown in a notebook draws itself there, in a frame of its own."""
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    graph = ggml.Graph()
    with graph:
        y = ggml.exp(graph.input("f32", (8, 2), name="x")).named("y")
    graph.expand(y)
    page = open_page(notebook(tmp_path / "notebook.html", graph.show(tmp_path / "graph.html")))
    frame = page.frame_locator("iframe")
    frame.locator("html[data-ready=true]").wait_for()
    assert frame.locator("#graph-table tbody tr").count() == 2
    assert "EXP" in frame.locator("#graph-drawing").inner_text()
