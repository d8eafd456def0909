"""`pyggml plan` and llama.cpp's expert cache: what it searches, what it predicts, and what it says where none pays."""

from __future__ import annotations

import json
import math
import shlex
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pyggml.advisor import EXPLAIN, Advice, Goal, MemoryModel, Search, Space, plan
from pyggml.advisor.advice import MARGIN_BYTES, open_machine
from pyggml.advisor.maker import Maker, _step
from pyggml.advisor.page import page_html
from pyggml.advisor.search import plain_first
from pyggml.advisor.settings import ik_flags_of
from pyggml.catalog import header_path
from pyggml.cli import group
from pyggml.commands.plan import _setting, command
from pyggml.errors import GraphError
from pyggml.foresight import Machine, ModelShape, Setting, machine_of, model_shape
from pyggml.foresight.caching import misses_per_token
from pyggml.gguf import GGUFFile
from pyggml.moe_cache import EVICTIONS
from pyggml.routing import LogNormal, RecordedRouting, parse_routing
from pyggml.simulation import simulate_batch, simulate_generation
from pyggml.types import Type

HOST = "ddr4-3200x2,cores=8,64GiB"
GIB = 1 << 30


def run(*args: str, status: int = 0) -> Any:
    """Return the JSON that the command prints."""
    result = CliRunner().invoke(command, [*args, "--host", HOST, "--json"])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def search_of(model: str, device: str, goal: Goal, *, margin_bytes: int = MARGIN_BYTES) -> tuple[Search, GGUFFile]:
    """Return a search over a model of the table."""
    backends, machine = open_machine(device, HOST)
    file = GGUFFile.open(header_path(model))
    shape = ModelShape.from_header(file.metadata, file.tensors, model)
    memory = MemoryModel(file, backends, goal.context, host=machine.host, margin_bytes=margin_bytes)
    return Search(shape, machine, goal, memory), file


def space_of(shape: ModelShape, machine: Machine, n_ctx: int = 4096) -> Space:
    """Return the space that `plan` would search."""
    return Space.of(
        shape, n_ctx=n_ctx, n_devices=len(machine.cards), has_unified=any(c.is_unified for c in machine.cards),
        device_bytes=sum(c.memory_bytes for c in machine.cards),
    )  # fmt: skip


def test_the_answer_equals_exhaustive_search_with_caches() -> None:
    """Planning every setting with every size of the cache finds no faster one that fits; and a cache wins here."""
    goal = Goal(512, 256, 4096)
    search, file = search_of("gpt-oss-20b", "rtx3060", goal, margin_bytes=5 * GIB)
    with file:
        whole = space_of(search.shape, search.machine)
        space = replace(
            whole, n_ubatch=(512,), kv_types=(Type.F16,), kv_offload=(True,), op_offload=(True,), is_pinned=(True,),
            n_gpu_layers=(-1,), n_cpu_moe=(0, 14, 19, 24), moe_cache_mib=whole.moe_cache_mib[:6],
        )  # fmt: skip
        settings = sorted(space.settings(8), key=plain_first)
        assert len(settings) == len(space) == 4 + 3 * 5
        found = next(search.best(search.ranked(settings, lambda s: _step(s.seconds))))
        every = [s for s in settings if all(d.fits for d in search.memory.exact(s) or [search_nothing()])]
        assert found.setting in every
        assert found.setting.moe_cache_mib
        assert 3 < len(every) < len(settings)
        assert found.seconds <= 1.006 * min(search.score(s).seconds for s in every)
        filled = search.filled(found)
        assert filled.seconds <= found.seconds
        assert all(d.fits for d in search.memory.exact(filled.setting) or [search_nothing()])


def search_nothing() -> Any:
    """Return the memory of a setting that cannot be planned."""
    from pyggml.advisor import DeviceMemory

    return DeviceMemory("none", 1, 1, 1)


def test_a_cache_fed_back_to_splits_gives_the_same_memory_times_and_hits() -> None:
    """`splits` with a plan's flags, the cache's among them, finds its bytes, its speeds with their ranges, and its hits."""
    answer = run(
        "gpt-oss-20b", "--device", "rtx3060", "-c", "4096", "--prompt", "512", "--generate", "96", "--margin", "5"
    )
    made, without = answer["plans"][:2]
    assert made["moe_cache_mib"] > 0 == without["moe_cache_mib"]
    assert made["flags"][made["flags"].index("--moe-cache-mib") + 1] == str(made["moe_cache_mib"])
    assert without["title"] == "without an expert cache"
    assert made["seconds"] * 1.03 <= without["seconds"]
    assert without["cache_hit_rate"] is None
    line = ["splits", "gpt-oss-20b", "-dev", "rtx3060,cpu", "--host", HOST, *made["flags"]]
    told = CliRunner().invoke(group, [*line, "--batches", "512", "-d", "0", "--json"])
    result = json.loads(told.stdout)
    device = next(m for m in result["memory"] if m["buft"] == "SIM0")
    assert device["total"] == made["memory"][0]["bytes"]
    prompt, answered = made["pp_tps"], made["tg_tps"]
    told = CliRunner().invoke(group, [*line, "--batches", "512", "-o", "json"])
    assert json.loads(told.stdout)[0]["t/s"] == round(prompt["mid"], 2)
    told = CliRunner().invoke(group, [*line, "--batches", "1", "-d", "512", "--generate", "96", "--json"])
    cache = json.loads(told.stdout)["expert_cache"]
    assert cache["generated"]["speed"] == pytest.approx(answered)  # of virtual time that began elsewhere
    assert cache["hit_rate"] == made["cache_hit_rate"] > 0.5
    told = CliRunner().invoke(group, [*line, "--batches", "1", "-d", "512", "--generate", "96", "-o", "json"])
    (row,) = json.loads(told.stdout)
    assert row["test"] == "tg96"
    assert [row["low"], row["t/s"], row["high"]] == [round(answered[k], 2) for k in ("low", "mid", "high")]


def test_misses_on_the_cpu_are_found_as_by_exhaustive_search() -> None:
    """Of caches whose misses the CPU computes, none that fits is faster than the one that is named."""
    goal = Goal(512, 96, 4096)
    search, file = search_of("gpt-oss-20b", "rtx3060", goal, margin_bytes=5 * GIB)
    with file, closing(search.memory):
        whole = space_of(search.shape, search.machine)
        space = replace(
            whole, n_ubatch=(512,), kv_types=(Type.F16,), kv_offload=(True,), op_offload=(True,),
            n_gpu_layers=(-1,), n_cpu_moe=(0, 19, 24), moe_cache_mib=whole.moe_cache_mib[2:6],
        )  # fmt: skip
        settings = list(space.settings(8))
        maker = Maker(search, "model.gguf", [], Advice("", goal, "", []))
        maker.advice.plans = [maker.make("", search.score(Setting(n_cpu_moe=24, is_pinned=True, threads=8)))]
        made = maker.beyond_llama(settings, str)
        assert made is not None
        every = [replace(s, moe_cache_misses="cpu") for s in settings if s.moe_cache_mib]
        fitting = [s for s in every if all(d.fits for d in search.memory.exact(s) or [search_nothing()])]
        assert 3 < len(fitting) < len(every)
        assert search.score(made.setting).seconds <= 1.006 * min(search.score(s).seconds for s in fitting)
        maker.advice.plans = [made]
        assert maker.beyond_llama(settings, str) is None


def test_misses_on_the_cpu_are_no_line_of_llama_and_equal_splits() -> None:
    """The row is beside the plans; its line, given to `splits`, has its memory, speed and hits."""
    own = "-ncmoe 24 --no-mmap --moe-cache-mib 3000 --moe-cache-misses cpu"
    answer = plan(
        "gpt-oss-20b", devices="rtx3060", host=HOST, prompt=512, generate=96, context=4096, margin_bytes=5 * GIB, n_plans=1,
        explain="moe-cache-misses", compare=[_setting(own)],
    )  # fmt: skip
    made, best, (row,) = answer.beyond, answer.plans[0], answer.compared
    assert made is not None
    assert made.fits
    assert made.seconds * 1.03 <= best.seconds
    assert "misses" not in best.command
    assert answer.explained is not None
    assert answer.explained.verdict.startswith("llama.cpp cannot do it. It would take")
    assert [c.flags for c in answer.explained.choices if "cpu" in c.flags]
    assert row.command.startswith("pyggml splits gpt-oss-20b -dev rtx3060,cpu --host ")
    program, *line = shlex.split(made.command)
    assert (program, line[0], made.ik_command) == ("pyggml", "splits", "")
    told = json.loads(CliRunner().invoke(group, [*line, "--json"]).stdout)
    assert next(m for m in told["memory"] if m["buft"] == "SIM0")["total"] == made.memory[0].bytes
    assert told["expert_cache"]["hit_rate"] == made.hit_rate
    assert told["expert_cache"]["generated"]["speed"] == pytest.approx(asdict(made.tg_tps))


def test_a_cache_is_tried_where_formulas_find_it_a_little_slower() -> None:
    """Faster host memory never makes the best plan slower: formulas find a cache 5 % slower than the simulated machine does."""
    slow, fast = (
        plan("gpt-oss-120b", devices="rtx3060", host=f"{ram}x2,cores=8,64GiB", n_plans=1).plans[0]
        for ram in ("ddr4-2666", "ddr4-3200")
    )
    assert slow.setting.moe_cache_mib
    assert fast.seconds <= 1.01 * slow.seconds


@pytest.mark.parametrize(
    ("model", "devices"),
    [("llama-3.2-3b", "rtx3060"), ("gpt-oss-20b", ""), ("gpt-oss-20b", "m2ultra"), ("gpt-oss-20b", "rtx3060,rtx3060")],
)
def test_no_cache_is_tried_where_llama_refuses_it_or_it_has_nothing_to_do(model: str, devices: str) -> None:
    """There is none without experts, without a card, with unified memory, or with nothing or everything on the host."""
    machine = machine_of(devices, HOST)
    cached = [s for s in space_of(model_shape(model), machine).settings(8) if s.moe_cache_mib]
    assert bool(cached) is (devices == "rtx3060,rtx3060")
    for s in cached:
        assert s.n_cpu_moe > 0
        assert s.n_gpu_layers < 0
        assert s.kv_offload
        assert not s.tensor_split


def test_a_cache_that_llama_refuses_is_told_with_the_reason() -> None:
    """--compare with a cache that is too small for one token, or without experts, names the reason and never becomes the best plan."""
    own = "-ncmoe 24 --moe-cache-mib 1"
    answer = run("gpt-oss-20b", "--device", "rtx3060", "-c", "4096", "--plans", "1", "--compare", own)
    (made,) = answer["compared"]
    assert "too small" in made["refused"]
    assert not made["fits"]
    assert answer["plans"][0]["refused"] == ""
    assert "too small" in CliRunner().invoke(
        command, ["gpt-oss-20b", "--device", "rtx3060", "-c", "4096", "--plans", "1", "--compare", own]
    ).output.replace("\n", " ")  # fmt: skip


def test_ik_llama_gets_no_cache_and_is_told_so() -> None:
    """Its line lacks the flag, and the plan says that it does; the page marks settings with a cache."""
    flags = ["-ngl", "all", "--moe-cache-mib", "4096", "-t", "8"]
    assert ik_flags_of(flags) == ["-ngl", "999", "-t", "8"]
    advice = plan(
        "gpt-oss-20b", devices="rtx3060", host=HOST, prompt=512, context=4096, margin_bytes=5 * GIB, n_plans=2
    )
    made = advice.plans[0]
    assert "--moe-cache-mib" in made.command
    assert "--moe-cache-mib" not in made.ik_command
    page = page_html(advice)
    assert made.ik_note in page
    assert made.cache_line in page
    assert page.count('class="cached"') > 3
    assert page.count("<circle") == 3 * len(advice.points) == 3 * len({flags for *_, flags in advice.points})
    assert page.count('class="plan"') == 3 * len(advice.plans)


def test_explaining_says_whether_a_cache_pays_with_numbers() -> None:
    """Where none pays, the best one is carried out and compared with the best plan; where one does, with the plan without."""
    args = ("--device", "rtx3060", "-c", "4096", "--prompt", "512", "--plans", "2", "--explain", "moe-cache-mib")
    told = run("qwen3-30b-a3b", *args)["explained"]
    assert told["flag"] == "--moe-cache-mib"
    assert told["verdict"].startswith("It does not pay here: the best setting with a cache (-ncmoe ")
    assert "times as long as the best plan" in told["verdict"]
    assert "% are in its" in told["verdict"]
    assert len(told["choices"]) > 3
    told = run("gpt-oss-20b", *args, "--margin", "5")["explained"]
    assert told["verdict"].startswith("It pays here.")
    assert "without takes 1." in told["verdict"]


_QUICK = {"-ngl", "-ub"}
_FLAGS = sorted(EXPLAIN.keys() - {"--moe-cache-mib", "--moe-cache-misses", "-ot", "-ts", "-b", "-ctv"})


@pytest.mark.parametrize("flag", [f if f in _QUICK else pytest.param(f, marks=pytest.mark.slow) for f in _FLAGS])
def test_every_flag_is_explained_on_a_machine(flag: str) -> None:
    """The best plan's value is marked, nothing that fits is faster, and the verdict names a number or that nothing can be chosen."""
    advice = plan("qwen3-0.6b", devices="gtx1650", host=HOST, context=4096, n_plans=1, explain=flag.lstrip("-"))
    told = advice.explained
    assert told is not None
    assert told.flag == flag
    assert told.verdict.endswith(".")
    chosen = [c for c in told.choices if c.is_chosen]
    assert len(chosen) == (1 if told.choices else 0)
    if flag not in ("-ctk",):
        assert all(c.seconds * 1.01 >= chosen[0].seconds for c in told.choices if not c.missing_bytes)
    with pytest.raises(GraphError):
        plan("qwen3-0.6b", devices="gtx1650", host=HOST, explain="--temp")


@pytest.mark.parametrize(("share", "spread"), [(0.15, 2.4), (0.4, 2.4), (0.7, 2.4), (0.4, 1.16), (0.8, 1.16)])
def test_misses_by_formula_are_those_of_the_cache(share: float, spread: float) -> None:
    """The expected misses of a layer are within a fifth of those that the slots of llama.cpp's first cache (LRU) count."""
    n_layer, n_expert, n_used, n = 12, 64, 4, 128
    routing = LogNormal(spread, seed=3)
    n_slots = int(share * n_layer * n_expert)
    table, misses = EVICTIONS["lru"](n_slots, n_expert), 0
    for token in range(n):
        table.begin()
        for layer in range(n_layer):
            misses += len(table.lookup(layer, routing.rows(layer, [token], n_expert, n_used)[0]).misses)
    said = misses_per_token(routing, n_expert, n_used, n_slots / n_layer, n)
    assert said == pytest.approx(misses / n / n_layer, rel=0.2)


def test_a_routing_is_the_same_however_many_tokens_are_drawn_at_once() -> None:
    """Tokens that are asked for one by one choose what they choose when all are asked for."""
    one, whole = LogNormal(2.4, seed=1), LogNormal(2.4, seed=1)
    for tokens in (range(70), range(4050, 4200), range(6140, 6150)):
        each = [one.rows(2, [i], 32, 4)[0] for i in tokens]
        assert each == whole.rows(2, tokens, 32, 4)
        assert len({tuple(row) for row in each}) > 3
    assert not any(len(race.chosen) > 5000 for race in one._drawn.values())


def test_a_long_generation_is_sampled() -> None:
    """Of 128 tokens a fourth is carried out: hits are those of all tokens, the speed is theirs within 5 %."""
    search, file = search_of("gpt-oss-20b", "rtx3060", Goal(64, 128, 512))
    with file:
        planner = search.memory.planner(Setting(n_cpu_moe=24, is_pinned=True, moe_cache_mib=4096, threads=8))
        made, cache = simulate_generation(planner, 128, depth=64, routing=LogNormal(2.4)), planner.expert_cache
        assert cache is not None
        hits = cache.counters.hit_rate
        whole = simulate_batch(planner, 128, depth=64, routing=LogNormal(2.4), is_generated=True)
        assert cache.counters.hit_rate == hits
        assert (made.n_micro_batches, whole.n_micro_batches) == (32, 128)
        assert made.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.05)
        assert math.isclose(made.bytes_copied, whole.bytes_copied, rel_tol=0.1)
        search.memory.close()


def test_a_recorded_routing_decides_the_hits(tmp_path: Path) -> None:
    """--routing takes what `splits` takes: with a trace that always chooses the same experts a cache hits nearly always."""
    ids = np.tile(np.arange(4, dtype=np.int32), (24, 200, 1))
    path = tmp_path / "same.npz"
    np.savez(path, topk=ids)
    args = (
        "gpt-oss-20b",
        "--device",
        "rtx3060",
        "-c",
        "4096",
        "--prompt",
        "136",
        "--generate",
        "64",
        "--plans",
        "2",
        "--margin",
        "5",
    )
    same, even = (run(*args, "--routing", text) for text in (f"trace:{path}", "uniform"))
    made = next(p for p in same["plans"] if p["moe_cache_mib"])
    assert made["cache_hit_rate"] > 0.95
    assert made["moe_cache_mib"] <= min([p["moe_cache_mib"] for p in even["plans"] if p["moe_cache_mib"]], default=9999)
    assert any("same.npz" in line for line in same["assumed"])
    assert made["seconds"] < min(p["seconds"] for p in even["plans"])
    with pytest.raises(GraphError, match="200 tokens"):
        plan("gpt-oss-20b", devices="rtx3060", host=HOST, routing=RecordedRouting.open(path))
    result = CliRunner().invoke(group, ["plan", *args, "--routing", "nothing"])
    assert result.exit_code != 0
    assert parse_routing("uniform").n_tokens is None


def test_command_lines_name_cards_as_llama_does() -> None:
    """Patterns for the second card say CUDA1 in command lines, and in flags as they were given; the weights are on that card."""
    own = "-ts 1,1 -ot blk\\.1\\.ffn_down.*=CUDA1"
    answer = run("llama-3.2-3b", "--device", "rtx3060,rtx3060", "-c", "4096", "--plans", "1", "--compare", own)
    (made,) = answer["compared"]
    assert "ffn_down.*=CUDA1" in " ".join(made["flags"])
    assert made["memory"][1]["bytes"] > made["memory"][0]["bytes"]
    assert "ffn_down.*=CUDA1" in made["command"]
    assert "SIM" not in made["command"] + made["ik_llama_command"]


def test_a_machine_without_a_card_needs_no_flags_of_devices() -> None:
    """Nothing is offloaded there, so that nothing switches it off."""
    plans = plan("qwen3-0.6b", devices="cpu", host=HOST, context=4096).plans
    assert [made.setting.type_k for made in plans] == [Type.F16, Type.Q8_0]
    assert not any("--no-op-offload" in made.flags or "-op" in made.ik_command.split() for made in plans)
