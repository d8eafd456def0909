"""Pictures of the page that `pyggml viz` makes, in light and dark, taken by Chromium. `make pictures` runs this.

A small random model answers over a simulated device. `plan-*.png` is the top of a plan's page, `page-*.png` that of the run, `why-*.png` the timeline with a
tensor found by name. Times are virtual, so that the same code, browser and fonts give the same pictures (a browser may
round a shade by one); what depends on the machine is left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from make_pictures import FOLDER, MODEL, PROMPT, call
from playwright.sync_api import Page, sync_playwright

sys.path.append(str(Path(__file__).parents[1] / "tests" / "browser"))
from find_browser import MISSING, find_browser  # it stands with the tests that need it most

WIDTH = 1120  # no wider: pages show pictures 800 to 900 pixels wide
TENSOR = "blk.1.ffn_up_exps.weight"
RUN = ("run", "moe.gguf", "--cpu-moe", "-n", "8", "--ignore-eos", "--quiet", "--prompt", PROMPT,
       "--html", "page.html")  # fmt: skip
PLAN = ("splits", "gpt-oss-120b", "-dev", "rtx3090", "-ncmoe", "24", "-c", "8192", "-ub", "2048", "--batches", "2048,1",
        "--html", "plan.html")  # fmt: skip
#: Without the line of model, devices and options; the panel as long as what it says.
STYLE = ".about { display: none } #detail { max-height: none !important } * { transition: none !important }"
#: Lines of the panel that a second run would change.
WITHOUT_WALL_TIME = """() => {
  for (const title of document.querySelectorAll("#detail dt")) {
    if (title.textContent !== "wall time") continue;
    title.nextElementSibling.remove();
    title.remove();
  }
}"""


def make_pages(folder: Path) -> tuple[Path, Path]:
    """Write the page of a run, and of a plan."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        call(MODEL)
        call(RUN)
        call(PLAN)
    finally:
        os.chdir(before)
    return folder / "page.html", folder / "plan.html"


def settle(page: Page) -> None:
    """Wait until what was asked for is drawn."""
    page.mouse.move(0, 0)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def take_top(page: Page, path: Path) -> None:
    """Take the page from its top to the end of the timeline: the prompt's last layer, and the tokens after it."""
    page.locator("#zoom-in").click()
    page.locator("#zoom-in").blur()
    settle(page)
    height = page.locator("#timeline").evaluate("e => e.getBoundingClientRect().bottom + scrollY")
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": WIDTH, "height": height + 12})


def take_why(page: Page, path: Path) -> None:
    """Find the tensor by its name, and take the timeline with what the page says of it."""
    page.locator("#search").fill(TENSOR)
    page.keyboard.press("Enter")
    page.locator("#zoom-out").click()
    page.locator("#zoom-out").click()
    page.locator("#search").blur()
    page.evaluate(WITHOUT_WALL_TIME)
    settle(page)
    page.locator("#timeline").screenshot(path=path)


def main() -> None:
    """Take all pictures anew."""
    program = find_browser()
    if program is None:
        raise SystemExit(MISSING)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path, plan = make_pages(Path(folder))
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark"):
            # as high as the picture: a window that grows while it is taken would be drawn anew
            page = browser.new_page(viewport={"width": WIDTH, "height": 2000}, color_scheme=scheme)
            page.goto(path.as_uri())
            page.add_style_tag(content=STYLE)
            take_top(page, FOLDER / f"page-{scheme}.png")
            take_why(page, FOLDER / f"why-{scheme}.png")
            page.goto(plan.as_uri())
            page.add_style_tag(content=STYLE)
            take_top(page, FOLDER / f"plan-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main()
