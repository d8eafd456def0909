"""The model that `make run` answers with, against real llama.cpp fed the same tokens."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

import pyggml as ggml
from pyggml.session import ContextFlags, PlacementFlags, Session

TOKENS = [3 + (i * 37 + 11) % 40000 for i in range(60)]


@pytest.fixture(scope="module")
def expected(example_path, tmp_path_factory):
    """Give llama.cpp's logits."""
    folder = tmp_path_factory.mktemp("example")
    return llama_cpp.logits(example_path, TOKENS, folder, batch=60, kv="F16", flash=True)


@pytest.mark.parametrize("over_device", [False, True])
def test_logits_are_those_of_llama_cpp(example_path, expected, over_device):
    """NMSE at most 5e-3, and the same first choice wherever llama.cpp's own margin exceeds 0.5."""
    devices = [ggml.Sim()] if over_device else []
    placement = PlacementFlags(cpu_moe=over_device)
    with Session.open(
        example_path, devices=devices, cpu=ggml.CPU(2), placement=placement, context=ContextFlags(n_ctx=256)
    ) as session:
        got = session.decode(TOKENS, outputs="all")
    assert np.square(got - expected).sum() / np.square(expected).sum() <= 5e-3
    best = np.sort(expected, axis=1)
    clear = best[:, -1] - best[:, -2] > 0.5
    assert clear.sum() > 10
    assert np.array_equal(got[clear].argmax(1), expected[clear].argmax(1))
