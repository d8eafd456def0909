"""`pyggml calibrate`: llama-bench's JSON beside predictions, and a machine that is fitted to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyggml.advisor import calibrate, compare_runs, read_bench
from pyggml.advisor.calibrate import PARTS, scaled
from pyggml.cli import run
from pyggml.cost import parse_profile
from pyggml.errors import FormatError
from pyggml.foresight import Machine, machine_of, model_shape
from pyggml.hardware.hosts import parse_host
from pyggml.types import Type

MODEL = "qwen3-30b-a3b"
HOST = "ddr4-3200x2,cores=8,64GiB"


def rows(**common: Any) -> list[dict[str, Any]]:
    """Return rows of llama-bench without speeds, for settings that depend on every part of a machine."""
    out = []
    for n_cpu_moe in (0, 24, 48):
        for n_prompt, n_gen in ((512, 0), (0, 128), (16, 0)):
            out.append({"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": 0, "n_cpu_moe": n_cpu_moe, "n_gpu_layers": 99,
                        "n_ubatch": 512, "flash_attn": True, "use_mmap": False, "avg_ts": 1.0, **common})  # fmt: skip
    return [*out, {**out[-3], "no_op_offload": 1}]


def written(path: Path, made: list[dict[str, Any]], machine: Machine) -> Path:
    """Write rows whose speeds a machine has exactly."""
    path.write_text(json.dumps(made))
    for row, c in zip(made, compare_runs(MODEL, machine, read_bench(path)), strict=True):
        row["avg_ts"] = c.predicted.mid
    path.write_text(json.dumps(made))
    return path


def test_a_fit_finds_how_a_machine_differs(tmp_path: Path) -> None:
    """Runs of a machine with other rates give these rates back, and runs that are left out are predicted well."""
    described = machine_of("rtx3090", HOST)
    true = (1.2, 0.85, 0.7, 1.3, 0.8)
    path = written(tmp_path / "runs.json", rows(), scaled(described, true))
    found = calibrate(MODEL, described, read_bench(path))
    for part, factor in zip(PARTS, true, strict=True):
        assert found.factors[part] == pytest.approx(factor, rel=0.08), part
    assert max(abs(c.ratio - 1) for c in found.after) < 0.02 < max(abs(c.ratio - 1) for c in found.before)
    assert len(found.left_out) == 10
    assert sorted(abs(r - 1) for r in found.left_out)[4] < 0.05


def test_what_no_run_depends_on_stays(tmp_path: Path) -> None:
    """Runs without weights in host memory say nothing of link and host."""
    described = machine_of("rtx3090", HOST)
    made = [r for r in rows() if r["n_cpu_moe"] == 0]
    path = written(tmp_path / "runs.json", made, scaled(described, (0.8, 0.9, 1.0, 1.0, 1.0)))
    found = calibrate(model_shape(MODEL), described, read_bench(path))
    assert [found.factors[p] for p in PARTS[2:]] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert found.factors["card memory"] < 0.95
    alone = calibrate(MODEL, described, read_bench(path)[:1])
    assert alone.left_out == []


def test_rows_have_the_meaning_of_llama_bench(tmp_path: Path) -> None:
    """Flags of a row become a setting; JSON lines are read, too; ``-pg`` is a prompt and an answer."""
    row = {"n_prompt": 512, "n_gen": 128, "n_depth": 64, "avg_ts": 99.5, "n_gpu_layers": 20, "n_ubatch": 256, "type_k": "q8_0",
           "type_v": "q8_0", "use_mmap": True, "no_kv_offload": True, "no_op_offload": 1, "split_mode": "none",
           "tensor_buft_overrides": "blk\\..*_exps=CPU;output=CUDA0", "flash_attn": 0}  # fmt: skip
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps({**row, "avg_ts": 0}) + "\n")
    (one,) = read_bench(path)
    assert one.test == "pp512+tg128 @ d64"
    s = one.setting
    assert (s.n_gpu_layers, s.n_ubatch, s.type_k, s.is_pinned, s.kv_offload, s.op_offload, s.flash_attn) == (
        20, 256, Type.Q8_0, False, False, False, False,
    )  # fmt: skip
    assert s.overrides == ("blk\\..*_exps=CPU", "output=CUDA0")
    (c,) = compare_runs(MODEL, machine_of("rtx3090", HOST), [one])
    prompt, answer = (
        compare_runs(MODEL, machine_of("rtx3090", HOST), [type(one)(p, g, d, s, 1.0, "")])[0].predicted.mid
        for p, g, d in ((512, 0, 64), (0, 128, 576))
    )
    assert 640 / c.predicted.mid == pytest.approx(512 / prompt + 128 / answer)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "model | size", "[1]", '[{"n_prompt": 1}]', '[{"n_prompt": 512, "n_gen": 0, "avg_ts": "fast"}]'],
)
def test_what_is_no_measurement_is_told(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, an empty list and foreign JSON end in one line that names the option of llama-bench."""
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="llama-bench"):
        read_bench(path)
    assert run(["calibrate", MODEL, str(path), "-dev", "rtx3090"]) == 1
    assert "llama-bench ... -o json" in capsys.readouterr().err
    with pytest.raises(FormatError, match="no such file"):
        read_bench(tmp_path / "missing.json")


def test_the_command_writes_a_machine_that_plan_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of -o is taken by --device and --host, and predicts what was measured."""
    described = machine_of("rtx3090", HOST)
    path = written(tmp_path / "runs.json", rows(), scaled(described, (0.8, 0.9, 0.8, 0.8, 0.9)))
    mine = tmp_path / "mine.json"
    assert run(["calibrate", MODEL, str(path), "-dev", "rtx3090", "--host", HOST, "-o", str(mine), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["runs"]) == 10
    assert told["left_out_error"] < 0.05
    machine = Machine.of_profiles([parse_profile(str(mine))], parse_host(str(mine)))
    for c in compare_runs(MODEL, machine, read_bench(path)):
        assert c.ratio == pytest.approx(1.0, abs=0.03)
    assert run(["calibrate", MODEL, str(path), "-dev", "rtx3090", "--host", HOST]) == 0
    assert "median error" in capsys.readouterr().out
    assert (
        run(["plan", "qwen3-0.6b", "--device", str(mine), "--host", str(mine), "-c", "4096", "--plans", "1", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["plans"]
