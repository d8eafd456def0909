"""The documentation site: it builds without a warning, its links hold, it fits a phone, and its search works offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from browsing import DESKTOP, PHONE, overflow
from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[2]
PAGES = (
    "docs/index",
    "README",
    "docs/api/commands",
    "docs/api/scheduler",
    "docs/tutorials/04-splits",
    "docs/viz",
    "docs/ops",
)


def test_every_page_is_in_the_contents() -> None:
    """Each page of docs/ is in a list of contents of the first page."""
    listed = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or f"\n{name}\n" in listed or name.startswith("tutorials/"), name


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of the site: that of the variable SITE, else one that is built here."""
    if given := os.environ.get("SITE"):
        return ROOT / given
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-c", "docs", ".", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def open_site(chromium: Browser, site: Path) -> Iterator[object]:
    """Open pages of the site without a network; none may log an error."""
    errors: list[str] = []
    contexts = []

    def open_one(name: str, size: tuple[int, int], *, dark: bool = False) -> Page:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto((site / name.partition("?")[0]).as_uri() + "".join(name.partition("?")[1:]))
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


@pytest.mark.slow
def test_links_lead_somewhere(site: Path) -> None:
    """Each link of each page leads to a file of the site, and to a place in it."""
    texts = {path.resolve(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    wrong = []
    for path, text in texts.items():
        for target in re.findall(r'<(?:a|img|source)[^>]* (?:href|src|srcset)="([^"]+)"', text):
            file, _, place = unquote(target).partition("#")
            if "://" in target or target.startswith(("mailto:", "data:")):
                continue
            to = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not to.exists() or (place and to in anchors and place not in anchors[to]):
                wrong.append(f"{path.relative_to(site.resolve())}: {target}")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_fit(open_site, size, dark) -> None:
    """No page is wider than its window, and each has a heading that can be read on its ground."""
    for name in PAGES:
        page = open_site(f"{name}.html", size, dark=dark)
        assert overflow(page) == 0, name
        ink, ground = page.evaluate(
            "[getComputedStyle(document.querySelector('h1')).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in (ink, ground)]
        assert abs(light[0] - light[1]) > 0.5, (name, ink, ground)
        assert (light[1] < 0.5) is dark


@pytest.mark.slow
def test_search_works_offline(open_site) -> None:
    """The search finds a method and a page, from files alone."""
    page = open_site("search.html?q=offload_op", DESKTOP)
    page.locator("#search-results li a", has_text="Backend.offload_op").first.wait_for()
