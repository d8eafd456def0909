"""The pages of `pyggml experts compare|usage|predict --html`, in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from browsing import DESKTOP, PHONE, OpenPage, overflow

from pyggml import cli


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    """Give a small trace of two requests, whose model's name would end a script."""
    rng = np.random.default_rng(4)
    lines: list[dict[str, object]] = [
        {"format": "pyggml-routing", "version": 1, "model": "</script>", "n_layer": 2, "n_expert": 8, "n_used": 2,
         "expert_bytes": [[1000], [1000]], "requests": ["a", "b"]}
    ]  # fmt: skip
    lines += [
        {"request": request, "step": s, "layer": i, "ids": [rng.permutation(7)[:2].tolist()]}
        for request in ("a", "b")
        for s in range(20)
        for i in range(2)
    ]
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return trace


def _page(command: str, trace: Path, *words: str) -> Path:
    path = trace.with_name(f"{command}.html")
    assert cli.run(["experts", command, str(trace), "--html", str(path), *words]) == 0
    return path


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_three_plots_with_a_table_beside_each(
    open_page: OpenPage, trace_path: Path, size: tuple[int, int], dark: bool
) -> None:
    """Each plot has its points and a table of the same numbers, which a hover tells, and nothing is wider than the window."""
    page = open_page(_page("compare", trace_path, "--capacities", "25%,50%"), size, dark=dark)
    assert overflow(page) <= 0
    assert page.locator("h1").inner_text().startswith("</script>")
    assert page.locator("#cost-plot circle").count() == 5 * 2 + 2
    assert page.locator("#cost-table tbody tr").count() == 10
    assert page.locator("#heat rect").count() == 16
    assert page.locator("#heat-table tbody tr").count() == 2
    assert page.locator("#union-table tbody tr").count() >= 5
    assert page.locator("#time-table tbody tr").count() == 1 + 2 * 5 + 1
    page.locator("#cost-plot circle").first.hover(force=True)
    assert "ms" in page.locator("#tip").inner_text()
    page.locator("#size").select_option("50%")
    assert page.locator("#time-plot rect").count() > 10
    assert page.locator("#predicted").is_hidden()
    hidden = "s => [...document.querySelectorAll(s)].map(e => e.scrollWidth - e.clientWidth)"
    assert size == PHONE or max(page.evaluate(hidden, ".beside > div")) <= 0, "a column of a table is out of sight"
    plots = "#cost-plot, #union-plot, #time-plot, :has(> #cost-plot), :has(> #union-plot), :has(> #time-plot)"
    assert max(page.evaluate(hidden, plots)) <= 0, "a part of a plot is out of sight"


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_used_experts_by_layer_and_by_tokens(open_page: OpenPage, trace_path: Path, size: tuple[int, int]) -> None:
    """The map has a cell for each expert that tells its share, unions stand against a uniform router, and no other plot is there."""
    page = open_page(_page("usage", trace_path), size)
    assert overflow(page) <= 0
    assert [
        section for section in ("cost", "used", "time", "predicted") if page.locator(f"#{section}").is_visible()
    ] == ["used"]
    assert page.locator("nav a").count() == 1
    assert page.locator("#heat rect").count() == 16
    page.locator("#heat rect").nth(7).hover(force=True)
    assert page.locator("#tip").inner_text() == "layer 0, expert 7: 0.0 % of steps"
    assert page.locator("#heat-table tbody tr").first.locator("td").all_inner_texts()[:3] == ["0", "7", "1"]
    head = page.locator("#union-table th").all_inner_texts()
    assert head == ["tokens", "consecutive", "independent", "uniform"]
    assert page.locator("#union-plot circle").count() >= 3
    assert "of the experts of the token before" in page.locator("#used-words").inner_text()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_recall_and_precision_of_prefetchers(open_page: OpenPage, trace_path: Path, size: tuple[int, int]) -> None:
    """Each prefetcher has a bar of recall and one of precision, of the chosen cache size, and a row of each size."""
    words = ("--capacities", "25%,50%", "--prefetchers", "popularity,previous,oracle")
    page = open_page(_page("predict", trace_path, *words), size)
    assert overflow(page) <= 0
    assert page.locator("section:visible").count() == 1
    assert page.locator("#predicted-table tbody tr").count() == 6
    oracle = page.locator("#predicted-table tbody tr").nth(4).locator("td").all_inner_texts()
    assert oracle[:5] == ["oracle", "25 %", "100.0", "100.0", "100.0"]
    bars = page.locator("#predicted-plot rect")
    assert bars.count() == 6
    bars.last.hover(force=True)
    assert page.locator("#tip").inner_text() == "oracle at 25 %: precision on what is not in the cache 100.0 %"
    page.locator("#predicted-size").select_option("50 %")
    bars.first.hover(force=True)
    assert "at 50 %: recall" in page.locator("#tip").inner_text()
