"""The device in ggml, held to ggml's own CPU by ggml's own comparison, and given to ggml's own scheduler."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyggml.llama import LlamaModel
from pyggml.llama.library import find_llama
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

SCRIPT = Path(__file__).with_name("on_library.py")


def _run(what: str, library: Path, folder: Path, timeout_s: float = 3600, **arguments: object) -> list[dict[str, Any]]:
    """Run the script in a process of its own, and return what it found."""
    out = folder / "found.json"
    command = [sys.executable, str(SCRIPT), what, str(library), str(out), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def _check_ops(found: list[dict[str, Any]], n_least: int) -> None:
    assert [f for f in found if f.get("is_right") is False] == []
    assert sum("is_right" in f for f in found) >= n_least
    assert found[-1] == {"hazards": []}


def test_ops_are_those_of_ggmls_cpu(tmp_path: Path) -> None:
    """`ggml_backend_compare_graph_backend` over every fifth op case of the test kit, on a device that works late."""
    _check_ops(_run("ops", find_llama(), tmp_path, seed=5, n_case=1, every=5), 30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_many_cases_of_ops(tmp_path: Path, seed: int | None) -> None:
    """The same over more cases, at once and late: of some 600 all but views, and but those at which ggml's CPU would end the process."""
    _check_ops(_run("ops", find_llama(), tmp_path, seed=seed, n_case=4), 450)


def _request(path: Path, folder: Path, **more: Any) -> str:
    """Return a file with the request that opens a model with experts on the host."""
    context, placement = ContextFlags(n_ctx=256, n_ubatch=64), PlacementFlags(cpu_moe=True)
    with LlamaModel(path, context=context, placement=placement, threads=1, **more) as model:
        request = folder / "request"
        request.write_bytes(pickle.dumps(model.opened_with))
    return str(request)


@pytest.mark.parametrize("arch", ["qwen3moe", pytest.param("gpt-oss", marks=pytest.mark.slow),
                                  pytest.param("deepseek2", marks=pytest.mark.slow)])  # fmt: skip
def test_graphs_of_a_model(random_model: Callable[[str], Path], tmp_path: Path, arch: str) -> None:
    """The same over each graph that llama.cpp gives the device in a prompt and a token, with experts on the host."""
    found = _run("model", find_llama(), tmp_path, request=_request(random_model(arch), tmp_path, host=None))
    assert len(found) > 100
    assert [f for f in found if not f["is_right"]] == []


@pytest.mark.parametrize("arch", ["qwen3moe", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_known_calls_have_the_effects_of_others(random_model: Callable[[str], Path], tmp_path: Path, arch: str) -> None:
    """Calls that compiled code answers give the bits, counts and virtual times that Python gives; so it is after a kernel stopped."""
    first, known, python, stopped, after = _run(
        "known", find_llama(), tmp_path, request=_request(random_model(arch), tmp_path)
    )
    assert (known.pop("was_known"), python.pop("was_known")) == (True, False)
    assert stopped["error"].startswith("SIM0")
    assert "stopped" in stopped["error"]
    for other in (known, first, after):
        assert other["virtual_s"] == pytest.approx(python["virtual_s"], rel=1e-9)
        assert other["counts"] == python["counts"]
        assert (other["logits"], other["batches"]) == (python["logits"], python["batches"])
