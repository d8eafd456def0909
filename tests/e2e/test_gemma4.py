"""Gemma4: layers of two kinds of heads, some with K and V of others; against live llama.cpp beyond the window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from beside_llama import greedy_difference, plan_of_both_graphs
from edited_models import SIZES, write_edited

from pyggml.errors import FormatError
from pyggml.session import ContextFlags, PlacementFlags, Session
from pyggml.types import Type

ARCHS = ("gemma4", "gemma4-dense")
TOKENS = [(i * 37 + 11) % 300 for i in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Give a tiny model with experts, and a dense one whose last layers use K and V of others."""
    folder = tmp_path_factory.mktemp("gemma4")
    sizes = replace(SIZES, layers=4)
    return {arch: write_edited(folder / f"{arch}.gguf", arch, sizes=sizes) for arch in ARCHS}


@pytest.mark.parametrize("devices", [[], ["sim:rtx4090-pcie4"]], ids=["cpu", "sim"])
@pytest.mark.parametrize("arch", ARCHS)
def test_parts_of_a_prompt_and_what_follows(arch, devices, models, tmp_path):
    """A prompt in micro-batches of 8 and the tokens that follow it have llama.cpp's logits, on a device, too."""
    flags = ContextFlags(n_ctx=256, n_ubatch=8, type_k=Type.F32, type_v=Type.F32, flash_attn="off")
    placement = PlacementFlags(cpu_moe=arch == "gemma4", n_gpu_layers=3)
    opening = {"devices": devices, "context": flags, "placement": placement}
    assert greedy_difference(models[arch], tmp_path, TOKENS, 5, **opening) < 5e-3


@pytest.mark.parametrize(
    "words",
    [["-ngl", "2"], ["-ngl", "99"], ["-ngl", "99", "--no-kv-offload"], ["-ngl", "99", "-fa", "on"]],
    ids=" ".join,
)
@pytest.mark.parametrize("arch", ARCHS)
def test_plans_are_those_of_llama_cpps_graph(arch, words, models, capsys):
    """Over a device, splits, copies and pins are those of the graph that llama.cpp builds, line for line."""
    assert len(plan_of_both_graphs(models[arch], words, capsys).split("\n")) > 300


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.shared_kv_layers": 1}, "shared_kv_layers.*is 1"),
        ({"attention.shared_kv_layers": 3}, "shared_kv_layers.*is 3"),
        ({"attention.value_length_swa": 8}, "does not go with"),
        ({"attention.key_length_swa": None}, "key_length_swa"),
        ({"attention.sliding_window_pattern": None}, "sliding_window_pattern.*is missing"),
        ({"attention.head_count_kv": [2, 2]}, "has 2 values for 4 layers"),
        ({"attention.head_count_kv": [2, 2, 3, 2]}, "no multiple"),
        ({"feed_forward_length": [96, 0, 96, 96]}, "is 0 in a layer"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(keys, message, tmp_path):
    """Keys of layers that do not go together give one line that names one."""
    path = write_edited(tmp_path / "m.gguf", "gemma4-dense", sizes=replace(SIZES, layers=4), keys=keys)
    with pytest.raises(FormatError, match=message):
        Session.open(path, data=False)
