"""The page of `pyggml experts compare --html`, in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from browsing import DESKTOP, PHONE, OpenPage, overflow

from pyggml import cli


@pytest.fixture
def lab_page(tmp_path: Path) -> Path:
    """Give the page of a small trace, whose model's name would end a script."""
    rng = np.random.default_rng(4)
    lines: list[dict[str, object]] = [
        {"format": "pyggml-routing", "version": 1, "model": "</script>", "n_layer": 2, "n_expert": 8, "n_used": 2,
         "expert_bytes": [[1000], [1000]]}
    ]  # fmt: skip
    lines += [{"step": s, "layer": i, "ids": [rng.permutation(8)[:2].tolist()]} for s in range(40) for i in range(2)]
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "page.html"
    assert cli.run(["experts", "compare", str(trace), "--capacities", "25%,50%", "--html", str(path)]) == 0
    return path


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_three_plots_with_a_table_beside_each(
    open_page: OpenPage, lab_page: Path, size: tuple[int, int], dark: bool
) -> None:
    """Each plot has its points and a table of the same numbers, which a hover tells, and nothing is wider than the window."""
    page = open_page(lab_page, size, dark=dark)
    assert overflow(page) <= 0
    assert page.locator("h1").inner_text().startswith("</script>")
    assert page.locator("#cost-plot circle").count() == 5 * 2 + 2
    assert page.locator("#cost-table tbody tr").count() == 10
    assert page.locator("#heat rect").count() == 16
    assert page.locator("#union-table tbody tr").count() >= 5
    assert page.locator("#time-table tbody tr").count() == 1 + 2 * 5 + 1
    page.locator("#cost-plot circle").first.hover(force=True)
    assert "ms" in page.locator("#tip").inner_text()
    page.locator("#size").select_option("50%")
    assert page.locator("#time-plot rect").count() > 10
