"""Attacks in processes of their own: every case ends with an error of pyggml's or the right result; no crash, no hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Cases of each kind in `make soak`, and in how many processes.
CASES = {"files": 3000, "uses": 1000, "pins": 1000, "names": 1000, "outputs": 400}
N_PARTS = 4
#: Seconds for the cases of a process, on a machine that does much else: one that hangs ends its process itself.
N_S = 3600


def _attack(first: int, folder: Path, n_of: dict[str, int]) -> None:
    """Run n cases of each kind in a process of its own; among them are ones that run and ones that are refused."""
    cases = [f"{kind}={n}" for kind, n in n_of.items()]
    command = [sys.executable, "-m", "tests.attack.attacks", str(first), str(folder), *cases]
    # a failed assertion of ggml starts a debugger, which could outlive the process and hold its output open
    env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, errors="replace", timeout=N_S, check=False
    )
    tail = done.stderr.splitlines()[-12:]
    assert done.returncode == 0, f"{cases}: the process ended with {done.returncode}: {tail}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed"] == []
    for kind, n in n_of.items():
        endings: dict[str, int] = result["endings"][kind]
        assert sum(endings.values()) == n
        assert len(endings) > 1, kind


def test_a_few_attacks(tmp_path: Path) -> None:
    """Some cases of each kind pass in every test run."""
    _attack(0, tmp_path, {kind: 20 if kind in ("names", "outputs") else 40 for kind in CASES})


@pytest.mark.slow
@pytest.mark.parametrize("part", range(N_PARTS))
@pytest.mark.parametrize("kind", CASES)
def test_many_attacks(kind: str, part: int, tmp_path: Path) -> None:
    """Damaged files over all families, wrong uses, pins and policies, hostile names, outputs that cannot be written."""
    n = CASES[kind] // N_PARTS
    _attack(1000 + part * n, tmp_path, {kind: n})


CHILD = """
import numpy as np, pyggml as ggml
graph = ggml.Graph()
with graph:
    x = graph.input("f32", (64, 4), name="x"); y = ggml.rms_norm(ggml.scale(x, 2.0), 1e-5)
graph.expand(y)
sched = ggml.Scheduler([ggml.CPU(threads=1)])
sched.alloc_graph(graph)
x.set_array(np.ones((4, 64)))
sched.compute(graph)
print(round(float(y.numpy().sum())))
"""
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + CHILD


def _start(code: str, cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_cold_processes_share_a_cache(tmp_path: Path) -> None:
    """Two processes that compile the same kernels into one empty cache at once both compute, and the next finds them."""
    for _ in range(2):
        running = [_start(CHILD, tmp_path) for _ in range(2)]
        for process in running:
            out, error = process.communicate(timeout=120)
            assert (process.returncode, out.strip()) == (0, "256"), error


@pytest.mark.slow
def test_a_full_disk_costs_only_the_cache(tmp_path: Path) -> None:
    """Where a compiled kernel cannot be written whole, it is computed all the same, and nothing damaged is left behind."""
    out, error = (limited := _start(LIMITED, tmp_path)).communicate(timeout=120)
    assert (limited.returncode, out.strip()) == (0, "256"), error
    out, error = (after := _start(CHILD, tmp_path)).communicate(timeout=120)
    assert (after.returncode, out.strip()) == (0, "256"), error


@pytest.mark.slow
def test_a_cache_that_is_a_file_or_read_only_is_done_without(tmp_path: Path) -> None:
    """A cache folder that cannot be one is replaced for as long as the process runs."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for cache in (blocked, Path("/proc/1/nothing")):
        out, error = (process := _start(CHILD, cache)).communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "256"), error
