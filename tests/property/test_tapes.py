"""Times and counts that are played from a tape equal those of a compute that makes every call, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyggml.backend import REGISTRY, Backend
from pyggml.catalog import MODELS, write_header
from pyggml.errors import PyggmlError
from pyggml.gguf import GGUFFile
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.sched import tape
from pyggml.sched.compute import SplitRun
from pyggml.simulation import simulate_batch
from pyggml.types import Type

N_LAYER = 3

placements = st.builds(
    PlacementFlags,
    n_gpu_layers=st.sampled_from([-1, 0, 1, 2, N_LAYER + 1]),
    n_cpu_moe=st.sampled_from([0, 0, 2]),
    overrides=st.sampled_from([(), (), (r"blk\.1\.attn=CPU",), ("ffn_(up|down)=CPU",)]),
    use_mmap=st.booleans(),
)
contexts = st.builds(
    ContextFlags,
    n_ctx=st.just(1024),
    n_batch=st.sampled_from([256, 512]),
    n_ubatch=st.sampled_from([48, 64, 256]),
    flash_attn=st.sampled_from(["on", "off"]),
    type_k=st.sampled_from([Type.F16, Type.Q8_0]),
    offload_kqv=st.booleans(),
    op_offload=st.booleans(),
)
#: Tokens of a decode, tokens before, and whether they are generated one by one.
decodes = st.lists(
    st.tuples(st.sampled_from([1, 5, 100, 300, 512]), st.sampled_from([0, 17, 512]), st.booleans()),
    min_size=2,
    max_size=4,
)


class EveryCall(SplitRun):
    """A compute of a type that no tape stands for."""

    __slots__ = ()


def _simulated(planner: Planner, batches: list[tuple[int, int, bool]], *, with_tape: bool) -> list[Any]:
    if not with_tape:
        planner.sched.run_type = EveryCall
    clock, stats, seen = planner.sched.clock, planner.sched.stats, []
    assert clock is not None
    clock.reset()
    stats.clear()
    for n_tokens, depth, is_generated in batches:
        is_generated = is_generated and n_tokens < 10
        try:
            seen.append(simulate_batch(planner, n_tokens, depth=depth, is_generated=is_generated))
        except PyggmlError as error:  # some settings cannot be simulated
            seen.append(str(error))
        seen.append(clock.times() | {name: getattr(stats, name) for name in stats.__slots__})
        seen[-1] = {name: value.copy() if isinstance(value, list | dict) else value for name, value in seen[-1].items()}
    del seen[-1]["n_resets"]
    return seen


@pytest.mark.parametrize("name", ["qwen2.5-7b", "gemma-2-9b", "qwen3-30b-a3b", "glm-4.7-flash"])
def test_a_tape_gives_the_times_of_every_call(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and tokens of one planner after the other, whose graphs have the structure of earlier ones or not."""
    monkeypatch.delenv("PYGGML_CHECK", raising=False)  # with the check there are observers, and every call is made
    path = tmp_path / "model.gguf"
    write_header(replace(MODELS[name], n_layer=N_LAYER), "Q4_K_M", path)
    file = GGUFFile.open(path)
    names = ["sim:rtx4090-pcie4", "sim:rtx3060-pcie3", "cpu"]
    both = [[d.backend() for d in REGISTRY.open_all(names, data=False)] for _ in range(2)]
    n_played = 0

    def counting(play: Any) -> Any:
        def count(*arguments: Any, **options: Any) -> None:
            nonlocal n_played
            n_played += 1
            play(*arguments, **options)

        return count

    monkeypatch.setattr(tape.Tape, "play", counting(tape.Tape.play))

    @settings(
        max_examples=8, phases=(Phase.generate,), derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(
        flags=st.lists(st.tuples(placements, contexts, decodes), min_size=2, max_size=3),
        n_gpu=st.sampled_from([1, 1, 2]),
    )
    def check(flags: list[tuple[PlacementFlags, ContextFlags, Any]], n_gpu: int) -> None:
        every: list[list[Backend]] = [[*backends[:n_gpu], backends[-1]] for backends in both]
        planners: list[Planner] = []
        for backends in every:
            planners.append(
                Planner.open(
                    file, devices=backends[:-1], cpu=backends[-1], context=ContextFlags(n_ctx=512), data=False,
                    clock=virtual_clock(backends),
                )
            )  # fmt: skip
        for placement, context, batches in [*flags, flags[0]]:
            before = [[str(b.device.traffic) for b in backends[:-1]] for backends in every]
            assert before[0] == before[1]
            try:
                for planner in planners:
                    planner.change(placement, context)
            except PyggmlError:
                break
            results = [_simulated(p, batches, with_tape=i == 0) for i, p in enumerate(planners)]
            assert results[0] == results[1]
        for planner in planners:
            planner.close()

    check()
    assert n_played > 50
