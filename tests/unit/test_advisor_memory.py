"""What settings are asked for their memory, and what of it counts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from pyggml.advisor import Goal, MemoryModel, Search, plan
from pyggml.advisor.advice import open_machine
from pyggml.advisor.maker import _NOTEWORTHY, _WORTH_A_TRY, _times
from pyggml.advisor.memory import DeviceMemory
from pyggml.catalog import header_path
from pyggml.errors import GraphError
from pyggml.foresight import ModelShape, Setting
from pyggml.gguf import GGUFFile
from pyggml.planning import Planner
from pyggml.types import Type

HOST = "ddr4-3200x2,cores=8,64GiB"


def test_types_of_the_cache_that_a_model_cannot_have_are_tried_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three settings with a KV type are refused with the same words: the others of it are not planned, and those of other types are."""
    planner, asked = MemoryModel.planner, []

    def refusing(memory: MemoryModel, setting: Setting) -> Planner:
        asked.append(setting)
        if setting.type_k is Type.Q8_0:
            raise GraphError("no backend of SIM0, CPU can run CONCAT")
        return planner(memory, setting)

    monkeypatch.setattr(MemoryModel, "planner", refusing)
    with_q8 = [Setting(n_gpu_layers=n, type_k=Type.Q8_0, type_v=Type.Q8_0) for n in range(5)]
    advice = plan("llama-3.1-405b", devices="rtx3060", host="ddr4-3200x2,cores=8,16GiB", compare=with_q8)
    assert advice.nothing_fits
    assert sum(s.type_k is Type.Q8_0 for s in asked) == 3
    assert sum(s.type_k is Type.F16 for s in asked) > 3
    assert all("can run CONCAT" in made.refused for made in advice.compared)


def test_memory_of_a_mapped_file_is_that_of_its_weights_on_the_host() -> None:
    """Weights of devices between those on the host are in the mapped range, but take no memory of the host."""
    backends, machine = open_machine("rtx3060", HOST)
    with (
        GGUFFile.open(header_path("qwen3-8b")) as file,
        closing(MemoryModel(file, backends, 4096, host=machine.host, margin_bytes=0)) as memory,
    ):
        ends = Setting(overrides=(r"blk\.(0|35)\.=CPU",))
        mapped, pinned = (memory.exact(replace(ends, is_pinned=is_pinned)) for is_pinned in (False, True))
    assert mapped is not None
    assert pinned is not None
    assert mapped[-1].bytes == pytest.approx(pinned[-1].bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "device"),
    [("llama-3.2-3b:F16", "gtx1650,gtx1650"), ("qwen3-30b-a3b", "rtx3090,rtx3060"), ("gemma-3-4b", "rtx3060,rtx3060")],
)
def test_a_setting_of_other_shares_lacks_on_each_device_at_least_its_bound(model: str, device: str) -> None:
    """What is known of one setting bounds what any other lacks, so that no smaller lack is overlooked where nothing fits."""
    file = GGUFFile.open(header_path(model))
    backends, machine = open_machine(device, HOST)
    model_memory = MemoryModel(file, backends, 8192, host=machine.host, margin_bytes=0)
    n = model_memory.n_layer
    some = [
        Setting(n_gpu_layers=ngl, tensor_split=shares, n_ubatch=n_ubatch, type_k=t, type_v=t, kv_offload=kv, op_offload=kv, threads=8)
        for ngl, shares, n_ubatch, t, kv in [
            (n - 2, (), 512, Type.F16, True), (n - 2, (1.0, 4.0), 512, Type.F16, True), (n // 2, (4.0, 1.0), 512, Type.F16, True),
            (1, (1.0, 4.0), 512, Type.F16, True), (-1, (1.0, 2.0), 512, Type.F16, True), (n - 2, (1.0, 4.0), 2048, Type.F16, True),
            (n - 2, (1.0, 4.0), 512, Type.Q8_0, True), (n - 2, (1.0, 4.0), 512, Type.F16, False), (0, (), 512, Type.Q8_0, False),
            (n - 2, (4.0, 1.0), 2048, Type.Q8_0, False),
        ]
    ]  # fmt: skip
    with file, closing(model_memory) as memory:
        memory._of_bytes = [1] * 3  # all is missing
        exact = {s: memory.exact(s) or [] for s in some}
        least = dict(memory._least)
        for kind, rest in least.items():
            memory._least, memory._rest, memory._exact = {kind: rest}, {}, {}  # as if this alone had been planned
            memory._least_of.clear()
            memory._bounds.clear()
            for i in range(3):
                memory._of_bytes = [int(i == j) for j in range(3)]  # all is missing on one device, or on the host
                told = {s: memory.least_missing(s) for s in some}
                assert all(told[s] <= exact[s][i].missing_bytes for s in some), (kind, i)
                assert model.startswith("gemma") or sum(told.values()) > sum(memory.weights(s)[i] for s in some)


@pytest.mark.parametrize(
    ("model", "device", "flags"),
    [
        ("gpt-oss-20b", "rtx3060", {"n_cpu_moe": 12}),
        ("llama-3.2-3b:Q8_0", "gtx1650", {"n_gpu_layers": 20}),
        ("gemma-3-4b", "rtx3060,rtx3060", {"tensor_split": (1.0, 2.0)}),
        ("gemma-4-31b", "rtx3060", {"n_gpu_layers": 31, "op_offload": False}),
        ("qwen3.5-4b", "gtx1650", {"n_gpu_layers": 9, "kv_offload": False}),
        ("deepseek-v2-lite", "gtx1650", {"n_cpu_moe": 20}),
        ("glm-4.5-air", "rtx3060", {"n_cpu_moe": 43}),
    ],
)
def test_no_setting_is_left_out_that_might_fit(model: str, device: str, flags: dict[str, Any]) -> None:
    """A setting takes at least what the header and the memory of another micro-batch or KV type say; little less if it copies nothing."""
    base = Setting(n_batch=4096, threads=8, **flags)
    some = [replace(base, n_ubatch=n, type_k=t, type_v=t) for n in (512, 1024, 4096) for t in (Type.F16, Type.Q8_0)]
    backends, machine = open_machine(device, HOST)
    with (
        GGUFFile.open(header_path(model)) as file,
        closing(MemoryModel(file, backends, 8192, host=machine.host, margin_bytes=0)) as memory,
    ):
        exact = {s: memory.exact(s) for s in some}
        rests = dict(memory._rest)
        for kind, rest in [(None, []), *rests.items()]:
            memory._rest = {} if kind is None else {kind: rest}  # as if this alone had been planned
            memory._bounds.clear()
            for setting, planned in exact.items():
                least = memory.at_least(setting)
                assert planned is not None
                assert all(a.bytes <= b.bytes for a, b in zip(least, planned, strict=True)), (kind, setting)
                assert setting.op_offload or least[0].bytes > 0.98 * planned[0].bytes


def test_the_scheduler_is_asked_of_few_settings_that_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, KV cache and results are known from the header, so a plan of a model larger than its card opens hardly a setting in vain."""
    asked: list[bool] = []
    answer = MemoryModel._open

    def counting(memory: MemoryModel, setting: Setting) -> list[DeviceMemory] | None:
        taken = answer(memory, setting)
        asked.append(taken is not None and all(d.fits for d in taken))
        return taken

    monkeypatch.setattr(MemoryModel, "_open", counting)
    advice = plan("qwen3-8b", devices="gtx1650", host=HOST)
    assert len(advice.plans) == 4
    assert len(asked) == advice.n_planned < 10
    assert asked.count(False) <= 3


@pytest.mark.parametrize(
    ("model", "device", "n_layers"),
    [("qwen3-8b", "gtx1650", (12, 16)), ("gemma-3-4b", "gtx1650", (10, 20)), ("qwen3-30b-a3b", "rtx3060", (-1, -1))],
)
def test_the_simulated_machine_finds_no_more_to_gain_than_formulas(
    model: str, device: str, n_layers: tuple[int, int]
) -> None:
    """So a row that must gain 3 % is not carried out where formulas find less than 2 %."""
    backends, machine = open_machine(device, HOST)
    experts = (40, 36) if n_layers[0] < 0 else (0, 0)
    less, more = (
        Setting(n_gpu_layers=n, n_cpu_moe=moe, n_ubatch=ub, threads=8)
        for n, moe, ub in zip(n_layers, experts, (512, 1024), strict=True)
    )
    with (
        GGUFFile.open(header_path(model)) as file,
        closing(MemoryModel(file, backends, 8192, host=machine.host, margin_bytes=0)) as memory,
    ):
        shape = ModelShape.from_header(file.metadata, file.tensors, model)
        search = Search(shape, machine, Goal(), memory)
        slow, fast = _times(search, less), _times(search, more)
        by_formula = search.score(less), search.score(more)
    margin = _NOTEWORTHY / _WORTH_A_TRY
    assert fast.pp.mid / slow.pp.mid < margin * by_formula[0].prompt_s / by_formula[1].prompt_s
    assert fast.tg.mid / slow.tg.mid < margin * by_formula[0].generate_s / by_formula[1].generate_s
