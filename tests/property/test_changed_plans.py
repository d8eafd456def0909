"""A planner whose flags were changed plans as one that was opened with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyggml.backend import REGISTRY, Backend
from pyggml.catalog import MODELS, write_header
from pyggml.errors import GraphError, PyggmlError
from pyggml.gguf import GGUFFile
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.simulation import simulate_batch
from pyggml.types import Type

N_LAYER = 2

placements = st.builds(
    PlacementFlags,
    n_gpu_layers=st.sampled_from([-1, -1, 0, 1, N_LAYER]),
    n_cpu_moe=st.integers(0, N_LAYER),
    tensor_split=st.sampled_from([(), (1, 3)]),
    overrides=st.sampled_from([(), (r"blk\.1\.attn=CPU",), ("ffn_(up|down)=CPU",)]),
    use_mmap=st.booleans(),
)
contexts = st.builds(
    ContextFlags,
    n_ctx=st.sampled_from([512, 1024]),
    n_batch=st.sampled_from([256, 512]),
    n_ubatch=st.sampled_from([64, 128, 512]),
    flash_attn=st.sampled_from(["auto", "on", "off"]),
    type_k=st.sampled_from([Type.F16, Type.Q8_0]),
    offload_kqv=st.booleans(),
    op_offload=st.booleans(),
    n_seq_max=st.sampled_from([1, 1, 2]),
)


def _described(planner: Planner) -> Any:
    """Return all that a plan says: memory, splits with causes, sizes, and bytes and seconds of a prompt and a token."""
    plans = [
        (
            planned.compute_bytes,
            [(s.backend_id, s.i_start, s.i_end, [t.name for t in s.inputs]) for s in planned.plan.splits],
            [
                (n.name, n.ne, planned.plan.assignment.ids[n], planned.plan.assignment.causes[n])
                for n in planned.graph.graph.nodes
            ],
        )
        for n_tokens in (200, 1)
        for planned in planner.plan_batch(n_tokens)
    ]
    try:
        simulated = [simulate_batch(planner, n_tokens) for n_tokens in (200, 1)]
    except PyggmlError as error:  # some settings cannot be simulated
        return list(planner.memory()), plans, str(error)
    return (
        list(planner.memory()),
        planner.params,
        [(w.spec.name, w.buft.name, w.reason) for w in planner.placement.weights],
        plans,
        [(s.bytes_copied, s.bytes_full, s.n_micro_batches) for s in simulated],
        [pytest.approx(s.seconds, rel=1e-9) for s in simulated],
    )


@pytest.mark.parametrize(
    ("name", "n_layer"),
    [("gpt-oss-20b", N_LAYER), ("qwen3-235b-a22b", N_LAYER), ("qwen3.5-27b", 4), ("gemma-4-31b", 6)],
)
def test_a_changed_planner_plans_as_a_new_one(name: str, n_layer: int, tmp_path: Path) -> None:
    """Memory, placement, splits, causes, bytes and times after each of several changes are those of a planner opened so."""
    path = tmp_path / "model.gguf"
    write_header(replace(MODELS[name], n_layer=n_layer), "Q4_K_M", path)
    file = GGUFFile.open(path)
    names = ["sim:rtx4090-pcie4", "sim:rtx3060-pcie3", "cpu"]
    both = [[d.backend() for d in REGISTRY.open_all(names, data=False)] for _ in range(2)]

    @settings(
        max_examples=8, phases=(Phase.generate,), derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(flags=st.lists(st.tuples(placements, contexts), min_size=2, max_size=3), n_gpu=st.sampled_from([1, 1, 2]))
    def check(flags: list[tuple[PlacementFlags, ContextFlags]], n_gpu: int) -> None:
        own, others = (
            [*backends[:n_gpu], backends[-1]] for backends in both
        )  # each sees all memory of its devices free

        def opened(backends: list[Backend], placement: PlacementFlags, context: ContextFlags) -> Planner:
            return Planner.open(
                file, devices=backends[:-1], cpu=backends[-1], placement=placement, context=context, data=False,
                clock=virtual_clock(backends),
            )  # fmt: skip

        with opened(own, PlacementFlags(), ContextFlags(n_ctx=512)) as planner:
            _described(planner)
            for placement, context in [*flags, flags[0]]:
                try:
                    fresh = opened(others, placement, context)
                except PyggmlError as error:
                    with pytest.raises(type(error)):
                        planner.change(placement, context)
                    continue
                with fresh:
                    planner.change(placement, context)
                    assert _described(planner) == _described(fresh)

    check()


def test_a_flag_that_cannot_be_leaves_the_planner_as_it_was(tmp_path: Path) -> None:
    """A wrong override or context is an error, and the plan before stays."""
    path = tmp_path / "model.gguf"
    write_header(replace(MODELS["gpt-oss-20b"], n_layer=N_LAYER), "MXFP4", path)
    with Planner.open(path, devices=["sim:rtx4090-pcie4"], context=ContextFlags(n_ctx=512), data=False) as planner:
        before = list(planner.memory())
        with pytest.raises(GraphError, match="no buffer type"):
            planner.change(PlacementFlags(overrides=("ffn=MARS",)))
        with pytest.raises(GraphError, match="n_batch"):
            planner.change(context=ContextFlags(n_batch=0))
        assert list(planner.memory()) == before
        assert len(planner.plan_batch(8)) == 1
