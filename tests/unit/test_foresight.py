"""Foresight: shapes from tensors, cards and hosts by name, and what each term of the clock does."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyggml.backend import REGISTRY
from pyggml.catalog import MODELS, write_header
from pyggml.cli import run
from pyggml.cost import host_profile, parse_profile
from pyggml.errors import DeviceUnavailableError, FormatError
from pyggml.foresight import Machine, Setting, estimate, machine_of, model_shape, speed_of
from pyggml.foresight.estimate import LayerTimes, place, predict
from pyggml.hardware.cards import CARDS, GENERATIONS, Card, find_card
from pyggml.hardware.hosts import find_cpu, parse_host
from pyggml.hardware.rates import RATES, n_fitted
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.routing import LogNormal
from pyggml.simulation import simulate_batch
from pyggml.types import Type

BENCH = Path(__file__).parents[1] / "bench" / "bench_foresight.py"
MACHINE = machine_of("rtx3090", "ddr4-3200x2,cores=8,64GiB")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("bench_foresight", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH.parent)
        spec.loader.exec_module(module)
    return module


def _seconds(model: str, machine: Machine, n: int, **flags: object) -> float:
    setting = Setting(**flags)  # type: ignore[arg-type]
    return predict(model_shape(model), machine, setting, n, 0, is_prompt=n > 1)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"), ("RTX 4070 Ti SUPER", "rtx4070tisuper"), ("A100 SXM 80GB", "a100sxm"),
        ("Radeon AI PRO R9700", "r9700"), ("Radeon 8060S (Strix Halo iGPU, gfx1151)", "8060s"), ("A40 48GB", "a40"),
        ("M2 Ultra 76-Core GPU", "m2ultra"), ("MI60 / MI50 (gfx906)", "mi60"), ("Intel Arc Pro B70", "b70"),
        ("M1 8-Core GPU", "m1"), ("RTX PRO 6000 Blackwell Workstation", "rtxpro6000"), ("GB10 (DGX Spark)", "gb10"),
        ("RTX 6000 Ada", "rtx6000ada"), ("Quadro RTX 5000", "quadrortx5000"), ("V100 16GB", "v100"),
    ],
)  # fmt: skip
def test_cards_as_people_write_them(text: str, name: str) -> None:
    """Makers, brackets and sizes do not hide a card."""
    card = find_card(text)
    assert card is not None
    assert card.name == name


def test_data_sheets_are_plausible() -> None:
    """Every card has a known generation, and rates that a card can have."""
    assert len(CARDS) > 120
    for card in CARDS.values():
        assert card.generation in GENERATIONS
        assert 1e11 / 4 < card.bytes_per_s < 1e13
        assert card.f32_per_s <= card.f16_per_s <= 2.01 * card.int8_per_s or card.family == "cuda-dp4a"
    assert find_card("RTX 9999") is None
    small = find_card("RTX 3080", 12)
    assert small is not None
    assert small.memory_bytes == 12 * 2**30


def test_hosts(bench: ModuleType) -> None:
    """A host is read from a specification or from what people write of their machine."""
    host = parse_host("ddr5-6000x2,cores=16,isa=avx512,96GiB")
    assert (host.n_cores, host.isa, host.memory_bytes) == (16, "avx512", 96 * 2**30)
    assert host.read_bytes_per_s == pytest.approx(0.88 * 96e9)
    assert parse_host("read=60GB/s").read_bytes_per_s == 60e9
    assert parse_host("Ryzen 9 5950X,ddr4-3600x2").n_cores == 16
    assert bench.memory_rate("512 GB of 768 GB, 12 channels DDR5-6000") == pytest.approx(0.88 * 576e9)
    assert bench.memory_rate("128 GB LPDDR5X-8000 256 bit, shared") == pytest.approx(0.88 * 256e9)
    assert bench.memory_rate("126 GiB (type not stated)") is None
    assert find_cpu("i7-7700 4c/8t") == (4, "avx2")
    for bad in ("ddr4-3200x2,cores=0", "many cores"):
        with pytest.raises(DeviceUnavailableError):
            parse_host(bad)


def test_at_most_forty_numbers_are_fitted() -> None:
    """The clock has few free numbers, and each is a positive one."""
    assert n_fitted() <= 40
    assert RATES.cuda.memory < 1
    assert RATES.rocm.memory < 1


def test_a_file_and_its_name_have_one_shape(tmp_path: Path) -> None:
    """The shape of a header equals that of the name it was made from, for attention, windows, states and latents."""
    for name in ("qwen3-30b-a3b", "gpt-oss-20b", "qwen3.6-35b-a3b", "deepseek-v2-lite", "llama-3-8b"):
        path = tmp_path / f"{name}.gguf"
        write_header(MODELS[name], MODELS[name].quant, path)
        file, table = model_shape(str(path)), model_shape(name)
        assert file.layers == table.layers, name
        assert (file.output, file.total_bytes, file.n_used) == (table.output, table.total_bytes, table.n_used)
    with pytest.raises(FormatError, match="no such model"):
        model_shape("gpt-5")


def test_what_moves_times_the_right_way() -> None:
    """More in host memory, less RAM, a narrower link and pageable memory are slower; each where it should be."""
    model = "qwen3-30b-a3b"
    none, half, all_ = (_seconds(model, MACHINE, 1, n_cpu_moe=n) for n in (0, 24, 48))
    assert none < half < all_
    slow_ram = (
        replace(MACHINE, host=replace(MACHINE.host, read_bytes_per_s=20e9))
        if hasattr(MACHINE, "__slots__")
        else MACHINE
    )
    assert _seconds(model, slow_ram, 1, n_cpu_moe=48) > 1.5 * all_
    assert _seconds(model, slow_ram, 1) == none
    pinned, pageable = (_seconds(model, MACHINE, 512, n_cpu_moe=48, is_pinned=p) for p in (True, False))
    assert pageable > pinned
    narrow = machine_of("rtx3090", MACHINE.host, pcie="3.0 x4")
    assert _seconds(model, narrow, 512, n_cpu_moe=48, is_pinned=True) > 3 * pinned
    assert _seconds(model, narrow, 1, n_cpu_moe=48) == all_  # nothing is copied for one token


def test_times_of_layers_that_are_kept_change_nothing() -> None:
    """Settings that share the times of their layers are predicted as each alone, to the last bit."""
    for model, machine in (("gpt-oss-20b", machine_of("rtx3090,rtx3060")), ("gemma-3-12b", machine_of("rtx4090"))):
        shape = model_shape(model)
        known: LayerTimes = {}
        some = [
            replace(s, **flag)
            for s in (Setting(), Setting(n_gpu_layers=5), Setting(n_cpu_moe=7, overrides=(r"blk\.9\.ffn=CPU",)))
            for flag in (
                {}, {"threads": 2}, {"is_pinned": True}, {"type_k": Type.Q8_0}, {"type_v": Type.Q8_0}, {"kv_offload": False},
                {"op_offload": False}, {"flash_attn": False}, {"backend": "vulkan"}, {"split_mode": "row"}, {"n_ubatch": 96},
            )
        ]  # fmt: skip
        for s in some:
            for n, depth, is_prompt in ((1000, 0, True), (128, 1000, False)):
                alone = predict(shape, machine, s, n, depth, is_prompt=is_prompt)
                assert predict(shape, machine, s, n, depth, is_prompt=is_prompt, known=known) == alone, s
        assert known


def test_larger_micro_batches_amortise_copies_and_padding() -> None:
    """With experts on the host a larger micro-batch is much faster, with all on the card a little."""
    prompts = {
        ub: _seconds("gpt-oss-120b", MACHINE, 4096, n_cpu_moe=36, n_ubatch=ub, n_batch=4096) for ub in (512, 4096)
    }
    assert prompts[512] > 3 * prompts[4096]
    resident = [_seconds("qwen3-30b-a3b", MACHINE, 2048, n_ubatch=ub) for ub in (64, 512, 2048)]
    assert resident[0] > 1.6 * resident[1] > 1.6 * resident[2]


def test_cards_in_a_row() -> None:
    """Two cards decode no faster than one, and take a prompt faster when it has several micro-batches."""
    two = machine_of("rtx3090,rtx3090")
    one = machine_of("rtx3090")
    assert _seconds("llama-3-8b", two, 1) >= _seconds("llama-3-8b", one, 1)
    assert _seconds("llama-3-8b", two, 1024) < _seconds("llama-3-8b", one, 1024)
    layers = place(model_shape("llama-3-8b"), Setting(), [1.0, 1.0])
    assert (
        sorted(p.device for p in layers for _ in range(p.count)) == [0] * 17 + [1] * 15
    )  # the output is the 33rd of 33


def test_cards_that_share_every_layer() -> None:
    """Split by rows, two cards share the dense products and pay for the link; by tensors they share all, and are faster where it is wide."""
    two, slow = machine_of("rtx3090,rtx3090", pcie="4.0 x16"), machine_of("rtx3090,rtx3090", pcie="3.0 x1")
    layer, row, tensor = (_seconds("llama-3.3-70b", two, 512, split_mode=m) for m in ("layer", "row", "tensor"))
    assert tensor < row
    assert tensor < layer
    for mode in ("row", "tensor"):
        assert _seconds("llama-3.3-70b", slow, 512, split_mode=mode) > 1.5 * (row if mode == "row" else tensor)
        assert _seconds("llama-3-8b", machine_of("rtx3090"), 512, split_mode=mode) == _seconds(
            "llama-3-8b", machine_of("rtx3090"), 512
        )
    amd = machine_of("r9700,r9700")
    assert _seconds("llama-3-8b", amd, 512, split_mode="row", backend="Vulkan") == _seconds(
        "llama-3-8b", amd, 512, backend="Vulkan"
    )  # Vulkan has no buffers that are split by rows


def test_depth_costs_by_attention() -> None:
    """Depth slows a model with full attention more than one with windows or recurrent layers."""

    def slower(model: str) -> float:
        at = [predict(model_shape(model), MACHINE, Setting(), 1, d, is_prompt=False) for d in (0, 32768)]
        return at[1] / at[0]

    assert slower("llama-2-7b") > slower("llama-3-8b") > slower("qwen3.6-35b-a3b") > 1


def test_used_experts_grow_with_tokens() -> None:
    """One token uses its experts, many use nearly all, and an even router more than an uneven one."""
    counts = [LogNormal(1.0).used(128, 8, n) for n in (1, 8, 64, 512)]
    assert counts[0] == 8
    assert counts == sorted(counts)
    assert counts[-1] > 120
    assert LogNormal(0.1).used(128, 8, 16) > LogNormal(2.5).used(128, 8, 16)


def test_estimate_has_ranges() -> None:
    """An estimate says between what the truth is likely; a card that is not known is an error."""
    answer = estimate("gpt-oss-120b", MACHINE, Setting(n_cpu_moe=36))
    for speed in (answer.prompt, answer.generation):
        assert speed.low < speed.mid < speed.high < 3 * speed.low
    with pytest.raises(DeviceUnavailableError, match="no card"):
        machine_of("rtx9999")


def test_benchmark_holds_on_the_project_s_facts(bench: ModuleType) -> None:
    """The predictions stay within the bars on the runs in the tree; strange rows are counted, never a crash."""
    rows = bench.read_lines(bench.DATA / "foresight_runs.jsonl")
    out = bench.report(rows, [])
    assert out["pp"]["median_error"] < 0.20
    assert out["pp"]["p90_error"] < 0.60
    assert out["tg"]["median_error"] < 0.09
    assert out["tg"]["p90_error"] < 0.30
    assert out["regret"]["median"] < 0.03
    assert out["regret"]["worst"] < 0.15
    assert out["coverage_80"] >= 0.8
    assert out["range_ratio"] <= 1.8
    assert out["parameters"] <= 40


def test_strange_rows_are_told(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of other engines, cards and models, and rows that are none, end under a reason."""
    rows = bench.read_lines(bench.DATA / "foresight_runs.jsonl")[:1]
    strange = [
        {**rows[0], "engine": "ik_llama.cpp"}, {**rows[0], "gpus": [{"name": "RTX 9999"}]}, {**rows[0], "gpus": None},
        {**rows[0], "model": "GPT-5"}, {**rows[0], "quant": "Q9"}, {**rows[0], "ub": "all", "ctx_or_depth": "deep"},
        {"engine": "llama.cpp", "pp_tps": 1}, {}, {**rows[0], "gpus": ["RTX 3090"]}, {**rows[0], "flags": ["-ngl"]},
    ]  # fmt: skip
    path, logs = tmp_path / "runs.jsonl", tmp_path / "logs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in strange) + "\nno json\n[1]\n")
    logs.write_text(json.dumps({"mainline": True}) + "\n" + json.dumps({"mainline": False}) + "\n{}\n")
    assert bench.main(["--runs", str(path), "--memory-logs", str(logs), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert {"engine", "unknown card", "hardware not named", "unknown model", "unknown quantisation"} <= set(
        out["unpredicted"]
    )
    assert out["memory"]["n"] == 0


def test_cards_are_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A card's name alone is a simulated device at its own link; custom devices take generation and peaks; splits says speeds."""
    first, second = REGISTRY.open_all(["rtx3060", "rtx3060-pcie3"], data=False)
    assert (first.profile, second.profile) != (None, None)
    assert first.profile is not None
    assert second.profile is not None
    assert first.profile.link.bytes_per_s == pytest.approx(2 * second.profile.link.bytes_per_s)
    custom = parse_profile("custom:24GiB,1000GB/s,25GB/s,gen=rdna3,f16=100T,int8=100T")
    assert isinstance(custom.sheet, Card)
    assert (custom.sheet.family, custom.sheet.f16_per_s) == ("rocm", 100e12)
    with pytest.raises(DeviceUnavailableError, match="no generation"):
        parse_profile("custom:24GiB,1000GB/s,25GB/s,gen=voodoo")
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    speeds = []
    for host in ("ddr4-3200x2,cores=8", "ddr4-2133x1,cores=4"):
        flags = ["-dev", "rtx3090,cpu", "--cpu-moe", "-c", "512", "--batches", "1", "--host", host, "--json"]
        assert run(["splits", "olmoe-1b-7b", *flags]) == 0
        speeds.append(json.loads(capsys.readouterr().out)["batches"][0]["virtual"])
    fast, slow = speeds
    assert fast["low"] < fast["tokens_per_s"] < fast["high"]
    assert slow["tokens_per_s"] < fast["tokens_per_s"]


@pytest.mark.parametrize(
    ("model", "device", "flags"),
    [
        ("llama-3-8b", "rtx3090", {}), ("llama-3-8b", "r9700", {}), ("llama-3-8b", "rtx3060", {"n_gpu_layers": 16}),
        ("qwen3-30b-a3b", "m2ultra", {}), ("gpt-oss-20b", "rtx3090", {"n_cpu_moe": 24}),
        ("olmoe-1b-7b", "rtx3090", {"n_cpu_moe": 5, "use_mmap": False}), ("gemma-3-4b", "rtx4090", {}),
        ("llama-3-8b", "rtx3060", {"overrides": ("--n-cpu-ffn 20",), "use_mmap": False}),
        ("gemma-3-4b", "rtx3060", {"overrides": (r"blk\.1.\.ffn_(up|down)=CPU",)}),
        ("llama-3-8b", "rtx3090", {"overrides": (r"blk\.[0-9]\.=CPU",)}),
        ("gpt-oss-20b", "rtx3060", {"overrides": (r"ffn_.*=CPU",)}),
        ("llama-3-8b", "rtx3090", {"n_gpu_layers": 20, "offload_kqv": False}),
    ],
)  # fmt: skip
def test_a_plan_and_an_estimate_agree(
    model: str, device: str, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual time, node by node through the scheduler, comes within 8 % of the estimate from the tensors alone."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    host = parse_host("ddr4-3200x2,cores=8")
    context = ContextFlags(n_ctx=1024, offload_kqv=flags.get("offload_kqv", True), flash_attn="on")
    flags = {name: value for name, value in flags.items() if name != "offload_kqv"}
    backends = [d.backend() for d in REGISTRY.open_all([device, "cpu"], data=False)]
    profile = backends[0].device.profile
    assert profile is not None
    machine = Machine.of_profiles([profile], host)
    setting = Setting(
        n_gpu_layers=flags.get("n_gpu_layers", -1), n_cpu_moe=flags.get("n_cpu_moe", 0),
        overrides=flags.get("overrides", ()), kv_offload=context.offload_kqv, is_pinned=not flags.get("use_mmap", True),
    )  # fmt: skip
    with Planner.open(
        model, devices=backends[:-1], cpu=backends[-1], data=False, placement=PlacementFlags(**flags),
        context=context, clock=virtual_clock(backends, host_profile(host)),
    ) as planner:  # fmt: skip
        for n in (512, 1):
            speed = simulate_batch(planner, n).speed
            assert speed is not None
            said = speed_of(model_shape(model), machine, setting, n, 0, is_prompt=n > 1)
            assert speed.mid == pytest.approx(said.mid, rel=0.08)
            assert speed.high / speed.low == pytest.approx(said.high / said.low)


def test_a_host_says_that_its_memory_was_assumed() -> None:
    """A processor's name says nothing about memory; a type or a rate does."""
    assert parse_host("Ryzen 7 5700X").is_memory_assumed
    assert not any(parse_host(text).is_memory_assumed for text in ("ddr4-3200x2", "read=60GB/s,cores=8"))
