"""Models of every type of weight can be planned; a type that is none for weights is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gguf import GGMLQuantizationType

from pyggml.catalog import MODELS, type_tensors, write_header
from pyggml.errors import UnsupportedOpError
from pyggml.planning import Planner
from pyggml.session import ContextFlags, PlacementFlags, Session
from pyggml.types import Type

CONTEXT = ContextFlags(n_ctx=256)
SMALL = replace(MODELS["qwen3-235b-a22b"], n_layer=2, n_expert=4, n_used=2, n_vocab=64)
#: Intermediate results aside, every quantised type that the library which writes files knows.
TYPES = [t for t in Type if t.is_quantized and t not in (Type.Q8_1, Type.Q8_K) and int(t) in list(GGMLQuantizationType)]


def write_typed(path, kind, monkeypatch):
    """Write a header whose quantised weights have one type, whatever mixes have it."""

    def typed(*args, **options):
        return [replace(t, type=kind if t.type.is_quantized else t.type) for t in type_tensors(*args, **options)]

    monkeypatch.setattr("pyggml.catalog.header.type_tensors", typed)
    write_header(SMALL, "Q8_0", path)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("device", ["sim:rtx4090-pcie4", "mock:CUDA0:offload=32"])
def test_weights_of_any_type_can_be_planned(tmp_path, kind, device, monkeypatch):
    """A plan has the splits of the same model in Q8_0, and sizes of its own."""
    found, sizes = [], []
    for name in (kind.name.lower(), "q8_0"):
        path = tmp_path / f"{name}.gguf"
        write_typed(path, Type.of(name), monkeypatch)
        with Planner.open(
            path, devices=[device], placement=PlacementFlags(cpu_moe=True), context=CONTEXT, data=False
        ) as planner:
            splits = planner.plan_batch(40)[0].plan.splits
            found.append([(s.backend_id, s.i_start, s.i_end, [i.name for i in s.inputs]) for s in splits])
            sizes.append(sum(i.nbytes for s in splits for i in s.inputs if i.name.endswith("exps.weight")))
    assert found[0] == found[1]
    assert len(found[0]) > 3
    assert sizes[0] * Type.Q8_0.row_size(256) == sizes[1] * kind.row_size(256)


def test_a_type_without_a_kernel_is_refused_before_computing(tmp_path, monkeypatch):
    """Q8_K is what some products make of activations; a model of such weights is refused, and the type named."""
    path = tmp_path / "q8_k.gguf"
    write_typed(path, Type.Q8_K, monkeypatch)
    with pytest.raises(UnsupportedOpError, match=r"its type is q8_K.*such as q8_0"):
        Session.open(path, context=CONTEXT)
