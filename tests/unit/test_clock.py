"""Virtual time: what overlaps, what waits, and that nothing else matters."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

import pyggml as ggml
from pyggml.clock import VirtualClock
from pyggml.cost import CPU_PROFILE, PROFILES
from pyggml.record import ComputeRecord, CopyRecord, Recording
from pyggml.timeline import trace_events

SIM, CPU = 0, 1
MB = 1_000_000
PROFILE = PROFILES["rtx4090-pcie4"]


def _clock() -> VirtualClock:
    return VirtualClock([PROFILE, CPU_PROFILE])


def _no_experts(node) -> float:
    raise AssertionError(f"'{node.name}' has no experts")


def _nodes():
    with ggml.Graph() as graph:
        y = ggml.mul_mat(graph.input("f16", (4096, 4096), name="w"), graph.input("f32", (4096, 64), name="x"))
    return [y]


def test_copy_from_pinned_memory_runs_behind_the_hosts_back():
    """The host goes on at once; the stream waits for the bytes."""
    clock = _clock()
    span = clock.copy(CPU, SIM, 100 * MB, is_async=True, is_pinned=True)
    assert clock.host_s == 0
    assert clock.stream_s[SIM] == span.end_s == PROFILE.link.seconds(100 * MB)


@pytest.mark.parametrize(("is_async", "is_pinned"), [(True, False), (False, True), (False, False)])
def test_other_copies_hold_the_host(is_async, is_pinned):
    """Pageable memory is staged by the host, and a copy that is not asynchronous is waited for."""
    clock = _clock()
    span = clock.copy(CPU, SIM, 100 * MB, is_async=is_async, is_pinned=is_pinned)
    assert clock.host_s == span.end_s == PROFILE.link.seconds(100 * MB, is_pinned=is_pinned)


def test_work_starts_after_the_copy_before_it_in_the_stream():
    """A stream does its work in order, while the host's time stands still."""
    clock = _clock()
    copy = clock.copy(CPU, SIM, 100 * MB, is_async=True, is_pinned=True)
    work = clock.compute(SIM, _nodes(), _no_experts)
    assert work.start_s == copy.end_s
    assert clock.host_s == 0
    assert clock.synchronize(SIM).end_s == clock.host_s == work.end_s


def test_synchronous_copy_overlaps_work_that_nobody_waited_for():
    """What the scheduler does not wait for goes on meanwhile."""
    clock = _clock()
    work = clock.compute(SIM, _nodes(), _no_experts)
    copy = clock.copy(CPU, SIM, 100 * MB, is_async=False, is_pinned=True)
    assert copy.start_s == 0 < work.end_s
    clock.synchronize(SIM)
    late = clock.copy(CPU, SIM, MB, is_async=False, is_pinned=True)
    assert late.start_s == max(work.end_s, copy.end_s)


def test_a_link_carries_one_copy_each_way():
    """Two copies one way follow each other; one the other way runs beside them."""
    clock = _clock()
    first = clock.copy(CPU, SIM, 100 * MB, is_async=True, is_pinned=True)
    back = clock.copy(SIM, CPU, 10 * MB, is_async=False, is_pinned=True)
    second = clock.copy(CPU, SIM, 100 * MB, is_async=True, is_pinned=True)
    assert back.start_s == 0
    assert second.start_s == first.end_s
    assert clock.to_device_busy_s[SIM] == pytest.approx(first.end_s + second.end_s - second.start_s)
    assert clock.from_device_busy_s[SIM] == back.end_s


def test_the_host_computes_while_it_waits_for_nothing_else():
    """The CPU's work moves the host's time, and the device's goes on beside it."""
    clock = _clock()
    device = clock.compute(SIM, _nodes(), _no_experts)
    host = clock.compute(CPU, _nodes(), _no_experts)
    assert host.start_s == device.start_s == 0
    assert clock.host_s == host.end_s
    assert clock.busy_s == [device.end_s, host.end_s]


def test_events_stand_for_what_was_given_before_them():
    """Host and stream wait for the mark, not for what came after."""
    clock = VirtualClock([PROFILE, PROFILE, CPU_PROFILE])
    first = clock.compute(0, _nodes(), _no_experts)
    clock.event_record(0, 2)
    clock.compute(0, _nodes(), _no_experts)
    assert clock.event_wait(1, 0, 2).end_s == first.end_s == clock.stream_s[1]
    assert clock.event_synchronize(0, 2).end_s == clock.host_s == first.end_s
    assert clock.event_synchronize(0, 3).end_s == clock.host_s  # never recorded: nothing to wait for


def test_link_may_slow_down_at_any_moment():
    """A profile that is replaced holds from then on."""
    clock = _clock()
    before = clock.copy(CPU, SIM, 100 * MB, is_async=False, is_pinned=True)
    slow = replace(PROFILE.link, bytes_per_s=PROFILE.link.bytes_per_s / 4)
    clock.profiles[SIM] = replace(PROFILE, link=slow)
    after = clock.copy(CPU, SIM, 100 * MB, is_async=False, is_pinned=True)
    assert after.end_s - after.start_s > 3.9 * (before.end_s - before.start_s)


def test_copy_between_devices_goes_at_the_pace_of_the_slower_link():
    """It waits for the source's stream and takes both links."""
    slow = PROFILES["rtx3090-pcie3"]
    clock = VirtualClock([PROFILE, slow, CPU_PROFILE])
    work = clock.compute(0, _nodes(), _no_experts)
    span = clock.copy(0, 1, 100 * MB, is_async=True, is_pinned=True)
    assert span.start_s == work.end_s
    assert span.end_s - span.start_s == pytest.approx(slow.link.seconds(100 * MB))


def _graph():
    context = ggml.Context()
    w = context.new_tensor("f32", (64, 32, 8), name="w")
    graph = ggml.Graph()
    with graph:
        x, ids = graph.input("f32", (64, 1, 40), name="x"), graph.input("i32", (2, 40), name="ids")
        y = ggml.mul_mat_id(w, x, ids).named("y")
    graph.expand(y)
    return context, w, graph, x, ids


def _records(*, delay_s: float = 0.0, parallel: bool = False) -> list:
    """Return the records of two computings, wall times out."""
    sim, cpu = ggml.Sim(threads=1), ggml.CPU(threads=1)
    context, w, graph, x, ids = _graph()
    context.alloc(cpu, usage="weights")
    recording = Recording()
    clock = VirtualClock([PROFILE, CPU_PROFILE])
    rng = np.random.default_rng(5)
    w.set_array(rng.standard_normal((8, 32, 64)))

    def wait(tensor, ask) -> bool:
        time.sleep(delay_s)
        return False

    callback = wait if delay_s else None
    with ggml.Scheduler([sim, cpu], recorder=recording, clock=clock, parallel=parallel) as sched:
        sched.set_eval_callback(callback)
        for _ in range(2):
            sched.reset()
            sched.alloc_graph(graph)
            x.set_array(rng.standard_normal((40, 1, 64)))
            ids.set_array(rng.integers(0, 8, (40, 2), dtype=np.int32))
            sched.compute(graph)
    return [replace(r, start_s=0.0, end_s=0.0) if hasattr(r, "start_s") else r for r in recording.records]


@pytest.mark.parametrize("parallel", [False, True])
def test_two_runs_with_one_seed_give_identical_records(parallel):
    """Every record, its virtual times among them, is the same."""
    first, second = _records(parallel=parallel), _records(parallel=parallel)
    assert first == second
    assert any(isinstance(r, CopyRecord) and r.virtual is not None for r in first)


def test_virtual_time_is_independent_of_wall_time():
    """A host that sleeps between the nodes gets the same times of copies and work."""
    quick = [r for r in _records() if isinstance(r, CopyRecord | ComputeRecord)]
    slow = [r for r in _records(delay_s=0.01) if isinstance(r, CopyRecord | ComputeRecord)]
    assert [r.virtual for r in quick] == [r.virtual for r in slow]


def test_timeline_shows_the_simulated_machine_beside_this_one():
    """A second process has lanes for links and work, and an arrow from each copy to the work that reads it."""
    records = _records()
    events = trace_events(records)
    lanes = {e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    assert {"SIM0 compute", "link CPU → SIM0"} <= lanes
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    n_copies = sum(isinstance(r, CopyRecord) for r in records)
    assert len(starts) == len(ends) == n_copies > 2
    assert all(starts[i]["ts"] <= ends[i]["ts"] for i in starts)
    copied = [e["args"]["bytes"] for e in events if e.get("cat") == "copy" and e["pid"] == 2]
    assert sum(copied) == sum(r.size_bytes for r in records if isinstance(r, CopyRecord))
