"""Answers of llama.cpp that follow from earlier ones: they are those that it would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyggml.backend import REGISTRY
from pyggml.catalog import header_path
from pyggml.gguf import GGUFFile
from pyggml.llama.source import CapturedSource
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner

_FIT = (r"blk\.4\.ffn_down.*=CPU", r"blk\.(5|6|7|8|9|10|11)\.ffn_(up|down|gate_up|gate)_(ch|)exps=CPU")
_CHANGES: list[tuple[PlacementFlags, dict[str, Any]]] = [
    (PlacementFlags(n_cpu_moe=3), {}),
    (PlacementFlags(n_cpu_moe=20), {}),
    (PlacementFlags(n_cpu_moe=20, use_mmap=False), {"op_offload": False}),
    (PlacementFlags(overrides=_FIT), {}),
    (PlacementFlags(overrides=_FIT), {"n_ubatch": 64}),
    (PlacementFlags(n_cpu_moe=2, use_mmap=False), {"n_ubatch": 64}),
    (PlacementFlags(n_gpu_layers=5), {}),
    (PlacementFlags(overrides=("token_embd=SIM0", r"blk\.1\..*=CPU")), {}),
    (PlacementFlags(n_cpu_moe=3), {"offload_kqv": False}),
]
#: Flags about which enough is known then.
_NOT_ASKED: list[tuple[PlacementFlags, dict[str, Any]]] = [
    (PlacementFlags(n_cpu_moe=4), {"n_batch": 2048, "op_offload": False}),
    (PlacementFlags(n_cpu_moe=9, use_mmap=False), {}),
    (PlacementFlags(overrides=_FIT), {"op_offload": False}),
]


def _described(planner: Planner) -> Any:
    """Return where weights are and why, memory, and the graphs with where their leafs are, whatever their addresses."""
    graphs = []
    for n, depth in ((70, 0), (1, 100)):
        for planned in planner.plan_batch(n, depth=depth):
            nodes = planned.graph.graph.nodes
            leafs = {s for t in nodes for s in t.src if s is not None and s.buffer is not None and not s.src}
            graphs.append((
                [(t.name, t.op, t.type, t.ne, t.nb, t.op_params, [s and s.name for s in t.src]) for t in nodes],
                sorted((t.name, t.ne, t.buffer.buft.name, t.buffer.usage) for t in leafs if t.buffer is not None),
                [(s.backend_id, s.i_start, [t.name for t in s.inputs]) for s in planned.plan.splits],
                planned.compute_bytes,
            ))  # fmt: skip
    weights = sorted((w.spec.name, w.buft.name, w.reason) for w in planner.placement.weights)
    return (
        weights,
        [str(m) for m in planner.memory()],
        planner.params,
        [d.name for d in planner.placement.layers],
        graphs,
    )


@pytest.mark.parametrize(
    "model",
    ["deepseek-v2-lite", pytest.param("deepseek-v4-flash", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_answers_that_follow_from_others_are_those_of_llama(model: str) -> None:
    """A changed planner has the places, graphs, splits and memory of one that asks llama.cpp, and asks less often."""
    own, others = ([d.backend() for d in REGISTRY.open_all(["sim:rtx4090-pcie4", "cpu"], data=False)] for _ in range(2))

    def opened(backends: list[Any], placement: PlacementFlags, context: ContextFlags) -> Planner:
        return Planner.open(
            file, devices=backends[:1], cpu=backends[1], placement=placement, context=context, graph="llama", data=False,
        )  # fmt: skip

    with (
        GGUFFile.open(Path(header_path(model))) as file,
        opened(own, PlacementFlags(), ContextFlags(n_ctx=256)) as planner,
    ):
        for placement, flags in [*_CHANGES, *_NOT_ASKED]:
            asked = _n_asked(planner)
            context = ContextFlags(**{"n_ctx": 256, "n_ubatch": 32, "flash_attn": "on"} | flags)
            planner.change(placement, context)
            with opened(others, placement, context) as fresh:
                assert _described(planner) == _described(fresh), (placement, context)
            if (placement, flags) in _NOT_ASKED:
                assert _n_asked(planner) == asked


def _n_asked(planner: Planner) -> int:
    assert isinstance(planner.source, CapturedSource)
    return planner.source.answers.n_asked
