"""A family that is not built, and no llama.cpp: what the header alone tells, and what to install."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from headers import write_known

from pyggml import config
from pyggml.backend import REGISTRY
from pyggml.cli import run
from pyggml.gguf import GGUFFile
from pyggml.makers.make_moe import Recipe, make_moe
from pyggml.models.context import ContextFlags
from pyggml.models.header_plan import plan_header
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the installed llama.cpp."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else find(name, *a))
    monkeypatch.delenv("PYGGML_LIBLLAMA", raising=False)


def test_splits_without_llama_tells_of_the_header(no_llama: None, tmp_path: Path, capfd) -> None:
    """Bytes by buffer type are printed, then one line says what to install; the exit status is 1."""
    path = write_known("stablelm", tmp_path)
    assert run(["splits", str(path), "-c", "512", "--json"]) == 1
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert told["model"]["arch"] == "stablelm"
    assert told["splits"] is None
    assert config.install_hint("llama") in err
    assert config.install_hint("llama") in told["install"]
    assert run(["splits", str(path), "-c", "512"]) == 1
    out, err = capfd.readouterr()
    assert "KV cache (max.)" in out
    assert "llama.cpp is not installed" in err


def test_graphs_that_are_built_need_no_llama(no_llama: None, tmp_path: Path, capfd) -> None:
    """Without llama.cpp a family that is built is planned as always, and asking for llama.cpp tells of the other way."""
    path = tmp_path / "llama.gguf"
    make_moe(path, Recipe(arch="llama"))
    assert run(["splits", str(path), "-c", "512", "--graph", "built", "--batches", "1"]) == 0
    assert run(["splits", str(path), "-c", "512", "--graph", "llama", "--batches", "1"]) == 1
    assert "--graph built" in capfd.readouterr().out


@pytest.mark.parametrize("arch", ["stablelm", "falcon", "phi2", "glm4moe"])
@pytest.mark.parametrize("flags", [PlacementFlags(), PlacementFlags(n_gpu_layers=1), PlacementFlags(cpu_moe=True)])
def test_the_header_tells_what_llama_cpp_does(arch: str, flags: PlacementFlags, tmp_path: Path) -> None:
    """Where every layer keeps all tokens, weights and K and V by buffer type are those of the captured plan."""
    path, context = write_known(arch, tmp_path), ContextFlags(n_ctx=512, n_ubatch=64)
    devices = [*REGISTRY.open_all(["mock:CUDA0"], data=False), *REGISTRY.open_all(["cpu"], data=False)]
    with GGUFFile.open(path) as file:
        told = plan_header(file, devices[:1], devices[1], placement=flags, context=context)
    with Planner.open(
        path, devices=[devices[0]], cpu=devices[1], placement=flags, context=context, graph="llama", data=False
    ) as planner:
        caches = {m.buft: m.cache for m in planner.memory()}
        weights = dict.fromkeys(caches, 0)
        for w in planner.placement.weights:
            weights[w.buft.name] += w.info.nbytes
    assert {m.buft: m.cache for m in told} == caches
    assert {m.buft: m.weights for m in told} == weights
