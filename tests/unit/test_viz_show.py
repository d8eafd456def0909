"""Graphs and schedulers show their page: in the browser, or where they stand in a notebook."""

from __future__ import annotations

import sys
from html import unescape
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import pyggml as ggml
from pyggml.viz import page_html, view_of_graph, view_of_scheduler


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the addresses that were opened; no browser is."""
    found: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: found.append(url) or True)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    return found


@pytest.fixture
def graph() -> ggml.Graph:
    """A graph of one node."""
    made = ggml.Graph()
    with made:
        y = ggml.exp(made.input("f32", (8, 2), name="x")).named("y <b>")
    made.expand(y)
    return made


def in_notebook(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    """Make IPython look imported, with a shell."""
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)


def test_graph(graph: ggml.Graph, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's page is written to a temporary file, opened once, and returned with its path."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    page = graph.show()
    assert opened == [page.path.as_uri()]
    assert page.path.parent == tmp_path
    assert page.path.name.startswith("pyggml-")
    assert page.path.read_text(encoding="utf-8") == page_html(view_of_graph(graph))
    assert Path(page) == page.path == Path(str(page))


def test_path(graph: ggml.Graph, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is written where the caller says, whatever becomes the working folder later."""
    monkeypatch.chdir(tmp_path)
    page = graph.show("own page.html")
    assert page.path == tmp_path / "own page.html"
    assert opened == [(tmp_path / "own page.html").as_uri()]


def test_scheduler(graph: ggml.Graph, opened: list[str], tmp_path: Path) -> None:
    """A scheduler shows its latest plan; with a recording, what was done."""
    cpu, gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4", data=False)
    plain, recorded = ggml.Scheduler([gpu, cpu]), ggml.Scheduler([gpu, cpu], recorder=ggml.Recording())
    for name, sched in (("plain", plain), ("recorded", recorded)):
        sched.split_graph(graph)
        page = sched.show(tmp_path / f"{name}.html")
        assert page.path.read_text(encoding="utf-8") == page_html(view_of_scheduler(sched))
    assert len(opened) == 2


def test_scheduler_without_a_graph(opened: list[str], tmp_path: Path) -> None:
    """A scheduler that has seen no graph has a page, too."""
    page = ggml.Scheduler([ggml.CPU(threads=1)]).show(tmp_path / "empty.html")
    assert "<!doctype html>" in page.path.read_text(encoding="utf-8")


def test_notebook(graph: ggml.Graph, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook no window opens: the page stands in a frame, which holds all of it."""
    in_notebook(monkeypatch, SimpleNamespace(kernel=object()))
    page = graph.show(tmp_path / "page.html")
    assert opened == []
    frame = page._repr_html_()
    source = frame.partition('srcdoc="')[2].partition('"')[0]
    assert unescape(source) == page.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["no shell", "a shell in a terminal"])
def test_not_a_notebook(
    graph: ggml.Graph, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: object
) -> None:
    """IPython in a terminal, or imported by a program, shows the page in the browser."""
    in_notebook(monkeypatch, shell)
    graph.show(tmp_path / "page.html")
    assert len(opened) == 1
