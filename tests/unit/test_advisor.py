"""`pyggml plan`: the answer equals exhaustive search, what is said to fit does, and flags mean the same to `splits`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyggml.advisor import EXPLAIN, Goal, MemoryModel, Search, Space, flags_of, plan
from pyggml.advisor.advice import MARGIN_BYTES, open_machine
from pyggml.advisor.limits import bottleneck
from pyggml.advisor.maker import _step
from pyggml.advisor.offload import pays_from
from pyggml.advisor.page import page_html
from pyggml.advisor.search import plain_first
from pyggml.advisor.settings import ik_flags_of
from pyggml.catalog import MODELS, header_path
from pyggml.cli import group
from pyggml.commands.plan import command
from pyggml.errors import DeviceUnavailableError, FormatError, GraphError, PyggmlError
from pyggml.foresight import ModelShape, Setting, machine_of
from pyggml.gguf import GGUFFile
from pyggml.hardware.formulas import overlapped
from pyggml.simulation import simulate_batch, simulate_prompt
from pyggml.types import Type

HOST = "ddr4-3200x2,cores=8,64GiB"


#: What several tests look at.
TWO_PLANS = ("gpt-oss-20b", "--device", "rtx3060", "-c", "4096", "--plans", "2")


@cache
def printed(*args: str, status: int = 0) -> str:
    """Return what the command prints, without carrying it out again."""
    result = CliRunner().invoke(command, [*args, "--host", HOST, "--json"])
    assert result.exit_code == status, result.output
    return result.stdout


def run(*args: str, status: int = 0) -> Any:
    """Return the JSON that the command prints."""
    return json.loads(printed(*args, status=status))


def search_of(model: str, device: str, goal: Goal) -> tuple[Search, GGUFFile]:
    """Return a search over a model of the table."""
    backends, machine = open_machine(device, HOST)
    file = GGUFFile.open(header_path(model))
    shape = ModelShape.from_header(file.metadata, file.tensors, model)
    memory = MemoryModel(file, backends, goal.context, host=machine.host, margin_bytes=MARGIN_BYTES)
    return Search(shape, machine, goal, memory), file


@pytest.mark.parametrize(("model", "device"), [("gpt-oss-20b", "rtx3060"), ("llama-3.2-3b:Q8_0", "gtx1650")])
def test_the_answer_equals_exhaustive_search(model: str, device: str) -> None:
    """Planning every single setting of a space by the scheduler finds no faster one that fits."""
    goal = Goal(1024, 128, 4096)
    search, file = search_of(model, device, goal)
    with file:
        space = replace(
            Space.of(search.shape, n_ctx=goal.context, n_devices=1, has_unified=False),
            n_ubatch=(512, 2048), kv_types=(Type.F16,), kv_offload=(True,), op_offload=(True,), is_pinned=(True,),
        )  # fmt: skip
        settings = sorted(space.settings(8), key=plain_first)
        assert 20 < len(settings) <= 500
        found = next(search.best(search.ranked(settings, lambda s: _step(s.seconds))))
        every = [s for s in settings if all(d.fits for d in search.memory.exact(s) or [])]
        assert found.setting in every
        assert len(every) < len(settings)
        best = min(search.score(s).seconds for s in every)
        assert found.seconds <= best * 1.006  # what differs by half a per cent counts as equal


def test_the_answer_equals_exhaustive_search_on_two_cards() -> None:
    """With -ts, experts from both ends and the cache on the host, planning every setting finds no faster one that fits."""
    goal = Goal(1024, 128, 4096)
    search, file = search_of("gpt-oss-20b", "gtx1650,rtx3060", goal)
    with file:
        space = replace(
            Space.of(search.shape, n_ctx=goal.context, n_devices=2, has_unified=False),
            n_ubatch=(512,), kv_types=(Type.F16,), is_pinned=(True,), op_offload=(True,), n_gpu_layers=(-1,),
            n_cpu_moe=(0, 2, 5), n_cpu_moe_last=(0, 2, 5), tensor_split=((), (8, 17), (15, 10)),
        )  # fmt: skip
        settings = sorted(space.settings(8), key=plain_first)
        assert len(settings) == len(set(settings)) == 30
        found = next(search.best(search.ranked(settings, lambda s: _step(s.seconds))))
        every = [s for s in settings if all(d.fits for d in search.memory.exact(s) or [])]
        assert 0 < len(every) < len(settings)
        assert found.setting in every
        assert found.seconds <= 1.006 * min(search.score(s).seconds for s in every)
        for setting in every:
            for told, planned in zip(search.memory.weights(setting), exact_weights(search, setting), strict=True):
                assert told == pytest.approx(planned, rel=0.01)


def exact_weights(search: Search, setting: Setting) -> list[int]:
    """Return the bytes of weights that a planner places on each device, then on the host."""
    names = [b.buffer_type.name for b in search.memory.backends[:-1]]
    with search.memory.planner(setting) as planner:
        out = [0] * (len(names) + 1)
        for m in planner.memory():
            out[names.index(m.buft) if m.buft in names else -1] += m.weights
    return out


def test_fewer_threads_are_never_predicted_faster() -> None:
    """A plan uses one thread for each core: with host weights fewer are slower, without none is asked."""
    search, file = search_of("gpt-oss-20b", "rtx3060", Goal())
    with file:
        for setting in (Setting(n_cpu_moe=24), Setting(n_gpu_layers=0), Setting()):
            times = [search.score(replace(setting, threads=n)).seconds for n in (1, 2, 4, 8)]
            assert times == sorted(times, reverse=True)
            assert (times[0] > times[3]) is (setting != Setting())


def test_flags_of_your_own_may_override_anything() -> None:
    """--compare takes patterns of -ot with llama.cpp's names of devices, and -ts; memory is that of the scheduler."""
    own = "-ngl 99 -ot blk\\.(2[0-9])\\.ffn_.*_exps=CPU,output=CUDA1 -ts 1,2"
    answer = run("gpt-oss-20b", "--device", "rtx3060,rtx3060", "-c", "4096", "--plans", "1", "--compare", own)
    (made,) = answer["compared"]
    assert made["flags"][-2:] != []
    assert "-ts" in made["flags"]
    assert made["memory"][2]["bytes"] > 1 << 30  # experts of four layers
    assert made["memory"][0]["bytes"] < made["memory"][1]["bytes"]
    assert made["tg_tps"]["mid"] < answer["plans"][0]["tg_tps"]["mid"]


def test_a_plan_that_is_said_to_fit_does_and_splits_agrees() -> None:
    """The flags of each plan, given to `splits`, show the same memory, byte for byte."""
    answer = run(*TWO_PLANS)
    assert len(answer["plans"]) == 2
    for made in [*answer["plans"], answer["fit"]]:  # --fit maps the file
        assert made["fits"]
        args = ["splits", "gpt-oss-20b", "-dev", "rtx3060,cpu", *made["flags"], "--batches", "1", "--json"]
        result = CliRunner().invoke(group, args)
        assert result.exit_code == 0, result.output
        memory = json.loads(result.stdout)["memory"]
        device = next(m for m in memory if m["buft"] == "SIM0")
        assert device["weights"] + device["cache"] + device["compute"] == made["memory"][0]["bytes"]
        assert [m["needed"] for m in memory if m["backend"] == "CPU"] == [made["memory"][1]["bytes"]]


#: Flags of answers that two tests look at.
OFFLOADED = ("-c", "4096", "--prompt", "1024", "--compare", "-ngl 99 -ncmoe 30")


@pytest.mark.parametrize(
    ("model", "device", "gib"),
    [("qwen3-30b-a3b", "rtx3060", 17.2), pytest.param("gpt-oss-120b", "rtx3090", 59.02, marks=pytest.mark.slow)],
)
def test_the_answer_has_what_one_decides_by(model: str, device: str, gib: float) -> None:
    """Plans differ, have ranges around the middle, a command, a bottleneck, and what would help most comes first."""
    answer = run(model, "--device", device, *OFFLOADED)
    plans = answer["plans"]
    assert len(plans) >= 3
    assert len({tuple(p["flags"]) for p in plans}) == len(plans)
    for made in [*plans, *answer["compared"]]:
        for speed in (made["pp_tps"], made["tg_tps"]):
            assert 0 < speed["low"] < speed["mid"] < speed["high"]
        assert made["command"].startswith(f"llama-server -m {model}.gguf -c 4096")
        assert made["bottleneck"].endswith(".")
        assert [m["device"] for m in made["memory"]] == [device, "host"]
        assert sum(m["bytes"] for m in made["memory"]) > gib * 2**30
    assert plans[0]["seconds"] <= min(p["seconds"] for p in answer["compared"])
    speedups = [h["speedup"] for h in answer["helps"]]
    assert speedups == sorted(speedups, reverse=True)
    assert answer["offload_pays_from_tokens"] > 32


@pytest.mark.parametrize(
    ("model", "device"),
    [("gpt-oss-20b", "rtx3060"), ("llama-3.2-3b:F16", "gtx1650,gtx1650"), ("llama-3.2-3b", "rtx3090")],
)
def test_what_fit_chooses_stands_beside_the_plans(model: str, device: str) -> None:
    """The row has what `-ngl auto` of `splits` finds: the same memory, at most the best plan's speed, and 1 GiB free."""
    answer = run(model, "--device", device, "-c", "8192", "--plans", "1")
    chosen, best = answer["fit"], answer["plans"][0]
    assert chosen["note"] == ""
    assert chosen["flags"][:3] == ["-c", "8192", "-ngl"]
    assert chosen["seconds"] >= 0.99 * best["seconds"]
    line = ["splits", model, "-dev", f"{device},cpu", "-c", "8192", "-fa", "on", "--batches", "1", "--json", "-ngl"]
    for flags in (["auto"], chosen["flags"][3:]):
        result = CliRunner().invoke(group, [*line, *flags])
        assert result.exit_code == 0, result.output
        for i, m in enumerate(
            m for m in json.loads(result.stdout)["memory"] if m["buft"].startswith("SIM") and "Host" not in m["buft"]
        ):
            assert m["total"] == chosen["memory"][i]["bytes"]
            assert m["total"] + MARGIN_BYTES <= chosen["memory"][i]["of_bytes"]


_MACHINES = ("rtx3060", "rtx3090", "gtx1650,gtx1650", "rtx4090", "rtx3060,rtx3060", "rtx5090")
_QUICK = {("gpt-oss-20b", "rtx3060"), ("llama-3.2-3b", "gtx1650,gtx1650")}
_EACH = [(name, _MACHINES[i % len(_MACHINES)]) for i, name in enumerate(sorted(MODELS))]


@pytest.mark.parametrize(
    ("model", "device"), [*sorted(_QUICK), *(pytest.param(*each, marks=pytest.mark.slow) for each in _EACH)]
)
def test_no_plan_is_behind_what_fit_chooses(model: str, device: str) -> None:
    """The best plan is at least as fast as what --fit chooses, if that keeps the margin; a model too large for the machine is refused."""
    advice = plan(model, devices=device, host="ddr5-5600x2,cores=16,512GiB", context=4096, n_plans=1)
    if not advice.plans:
        n_bytes = advice_weights(model)
        room = (512 << 30) + sum(c.memory_bytes for c in machine_of(device, HOST).cards)
        assert n_bytes > 0.95 * room
        assert advice.missing_bytes > n_bytes - room
        return
    if advice.fit is not None and advice.fit.fits:
        assert advice.plans[0].seconds <= advice.fit.seconds


def advice_weights(model: str) -> int:
    """Return the bytes of all weights of a model of the table."""
    with GGUFFile.open(header_path(model)) as file:
        return sum(info.nbytes for info in file.tensors.values())


def test_a_command_for_ik_llama_differs_where_its_flags_do() -> None:
    """-ngl is a number there, and -op -1,0 stands for --no-op-offload; patterns stay as they are."""
    flags = flags_of(Setting(op_offload=False, overrides=(r"blk\.(1|2)\.ffn_(up|all)_exps=CPU",), is_pinned=True), 4096)
    ik = ik_flags_of(flags)
    assert ik[ik.index("-ngl") + 1] == "999"
    assert ik[ik.index("-op") + 1] == "-1,0"
    assert "--no-op-offload" not in ik
    assert [f for f in flags if "exps" in f] == [f for f in ik if "exps" in f]
    made = run(*TWO_PLANS)["plans"][0]
    assert made["ik_llama_command"] == made["command"].replace("-ngl all", "-ngl 999")


def test_nothing_fits_is_told_with_what_is_missing() -> None:
    """A model too large for everything exits with 3, and names the missing bytes and a quantisation that fits."""
    answer = run("llama-3.3-70b:F16", "--device", "rtx3060", status=3)
    assert answer["plans"] == []
    assert answer["missing_bytes"] > 1 << 30
    assert answer["smaller"].startswith("llama-3.3-70b:")
    assert plan("deepseek-r1", devices="rtx3060", host=HOST).nothing_fits.endswith("No other quantisation would fit.")


def test_what_is_missing_is_of_the_smallest_setting_with_its_cache() -> None:
    """Weights alone would fit here, but not with the KV cache: bytes are missing, and a smaller type leaves them free."""
    model = "qwen3-30b-a3b:IQ4_XS"
    advice = plan(model, devices="rtx4060", host="ddr5-5600x2,cores=8,16GiB", context=131072, n_plans=1)
    assert advice.plans == []
    assert 0 < advice.missing_bytes < 1 << 30
    assert 0.8 < advice_weights(advice.smaller) / (advice_weights(model) - advice.missing_bytes) < 1
    assert f"<b>{advice.nothing_fits}</b>" in page_html(advice)
    assert advice.smaller in advice.nothing_fits


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"routing": "unifrm"}, "unifrm"),
        ({"compare": ["-ngl 1"]}, "compare cannot be '-ngl 1'"),
        ({"compare": "-ngl 1"}, "compare cannot be '-'"),
        ({"prompt": "2048"}, "prompt cannot be '2048'"),
        ({"n_plans": 1.5}, "n_plans cannot be 1.5"),
        ({"compare": [Setting(tensor_split=(1.0, 1.0))]}, "-ts 1,1 does not fit"),
        ({"compare": [Setting(tensor_split=(float("nan"),))]}, "-ts nan does not fit"),
        ({"n_plans": 0}, "at least 1 plan"),
        ({"margin_bytes": -1}, "at least 1 plan"),
        ({"margin_bytes": 30 << 30}, "leaves nothing of rtx3060"),
    ],
)
def test_what_is_no_argument_of_a_plan_is_told(given: dict[str, Any], says: str) -> None:
    """What the command line takes as text is an object in Python; the error says which."""
    with pytest.raises(PyggmlError, match=says):
        plan("qwen3-0.6b", devices="rtx3060", host=HOST, **given)


def test_memory_of_a_host_that_was_not_given_is_an_assumption() -> None:
    """A processor's name says nothing of its memory: what is assumed of it is told."""
    said = {
        spec: plan("qwen3-0.6b", devices="cpu", host=spec, context=4096, n_plans=1).assumed
        for spec in ("Ryzen 7 5700X,64GiB", HOST)
    }
    assert [any("DDR5-5600" in line for line in lines) for lines in said.values()] == [True, False]


def test_a_dense_model_without_a_card() -> None:
    """The CPU alone is a machine: one plan, no flags of devices."""
    advice = plan("qwen3-0.6b", devices="cpu", host=HOST, context=4096)
    assert advice.plans
    assert "-ngl" not in advice.plans[0].flags
    assert [m.device for m in advice.plans[0].memory] == ["host"]


@pytest.mark.slow
def test_two_cards_are_told_apart() -> None:
    """Two cards of a name have numbers, and share the layers."""
    advice = plan("llama-3.3-70b", devices="rtx3090,rtx3090", host=HOST, n_plans=1)
    memory = advice.plans[0].memory
    assert [m.device for m in memory] == ["rtx3090 #0", "rtx3090 #1", "host"]
    assert all(m.bytes > 15 << 30 for m in memory[:2])


def test_flags_say_what_differs_from_defaults() -> None:
    """Defaults that mean themselves are left out; every flag of a setting can be explained."""
    setting = Setting(
        n_cpu_moe=3, n_ubatch=4096, n_batch=4096, type_k=Type.Q8_0, type_v=Type.Q8_0, is_pinned=True, kv_offload=False,
        op_offload=False, threads=6,
    )  # fmt: skip
    flags = flags_of(setting, 8192)
    names = {flag for flag in flags if flag.startswith("-")}
    assert names <= EXPLAIN.keys()
    assert flags_of(Setting(), 4096) == ["-c", "4096", "-ngl", "all", "-fa", "on"]


def test_offloading_pays_later_with_a_slow_link() -> None:
    """The threshold rises where copies are slower, and there is none where nothing is on the host or copies never pay."""
    found = []
    for device in (
        "sim:custom:12GiB,360GB/s,25GB/s",
        "sim:custom:12GiB,360GB/s,6GB/s",
        "sim:custom:12GiB,360GB/s,0.01GB/s",
    ):
        search, file = search_of("gpt-oss-20b", device, Goal())
        with file:
            found.append(pays_from(search, Setting(n_cpu_moe=24, n_ubatch=2048, is_pinned=True, threads=8)))
            assert pays_from(search, Setting()) is None
            search.memory.close()
    fast, slow, never = found
    assert fast is not None
    assert slow is not None
    assert 32 <= fast < slow
    assert never is None


def test_a_prompt_from_a_mapped_file_waits_for_copies() -> None:
    """The bottleneck is the staging of memory that is not pinned; with pinned weights it is the link."""
    search, file = search_of("gpt-oss-120b", "rtx3090", Goal(2048, 1))
    with file:
        for is_pinned, what in ((False, "copies from memory that is not pinned"), (True, "the link to the device")):
            scored = search.score(Setting(n_cpu_moe=36, n_ubatch=512, is_pinned=is_pinned, threads=8))
            told = bottleneck(search, scored, scored)
            assert told.startswith("The prompt takes")
            assert told.endswith(f"for {what}.")
        search.memory.close()


@pytest.mark.parametrize(
    ("model", "device"), [("qwen3-30b-a3b", "rtx3060"), pytest.param("gpt-oss-120b", "rtx3090", marks=pytest.mark.slow)]
)
def test_offloading_pays_from_the_printed_number_by_the_clock_of_splits(model: str, device: str) -> None:
    """`splits` is faster with copies at the number that a plan prints, and not with one token less."""
    answer = run(model, "--device", device, *OFFLOADED)
    flags = next(p for p in answer["plans"] if not p["moe_cache_mib"])["flags"]
    n = answer["offload_pays_from_tokens"]
    assert 32 < n <= 1024
    line = ["splits", model, "-dev", f"{device},cpu", "--host", HOST, *flags, "--batches", f"{n},{n - 1}", "-o", "json"]
    rates = []
    for more in ([], ["--no-op-offload"]):
        result = CliRunner().invoke(group, [*line, *more])
        assert result.exit_code == 0, result.output
        rates.append([row["t/s"] for row in json.loads(result.stdout)])
    copied, computed = rates
    assert copied[0] >= computed[0]
    assert copied[1] <= computed[1]


def test_patterns_that_match_nothing_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of --fit's own patterns nothing is said; of the user's once, however many settings are planned."""
    args = ("deepseek-v2-lite", "--device", "rtx3060-8GiB", "-c", "4096", "--plans", "1")
    assert run(*args)["fit"]["command"].count("exps=CPU") == 1
    assert not caplog.records
    run(*args, "--compare", "-ot ffn_no_exps=CPU -ncmoe 4")
    line = ["splits", "deepseek-v2-lite", "-dev", "rtx3060", "-c", "2048", "-ncmoe", "1,2", "-ot", "ffn_no_exps=CPU"]
    assert CliRunner().invoke(group, line).exit_code == 0
    assert [record.getMessage().count("ffn_no_exps=CPU matches no weight") for record in caplog.records] == [1, 1]


def test_a_context_beyond_training_is_told() -> None:
    """A context longer than the model's own takes memory that llama-server does not use, which is said."""
    for n_ctx, is_told in ((32768, False), (40960, False), (40961, True)):
        assumed = run("qwen3-0.6b", "--device", "rtx3060", "-c", str(n_ctx), "--plans", "1")["assumed"]
        assert any("trained with 40960" in line for line in assumed) is is_told


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt": 5000, "context": 4096}, GraphError),
        ({"generate": 0}, GraphError),
        ({"devices": "rtx9999"}, DeviceUnavailableError),
        ({"devices": "libggml:CPU"}, DeviceUnavailableError),
        ({"host": "ddr9-1"}, DeviceUnavailableError),
        ({"kv_types": ["f16", "i8"]}, GraphError),
        ({"kv_types": ["q9"]}, GraphError),
        ({"kv_types": []}, GraphError),
    ],
)
def test_wrong_requests_are_typed_errors(options: dict[str, Any], error: type[Exception]) -> None:
    """What cannot be planned is an error of our own tree."""
    with pytest.raises(error):
        plan("qwen3-0.6b", **{"devices": "rtx3060", **options})
    with pytest.raises(FormatError):
        plan("no-such-model", devices="rtx3060")


def test_explain_and_wrong_flags() -> None:
    """`--explain` says what a flag does; one that a plan does not choose, or that is wrong, is a usage error."""
    runner = CliRunner()
    assert "host memory" in runner.invoke(command, ["--explain", "--n-cpu-moe"]).output
    assert "pinned" in runner.invoke(command, ["--explain", "--load-mode"]).output
    assert runner.invoke(command, ["--explain", "--temp"]).exit_code == 2
    assert runner.invoke(command, ["qwen3-0.6b", "--compare", "--no-such-flag"]).exit_code == 2


def test_page_shows_every_point(tmp_path: Path) -> None:
    """The page has a point for each setting that fits, in three plots, and the plans with their commands, escaped."""
    advice = plan("gpt-oss-20b", devices="rtx3060", host=HOST)
    advice.model = "<b>model</b>"
    page = page_html(advice)
    assert page.count("<circle") == 3 * len(advice.points) > 30
    assert all(" ".join(p.flags[:4]) in page for p in advice.plans)
    assert "<b>model" not in page
    advice = plan("qwen3-0.6b", devices="cpu", host=HOST)
    on_cpu = page_html(advice)
    assert on_cpu.count("<svg") == 1
    assert on_cpu.count('<circle class="plan"') == len(advice.plans) == 2
    assert "GiB on devices</text>" not in on_cpu


@pytest.mark.slow
def test_a_title_is_true() -> None:
    """What is called less memory takes less than the best plan, and nothing is faster than what is called the fastest."""
    for model, device in (("llama-3.1-8b", "rtx3060"), ("qwen3-30b-a3b", "rtx3060")):
        plans = {p.title: p for p in plan(model, devices=device, host=HOST, n_plans=7).plans}
        best = plans["best for this prompt and answer"]
        if less := plans.get("less memory on the device"):
            assert less.device_bytes < best.device_bytes
        if fastest := plans.get("fastest prompt"):
            assert fastest.pp_tps.mid * 1.01 > max(p.pp_tps.mid for p in plans.values() if p.setting.type_k is Type.F16)
        assert best.seconds <= 1.01 * min(p.seconds for p in plans.values() if p.setting.type_k is Type.F16)


def test_without_llama_the_rule_of_pyggml_answers_for_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row names who chose: llama.cpp itself, or pyggml's rule and why it was not asked; both choose the same."""
    live = run(*TWO_PLANS)["fit"]

    def missing(given: str = "") -> Path:
        raise DeviceUnavailableError("llama", "llama.cpp is not installed")

    monkeypatch.setattr("pyggml.llama.live_fit.find_llama", missing)
    own = json.loads(printed.__wrapped__(*TWO_PLANS))["fit"]
    assert "common_fit_params" in live["by"]
    assert "llama.cpp is not installed" in own["by"]
    assert own["flags"] == live["flags"]
    assert own["memory"] == live["memory"]


@pytest.mark.parametrize(
    ("model", "device", "threads"),
    [("gpt-oss-20b", "rtx3060", 8), ("llama-3.2-3b:F16", "gtx1650,gtx1650", 8), ("qwen3-8b", "gtx1650", 3)],
)
def test_flags_fed_back_to_splits_give_the_same_times(model: str, device: str, threads: int) -> None:
    """`splits` with a plan's flags finds the plan's speeds and their ranges, of every plan and row that is printed."""
    own = [w for ub in (256, 1024) for w in ("--compare", f"-ngl 9 -ub {ub} --no-mmap -t {threads}")]
    answer = run(model, "--device", device, "-c", "4096", "--prompt", "1024", "--plans", "1", *own)
    for made in [*answer["plans"], *answer["compared"], answer["fit"]]:
        line = ["splits", model, "-dev", f"{device},cpu", "--host", HOST, *made["flags"], "-o", "json"]
        for speed, size, depth in ((made["pp_tps"], 1024, 0), (made["tg_tps"], 1, 1024 + 128)):
            result = CliRunner().invoke(group, [*line, "--batches", str(size), "-d", str(depth)])
            assert result.exit_code == 0, result.output
            (row,) = json.loads(result.stdout)
            assert [row["low"], row["t/s"], row["high"]] == [round(speed[k], 2) for k in ("low", "mid", "high")]


@pytest.mark.parametrize(
    ("model", "device"),
    [
        pytest.param("gpt-oss-20b", "rtx3060", marks=pytest.mark.slow),
        ("llama-3.2-3b", "gtx1650,gtx1650"),
    ],
)
def test_long_prompts_fed_back_to_splits_give_the_same_times(model: str, device: str) -> None:
    """Prompts of many micro-batches, the last one smaller, have the same speed and range in `plan` and `splits`."""
    args = ("-c", "8192", "--prompt", "5000", "--plans", "1", "--compare", "-ngl 9 -ub 256")
    answer = run(model, "--device", device, *args)
    for made in [*answer["plans"], *answer["compared"], answer["fit"]]:
        line = [
            "splits",
            model,
            "-dev",
            f"{device},cpu",
            "--host",
            HOST,
            *made["flags"],
            "-o",
            "json",
            "--batches",
            "5000",
        ]
        result = CliRunner().invoke(group, line)
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)
        assert [row["low"], row["t/s"], row["high"]] == [round(made["pp_tps"][k], 2) for k in ("low", "mid", "high")]


@pytest.mark.parametrize(
    ("model", "device", "setting", "n"),
    [
        ("gpt-oss-20b", "rtx3060", Setting(n_cpu_moe=24, is_pinned=True), 6000),
        pytest.param("llama-3.2-3b", "rtx3060", Setting(), 16384, marks=pytest.mark.slow),
        pytest.param("llama-3.2-3b", "gtx1650,gtx1650", Setting(), 8192, marks=pytest.mark.slow),
        pytest.param("qwen3-30b-a3b", "rtx3060", Setting(n_cpu_moe=30, n_ubatch=500), 6000, marks=pytest.mark.slow),
        pytest.param("gemma-3-12b", "rtx3060", Setting(n_gpu_layers=30), 8192, marks=pytest.mark.slow),
    ],
)
def test_a_sampled_prompt_is_within_a_hundredth(model: str, device: str, setting: Setting, n: int) -> None:
    """Five micro-batches of each size stand for all: time and bytes differ by less than 1 %."""
    search, file = search_of(model, device, Goal(n, 16, n + 256))
    with file:
        planner = search.memory.planner(setting)
        sampled, whole = simulate_prompt(planner, n), simulate_batch(planner, n)
        assert sampled.n_micro_batches < 11 < whole.n_micro_batches
        assert sampled.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.01)
        assert sampled.bytes_copied == pytest.approx(whole.bytes_copied, rel=0.01)
        search.memory.close()


def test_several_cards_overlap_as_fitted() -> None:
    """A prompt of many micro-batches on two cards is faster than their times one after the other, by what was fitted."""
    search, file = search_of("llama-3.2-3b", "gtx1650,gtx1650", Goal(4096, 16, 8192))
    with file:
        made = simulate_prompt(search.memory.planner(Setting(threads=8)), 4096)
        assert made.seconds is not None
        assert made.overlap == overlapped(8, 2, search.machine.rates) < 0.9
        assert made.tokens_per_s == pytest.approx(4096 / made.seconds / made.overlap)
        assert made.tokens_per_s == pytest.approx(search.speed(Setting(threads=8), is_prompt=True).mid, rel=0.1)
        search.memory.close()


def test_a_token_behind_others_reads_their_cache() -> None:
    """With a depth `splits` plans a batch as one that follows so many tokens: it is slower, and must fit in the context."""
    line = ["splits", "qwen3-8b", "-dev", "rtx3060,cpu", "-c", "8192", "--batches", "1", "-o", "json"]
    rates = []
    for depth in (0, 4096, 8000):
        result = CliRunner().invoke(group, [*line, "-d", str(depth)])
        rates.append(json.loads(result.stdout)[0]["t/s"])
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.05 * rates[2]
    assert CliRunner().invoke(group, [*line, "-d", "8192"]).exit_code != 0


def test_no_plan_gives_up_speed_for_about_the_same_memory() -> None:
    """The plan with less memory is not slower than another that takes as much."""
    plans = run("qwen3-30b-a3b", "--device", "rtx4090")["plans"]
    small = next(p for p in plans if p["title"] == "less memory on the device")
    taken = {p["title"]: p["memory"][0]["bytes"] for p in plans}
    for other in plans:
        if taken[other["title"]] <= 1.01 * taken[small["title"]]:
            assert other["seconds"] >= 0.99 * small["seconds"], other["title"]


def test_generation_waits_for_fast_host_memory_too() -> None:
    """Threads read fast memory no faster than slower one; that time is host memory's, though twice the channels would not help."""
    advice = plan("gpt-oss-120b", devices="rtx3060", host="ddr5-4800x12,cores=32,256GiB", context=4096, n_plans=1)
    told = re.search(r"Generation .* waits for (\d+)% of its time for host memory", advice.plans[0].bottleneck)
    assert told is not None, advice.plans[0].bottleneck
    assert int(told[1]) > 40
    (channels,) = [h for h in advice.helps if "channels" in h.change]
    assert channels.speedup < 1.1


def test_more_memory_is_asked_of_each_card() -> None:
    """With several cards the change is one of each."""
    advice = plan("qwen3-30b-a3b", devices="rtx3060-6GiB,rtx3060-6GiB", host=HOST, context=4096, n_plans=1)
    assert "4 GiB more memory on each device" in [h.change for h in advice.helps]


@pytest.mark.parametrize("n_plans", [1, 2, 4])
def test_two_other_plans_are_shown_where_nothing_is_given_up_for_anything(n_plans: int) -> None:
    """A model that fits wholly has one plan that is best in all; others that fit stand beside it, each with other flags."""
    made = plan("qwen3-0.6b", devices="rtx3090", host="ddr4-3200x2,cores=8,64GiB", n_plans=n_plans).plans
    assert min(3, n_plans) <= len(made) <= n_plans
    assert len({tuple(p.flags) for p in made}) == len(made)
    assert all(p.fits for p in made)
