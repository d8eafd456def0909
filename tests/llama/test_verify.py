"""`pyggml verify`: equal plans are told so, and a wrong rule is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyggml.backend import op_batch_size
from pyggml.cli import group
from pyggml.llama.verify import DEVICE, verify
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

CONTEXT = ContextFlags(n_ctx=512, n_ubatch=64)
EXPERTS_ON_HOST = PlacementFlags(cpu_moe=True)


def _verify(path: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["verify", str(path), "-c", "512", "-ub", "64", *options])
    return result.exit_code, result.output


def test_equal_plans(random_model: Callable[[str], Path]) -> None:
    """The build and each plan are in the JSON, and the exit status is 0."""
    status, text = _verify(random_model("qwen3moe"), "-cmoe", "--batches", "100,1", "--json")
    found = json.loads(text)
    assert (status, found["equal"]) == (0, True)
    assert found["build"]["ggml"].startswith("0.")
    told = [(p["batch"], p["n_tokens"], p["equal"], p["first_difference"]) for p in found["plans"]]
    assert told == [(100, 64, True, None), (100, 36, True, None), (1, 1, True, None)]
    assert all(p["splits"] > 3 for p in found["plans"])


def test_a_wrong_threshold_is_found(random_model: Callable[[str], Path]) -> None:
    """A device that takes batches from 31 tokens on is none of llama.cpp's: exit status 1, with the first difference."""
    device = ["-dev", "mock:CUDA0:offload=31,cpu"]
    status, text = _verify(random_model("llama"), "-cmoe", *device, "--batches", "32,31", "--json")
    found = json.loads(text)
    assert (status, found["equal"]) == (1, False)
    right, wrong = found["plans"]
    assert right["equal"]
    assert wrong["first_difference"]["llama"].startswith("## SPLIT #2: CPU")
    assert wrong["first_difference"]["pyggml"].startswith("## SPLIT #2: CUDA0")
    status, text = _verify(random_model("llama"), "-cmoe", *device, "--batches", "31")
    assert status == 1
    assert "llama.cpp: ## SPLIT #2: CPU" in text


def test_a_wrong_rule_is_found(random_model: Callable[[str], Path]) -> None:
    """Another offload rule in pyggml's scheduler alone gives a difference where it decides otherwise, and only there."""

    def from_16(device, node):
        return op_batch_size(node) >= 16

    path = random_model("llama")
    found = verify(path, (40, 20, 8), context=CONTEXT, placement=EXPERTS_ON_HOST, offload_rule=from_16)
    assert [p.equal for p in found.plans] == [True, False, True]


def test_one_line_of_difference_is_found(random_model: Callable[[str], Path], monkeypatch) -> None:
    """A text that ends early differs where it ends."""
    from pyggml.llama import verify as module

    monkeypatch.setattr(
        module, "ggml_text", lambda planner, planned, text=module.ggml_text: text(planner, planned)[:-2]
    )
    found = verify(random_model("llama"), (1,), context=CONTEXT)
    assert found.plans[0].first_difference.line == found.plans[0].n_lines - 1


def test_flags_about_experts_that_are_none(random_model: Callable[[str], Path]) -> None:
    """Experts are kept on the host of a model that has none: a warning, and an equal plan."""
    status, text = _verify(random_model("llama-dense"), "-cmoe", "--batches", "1")
    assert status == 0
    assert "has no experts" in text


@pytest.mark.parametrize(
    "devices", [(DEVICE,), ("mock:CUDA0", "mock:CUDA1:offload=32"), ()], ids=["one", "two", "none"]
)
@pytest.mark.parametrize("flash_attn", ["auto", "off"])
def test_devices(random_model: Callable[[str], Path], devices: tuple[str, ...], flash_attn: str) -> None:
    """One device, two of which one offers to run what is on the host, and none: plans are equal with all of them."""
    context = ContextFlags(n_ctx=512, n_ubatch=64, flash_attn=flash_attn)
    for placement in (EXPERTS_ON_HOST, PlacementFlags(n_gpu_layers=2, n_cpu_moe=1)):
        found = verify(random_model("qwen3moe"), (64, 1), devices=devices, placement=placement, context=context)
        assert found.equal, found.plans
