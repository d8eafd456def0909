"""Every architecture of llama.cpp, by the smallest header that it takes: captured, and split as the real scheduler does."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from headers import known, write_known

from pyggml.errors import ModelError
from pyggml.llama.verify import DEVICE, verify
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

#: Names, devices and flags: what is offloaded, where experts and caches are.
PLACES: dict[str, tuple[str, PlacementFlags, bool]] = {
    "all": ("mock:CUDA0", PlacementFlags(), True),
    "one layer": ("mock:CUDA0", PlacementFlags(n_gpu_layers=1), True),
    "experts on the host": ("mock:CUDA0", PlacementFlags(cpu_moe=True), True),
    "experts offered": (DEVICE, PlacementFlags(cpu_moe=True), True),
    "cache on the host": ("mock:CUDA0", PlacementFlags(), False),
}
SIZES = (40, 1)
#: One of each kind: dense, with experts, hybrid, recurrent, encoders, latent attention, sliding windows, several inputs.
FEW = (
    "gemma3 gemma4 qwen3next qwen35moe llama4 deepseek32 glm4moe gpt-oss mamba2 falcon-h1 jamba nemotron_h_moe phi3 "
    "bert t5 rwkv6 lfm2moe hunyuan-moe kimi-linear minimax-m2 granitehybrid cohere2"
).split()
#: What llama.cpp of the tests does not take at all.
REFUSED = {name: about["why_not"] for name, about in known().items() if "why_not" in about}


def _differences(path: Path, cases: list[tuple[str, str]]) -> list[str]:
    out = []
    for flash, name in cases:
        device, placement, offload_kqv = PLACES[name]
        context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, flash_attn=flash, offload_kqv=offload_kqv)
        found = verify(path, SIZES, devices=[device], placement=placement, context=context, outputs="all")
        out += [f"{flash}, {name}, {p.n_tokens}: {p.first_difference}" for p in found.plans if not p.equal]
        assert len(found.plans) == len(SIZES)
    return out


@pytest.mark.parametrize("arch", FEW)
def test_plans_equal_llama_cpps(arch: str, tmp_path: Path) -> None:
    """A few plans of one architecture of each kind equal what the real scheduler prints, line by line."""
    cases = [("on", "experts offered"), ("off", "one layer"), ("off", "cache on the host")]
    assert not _differences(write_known(arch, tmp_path), cases)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(set(known()) - set(REFUSED)))
def test_twenty_plans_of_every_architecture(arch: str, tmp_path: Path) -> None:
    """Flash attention on and off, five placements, two sizes: every plan equals the real scheduler's."""
    try:
        differences = _differences(write_known(arch, tmp_path), list(product(("on", "off"), PLACES)))
    except ModelError as error:
        assert arch in NOT_CAPTURED, error
        assert NOT_CAPTURED[arch] in str(error)
        return
    assert not differences


#: Headers that llama.cpp loads and then fails on, with its words.
NOT_CAPTURED: dict[str, str] = {}
