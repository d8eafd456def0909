"""Environment variables: parsed as upstream does, and documented."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pyggml import config

ROOT = Path(__file__).parents[2]


def test_page_and_table_agree() -> None:
    """The page for people has one row for each variable of the table, with the same words."""
    page = (ROOT / "docs/env_vars.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert rows == [(v.name, v.type, v.default, v.meaning) for v in config.VARIABLES]


def test_environment_is_read_in_one_place() -> None:
    """No module but the configuration reads the environment; kernels, which know nothing of pyggml, are exempt."""
    readers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pyggml").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    # these hand a whole environment to a child process
    readers -= {"pyggml/commands/_fetch.py", "pyggml/llama/process.py"}
    assert readers == {"pyggml/config.py"}


def test_every_variable_read_is_in_the_table() -> None:
    """Names that the configuration asks for stand in the table."""
    source = (ROOT / "pyggml/config.py").read_text()
    asked = set(re.findall(r'_(?:integer|switch)\("(\w+)"|environ\.get\("(\w+)"', source))
    platform = {"LOCALAPPDATA", "XDG_CACHE_HOME"}  # the platform's, not ours
    names = {a or b for a, b in asked} - platform
    assert names <= {v.name for v in config.VARIABLES}
    assert names >= {"GGML_SCHED_DEBUG", "PYGGML_CHECK", "PYGGML_CACHE_DIR"}


@pytest.mark.parametrize(("text", "level"), [("", 0), ("0", 0), ("2", 2), (" 3 ", 3), ("-1", -1), ("1x", 1), ("on", 0)])
def test_debug_level(monkeypatch: pytest.MonkeyPatch, text: str, level: int) -> None:
    """GGML_SCHED_DEBUG is read as C's atoi does."""
    monkeypatch.setenv("GGML_SCHED_DEBUG", text)
    assert config.sched_debug() == level


@pytest.mark.parametrize(("text", "rows"), [(None, 32), ("", 32), ("1", 1), ("0", 0), ("many", 0)])
def test_min_batch(monkeypatch: pytest.MonkeyPatch, text: str | None, rows: int) -> None:
    """GGML_OP_OFFLOAD_MIN_BATCH has upstream's default; what is no number counts as 0, as upstream has it."""
    monkeypatch.delenv("GGML_OP_OFFLOAD_MIN_BATCH", raising=False)
    if text is not None:
        monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", text)
    assert config.op_offload_min_batch() == rows


@pytest.mark.parametrize(("text", "is_on"), [("", False), ("0", False), ("1", True), ("yes", True)])
def test_switches(monkeypatch: pytest.MonkeyPatch, text: str, is_on: bool) -> None:
    """A switch is on with anything but nothing and 0."""
    monkeypatch.setenv("PYGGML_TRACEBACK", text)
    assert config.traceback() is is_on


@pytest.mark.parametrize(("text", "level"), [("", 0), ("0", 0), ("1", 1), (" 2 ", 2), ("yes", 1)])
def test_check_level(monkeypatch: pytest.MonkeyPatch, text: str, level: int) -> None:
    """PYGGML_CHECK is a level, and anything that is no number is 1, as it was a switch."""
    monkeypatch.setenv("PYGGML_CHECK", text)
    assert config.check() == level


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PYGGML_CACHE_DIR wins; else the platform's cache folder is used."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path / "here"))
    assert config.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("PYGGML_CACHE_DIR")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config.cache_dir() == tmp_path / "pyggml"
