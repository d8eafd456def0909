"""Offload by cost: what it chooses, that results do not change, and what it saves."""

from __future__ import annotations

import json

import numpy as np
import pytest

import pyggml as ggml
from pyggml import cli
from pyggml.backend import REGISTRY
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.routing import LogNormal
from pyggml.sched.offload import CostOffload
from pyggml.session import Session
from pyggml.simulation import simulate_batch

ROUTING = LogNormal(1.0)
FLAGS = PlacementFlags(cpu_moe=True)


def _seconds(n_tokens: int, device: str, rule: str) -> float:
    backends = [d.backend() for d in REGISTRY.open_all([device, "cpu"], data=False)]
    clock = virtual_clock(backends)
    with Planner.open(
        "qwen3-30b-a3b", devices=backends[:1], cpu=backends[1], placement=FLAGS, data=False, clock=clock,
        context=ContextFlags(n_ctx=2048, n_ubatch=1024, op_offload=rule != "never"),
        offload_rule=CostOffload(backends, clock, ROUTING) if rule == "cost" else None,
    ) as planner:  # fmt: skip
        return simulate_batch(planner, n_tokens, routing=ROUTING).seconds


@pytest.mark.parametrize("device", ["sim:rtx4090-pcie4", "sim:custom:24GiB,1000GB/s,3GB/s"])
@pytest.mark.parametrize("n_tokens", [1, 40, 256, 1024])
def test_it_is_about_as_fast_as_the_better_of_always_and_never(device, n_tokens):
    """For small and large micro-batches, over a fast link and a slow one."""
    times = {rule: _seconds(n_tokens, device, rule) for rule in ("tokens", "never", "cost")}
    assert times["cost"] <= 1.05 * min(times["tokens"], times["never"]), times


def test_over_a_slow_link_the_rule_of_32_tokens_loses():
    """40 tokens over 3 GB/s: offloading takes longer than the CPU, and the cost says so."""
    times = {rule: _seconds(40, "sim:custom:24GiB,1000GB/s,3GB/s", rule) for rule in ("tokens", "cost")}
    assert times["cost"] < 0.7 * times["tokens"], times


def test_results_do_not_change(tmp_path):
    """The logits of a prompt are bit-equal, wherever its experts are computed; so they are on late devices, without a hazard."""
    path = tmp_path / "moe.gguf"
    make_moe(path, Recipe("qwen3moe", ggml.Type.Q8_0, sizes=Sizes(layers=2, experts=8, used=2)))
    found = []
    for seed in (None, *range(20)):
        backends = [ggml.Sim("rtx4090-pcie4", threads=1, seed=seed), ggml.CPU(1)]
        clock = virtual_clock(backends)
        rule = None if seed is None else CostOffload(backends, clock, ROUTING)
        with Session.open(
            path, devices=backends[:1], cpu=backends[1], placement=FLAGS, clock=clock, offload_rule=rule
        ) as s:
            found.append(s.decode(list(range(3, 43)), outputs="all"))
        np.testing.assert_array_equal(found[-1], found[0])
        assert not backends[0].device.hazards


def test_run_and_splits_take_it(tmp_path, capsys):
    """`--offload-by cost`: the same text, fewer bytes over a slow link; in a plan less time, also in lists of flags; else refused in words."""
    model = tmp_path / "moe.gguf"
    make_moe(model, Recipe("qwen3moe", ggml.Type.Q8_0, sizes=Sizes(layers=2, experts=8, used=2)))
    slow = ("-dev", "sim:custom:24GiB,1000GB/s,1GB/s,cpu", "--cpu-moe")

    def ask(*words):
        status = cli.run(list(words))
        said = capsys.readouterr()
        assert status == 0, said.err
        return json.loads(said.out)

    tokens = ",".join(map(str, range(3, 43)))
    runs = [
        ask("run", str(model), *slow, "--tokens", tokens, "-n", "3", "--json", *by)
        for by in ((), ("--offload-by", "cost"))
    ]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    copied = [r["bytes_by_device"]["SIM0"].get("experts", 0) for r in runs]
    assert copied[0] > copied[1] == 0
    plans = [
        ask("splits", "qwen3-30b-a3b", *slow, "--batches", "40", "--json", "--offload-by", by)
        for by in ("rows", "cost")
    ]
    seconds = [p["batches"][0]["virtual"]["seconds"] for p in plans]
    assert seconds[1] < 0.7 * seconds[0]
    rows = ask(
        "splits", "qwen3-30b-a3b", *slow, "--batches", "40", "-ub", "256,512", "-o", "json", "--offload-by", "cost"
    )
    assert all(row["t/s"] == pytest.approx(40 / seconds[1], rel=0.01) for row in rows)
    for words, text in (
        (("splits", "qwen3-30b-a3b", *slow, "--no-op-offload"), "forbids it"),
        (("splits", "qwen3-30b-a3b", "-dev", "cpu"), "speeds are known"),
        (("run", str(model), *slow, "--engine", "llama"), "llama.cpp decides"),
    ):
        assert cli.run([*words, "--offload-by", "cost"]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
