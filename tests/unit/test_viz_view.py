"""What the page is given to show: numbers of records, in columns."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import pyggml as ggml
from pyggml.clock import Span, VirtualClock
from pyggml.cost import CPU_PROFILE, PROFILES
from pyggml.record import (
    AllocRecord,
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyRecord,
    Identified,
    Identity,
    MicroBatchRecord,
    Record,
    Recording,
    UsedExpertsRecord,
    WaitRecord,
)
from pyggml.viz import view_of_graph, view_of_records, view_of_scheduler

N_EXPERT, N_TOKEN = 8, 40


class Moe:
    """One product with experts in host memory, over a simulated device."""

    def __init__(self, *, recorder: Recording | None = None, clock: bool = False) -> None:
        self.cpu, self.gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4")
        self.weights = ggml.Context()
        self.w = self.weights.new_tensor("q8_0", (32, 16, N_EXPERT), name="blk.0.ffn_up_exps.weight")
        self.weights.alloc(self.cpu, usage="weights")
        self.w.set_array(np.ones((N_EXPERT, 16, 32), np.float32))
        self.graph = ggml.Graph()
        with self.graph:
            self.x = self.graph.input("f32", (32, 1, N_TOKEN), name="x")
            self.ids = self.graph.input("i32", (2, N_TOKEN), name="ids")
            y = ggml.scale(ggml.mul_mat_id(self.w, self.x, self.ids).named("y"), 2.0).named("z")
        self.graph.expand(y)
        made = VirtualClock([PROFILES["rtx4090-pcie4"], CPU_PROFILE]) if clock else None
        self.sched = ggml.Scheduler([self.gpu, self.cpu], recorder=recorder, clock=made)

    def compute(self, *experts: int) -> None:
        """Compute with ids that name some experts."""
        self.sched.reset()
        self.sched.alloc_graph(self.graph)
        self.x.set_array(np.zeros((N_TOKEN, 1, 32), np.float32))
        self.ids.set_array(np.resize(np.array(experts, np.int32), (N_TOKEN, 2)))
        self.sched.compute(self.graph)


def events(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events as rows, with names for numbers."""
    rows = [dict(zip(model["events"], row, strict=True)) for row in zip(*model["events"].values(), strict=True)]
    for row in rows:
        row["kind"], row["name"] = model["kinds"][row["kind"]], model["strings"][row["name"]]
        row["lane"] = model["lanes"][row["lane"]]["name"]
    return rows


def test_bytes_are_those_of_the_statistics() -> None:
    """Bytes by reason, and what whole copies would be, are what the scheduler counted."""
    moe = Moe(recorder=Recording(), clock=True)
    moe.compute(1, 2, 6)
    moe.compute(3)
    model = view_of_scheduler(moe.sched).model
    found: Counter[str] = Counter()
    full = sum(e["whole"] for e in model["experts"])
    for e in events(model):
        if e["kind"] in ("experts", "input"):
            found[e["kind"]] += e["amount"]
            full += e["whole"] if e["kind"] == "input" else 0
    stats = moe.sched.stats
    assert found == Counter({k: n for k, n in stats.bytes_by_reason.items() if n})
    assert full == stats.bytes_full > stats.bytes_copied
    assert [model["used_sets"][e["used"]] for e in model["experts"]] == [(1, 2, 6), (3,)]
    assert len(model["runs"]) == 2
    assert Counter(e["kind"] for e in events(model))["compute"] == stats.n_launches


def test_a_copy_tells_its_split_and_its_experts() -> None:
    """The copy of a run of experts leads to the planned input with the node that reads it, and to the experts."""
    moe = Moe(recorder=Recording())
    moe.compute(1, 2, 6)
    model = view_of_scheduler(moe.sched).model
    first, second = (e for e in events(model) if e["kind"] == "experts")
    assert (first["name"], first["lane"], first["offset"]) == ("blk.0.ffn_up_exps.weight", "CPU → SIM0", moe.w.nb[2])
    assert first["ref"] == second["ref"] == 0
    (split,) = model["graphs"][model["runs"][first["run"]]["graph"]]["splits"]
    given = split["inputs"][0]
    assert model["strings"][given["tensor"]] == first["name"]
    assert (given["kind"], model["strings"][given["user"]], given["user_cause"]) == ("experts", "y", "1.off")
    assert (given["bytes"], tuple(given["ne"]), given["buft"]) == (moe.w.nbytes, (32, 16, 8, 1), "CPU")
    assert model["causes"]["1.off"] == ggml.Cause.OFFLOADED.text


def test_copies_tell_their_engines() -> None:
    """On the virtual clock a copy leads to the copy engines that carry it; work and waits have none."""
    moe = Moe(recorder=Recording(), clock=True)
    moe.compute(1, 2)
    model = view_of_scheduler(moe.sched).model
    found = {e["kind"]: e["engines"] for e in events(model)}
    assert model["engine_sets"][found["experts"]] == ("SIM0 copy engine 0",)
    assert found["compute"] == found["wait"] == -1


def test_times_of_both_clocks() -> None:
    """Each event has the times of its record on either clock, in nanoseconds from the first."""
    span = Span(0.25, 0.75)
    records: list[Record] = [
        CopyRecord(0, "x", "CPU", "GPU", 0, 4, 4, "activation", 10.0, 10.5, span),
        ComputeRecord(0, "GPU", 1, "y", 10.5, 11.0, Span(0.75, 1.75)),
        WaitRecord(0, "synchronize", "GPU", 11.0, 12.0),
    ]
    times = view_of_records(records).model["times"]
    assert times["wall"] == {"start": [0, 500_000_000, 1_000_000_000], "length": [500_000_000, 500_000_000, 10**9]}
    assert times["virtual"] == {"start": [250_000_000, 750_000_000, -1], "length": [500_000_000, 10**9, -1]}
    assert list(times) == ["virtual", "wall"]


def test_another_clock_goes_on() -> None:
    """Virtual times of a second simulation come after those of the first."""
    records: list[Record] = []
    for i, start_s in enumerate((0.0, 5.0)):  # of the wall clock
        of = Identity(i_graph=0, i_run=i, i_clock=i)
        records += [
            MicroBatchRecord(1, 0, 1, **of),
            AssignRecord("y", "ADD", "GPU", "2.sup", start_s, start_s, Span(0.0, 0.0), **of),
            ComputeRecord(0, "GPU", 1, "y", start_s, start_s + 1, Span(0.0, 2.0), **of),
            WaitRecord(None, "synchronize", "GPU", start_s + 1, start_s + 1, Span(0.0, 2.0), **of),
        ]
    assert view_of_records(records).model["times"]["virtual"]["start"] == [0, 0, 2 * 10**9, 2 * 10**9]


def test_phases_are_those_of_tokens() -> None:
    """Time is told for all batches, for those of several tokens, and for those of one; waiting between runs is none."""
    records: list[Record] = [
        MicroBatchRecord(4, 0, 1, i_run=0),
        CopyRecord(0, "w", "CPU", "GPU", 0, 4, 4, "weight", 0.0, 3.0, i_run=0),
        ComputeRecord(0, "GPU", 1, "y", 3.0, 4.0, i_run=0),
        MicroBatchRecord(1, 4, 1, i_run=1),
        ComputeRecord(0, "GPU", 1, "y", 100.0, 102.0, i_run=1),
    ]
    found = {p["phase"]: p for p in view_of_records(records).model["phases"]}
    gpu = {name: p["backends"][0] for name, p in found.items()}
    assert {name: (p["n_tokens"], p["length"]) for name, p in found.items()} == {
        "all": (5, 6 * 10**9), "prompt": (4, 4 * 10**9), "generate": (1, 2 * 10**9),
    }  # fmt: skip
    assert gpu["prompt"] == {"backend": "GPU", "total": 4 * 10**9, "computing": 10**9, "waits": {"weight": 3 * 10**9}}
    assert gpu["generate"]["waits"] == {}


def test_planning_between_batches_is_of_none() -> None:
    """A graph that is assigned after a batch was computed does not make that batch longer."""
    records: list[Record] = [
        MicroBatchRecord(4, 0, 1, i_run=0),
        AssignRecord("y", "ADD", "GPU", "2.sup", 0.0, 1.0, i_run=0),
        ComputeRecord(0, "GPU", 1, "y", 1.0, 2.0, i_run=0),
        AssignRecord("y", "ADD", "GPU", "2.sup", 8.0, 9.0),
        MicroBatchRecord(4, 0, 1, i_run=1),
        ComputeRecord(0, "GPU", 1, "y", 10.0, 11.0, i_run=1),
    ]
    assert view_of_records(records).model["events"]["run"] == [0, 0, -1, 1]


def test_memory_has_its_steps() -> None:
    """Each change of what is held has its place among the events and its times."""
    records: list[Record] = [
        AllocRecord("", "CPU", "CPU", 100, "weights", 1.0, 1.5, Span(0.0, 0.0)),
        CallbackRecord(0, "y", True, False, 2.0, 2.0, Span(0.5, 0.5)),
        AllocRecord("g", "GPU", "GPU", 50, "compute", 2.5, 3.0, Span(0.75, 0.75)),
    ]
    first, second = view_of_records(records).model["memory"]
    assert (first["after"], first["wall"], first["virtual"]) == (0, 0, 0)  # before the first event: at its start
    assert (second["after"], second["wall"], second["virtual"]) == (1, 10**9, 750_000_000)
    assert (second["backend"], second["purpose"], second["bytes"]) == ("GPU", "compute", 50)


def test_a_plan_without_times() -> None:
    """A scheduler that recorded nothing shows its latest graph: each input whole, each split, one step each."""
    moe = Moe()
    moe.sched.alloc_graph(moe.graph)
    view = view_of_scheduler(moe.sched)
    assert view.name == "SIM0 + CPU"
    assert view.model["is_plan"]
    assert [(e["kind"], e["name"], e["amount"]) for e in events(view.model)] == [
        ("experts", "blk.0.ffn_up_exps.weight", moe.w.nbytes),
        ("input", "x", moe.x.nbytes),
        ("input", "ids", moe.ids.nbytes),
        ("compute", "y", 2),
    ]
    assert view.model["times"] == {"order": {"start": [0, 1, 2, 3], "length": [1, 1, 1, 1]}}


def test_a_recorder_that_came_late() -> None:
    """Records of a graph that was cut before anybody recorded are shown with that graph's splits."""
    moe = Moe()
    moe.sched.alloc_graph(moe.graph)
    moe.sched.recorder = Recording()
    moe.ids.set_array(np.zeros((N_TOKEN, 2), np.int32))
    moe.x.set_array(np.zeros((N_TOKEN, 1, 32), np.float32))
    moe.sched.compute(moe.graph)
    model = view_of_scheduler(moe.sched).model
    assert [r["graph"] for r in model["runs"]] == [0]
    assert len(model["graphs"][0]["splits"]) == moe.sched.n_splits == 1


def test_a_kind_that_is_not_known_yet() -> None:
    """A record of a kind that the page does not know, but with times, is shown as another; one without is passed over."""

    class NapRecord(Identified):
        split, start_s, end_s = 3, 1.0, 2.0

    class MoodRecord(Identified):
        pass

    records: list[Any] = [NapRecord(), MoodRecord()]
    (event,) = events(view_of_records(records).model)
    assert (event["kind"], event["name"], event["split"]) == ("other", "Nap", 3)


def test_experts_of_an_earlier_copy_are_not_mixed_up() -> None:
    """A copy refers to the used experts whose number it carries."""

    def copy(split: int, i_run: int, i_experts: int) -> CopyRecord:
        return CopyRecord(
            split, "w", "CPU", "GPU", 0, 8, 64, "experts", 0.0, 1.0, i_experts=i_experts, i_run=i_run
        )  # fmt: skip

    records: list[Record] = [
        UsedExpertsRecord(0, "w", "ids", (0,), 8, 8, 64, 0, i_run=0), copy(0, 0, 0),
        UsedExpertsRecord(1, "w", "ids", (0, 5), 8, 8, 0, 1, i_run=0), copy(1, 0, 1),
        UsedExpertsRecord(0, "w", "ids", (0, 1), 8, 8, 64, 0, i_run=1), copy(0, 1, 0),
    ]  # fmt: skip
    model = view_of_records(records).model
    assert [e["ref"] for e in events(model) if e["kind"] == "experts"] == [0, 1, 2]
    assert [e["run"] for e in model["experts"]] == [0, 0, 1]


def test_a_graph_alone() -> None:
    """A graph shows leafs and nodes with their sources; copies that a scheduler put in come after them."""
    moe = Moe()
    tensors = view_of_graph(moe.graph).model["graph"]["tensors"]
    assert [t["name"] for t in tensors] == ["blk.0.ffn_up_exps.weight", "x", "ids", "y", "z"]
    assert [t["src"] for t in tensors[3:]] == [[0, 1, 2], [3]]
    assert tensors[1]["flags"] == ["input"]
    moe.sched.alloc_graph(moe.graph)
    names = [t["name"] for t in view_of_graph(moe.graph).model["graph"]["tensors"]]
    assert names[5:] == ["SIM0#blk.0.ffn_up_exps.weight#0", "SIM0#x#0", "SIM0#ids#0"]


def test_nothing_at_all() -> None:
    """A view of no records is empty, not an error."""
    model = view_of_records([]).model
    assert not model["runs"]
    assert not model["events"]["kind"]


@pytest.mark.parametrize("full", [False, True])
def test_splits_record_what_they_need(full: bool) -> None:
    """The records of splits list the inputs that are copied, with sizes that whole copies have."""
    moe = Moe(recorder=Recording())
    if full:
        moe.sched.policy = ggml.FullCopier()
    moe.compute(1, 2)
    model = view_of_scheduler(moe.sched).model
    (split,) = model["graphs"][0]["splits"]
    copied = {e["name"] for e in events(model) if e["kind"] in ("experts", "weight", "input")}
    assert {model["strings"][i["tensor"]] for i in split["inputs"]} == copied
    assert sum(i["bytes"] for i in split["inputs"]) == moe.sched.stats.bytes_full
