"""`-ngl auto`: what fits into the memory of devices, with llama.cpp's margin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pyggml import cli
from pyggml.fit import MARGIN_BYTES, N_CTX_MIN
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner
from pyggml.types import Type

AUTO = PlacementFlags(fit=True)
CONTEXT = ContextFlags(n_ctx=8192)


def _open(model: str, devices: list[str], placement: PlacementFlags = AUTO, context: ContextFlags = CONTEXT) -> Planner:
    return Planner.open(model, devices=devices, placement=placement, context=context, data=False)


def _free(planner: Planner) -> list[int]:
    """Return the bytes that stay free of each device, less the margin."""
    used = {m.buft: m.total for m in planner.memory()}
    devices = planner.backends[:-1]
    return [b.device.memory()[0] - used.get(b.buffer_type.name, 0) - MARGIN_BYTES for b in devices]


def test_a_model_that_fits_keeps_all_layers() -> None:
    """Nothing is changed where the margin stays free."""
    with _open("qwen3-8b", ["sim:rtx4090-pcie4"]) as planner:
        assert planner.fit is not None
        assert planner.fit.text == "-c 8192"
        assert planner.fit.n_tried == 1
        assert planner.placement.is_full_offload


def test_a_dense_model_gets_as_many_layers_as_fit() -> None:
    """One layer more would not leave the margin."""
    with _open("llama-3.3-70b", ["sim:rtx4090-pcie4"]) as planner:
        fit = planner.fit
        assert fit is not None
        assert 0 < fit.placement.n_gpu_layers < 80
        assert _free(planner)[0] >= 0
        planner.change(replace(fit.placement, n_gpu_layers=fit.placement.n_gpu_layers + 1), fit.context)
        assert _free(planner)[0] < 0


@pytest.mark.parametrize("devices", [["sim:rtx4090-pcie4"], ["sim:rtx4090-pcie4", "sim:rtx3060-pcie3"]])
def test_a_mixture_of_experts_keeps_experts_on_the_host(devices: list[str]) -> None:
    """All layers are on devices, experts of the last ones are not; the margins hold, and one more layer of experts would not fit."""
    with _open("gpt-oss-120b", devices) as planner:
        fit = planner.fit
        assert fit is not None
        assert fit.placement.n_gpu_layers == 37
        assert fit.note == ""
        assert min(_free(planner)) >= 0
        on_host = [o for o in fit.placement.overrides if o.endswith("exps=CPU")]
        assert on_host
        fewer = tuple(o for o in fit.placement.overrides if o not in on_host[:1])
        planner.change(replace(fit.placement, overrides=fewer), fit.context)
        assert min(_free(planner)) < 0


def test_the_context_shrinks_first() -> None:
    """Without -c a context smaller than the trained one is found, a multiple of 256, with which all layers fit."""
    with _open("qwen3-8b", ["sim:rtx3060-pcie3"], context=ContextFlags(type_k=Type.F32, type_v=Type.F32)) as planner:
        fit = planner.fit
        assert fit is not None
        assert planner.placement.is_full_offload
        assert N_CTX_MIN <= fit.context.n_ctx < planner.hparams.n_ctx_train
        assert fit.context.n_ctx % 256 == 0
        assert _free(planner)[0] >= 0


def test_flags_that_place_weights_are_kept() -> None:
    """With -ncmoe nothing else is changed, as in llama.cpp, and the note says so."""
    with _open("gpt-oss-120b", ["sim:rtx3060-pcie3"], PlacementFlags(fit=True, n_cpu_moe=2)) as planner:
        assert planner.fit is not None
        assert "was given" in planner.fit.note
        assert planner.fit.placement == PlacementFlags(n_cpu_moe=2)


def test_the_same_is_found_by_a_planner_that_is_open() -> None:
    """`Planner.change` takes -ngl auto, too."""
    with _open("llama-3.3-70b", ["sim:rtx4090-pcie4"]) as planner:
        found = planner.fit
        planner.change(context=CONTEXT)
        planner.change(AUTO, CONTEXT)
        assert found is not None
        assert planner.fit is not None
        assert planner.fit.placement == found.placement


def test_splits_says_what_auto_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    """The line of flags is above the memory; -ngl all and a number stay what they are."""
    line: list[Any] = ["splits", "llama-3.3-70b", "-dev", "sim:rtx4090-pcie4", "-c", "4096", "--batches", "1"]
    assert cli.run([*line, "-ngl", "auto"]) == 0
    out = capsys.readouterr().out
    assert "-ngl auto: -ngl " in out
    assert "too large" not in out
    assert cli.run([*line, "-ngl", "20"]) == 0
    assert "-ngl auto" not in capsys.readouterr().out
