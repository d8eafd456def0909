"""Recordings that pages are made of: a small model's run with used experts and with whole ones, and a large model's plan."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyggml as ggml
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.planning import Planner, virtual_clock
from pyggml.record import Record, Recording
from pyggml.sched.policies import CopyPolicy, FullCopier
from pyggml.session import ContextFlags, PlacementFlags, Session
from pyggml.simulation import simulate_batch
from pyggml.types import Type

__all__ = ["record_large_plan", "record_runs"]

SIM = "rtx4090-pcie4"
PROMPT = [(i * 53 + 32) % 259 for i in range(40)]  # more than the 32 tokens from which on the device takes experts


def record_runs(folder: Path) -> dict[str, list[Record]]:
    """Return what was recorded of a prompt and two tokens, with the used experts copied, and with whole copies."""
    path = folder / "small.gguf"
    make_moe(path, Recipe("llama", Type.Q8_0, seed=3, skew=1.5, sizes=Sizes(layers=3, experts=16, used=2)))
    return {"used": _record_run(path, "used"), "full": _record_run(path, FullCopier())}


def _record_run(path: Path, policy: CopyPolicy | Literal["used"]) -> list[Record]:
    recording = Recording()
    sim, cpu = ggml.Sim(SIM), ggml.CPU(threads=1)
    with Session.open(
        path, devices=[sim], cpu=cpu, placement=PlacementFlags(cpu_moe=True), context=ContextFlags(n_ctx=128),
        recorder=recording, clock=virtual_clock([sim, cpu]), policy=policy,
    ) as session:  # fmt: skip
        session.decode(PROMPT)
        for token in (9, 11):
            session.decode([token])
    return recording.records


def record_large_plan(folder: Path) -> list[Record]:
    """Return what a plan of 94 layers of 128 experts records, carried out without data for 1,600 tokens."""
    recording = Recording()
    with Planner.open(
        "qwen3-235b-a22b", devices=[f"sim:{SIM}"], placement=PlacementFlags(cpu_moe=True), context=ContextFlags(n_ctx=2048, n_ubatch=128),
        data=False, strict=True, recorder=recording,
    ) as planner:  # fmt: skip
        planner.sched.clock = virtual_clock(planner.backends)
        simulate_batch(planner, 1600)
    return recording.records
