"""Graphs that are captured from llama.cpp equal those that pyggml builds; failures cost a child and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pyggml.llama.source as source_module
from pyggml.advisor import plan
from pyggml.errors import DeviceUnavailableError, GraphError, ModelError
from pyggml.llama.library import find_llama
from pyggml.llama.process import LlamaProcess
from pyggml.models.context import ContextFlags
from pyggml.models.kv_cache import CacheFullError
from pyggml.models.placement import PlacementFlags
from pyggml.plan_report import ggml_text, plan_batches
from pyggml.planning import GraphChoice, Planner
from pyggml.routing import DEFAULT_ROUTING
from pyggml.simulation import simulate_batch
from pyggml.types import Type

EXPERTS_ON_HOST = PlacementFlags(cpu_moe=True)


def _plan(
    path: Path,
    graph: GraphChoice,
    *,
    placement: PlacementFlags = EXPERTS_ON_HOST,
    devices: tuple[str, ...] = ("mock:CUDA0:offload=32",),
    **context: object,
) -> Planner:
    flags = ContextFlags(**{"n_ctx": 1024, "n_batch": 256, "n_ubatch": 64, **context})
    return Planner.open(path, devices=devices, placement=placement, context=flags, graph=graph, data=False)


def _text(planner: Planner, *sizes: int) -> list[str]:
    return [ggml_text(planner, planned) for n in sizes for planned in planner.plan_batch(n)]


CASES: dict[str, dict[str, object]] = {
    "experts on the host": {},
    "one layer on the device": {"placement": PlacementFlags(n_gpu_layers=1)},
    "without flash attention": {"flash_attn": "off"},
    "cache on the host": {"offload_kqv": False, "flash_attn": "off"},
    "quantised cache": {"type_k": Type.Q8_0, "type_v": Type.Q8_0, "flash_attn": "on"},
    "two devices": {"devices": ("mock:CUDA0:offload=32", "mock:CUDA1:offload=32"),
                    "placement": PlacementFlags(tensor_split=(2.0, 1.0))},
    "pinned memory": {"devices": ("sim",), "placement": PlacementFlags(cpu_moe=True, use_mmap=False)},
    "an override": {"placement": PlacementFlags(overrides=(r"blk\.1\.attn=CPU",))},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_captured_plans_equal_built_ones(random_model: Callable[[str], Path], case: str) -> None:
    """For an architecture that pyggml builds, both sources give the same splits, text, weights and memory."""
    path = random_model("qwen3moe")
    with _plan(path, "built", **CASES[case]) as built, _plan(path, "llama", **CASES[case]) as captured:
        assert _text(captured, 150, 1) == _text(built, 150, 1)
        assert captured.memory() == built.memory()
        assert captured.params.flash_attn == built.params.flash_attn
        placed = [
            {(w.info.name, w.buft.name, w.reason) for w in planner.placement.weights} for planner in (built, captured)
        ]
        assert placed[0] == placed[1]


@pytest.mark.parametrize("arch", ["llama", "glm4moe", "deepseek2", "olmoe", "granitemoe", "qwen2moe"])
def test_families_are_captured_as_they_are_built(random_model: Callable[[str], Path], arch: str) -> None:
    """Other families, too: their plans are equal line by line."""
    path = random_model(arch)
    with _plan(path, "built") as built, _plan(path, "llama") as captured:
        assert _text(captured, 40, 1) == _text(built, 40, 1)


@pytest.mark.parametrize(
    ("n_cards", "n_seq_max"),
    [(2, 3), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 2), (1, 3), (2, 2)))],
)
@pytest.mark.parametrize("offload_kqv", [True, False], ids=["kvo", "nkvo"])
@pytest.mark.parametrize("flash_attn", ["off", "auto", "on"])
def test_captured_plans_of_a_server_equal_built_ones(
    random_model: Callable[[str], Path], flash_attn: str, offload_kqv: bool, n_seq_max: int, n_cards: int
) -> None:
    """With a stream of the cache for each of several sequences plans are equal, whatever the number of tokens, and can be computed."""
    options = {
        "devices": ("sim",) * n_cards, "n_seq_max": n_seq_max, "flash_attn": flash_attn, "offload_kqv": offload_kqv,
        "placement": PlacementFlags(),
    }  # fmt: skip
    path = random_model("qwen3moe")
    with _plan(path, "built", **options) as built, _plan(path, "llama", **options) as captured:
        assert _text(captured, 150, 3, 1) == _text(built, 150, 3, 1)
        assert captured.memory() == built.memory()
        simulated = [[simulate_batch(planner, n) for n in (150, 3, 1, 1)] for planner in (built, captured)]
    assert simulated[0] == simulated[1]


def test_simulated_plans_are_equal(random_model: Callable[[str], Path]) -> None:
    """Bytes, causes and virtual seconds of a plan do not depend on whose graph it is."""
    path = random_model("qwen3moe")
    reports = []
    for graph in ("built", "llama"):
        with _plan(path, graph, devices=("sim:rtx4090-pcie4",)) as planner:
            reports.append([p.as_dict() for p in plan_batches(planner, [64, 1], routing=DEFAULT_ROUTING)])
    assert reports[0] == reports[1]


def test_what_was_captured_is_kept(random_model: Callable[[str], Path], own_cache: Path, monkeypatch) -> None:
    """A second plan with the same flags asks no child; a changed file is captured again."""
    asked: list[str] = []
    ask = LlamaProcess.ask
    monkeypatch.setattr(LlamaProcess, "ask", lambda self, request: asked.append(request["do"]) or ask(self, request))
    path = random_model("llama")
    for _ in range(2):
        with _plan(path, "llama") as planner:
            planner.plan_batch(40)
    assert asked == ["facts", "reserve", "decode"]
    os.utime(path)
    _plan(path, "llama").close()
    assert asked[3:] == ["facts", "reserve"]
    assert {p.suffix for p in (own_cache / "llama").iterdir()} == {".z"}


def test_no_more_tokens_than_the_context_has(random_model: Callable[[str], Path]) -> None:
    """A batch larger than the context is refused as for built models."""
    with _plan(random_model("llama"), "llama") as planner, pytest.raises(CacheFullError):
        planner.plan_batch(2000)


def _request(path: Path, **more: object) -> dict[str, object]:
    return {
        "model": str(path),
        "placement": source_module.about_placement(PlacementFlags(), (), ()),
        "context": source_module.about_context(ContextFlags(n_ctx=256, n_ubatch=32)),
        **more,
    }


def test_a_failed_assertion_ends_the_child_alone(random_model: Callable[[str], Path], process: LlamaProcess) -> None:
    """An assertion of llama.cpp becomes an error with its words, and the next request is answered by a new child."""
    path = random_model("llama")
    with pytest.raises(ModelError, match="failed an assertion") as caught:
        process.ask(_request(path, do="reserve", size=[1, 1, 0]))
    assert "GGML_ASSERT(n_outputs >= 1)" in caught.value.words
    assert process.ask(_request(path, do="reserve", size=[1, 1, 1]))["n_nodes"] > 50
    assert process.n_started == 2


def test_a_slow_answer_ends_the_child(random_model: Callable[[str], Path]) -> None:
    """A child that does not answer in time is killed with its whole group."""
    with LlamaProcess(find_llama(), timeout_s=0.01) as process:
        start = time.monotonic()
        with pytest.raises(ModelError, match=r"no answer in 0\.01 s"):
            process.ask(_request(random_model("llama"), do="facts"))
        assert time.monotonic() - start < 5
        assert process._process is None


def test_damaged_files_are_refused_with_llama_cpps_words(tmp_path: Path, own_cache: Path, random_model) -> None:
    """A file that llama.cpp refuses gives its own reason, and nothing is kept of it."""
    whole = random_model("llama").read_bytes()
    path = tmp_path / "renamed.gguf"
    path.write_bytes(whole.replace(b"blk.0.attn_norm.weight", b"blk.0.attn_morn.weight"))
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.attn_norm\.weight' not found"):
        _plan(path, "llama")
    assert not (own_cache / "llama").exists()


def test_a_plan_of_a_model_that_llama_cpp_refuses_ends_soon(
    random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three settings are asked for, not all; the error has llama.cpp's words."""
    path = tmp_path / "other.gguf"
    path.write_bytes(random_model("llama").read_bytes().replace(b"llama", b"llamX"))
    with pytest.raises(ModelError, match="unknown model architecture: 'llamX'"):
        plan(path, devices="rtx3060", host="ddr4-3200x2,cores=8,64GiB", prompt=64, generate=16, context=128)


def test_a_context_is_refused_with_llama_cpps_words(random_model: Callable[[str], Path]) -> None:
    """Flags that do not fit the model are refused with llama.cpp's line about it."""
    with pytest.raises(ModelError, match=r"does not make a context: .*different K"):
        _plan(random_model("deepseek2"), "llama", type_k=Type.F32)


def test_flags_are_checked_before_a_child_starts(random_model: Callable[[str], Path]) -> None:
    """An override to a buffer type that does not exist is refused as for built models."""
    with pytest.raises(GraphError, match="no buffer type is called 'GPU7'"):
        _plan(random_model("llama"), "llama", placement=PlacementFlags(overrides=("x=GPU7",)))


def test_a_library_that_is_none_is_refused(random_model: Callable[[str], Path], tmp_path: Path, monkeypatch) -> None:
    """PYGGML_LIBLLAMA must name a llama.cpp: a missing one and a file of something else are told apart."""
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(tmp_path / "nowhere"))
    with pytest.raises(DeviceUnavailableError, match=r"there is no llama\.cpp at"):
        _plan(random_model("llama"), "llama")
    (tmp_path / "libllama.so").write_bytes(b"no library")
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(tmp_path))
    with pytest.raises(DeviceUnavailableError, match="cannot be loaded"):
        _plan(random_model("llama"), "llama")
