"""Pages of plans, of graphs, and of what nobody should have named so."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import DESKTOP, PHONE, OpenPage, overflow, overlapping_texts

import pyggml as ggml
from pyggml.advisor.page import page_html
from pyggml.record import AllocRecord, ComputeRecord, CopyRecord, MicroBatchRecord
from pyggml.viz import view_of_graph, view_of_records, view_of_scheduler, write_page

EVIL = "</script><img src=x onerror=window.bad=1><!--"


@pytest.fixture
def sched() -> ggml.Scheduler:
    """A scheduler with a plan of three splits, on nothing that has data."""
    cpu, gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4", data=False)
    weights = ggml.Context()
    w = weights.new_tensor("f32", (8, 8), name="w")
    weights.alloc(gpu, usage="weights")
    graph = ggml.Graph()
    with graph:
        first = ggml.mul_mat(w, graph.input("f32", (8, 2), name="x")).named("first")
        second = ggml.exp(first).named("second")
        third = ggml.mul_mat(w, second).named("third")
    graph.expand(third)
    made = ggml.Scheduler([gpu, cpu])
    made.set_tensor_backend(second, cpu)
    made.split_graph(graph)
    return made


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_plan(open_page: OpenPage, tmp_path: Path, sched: ggml.Scheduler, size: tuple[int, int]) -> None:
    """The page of a plan has its splits and what they need, but no times."""
    write_page(tmp_path / "plan.html", view_of_scheduler(sched))
    page = open_page(tmp_path / "plan.html", size)
    assert page.locator("#splits-table tbody tr").count() == len(sched.splits) == 3
    n_bytes = sum(t.nbytes for split in sched.splits for t in split.inputs)
    assert page.evaluate("pyggml.totals[0].bytes_copied") == n_bytes
    assert page.evaluate("pyggml.views[0].clocks") == ["order"]
    page.locator("#splits-table tbody tr").nth(1).click()
    assert "first is a result of SIM0" in page.locator("tr.inputs").inner_text()
    assert "the user pinned it there" in page.locator("tr.inputs").inner_text()
    assert overflow(page) == 0
    assert overlapping_texts(page) == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_graph(open_page: OpenPage, tmp_path: Path, sched: ggml.Scheduler, size: tuple[int, int]) -> None:
    """The page of a graph lists its tensors and draws them; a click on one draws what is around it."""
    write_page(tmp_path / "graph.html", view_of_graph(sched.splits[0].graph.graph))
    page = open_page(tmp_path / "graph.html", size)
    boxes = page.locator("#graph-drawing [data-i]")
    n_all = boxes.count()
    assert page.locator("#graph-table tbody tr").count() == n_all
    page.locator("#graph-tools input").fill("EXP")
    assert page.locator("#graph-table tbody tr").count() == 1
    page.locator("#graph-table tbody tr").click()
    assert "second" in page.locator("#graph-drawing .chosen").text_content()
    assert overflow(page) == 0
    assert overlapping_texts(page) == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_plan_that_does_not_fit(open_page: OpenPage, tmp_path: Path, size: tuple[int, int]) -> None:
    """The page of a plan that is too large says so at its top, at the rate and beside the memory.

    Memory has a line at the device's size, there is no wall time, and a link opens a split.
    """
    gib = 1 << 30
    records = [
        AllocRecord("", "SIM0", "SIM0", 30 * gib, "weights", virtual=(0.0, 0.0)),
        MicroBatchRecord(4, 0, 1, i_run=0),
        CopyRecord(0, "CPU", "SIM0", "x", 0, 64, 64, "input", 0.0, 0.1, virtual=(0.0, 0.2), i_run=0),
        ComputeRecord(0, "SIM0", 3, "first", 0.1, 0.2, virtual=(0.2, 0.3), i_run=0),
    ]
    about = {
        "is_plan": True, "assumed": "Assumed: a card", "too_large": ["Does not fit: SIM0 has 24.0 GiB"],
        "devices": [{"name": "SIM0", "description": "a card", "memory_bytes": 24 * gib}],
    }  # fmt: skip
    write_page(tmp_path / "page.html", view_of_records(records, about=about))
    page = open_page(tmp_path / "page.html", size, fragment="#split-0")
    assert page.locator(".banner").inner_text() == "Does not fit: SIM0 has 24.0 GiB"
    assert "Does not fit" in page.locator("[data-total=length]").inner_text()
    assert "no weight was copied" in page.locator("[data-total=bytes_copied]").inner_text()
    assert page.locator("[data-total=bytes_copied] .bar").count() == 0
    assert page.locator(".capacity.over").count() == 1
    assert "6.0 GiB too much" in page.locator("#memory").inner_text()
    assert "Assumed: a card" in page.locator(".about").inner_text()
    assert page.evaluate("pyggml.views[0].clocks") == ["virtual"]
    assert page.locator("tr.inputs").count() == 1
    assert overflow(page) == 0
    assert overlapping_texts(page) == []


def test_names_are_text(open_page: OpenPage, tmp_path: Path) -> None:
    """A name that looks like a program is shown as it is written, wherever it stands."""
    copy = CopyRecord(0, EVIL, EVIL, EVIL, 0, 64, 64, "weight", 0.0, 0.1, i_graph=0, i_run=0)
    work = ComputeRecord(0, EVIL, 3, EVIL, 0.1, 0.2, causes=((EVIL, 3),), i_graph=0, i_run=0)
    write_page(tmp_path / "page.html", view_of_records([copy, work], name=EVIL, about={"options": EVIL}), title=EVIL)
    page = open_page(tmp_path / "page.html")
    page.locator("#search").fill("onerror")
    assert page.locator("#found li").first.inner_text().startswith(EVIL)
    page.keyboard.press("Enter")
    assert EVIL in page.locator("#detail").inner_text()
    page.locator("#splits-table tbody tr").first.click()
    page.locator("canvas.lanes").hover()
    assert page.title() == EVIL
    assert page.locator("img").count() == 0
    assert page.evaluate("window.bad") is None


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_recommended_flags(open_page: OpenPage, tmp_path: Path, size: tuple[int, int], dark: bool) -> None:
    """The page of `pyggml plan` is not wider than a phone, and a click on a point shows its flags; without a script it still has all."""
    advice = ggml.plan("qwen3-0.6b", devices="gtx1650", host="ddr4-3200x2,cores=8,64GiB", n_plans=2)
    (tmp_path / "flags.html").write_text(page_html(advice), encoding="utf-8")
    page = open_page(tmp_path / "flags.html", size, dark=dark)
    assert overflow(page) == 0
    assert page.locator("table.plans pre").first.inner_text().replace("\n", " ") == advice.plans[0].command
    page.locator("circle").last.dispatch_event("click")
    assert "-ngl all" in page.locator("#shown").inner_text()
    if size == PHONE:
        assert page.locator("table.plans tr").nth(1).bounding_box()["width"] <= size[0]
        assert not page.locator("tr.head").is_visible()
