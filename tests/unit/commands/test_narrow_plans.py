"""`pyggml plan` and `models` in a terminal of 80 columns: nothing is broken that one reads or pastes."""

from __future__ import annotations

import shlex

import pytest
from click.testing import CliRunner

from pyggml.advisor import plan
from pyggml.catalog import MODELS
from pyggml.cli import group
from pyggml.commands import _console

HOST = "ddr4-3200x2,cores=8,64GiB"


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *args: str) -> list[str]:
    """Return the lines of a command on a console of some columns."""
    monkeypatch.setattr(_console, "PIPE_WIDTH", width)
    result = CliRunner().invoke(group, list(args))
    assert result.exit_code in (0, 3), result.output
    return result.output.splitlines()


@pytest.mark.parametrize(("model", "device"), [("llama-3.2-3b:F16", "gtx1650,gtx1650"), ("gpt-oss-20b", "rtx3060")])
def test_a_plan_fits_into_80_columns(model: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line but a command is at most 80 columns wide; commands stay on one line, numbers and words are whole."""
    lines = printed(monkeypatch, 80, "plan", model, "--device", device, "--host", HOST, "-c", "4096", "--plans", "2")
    made = plan(model, devices=device, host=HOST, context=4096, n_plans=2)
    commands = [line for line in lines if "llama-server" in line]
    assert all(len(line) <= 80 for line in lines if line not in commands), max(lines, key=len)
    told = [shlex.split(line.removeprefix("ik_llama.cpp: ")) for line in commands]
    start = next(i for i, line in enumerate(lines) if line.startswith("plan "))
    table = "\n".join(lines[start : lines.index("", start)])
    words = set(table.split())
    for each in made.shown:
        assert shlex.split(each.command) in told
        assert set(each.title.split()) <= words
        assert f"{each.tg_tps.mid:.{0 if each.tg_tps.mid >= 100 else 1}f}" in words
        assert any(f"{each.tg_tps.low:.1f}-{each.tg_tps.high:.1f} t/s" in line for line in lines)


def test_wide_tables_have_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 120 columns on the table itself has them, and says nothing twice."""
    lines = printed(monkeypatch, 140, "plan", "llama-3.2-3b", "--device", "rtx3060", "-c", "4096", "--plans", "1")
    assert any(line.startswith("recommendation ") for line in lines)
    assert not any("of link per prompt token" in line for line in lines)
    assert all(len(line) <= 140 for line in lines)


def test_models_fit_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is on one line, with its whole name."""
    lines = printed(monkeypatch, 80, "models")
    assert all(len(line) <= 80 for line in lines)
    assert {line.split()[0] for line in lines[1:]} >= set(MODELS)


def test_explanations_and_refusals_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a flag does, and what is missing where nothing fits, is wrapped between words."""
    for args in (["--explain", "-ncmoe"], ["llama-3.3-70b:F16", "--device", "rtx3060", "-c", "4096"]):
        lines = printed(monkeypatch, 80, "plan", *args)
        assert all(len(line) <= 80 for line in lines if "llama-server" not in line)
    assert any("Nothing fits" in line for line in lines)
