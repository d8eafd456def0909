"""The page of a run: it loads, fits, zooms, filters, finds, explains, and its numbers are those of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from browsing import DESKTOP, PHONE, OpenPage, overflow, overlapping_texts, settled
from playwright.sync_api import Page

from pyggml.record import AllocRecord, ComputeRecord, CopyRecord, MicroBatchRecord, Record, UsedExpertsRecord
from pyggml.sched.experts import layer_of

Runs = dict[str, list[Record]]
Pages = dict[str, Path]
SHOWN = "pyggml.shownTimes()"
DRAWN = "pyggml.charts.map(c => c.drawnEvents)"
TENSOR = "blk.1.ffn_up_exps.weight"


def copies(records: Iterable[Record]) -> list[CopyRecord]:
    """Return the records of copies."""
    return [r for r in records if isinstance(r, CopyRecord)]


def bytes_if_whole(records: Iterable[Record]) -> int:
    """Return what whole copies would have moved."""
    return sum(
        r.tensor_bytes
        for r in records
        if isinstance(r, UsedExpertsRecord) or (isinstance(r, CopyRecord) and r.reason != "experts")
    )


def shown_ns(page: Page) -> float:
    """Return how much time is shown."""
    start, end = settled(page, SHOWN)
    return float(end - start)


# -- it loads, and fits --------------------------------------------------------


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["used", "both"])
def test_loads(open_page: OpenPage, pages: Pages, name: str, size: tuple[int, int], dark: bool) -> None:
    """It loads offline without a complaint, is as wide as its window, draws its events, and no text lies upon another."""
    page = open_page(pages[name], size, dark=dark)
    assert page.locator("html").get_attribute("data-ready") == "true"
    assert overflow(page) == 0
    assert all(n > 50 for n in settled(page, DRAWN))
    assert overlapping_texts(page) == []
    words = page.locator("#tiles, .tiles").first.inner_text() if name == "used" else "micro-batches"
    assert "micro-batches" in words, "one graph is computed for each micro-batch"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(n) for n in ground.removeprefix("rgb(").removesuffix(")").split(","))
    assert lightness < 200 if dark else lightness > 600


def test_overlaps_are_seen(open_page: OpenPage, pages: Pages) -> None:
    """The check above sees a text that lies upon another."""
    page = open_page(pages["used"])
    page.evaluate("""() => {
      const [title, other] = ["h1", "h3"].map(name => document.querySelector(name));
      const far = other.getBoundingClientRect().top - title.getBoundingClientRect().top;
      title.style.transform = `translateY(${far}px)`;
    }""")
    assert any("used" in pair for pair in overlapping_texts(page))


def test_theme_and_clock(open_page: OpenPage, pages: Pages) -> None:
    """A reader can turn to dark, and from virtual to wall time; the timeline is as long as the clock says."""
    page = open_page(pages["used"])
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    virtual_ns = shown_ns(page)
    page.get_by_role("button", name="wall time").click()
    wall_ns = shown_ns(page)
    assert wall_ns != virtual_ns
    assert wall_ns == pytest.approx(page.evaluate("pyggml.views[0].total.wall"), rel=0.01)


# -- zooming and filtering -----------------------------------------------------


def test_zooms_by_wheel_buttons_and_keys(open_page: OpenPage, pages: Pages) -> None:
    """Wheel, buttons and keys zoom in and out and move; the time under the pointer stays there."""
    page = open_page(pages["used"])
    canvas = page.locator("canvas.lanes")
    whole_ns = shown_ns(page)
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60)
    before = page.evaluate(f"pyggml.charts[0].timeAt({box['width'] * 0.75})")
    page.mouse.wheel(0, -400)
    page.wait_for_function(f"(() => {{ const [a, b] = {SHOWN}; return b - a < {whole_ns * 0.8} }})()")
    assert page.evaluate(f"pyggml.charts[0].timeAt({box['width'] * 0.75})") == pytest.approx(before, rel=0.01)
    wheeled_ns = shown_ns(page)
    page.get_by_role("button", name="Zoom in").click()
    assert shown_ns(page) == pytest.approx(wheeled_ns / 2)
    page.get_by_role("button", name="Zoom out").click()
    assert shown_ns(page) == pytest.approx(wheeled_ns)
    canvas.focus()
    page.keyboard.press("+")
    zoomed = settled(page, SHOWN)
    assert zoomed[1] - zoomed[0] < wheeled_ns
    page.keyboard.press("ArrowLeft")
    assert settled(page, SHOWN)[0] < zoomed[0]
    page.keyboard.press("0")
    assert shown_ns(page) == pytest.approx(whole_ns)


def test_draws_less_when_zoomed(open_page: OpenPage, pages: Pages) -> None:
    """Only what can be seen is drawn."""
    page = open_page(pages["used"])
    (whole,) = settled(page, DRAWN)
    page.evaluate("pyggml.showTimes(0, pyggml.views[0].total.virtual / 50)")
    (part,) = settled(page, DRAWN)
    assert 0 < part < whole / 2


def test_filters(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """A kind of event can be hidden and shown, and with Shift shown alone."""
    page = open_page(pages["used"])
    (whole,) = settled(page, DRAWN)
    n_experts = sum(r.reason == "experts" for r in copies(runs["used"]))
    chip = page.locator("#kinds [data-kind=experts]")
    chip.click()
    assert settled(page, DRAWN) == [whole - n_experts]
    assert chip.get_attribute("aria-pressed") == "false"
    chip.click()
    assert settled(page, DRAWN) == [whole]
    chip.click(modifiers=["Shift"])
    assert settled(page, DRAWN) == [n_experts]


# -- finding and explaining ----------------------------------------------------


def test_finds_a_tensor_and_says_why_it_was_copied(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """A tensor found by a part of its name is shown with why it was copied, what of it, and who reads it."""
    pieces = [r for r in copies(runs["used"]) if r.tensor == TENSOR]
    (used,) = [r for r in runs["used"] if isinstance(r, UsedExpertsRecord) and r.tensor == TENSOR]
    page = open_page(pages["used"])
    page.keyboard.press("/")
    page.keyboard.type("1.ffn_up")
    assert page.locator("#found li").first.inner_text().split("\n")[0] == TENSOR
    page.keyboard.press("Enter")
    detail = page.locator("#detail")
    assert detail.get_attribute("data-name") == TENSOR
    assert detail.get_attribute("data-bytes") == str(pieces[0].size_bytes)
    said = detail.inner_text()
    for text in (
        f"{TENSOR} is a weight in memory of CPU",
        "where SIM0 cannot use it",
        "ffn_moe_up-1 (MUL_MAT_ID) reads it on SIM0",
        "because its weight is in host memory, and the device offered to take the op",
        f"Of its 16 experts {used.ids} names {len(used.used)}",
        f"{pieces[0].size_bytes:,} bytes",
        f"copy 1 of {len(pieces)} of this tensor",
    ):
        assert text in said
    assert shown_ns(page) < page.evaluate("pyggml.views[0].total.virtual") / 2
    page.keyboard.press("Escape")
    assert "Select a bar" in detail.inner_text()


def test_goes_to_the_next_copy_of_a_tensor(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """The pieces of a tensor are gone through one after the other."""
    pieces = [r.size_bytes for r in copies(runs["used"]) if r.tensor == TENSOR]
    assert len(pieces) > 1
    page = open_page(pages["used"])
    page.locator("#search").fill(TENSOR)
    page.keyboard.press("Enter")
    found = [page.locator("#detail").get_attribute("data-bytes")]
    for _ in pieces[1:]:
        page.locator("#detail").get_by_role("button", name="next").click()
        found.append(page.locator("#detail").get_attribute("data-bytes"))
    assert found == [str(n) for n in pieces]


def test_finds_a_node(open_page: OpenPage, pages: Pages) -> None:
    """A node that is not copied is found, too: the work of its split, and why it is where it is."""
    page = open_page(pages["used"])
    page.locator("#search").fill("ffn_moe_logits-2")
    page.keyboard.press("Enter")
    detail = page.locator("#detail")
    assert detail.get_attribute("data-kind") == "compute"
    assert "ffn_moe_logits-2" in (detail.text_content() or "")


def test_clicking_a_bar_selects_it(open_page: OpenPage, pages: Pages) -> None:
    """A click on the timeline tells of the event under it."""
    page = open_page(pages["used"])
    page.locator("#search").fill(TENSOR)
    page.keyboard.press("Enter")
    name = page.locator("#detail").get_attribute("data-name")
    start = page.evaluate("pyggml.views[0].start.virtual[pyggml.state.selected.i] + 1")
    lane = page.evaluate("pyggml.charts[0].lanes.findIndex(l => l.events.includes(pyggml.state.selected.i))")
    page.keyboard.press("Escape")
    position = {
        "x": page.evaluate(f"pyggml.charts[0].xOf({start})"),
        "y": page.evaluate(f"pyggml.laneTop({lane})") + 25,
    }
    page.locator("canvas.lanes").click(position=position)
    assert page.locator("#detail").get_attribute("data-name") == name


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["used", "full"])
def test_bytes_are_those_of_the_records(open_page: OpenPage, pages: Pages, runs: Runs, name: str) -> None:
    """Bytes in all, by reason and by tensor, and what was saved, equal the sums of the records."""
    records = runs[name]
    by_reason = Counter[str]()
    by_tensor = Counter[str]()
    for r in copies(records):
        by_reason[r.reason] += r.size_bytes
        by_tensor[r.tensor] += r.size_bytes
    page = open_page(pages[name])
    t = page.evaluate("pyggml.totals[0]")
    assert t["bytes_copied"] == by_reason.total()
    assert t["bytes_full"] == bytes_if_whole(records)
    assert {k: v for k, v in t["bytes_by_reason"].items() if v} == by_reason
    assert t["n_copies"] == len(copies(records))
    assert t["n_launches"] == sum(isinstance(r, ComputeRecord) for r in records)
    # what is told is what was summed
    assert page.locator("[data-total=bytes_copied]").get_attribute("data-value") == str(by_reason.total())
    told = page.locator("#reasons .reason").evaluate_all(
        "all => all.map(e => [e.dataset.reason, Number(e.dataset.bytes)])"
    )
    assert dict(told) == by_reason
    rows = page.evaluate("pyggml.byTensor(pyggml.views[0], () => true, 'tensor').map(r => [r.name, r.bytes])")
    assert dict(rows) == by_tensor
    assert page.locator("#bytes-table").get_attribute("data-bytes") == str(by_reason.total())
    tile = page.locator("[data-total=bytes_copied]").inner_text()
    assert ("saved" in tile and "nothing saved" not in tile) == (name == "used")


def test_time_is_that_of_the_records(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """Each backend computes as long as its records say, and computing and waiting make up all of the time."""
    page = open_page(pages["used"])
    (phase,) = page.evaluate("pyggml.totals[0].phases.filter(p => p.phase === 'all' && p.clock === 'virtual')")
    busy_s = Counter[str]()
    for r in runs["used"]:
        if isinstance(r, ComputeRecord) and r.virtual is not None:
            busy_s[r.backend] += r.virtual.end_s - r.virtual.start_s
    for backend in phase["backends"]:
        assert backend["computing"] == pytest.approx(busy_s[backend["backend"]] * 1e9, abs=100)
        assert backend["computing"] + sum(backend["waits"].values()) == pytest.approx(backend["total"], abs=100)
        told = page.locator(f".spent[data-phase=all][data-backend={backend['backend']}] [data-what=computing]")
        assert told.get_attribute("data-ns") == str(backend["computing"])


def test_experts_are_those_of_the_records(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """The map of experts counts in how many micro-batches each was needed, and sums the bytes of their copies."""
    needed: set[tuple[int, int | None, str, int]] = set()
    batch = 0
    for r in runs["used"]:
        batch += isinstance(r, MicroBatchRecord)
        if isinstance(r, UsedExpertsRecord):  # weights of one layer share their ids
            needed |= {(batch, layer_of(r.tensor), r.ids, expert) for expert in r.used}
    used = Counter((layer, expert) for _, layer, _, expert in needed)
    by_layer = Counter[int | None]()
    for c in copies(runs["used"]):
        if c.reason == "experts":
            by_layer[layer_of(c.tensor)] += c.size_bytes
    page = open_page(pages["used"])
    cells = page.evaluate("pyggml.expertCells(pyggml.views[0], () => true)")
    assert cells["n"] == 16
    found = {(row["layer"], e): n for row in cells["rows"] for e, n in enumerate(row["used"]) if n}
    assert found == used
    assert {row["layer"]: sum(n or 0 for n in row["bytes"]) for row in cells["rows"]} == by_layer
    assert page.locator("#heat canvas").get_attribute("aria-label").startswith(f"{len(by_layer)} layers by 16 experts")


def test_memory_is_that_of_the_records(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """Of each backend the most that it ever held is told."""
    held: dict[tuple[str, str, str], int] = {}
    most = Counter[str]()
    for r in runs["used"]:
        if isinstance(r, AllocRecord):
            held[r.backend, r.buft, r.purpose] = r.size_bytes
            most[r.backend] = max(most[r.backend], sum(n for (b, _, _), n in held.items() if b == r.backend))
    page = open_page(pages["used"])
    figures = page.locator("#memory figure").evaluate_all(
        "all => all.map(f => [f.dataset.backend, Number(f.dataset.bytes)])"
    )
    assert dict(figures) == most


def test_splits_are_those_of_the_records(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """The splits of a computing are listed with what was copied for them; one is opened to its inputs."""
    prompt: dict[int, int] = {}
    for r in runs["used"]:
        if isinstance(r, CopyRecord):
            prompt[r.split] = prompt.get(r.split, 0) + r.size_bytes
        elif isinstance(r, ComputeRecord) and r.split == 0 and prompt:
            break  # the next computing begins
    page = open_page(pages["used"])
    rows = page.locator("#splits-table tbody tr").evaluate_all("all => all.map(l => [l.row.split, l.row.bytes])")
    assert {split: n for split, n in rows if n} == prompt
    page.locator("#splits-tools input").fill("ffn_up_exps")
    lines = page.locator("#splits-table tbody tr")
    assert lines.count() == 2  # the last layer's experts are needed by one token only
    lines.first.click()
    assert "is a weight in memory of CPU" in page.locator("tr.inputs").inner_text()


# -- two side by side ----------------------------------------------------------


def test_side_by_side(open_page: OpenPage, pages: Pages, runs: Runs) -> None:
    """Two runs have a timeline each with one zoom, and a table of what differs."""
    page = open_page(pages["both"])
    assert page.locator("figure.chart figcaption").all_inner_texts() == ["A used", "B full"]
    told = page.locator("#delta [data-key=bytes_copied]")
    for letter, name in (("a", "used"), ("b", "full")):
        assert told.get_attribute(f"data-{letter}") == str(sum(r.size_bytes for r in copies(runs[name])))
    same = page.locator("#delta [data-key=bytes_full]")
    assert same.get_attribute("data-a") == same.get_attribute("data-b") == str(bytes_if_whole(runs["full"]))
    page.get_by_role("button", name="Zoom in").click()
    a, b = settled(page, "pyggml.charts.map(c => c.timeAt(0))")
    assert a == b > 0
    page.locator("#view-switch").get_by_role("button", name="B").click()
    assert page.locator("#bytes-table").get_attribute("data-bytes") == told.get_attribute("data-b")


# -- a large plan --------------------------------------------------------------


def test_fifty_thousand_events(open_page: OpenPage, large: tuple[list[Record], Path]) -> None:
    """A page of 50,000 events sums them all, fits a phone, and a frame draws little more than there are pixels for."""
    records, path = large
    page = open_page(path)
    assert page.evaluate("pyggml.views[0].n") > 50_000
    assert page.evaluate("pyggml.totals[0].bytes_copied") == sum(r.size_bytes for r in copies(records))
    assert page.evaluate("pyggml.totals[0].bytes_full") == bytes_if_whole(records)
    n_layers = len({layer_of(r.tensor) for r in records if isinstance(r, UsedExpertsRecord)})
    assert n_layers == 93  # the last layer's experts are needed by one token only, too few to offload
    assert page.evaluate("pyggml.expertCells(pyggml.views[0], () => true).rows.length") == n_layers
    settled(page, "0")
    n_drawn, n_rects, ms = page.evaluate("""async () => {
      const own = CanvasRenderingContext2D.prototype.fillRect;
      let n = 0;
      CanvasRenderingContext2D.prototype.fillRect = function (...at) { n++; return own.apply(this, at); };
      const frames = [];
      const total = pyggml.views[0].total.virtual;
      for (let k = 0; k < 20; k++) {
        const from = (total * k) / 40;
        pyggml.showTimes(from, from + total / 2);
        const start = performance.now();
        await new Promise(requestAnimationFrame);
        frames.push(performance.now() - start);
      }
      CanvasRenderingContext2D.prototype.fillRect = own;
      return [pyggml.charts[0].drawnEvents, n / 20, frames.sort((a, b) => a - b)[10]];
    }""")
    assert n_drawn > 10_000  # half of the time is shown
    assert n_rects < 20_000
    assert ms < 1000  # a frame takes some 20 ms; a slow machine is no failure
    phone = open_page(path, PHONE)  # here, as the records of a large plan are not made twice
    assert overflow(phone) == 0
    assert overlapping_texts(phone) == []
