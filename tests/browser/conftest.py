"""One browser for all tests of this folder, and pages that may not fail, overflow or reach the net."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import DESKTOP, OpenPage
from find_browser import MISSING, find_browser
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Request, sync_playwright
from recorded import record_large_plan, record_runs

from pyggml.record import Record
from pyggml.viz import view_of_records, write_page

FLAGS = (
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, so that it can be left out."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Give a browser without windows; its profile is new and empty."""
    program = find_browser()
    if program is None:
        pytest.fail(MISSING, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Give the records of a small model's run, with ``used`` experts copied and with ``full`` copies."""
    return record_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, list[Record]]) -> dict[str, Path]:
    """Give the pages of one run, and of both side by side."""
    folder = tmp_path_factory.mktemp("pages")
    views = {name: view_of_records(records, name=name) for name, records in runs.items()}
    made = {"used": [views["used"]], "full": [views["full"]], "both": [views["used"], views["full"]]}
    for name, shown in made.items():
        write_page(folder / f"{name}.html", *shown)
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], Path]:
    """Give the records of a large model's plan, and their page of more than 50,000 events."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYGGML_CHECK", raising=False)  # checking each of its splits takes half a minute
        records = record_large_plan(folder)
    write_page(folder / "large.html", view_of_records(records, name="qwen3-235b"))
    return records, folder / "large.html"


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Open files, offline; at the end of the test none may have had an error, or asked for anything but itself."""
    errors: list[str] = []
    contexts: list[BrowserContext] = []

    def open_file(path: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False, fragment: str = "") -> Page:
        url = path.resolve().as_uri()

        def on_console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                errors.append(f"console {message.type}: {message.text}")

        def on_request(request: Request) -> None:
            if request.url.partition("#")[0] != url and not request.url.startswith(("data:", "blob:")):
                errors.append(f"asked for {request.url}")

        def on_error(error: Error) -> None:
            errors.append(f"uncaught: {error}")

        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # of a machine with other things to do, too
        page.on("console", on_console)
        page.on("pageerror", on_error)
        page.on("request", on_request)
        page.goto(url + fragment)
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not errors, "; ".join(errors)
