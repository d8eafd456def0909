"""`python -m tests.oracle.keep_up LIBRARY`: which rules a later ggml no longer keeps, case by case."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from oracle.keep_up import CASES, main

from .test_sched_live import b11549


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a few cases, with experts and without."""
    made = tmp_path_factory.mktemp("few")
    for name in ("000", "004", "106", "121", "167"):
        shutil.copy(next(CASES.glob(f"{name}-*.case.json.gz")), made)
    return made


def test_a_library_that_keeps_the_rules_agrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B11549 against the newest rules: nothing to do, and status 0."""
    assert main([b11549(), "--cases", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("5 of 5 cases agree\n")


def test_rules_that_no_longer_hold_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same library held to 0.26: each case names the rules that changed since, and none that did not matter to it."""
    assert main([b11549(), "--cases", str(folder), "--dialect", "0.26"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("-")[0]: line.partition(": ")[2] for line in lines if line[:3] in ("004", "106", "121")}
    assert found == {
        "004": "host_weights_last = True, wait_weight_backend = False",
        "106": "host_weights_last = True",
        "121": "host_weights_last = True, ids_by_n_expert = True",
    }
    assert "2 of 5 cases agree" in lines


def test_what_cannot_be_asked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with neither library nor source is one line, and status 2."""
    assert main([str(tmp_path)]) == 2
    assert "no libggml-base.so and no src/ggml-backend.cpp here" in capsys.readouterr().err
