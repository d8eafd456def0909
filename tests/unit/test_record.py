"""Records are complete: each call that the scheduler makes on a backend, and all memory that is held, has one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from race_worlds import World, one_device, two_devices

import pyggml as ggml
from pyggml.backends.sim import SimEvent
from pyggml.clock import VirtualClock
from pyggml.cost import CPU_PROFILE, PROFILES
from pyggml.errors import OutOfMemoryError
from pyggml.record import (
    AllocRecord,
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyRecord,
    EventRecord,
    ReadRecord,
    Record,
    Recording,
    UsedExpertsRecord,
    WaitRecord,
)
from pyggml.sched import log
from pyggml.timeline import trace_events

PROFILE = PROFILES["rtx4090-pcie4"]
N_RUNS = 8  # twice as many as there are pipeline copies
#: Those that the scheduler makes as it goes.
TIMED = (AssignRecord, AllocRecord, CopyRecord, ReadRecord, WaitRecord, EventRecord, ComputeRecord, CallbackRecord)
SEEN = (*TIMED, UsedExpertsRecord)
#: What a scheduler calls on a backend.
CALLS = ("graph_compute", "event_record", "event_wait", "synchronize", "set_tensor_async", "get_tensor_async",
         "cpy_tensor_async")  # fmt: skip


@contextmanager
def _counting(monkeypatch: pytest.MonkeyPatch, methods: list[tuple[type, str]]) -> Iterator[Counter[str]]:
    """Count the calls of methods by name, but not those that counted ones make.

    An event's ``synchronize`` counts as ``event_synchronize``.
    """
    counts: Counter[str] = Counter()
    inside = [0]

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += not inside[0]
            inside[0] += 1
            try:
                return method(*args)
            finally:
                inside[0] -= 1

        return call

    with monkeypatch.context() as patch:
        patch.setattr(SimEvent, "synchronize", counted("event_synchronize", SimEvent.synchronize))
        for owner, name in methods:
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield counts


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("watch", ["", "h3"])
@pytest.mark.parametrize("seed", [None, 2])
def test_each_call_has_its_record(parallel, watch, seed, monkeypatch):
    """Launches, events, waits and calls of the callback are as many as were made, and each kind is met."""
    world = two_devices(seed, parallel=parallel, watch=watch)
    recording = world.sched.recorder = Recording()
    n_asked = Counter[str]()
    callback = world.sched.eval_callback
    if callback is not None:
        world.sched.set_eval_callback(lambda tensor, ask: (n_asked.update(["call"]), callback(tensor, ask))[1])
    kinds = {type(b) for b in world.backends}
    try:
        with _counting(monkeypatch, [(kind, name) for kind in kinds for name in CALLS]) as called:
            world.run(N_RUNS)
            records = list(recording.records)
    finally:
        world.close()
    what = Counter(r.what for r in records if isinstance(r, WaitRecord))
    found = {
        "graph_compute": sum(isinstance(r, ComputeRecord) for r in records),
        "event_record": sum(isinstance(r, EventRecord) for r in records),
        "event_wait": what["event_wait"],
        "synchronize": what["synchronize"],
        "event_synchronize": what["event_synchronize"],
    }
    assert found == {name: called[name] for name in found}
    assert {name for name, n in found.items() if n} == (set(found) if parallel else {"graph_compute", "synchronize"})
    assert sum(isinstance(r, CallbackRecord) for r in records) == n_asked["call"]
    assert bool(n_asked["call"]) == bool(watch)
    assert world.sched.stats.n_launches == found["graph_compute"]


def _timed(make: Callable[..., World], seed: int | None = None, **options: Any) -> list[Record]:
    """Return the records of a few runs with a clock."""
    world = make(seed, **options)
    recording = world.sched.recorder = Recording()
    world.sched.clock = VirtualClock([PROFILE] * (len(world.backends) - 1) + [CPU_PROFILE])
    try:
        world.run(N_RUNS)
        return list(recording.records)
    finally:
        world.close()


def test_an_event_is_recorded_before_it_is_waited_for():
    """A wait names the copy of the event; it ends no earlier than the backend comes to the mark."""
    marks: dict[tuple[str, int], EventRecord] = {}
    n_met = 0
    for r in _timed(two_devices, parallel=True):
        if isinstance(r, EventRecord):
            assert r.virtual.start_s == r.virtual.end_s
            marks[r.backend, r.copy] = r
        elif isinstance(r, WaitRecord) and r.what != "synchronize" and (r.backend, r.copy) in marks:
            n_met += 1
            assert r.virtual.end_s >= marks[r.backend, r.copy].virtual.end_s
    assert set(marks) == {(name, copy) for name in ("SIM0", "SIM1") for copy in range(4)}
    assert n_met > 8


@pytest.mark.parametrize("parallel", [False, True])
def test_two_runs_with_one_seed_give_identical_records(parallel):
    """Devices that work late, events, experts and a callback: all but wall time is the same; and so for another seed."""

    def records(seed: int | None) -> list[Record]:
        kept = _timed(two_devices, seed, parallel=parallel, watch="h3")
        return [
            r if isinstance(r, UsedExpertsRecord) else replace(r, start_s=0.0, end_s=0.0)
            for r in kept
            if isinstance(r, SEEN)
        ]

    first = records(7)
    assert len(first) > 100
    assert first == records(7)
    assert first == records(8) == records(None)  # when work is done does not change what the scheduler did


def test_what_waits_outside_of_splits_has_none():
    """The end of a computing, and making room for a graph, wait for every backend."""
    outside = [r.backend for r in _timed(one_device) if isinstance(r, WaitRecord) and r.split is None]
    assert outside == ["SIM0", "CPU"] * (len(outside) // 2)
    assert outside


def test_every_kind_has_wall_and_virtual_time():
    """Assignments, allocations, copies, reads, waits, events, launches and callbacks say when, on both clocks."""
    records = _timed(two_devices, parallel=True, watch="h3")
    for kind in TIMED:
        own = [r for r in records if isinstance(r, kind)]
        assert own
        for r in own:
            assert 0 < r.start_s <= r.end_s
            assert r.virtual is not None


def test_the_timeline_shows_events_as_moments_of_their_backend():
    """An instant on the lane of the backend's work, with its split and copy, in both processes."""
    records = _timed(one_device, parallel=True)
    events = trace_events(records)
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    shown = [e for e in events if e.get("cat") == "event"]
    assert {(e["ph"], lanes[e["pid"], e["tid"]]) for e in shown} == {("i", "SIM0 compute")}
    for pid in (1, 2):
        told = [(e["args"]["split"], e["args"]["copy"]) for e in shown if e["pid"] == pid]
        assert told == [(r.split, r.copy) for r in records if isinstance(r, EventRecord)]


# -- memory ------------------------------------------------------------------


def _held(records: list[Record]) -> dict[tuple[str, str, str], int]:
    """Return what is held after records, by purpose, backend and buffer type."""
    held = {(r.purpose, r.backend, r.buft): r.size_bytes for r in records if isinstance(r, AllocRecord)}
    return {key: n for key, n in held.items() if n}


def _graph(n: int) -> ggml.Graph:
    with ggml.Graph() as graph:
        y = ggml.sqr(graph.input("f32", (n, n), name="x")).named("y")
    graph.expand(y)
    return graph


def test_compute_buffers_are_recorded_when_they_change():
    """Also where there is one buffer type and the allocator reserves by itself, and when they are given back."""
    cpu, recording = ggml.CPU(threads=1), Recording()
    sched = ggml.Scheduler([cpu], recorder=recording)
    small, large = _graph(8), _graph(64)
    sizes = []
    for graph in (small, large, small):
        sched.reset()
        sched.alloc_graph(graph)
        sizes.append(sched.buffer_size(cpu))
        assert _held(recording.records) == {("compute", "CPU", "CPU"): sizes[-1]}
    sched.close()
    assert [(r.size_bytes, r.graph) for r in recording.records if isinstance(r, AllocRecord)] == [
        (sizes[0], "y"),
        (sizes[1], "y"),
        (0, ""),
    ]


def test_a_reserve_that_fails_records_what_it_gave_back():
    """After an allocation that failed the records hold what the device holds."""
    sim, recording = ggml.Sim("custom:1MiB,100GB/s,10GB/s", threads=1), Recording()
    with ggml.Scheduler([sim, ggml.CPU(threads=1)], recorder=recording) as sched:
        small, large = _graph(64), _graph(1024)
        for graph in (small, large):
            sched.set_tensor_backend(graph["y"], sim)
            if graph is small:
                sched.reserve(graph)
                assert _held(recording.records)["compute", "SIM0", "SIM0"] == sim.device.used_bytes > 0
            else:
                with pytest.raises(OutOfMemoryError):
                    sched.reserve(graph)
        assert sim.device.used_bytes == 0
        assert ("compute", "SIM0", "SIM0") not in _held(recording.records)


# -- switched off ------------------------------------------------------------


def test_without_a_recorder_no_record_is_made_and_no_time_is_asked_for(monkeypatch):
    """Nothing that a record needs is worked out: neither wall time nor the record."""

    def never(*args: Any) -> Any:
        raise AssertionError("this is for records")

    expected = two_devices(None, parallel=True, watch="h3").run(N_RUNS)
    for name in ("perf_counter", *(kind.__name__ for kind in TIMED)):
        monkeypatch.setattr(log, name, never)
    world = two_devices(None, parallel=True, watch="h3")
    try:
        assert all(map(np.array_equal, world.run(N_RUNS), expected))
    finally:
        world.close()
