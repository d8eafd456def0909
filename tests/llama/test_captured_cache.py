"""llama.cpp's expert cache in captured graphs: as in built ones, and as the real scheduler splits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mixed_model import write_mixed

from pyggml.errors import SchedError
from pyggml.lab.running import parse_rule
from pyggml.llama.verify import DEVICE, verify
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.moe_cache import CacheRule, LlamaCache
from pyggml.plan_report import ggml_text
from pyggml.planning import GraphChoice, Planner
from pyggml.routing import DEFAULT_ROUTING
from pyggml.simulation import simulate_batch

CONTEXT = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, flash_attn="on")
RULE = LlamaCache(6 << 20)


@contextmanager
def _plan(
    path: Path,
    graph: GraphChoice,
    rule: CacheRule = RULE,
    devices: tuple[str, ...] = ("sim:rtx4090-pcie4",),
    **flags: object,
) -> Iterator[Planner]:
    placement = PlacementFlags(**{"cpu_moe": True, **flags})
    with Planner.open(
        path, devices=devices, placement=placement, context=CONTEXT, graph=graph, data=False, expert_cache=rule
    ) as planner:
        yield planner


@pytest.mark.parametrize("arch", ["qwen3moe", "olmoe", "glm4moe"])
def test_captured_plans_with_a_cache_equal_built_ones(random_model: Callable[[str], Path], arch: str) -> None:
    """Splits, memory, slots, hits and virtual time do not depend on whose graph reads the cache."""
    found = []
    for graph in ("built", "llama"):
        with _plan(random_model(arch), graph) as planner:
            texts = [ggml_text(planner, p) for n in (64, 20, 1) for p in planner.plan_batch(n)]
            made = simulate_batch(planner, 12, routing=DEFAULT_ROUTING, is_generated=True)
            assert planner.expert_cache is not None
            assert planner.expert_cache.counters.hits
            found.append([texts, planner.memory(), planner.expert_cache.as_dict(), made.seconds, made.bytes_copied])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "devices", [(DEVICE,), ("mock:CUDA0:offload=32", "mock:CUDA1:offload=32")], ids=["one device", "two devices"]
)
def test_splits_with_a_cache_are_llama_cpps(
    random_model: Callable[[str], Path], tmp_path: Path, devices: tuple[str, ...]
) -> None:
    """The real scheduler splits graphs that read the banks of two groups, and graphs past the cache, line by line alike."""
    path = write_mixed(tmp_path / "mixed.gguf", random_model("qwen3moe"))
    found = verify(
        path, (64, 16, 1), devices=devices, placement=PlacementFlags(cpu_moe=True), context=CONTEXT, expert_cache=RULE
    )
    assert [p.first_difference for p in found.plans] == [None] * 3
    with _plan(path, "llama", devices=devices) as planner:
        assert planner.expert_cache is not None
        assert len(planner.expert_cache.groups) == (2 if len(devices) == 1 else 3)
        assert any("moe_cache.slot_map" in ggml_text(planner, p) for p in planner.plan_batch(1))


def test_a_cache_of_the_users_own_is_refused(random_model: Callable[[str], Path]) -> None:
    """llama.cpp builds its own cache into its graphs, and no other."""
    with (
        pytest.raises(SchedError, match="its own expert cache"),
        _plan(random_model("qwen3moe"), "llama", parse_rule("lfu:50%", "layer", None)),
    ):
        pass


def test_a_cache_too_small_for_a_token_is_refused_as_for_built_models(random_model: Callable[[str], Path]) -> None:
    """The error has the same words whose graph it may be."""
    words = []
    for graph in ("built", "llama"):
        with pytest.raises(SchedError) as error, _plan(random_model("qwen3moe"), graph, LlamaCache(1 << 10)):
            pass
        words.append(str(error.value))
    assert words[0] == words[1]
