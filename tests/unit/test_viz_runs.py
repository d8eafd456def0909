"""Which run of which graph a record belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

import pyggml as ggml
from pyggml.clock import Span
from pyggml.planning import virtual_clock
from pyggml.record import (
    AssignRecord,
    ComputeRecord,
    CopyRecord,
    MicroBatchRecord,
    Record,
    Recording,
    SplitRecord,
    UsedExpertsRecord,
    WaitRecord,
)
from pyggml.timeline import trace_events
from pyggml.viz.lanes import Lane
from pyggml.viz.numbering import number_records
from pyggml.viz.objects import view_of_scheduler
from pyggml.viz.runs import Runs


def copy(split: int, i_run: int = -1, i_graph: int = -1) -> CopyRecord:
    """Return a copy for a split."""
    return CopyRecord(split, "x", "CPU", "GPU", 0, 4, 4, "activation", 0.0, 0.0, i_run=i_run, i_graph=i_graph)


def work(split: int, i_run: int = -1, i_graph: int = -1, first: str = "y") -> ComputeRecord:
    """Return the work of a split, from a node on."""
    return ComputeRecord(split, "GPU", 1, first, 0.0, 0.0, i_run=i_run, i_graph=i_graph)


def plan(*splits: int, op: str = "ADD", i_graph: int = -1, i_run: int = -1) -> list[Record]:
    """Return what is recorded when a graph of so many splits is planned."""
    nodes: list[Record] = [
        AssignRecord(f"y{i}", op, "GPU", "2.sup", float(i), i_graph=i_graph, i_run=i_run) for i in splits
    ]
    return nodes + [
        SplitRecord(i, "GPU", i, i + 1, 1, f"y{i}", op, "2.sup", (), i_graph=i_graph, i_run=i_run) for i in splits
    ]


def runs_of(records: Iterable[Record]) -> tuple[list[int], Runs]:
    """Return the run of each record, and what was collected."""
    runs = Runs()
    found = [runs.take(record) for record in records]
    runs.settle()
    return found, runs


def test_runs_are_those_of_the_records() -> None:
    """A record is of the run whose number it carries, whatever the numbers are; -1 is none."""
    found, runs = runs_of([MicroBatchRecord(4, 0, 1, i_run=7), copy(0, 7), work(0, 7), plan(0)[0], work(0, 9)])
    assert found == [0, 0, 0, -1, 1]
    assert [r.batch and r.batch.n_tokens for r in runs.runs] == [4, None]


def test_graphs_are_known_once() -> None:
    """A graph that is planned again at another time is the same; one of another kind is not."""
    later = [replace(r, start_s=9.0) if isinstance(r, AssignRecord) else r for r in plan(0, 1, i_graph=1)]
    records = [
        *plan(0, 1, i_graph=0),
        work(0, 0, 0),
        *later,
        work(0, 1, 1),
        *plan(0, op="MUL", i_graph=2),
        work(0, 2, 2),
    ]
    _, runs = runs_of(records)
    assert [r.graph for r in runs.runs] == [0, 0, 1]
    assert [len(g.splits) for g in runs.graphs] == [2, 1]


def test_graphs_that_only_reserved_are_left_out() -> None:
    """What was planned and never computed is left out, unless nothing was computed at all."""
    planned = [*plan(0, 1, 2, i_graph=0), *plan(0, 1, i_graph=1)]
    _, runs = runs_of([*planned, work(0, 0, 1), work(1, 0, 1)])
    assert [len(g.splits) for g in runs.graphs] == [2]
    assert [r.graph for r in runs.runs] == [0]
    assert [len(g.splits) for g in runs_of(planned)[1].graphs] == [3, 2]


def scheduler(recorder: Recording) -> tuple[ggml.Scheduler, list[ggml.Graph]]:
    """Return a scheduler over two backends, and two graphs of one split each on the first."""
    graphs = []
    for _ in range(2):
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (4,), name="x").set_output()
            graph.expand(ggml.scale(x, 2.0).named("y"))
        graphs.append(graph)
    return ggml.Scheduler([ggml.Sim("rtx4090-pcie4", threads=1), ggml.CPU(threads=1)], recorder=recorder), graphs


def computed(sched: ggml.Scheduler, graph: ggml.Graph) -> None:
    """Allocate, fill and compute a graph."""
    sched.reset()
    sched.alloc_graph(graph)
    graph.leafs[0].set_array(np.ones(4))
    sched.compute(graph)


def test_a_scheduler_numbers_what_it_records() -> None:
    """Graphs count up with each cut, runs with each compute or announcement; what is planned unannounced is of no run."""
    recording = Recording()
    sched, (first, second) = scheduler(recording)
    computed(sched, first)
    sched.compute(first)
    sched.announce(1, 0, 1)
    computed(sched, second)
    work = [(r.i_graph, r.i_run) for r in recording.records if isinstance(r, ComputeRecord)]
    assert work == [(0, 0), (0, 1), (1, 2)]
    assert [(r.i_graph, r.i_run) for r in recording.records if isinstance(r, SplitRecord)] == [(0, -1), (1, 2)]
    assert [r.i_run for r in recording.records if isinstance(r, MicroBatchRecord)] == [2]
    waits = [r.i_run for r in recording.records if isinstance(r, WaitRecord)]
    assert waits == sorted(waits)
    assert waits[-1] == 2


def test_another_clock_is_counted() -> None:
    """Records say which virtual clock their times are of."""
    recording = Recording()
    sched, (graph, _) = scheduler(recording)
    for _ in range(2):
        sched.clock = virtual_clock(sched.backends)
        computed(sched, graph)
    assert sched.clock is not None
    sched.clock.reset()
    computed(sched, graph)
    assert sorted({r.i_clock for r in recording.records}) == [0, 1, 2]


def numbers(*records: Record) -> list[tuple[int, int, int]]:
    """Return graph, run and clock of records of an old file."""
    return [(r.i_graph, r.i_run, r.i_clock) for r in number_records(records)]


def test_old_records_of_a_session() -> None:
    """A batch of tokens begins a run; its plan belongs to it; a graph planned after its work belongs to none."""
    old = [MicroBatchRecord(4, 0, 1), *plan(0), work(0), *plan(0), MicroBatchRecord(1, 4, 1), work(0)]
    assert numbers(*old) == [
        (-1, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (1, -1, 0), (1, -1, 0), (1, 1, 0), (1, 1, 0),
    ]  # fmt: skip


def test_old_records_without_a_session() -> None:
    """A run begins with a split before the latest one."""
    assert [n[1] for n in numbers(copy(0), work(0), copy(1), work(1), copy(0), work(0))] == [0, 0, 0, 0, 1, 1]


def test_old_clocks_and_experts() -> None:
    """A clock that was set back is another one; copies of experts refer to the latest record of their split and weight."""
    waits = [WaitRecord(None, "synchronize", "GPU", 0.0, 0.0, Span(0.0, end_s)) for end_s in (2.0, 3.0, 1.0)]
    assert [n[2] for n in numbers(*waits)] == [0, 0, 1]
    experts = [UsedExpertsRecord(split, "x", "ids", (0,), 8, 8, 64) for split in (0, 1)]
    sent = replace(copy(1), reason="experts")
    made = number_records([MicroBatchRecord(1, 0, 1), *experts, sent, replace(sent, split=0)])
    assert [r.i_experts for r in made if isinstance(r, CopyRecord)] == [1, 0]


def test_perfetto_and_the_page_have_the_same_lanes() -> None:
    """A record is in the same lane in Perfetto and on the page; each has its own words for it."""
    recording = Recording()
    sched, (graph, _) = scheduler(recording)
    sched.set_tensor_backend(graph.nodes[-1], sched.backends[0])
    sched.alloc_graph(graph)
    graph.leafs[0].set_array(np.ones(4))
    sched.compute(graph)
    on_page = view_of_scheduler(sched).model["lanes"]
    in_perfetto = {e["args"]["name"] for e in trace_events(recording.records) if e["name"] == "thread_name"}
    assert in_perfetto == {Lane(lane["kind"], lane["name"], lane["backend"]).perfetto_name for lane in on_page}
    assert in_perfetto == {"host", "link CPU → SIM0", "SIM0 compute"}
