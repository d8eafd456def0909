"""Whole models with the CUDA backend over a fake driver: experts in host memory, the cache on the card."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backends import cuda
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.session import PlacementFlags, Session
from pyggml.testing.fake_driver import FakeCard, FakeMachine

TOKENS = list(range(3, 43))  # 40: from 32 on the device takes ops whose experts lie in host memory


#: Small, as a card that is emulated takes seconds for what a real one does at once; two layers, so that results go on.
SIZES = Sizes(layers=2, embd=128, heads=2, kv_heads=1, ff=128, ff_exp=64)


def write_model(arch, path):
    """Write a random model and return its path."""
    make_moe(path, Recipe(arch, sizes=SIZES))
    return path


@pytest.fixture(params=["fake", pytest.param("driver", marks=pytest.mark.gpu)])
def device(request):
    """Give a card of a fake machine, or the first of this one."""
    if request.param == "fake":
        return cuda.CudaDevice(FakeMachine(seed=1).cards[0])
    found = cuda.devices()
    if not found:
        pytest.skip(f"no card: {cuda.why_missing()}")
    return found[0]


@pytest.mark.parametrize(("arch", "cpu_moe"), [("qwen3moe", True), ("llama", False)])
def test_a_model_over_a_card(device, arch, cpu_moe, tmp_path):
    """Prompt and next token have the logits that the CPU alone gives; ops without a kernel run on the CPU."""
    path = write_model(arch, tmp_path / "model.gguf")
    with Session.open(path, cpu=ggml.CPU(1)) as alone:
        expected = [alone.decode(TOKENS, outputs="all"), alone.decode([5])]
    with Session.open(path, devices=[device], cpu=ggml.CPU(1), placement=PlacementFlags(cpu_moe=cpu_moe)) as session:
        got = [session.decode(TOKENS, outputs="all"), session.decode([5])]
    for a, b in zip(got, expected, strict=True):
        assert ((a - b) ** 2).sum() / (b**2).sum() < 1e-6
        assert np.array_equal(a.argmax(-1), b.argmax(-1))
    if isinstance(device.card, FakeCard):
        assert device.card.traffic.n_launched > 100


@pytest.mark.parametrize("arch", ["qwen3moe", "llama"])
def test_a_model_stays_on_the_card(device, arch, tmp_path):
    """With all weights on the card, attention and the experts' router included, only the embedding is the CPU's."""
    path = write_model(arch, tmp_path / "model.gguf")
    with Session.open(path, devices=[device], cpu=ggml.CPU(1)) as session:
        [planned] = session.plan_batch(len(TOKENS))
        splits = planned.plan.splits
    assert [split.backend_id for split in splits] == [1, 0]
    assert {node.op for node in splits[0].graph.nodes} == {ggml.Op.GET_ROWS}
