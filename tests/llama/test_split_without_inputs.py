"""The race of 0.20: a split without inputs is not waited for, in the library itself where its version has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builds import BUILDS

from pyggml.backends.libggml.library import find_library
from pyggml.llama.library import find_llama

SCRIPT = Path(__file__).with_name("split_on_library.py")
N_SEEDS = 5


def _runs(library: Path, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the library's version, and its runs: one at once, then one for each seed."""
    out = folder / "found.json"
    command = [sys.executable, str(SCRIPT), str(library), str(out), json.dumps(list(range(N_SEEDS)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    first, *runs = found["runs"]
    assert first["hazards"] == []
    assert {r["n_splits"] for r in found["runs"]} == {3}
    return found["version"], runs


def test_version_0_20_has_the_race(tmp_path: Path) -> None:
    """The second stream squares what the first has not yet computed, with each seed; both know of no wait."""
    version, runs = _runs(find_library(), tmp_path)
    assert version.startswith("0.20.")
    assert not any(r["is_right"] for r in runs)
    for run in runs:
        assert (
            "SIM0 (stream 1) reads 'node_0' in SQR 'node_1', but SIM0 writes 'node_0' in MUL_MAT 'node_0', "
            "and SIM0 (stream 1) does not wait for SIM0"
        ) in run["hazards"]


@pytest.mark.parametrize("library", [find_llama, *(lambda path=p: path for p in BUILDS)])
def test_later_versions_have_it_not(library: Any, tmp_path: Path) -> None:
    """Since 0.21 the scheduler waits for the split before: right results, no hazard."""
    version, runs = _runs(library(), tmp_path)
    assert tuple(map(int, version.split(".")[:2])) >= (0, 21)
    assert all(r["is_right"] and r["hazards"] == [] for r in runs)
