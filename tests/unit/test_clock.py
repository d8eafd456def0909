"""Virtual time: what overlaps, what waits, and that nothing else matters."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

import pyggml as ggml
from pyggml.clock import VirtualClock
from pyggml.cost import CPU_PROFILE, PROFILES
from pyggml.errors import BackendError
from pyggml.hardware.formulas import pageable_rate
from pyggml.hardware.hosts import DEFAULT_HOST
from pyggml.hardware.rates import RATES
from pyggml.record import (
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyRecord,
    Recording,
)
from pyggml.timeline import trace_events

SIM, CPU = 0, 1
MB = 1_000_000
PROFILE = PROFILES["rtx4090-pcie4"]
PAGEABLE = pageable_rate(DEFAULT_HOST, RATES)


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
    assert clock.host_s == span.end_s == PROFILE.link.seconds(100 * MB, at_most=math.inf if is_pinned else PAGEABLE)


def test_a_copy_within_a_device_uses_its_memory_and_no_link():
    """252 MB take the time to read and write them in device memory, and both links stay free."""
    clock = _clock()
    span = clock.copy(SIM, SIM, 252 * MB, is_async=True, is_pinned=True)
    assert 0.4e-3 < span.seconds < 0.8e-3
    assert (clock.host_s, clock.stream_s[SIM], clock.busy_s[SIM]) == (0, span.end_s, span.seconds)
    assert clock.to_device_busy_s == clock.from_device_busy_s == [0.0, 0.0]
    assert clock.engines(SIM, SIM) == []


def test_a_second_queue_carries_bytes_beside_the_work():
    """A copy in a queue of its own does not wait for the stream's work; the stream waits for it where it is told to."""
    clock = _clock()
    clock.spend(SIM, 1.0)
    span = clock.copy(CPU, SIM, 100 * MB, is_async=True, is_pinned=True, queue=1)
    assert span.start_s == 0
    assert clock.ready_s(SIM, 1) == span.end_s
    assert clock.wait_until(SIM, 2.0).end_s == clock.stream_s[SIM] == 2.0
    assert clock.wait_until(None, span.end_s).end_s == clock.host_s == span.end_s


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


def test_one_copy_engine_carries_one_copy_in_all():
    """Where a device has a single engine the ways take turns; with two they do not."""
    one, two = (VirtualClock([replace(PROFILE, copy_engines=n), CPU_PROFILE]) for n in (1, 2))
    there, back = ([c.copy(*ends, 100 * MB, is_async=True, is_pinned=True) for c in (one, two)]
                   for ends in ((CPU, SIM), (SIM, CPU)))  # fmt: skip
    assert back[0].start_s == there[0].end_s
    assert back[1].start_s == 0
    assert one.copy(CPU, SIM, MB, is_async=True, is_pinned=True).start_s == back[0].end_s


def test_slow_link_takes_as_many_times_as_long():
    """Of a copy between devices the link that takes longer counts."""
    clock = VirtualClock([PROFILE, PROFILE, CPU_PROFILE])
    usual = clock.copy(2, 0, MB, is_async=True, is_pinned=True).end_s
    clock.reset()
    assert clock.copy(2, 0, MB, is_async=True, is_pinned=True, slow_dst=3.0).end_s == pytest.approx(3 * usual)
    clock.reset()
    assert clock.copy(0, 2, MB, is_async=True, is_pinned=True, slow_src=4.0).end_s == pytest.approx(4 * usual)
    clock.reset()
    span = clock.copy(0, 1, MB, is_async=True, is_pinned=True, slow_src=3.0, slow_dst=2.0)
    assert span.end_s == pytest.approx(3 * usual)


def test_each_way_of_a_link_has_its_own_rate():
    """A read takes the way back, and a copy between devices the slower of one's way back and the other's way there."""
    slow = replace(PROFILE, link_back=replace(PROFILE.link, bytes_per_s=PROFILE.link.bytes_per_s / 3))
    clock = VirtualClock([slow, PROFILE, CPU_PROFILE])
    there, back = (clock.copy(*ends, 100 * MB, is_async=False, is_pinned=True).seconds for ends in ((2, 0), (0, 2)))
    assert there == PROFILE.link.seconds(100 * MB)
    assert back == pytest.approx(slow.from_device.seconds(100 * MB))
    between = clock.copy(0, 1, 100 * MB, is_async=False, is_pinned=True)
    assert between.seconds == pytest.approx(back)


def test_copies_show_on_the_lanes_of_their_engines():
    """With one engine both ways share a lane; a copy from device to device takes one of each; the host has none."""
    one, two = (
        VirtualClock([replace(PROFILE, copy_engines=1), CPU_PROFILE]),
        VirtualClock([PROFILE, PROFILE, CPU_PROFILE]),
    )
    assert one.engines(1, 0) == one.engines(0, 1) == [(0, 0)]
    assert (two.engines(2, 0), two.engines(0, 2), two.engines(0, 1)) == ([(0, 0)], [(0, 1)], [(1, 0), (0, 1)])
    assert two.engines(2, 2) == []
    records = _records()
    events = trace_events(records)
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    carried = [(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") == "engine"]
    on_links = [e for e in events if e.get("cat") in ("copy", "read") and e["pid"] == 2]
    assert sorted(carried) == sorted((e["name"], e["ts"], e["dur"]) for e in on_links)
    lane_of = {e["name"]: lanes[e["tid"]] for e in events if e.get("cat") == "engine"}
    assert lane_of.pop("SIM0#ids#0") == "SIM0 copy engine 1"  # ids are read back; all else goes there
    assert set(lane_of.values()) == {"SIM0 copy engine 0"}


def _graph():
    context = ggml.Context()
    w = context.new_tensor("f32", (64, 32, 8), name="w")
    graph = ggml.Graph()
    with graph:
        x, ids = graph.input("f32", (64, 1, 40), name="x"), graph.input("i32", (2, 40), name="ids")
        y = ggml.mul_mat_id(w, x, ids).named("y")
    graph.expand(y)
    return context, w, graph, x, ids


def _records(*, delay_s: float = 0.0, parallel: bool = False, slow: tuple[float, int] | None = None) -> list:
    """Return the records of two computings, wall times out."""
    sim, cpu = ggml.Sim(threads=1), ggml.CPU(threads=1)
    if slow is not None:
        sim.device.slow_link(slow[0], after=slow[1])
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
    assert {"SIM0 compute", "link CPU → SIM0", "SIM0 copy engine 0"} <= lanes
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    n_copies = sum(isinstance(r, CopyRecord) for r in records)
    assert len(starts) == len(ends) == n_copies > 2
    assert all(starts[i]["ts"] <= ends[i]["ts"] for i in starts)
    copied = [e["args"]["bytes"] for e in events if e.get("cat") == "copy" and e["pid"] == 2]
    assert sum(copied) == sum(r.size_bytes for r in records if isinstance(r, CopyRecord))


def test_link_slows_down_at_the_moment_asked_for():
    """Copies before it take what they took, later ones as many times as long, and nothing else changes."""

    def seconds(records: list) -> list[float]:
        return [r.virtual.end_s - r.virtual.start_s for r in records if isinstance(r, CopyRecord)]

    usual, slow = _records(), _records(slow=(5.0, 2))
    assert seconds(slow)[:2] == pytest.approx(seconds(usual)[:2])
    assert seconds(slow)[2:] == pytest.approx([5 * s for s in seconds(usual)[2:]])
    strip = [[replace(r, virtual=None) if hasattr(r, "virtual") else r for r in records] for records in (usual, slow)]
    assert strip[0] == strip[1]


def test_a_link_that_cannot_be_is_refused():
    """A factor of 0 has no rate; clearing faults brings the profile's link back."""
    device = ggml.Sim(threads=1).device
    with pytest.raises(BackendError):
        device.slow_link(0)
    device.slow_link(2.0)
    assert device.link_slowdown() == device.link_slowdown() == 2.0
    device.clear_faults()
    assert device.link_slowdown() == 1.0


def test_assignments_are_recorded_when_a_graph_is_split():
    """Each computed node has one record with its backend and cause; a launch counts the causes of its nodes."""
    records = _records()
    assigned = [r for r in records if isinstance(r, AssignRecord)]
    assert {(r.tensor, r.op, r.backend, r.cause) for r in assigned} == {("y", "MUL_MAT_ID", "SIM0", "1.off")}
    launched = [r for r in records if isinstance(r, ComputeRecord)]
    assert [dict(r.causes) for r in launched] == [{"1.off": 1}] * 2
    shown = [e["args"]["causes"] for e in trace_events(records) if e.get("cat") == "compute" and e["pid"] == 2]
    assert shown == [{"1.off": 1}] * 2


def test_callbacks_are_recorded_and_shown_as_moments_of_the_host():
    """Each call has a record of what was asked and answered, and an instant on the host's lane."""
    records = _records(delay_s=1e-4)
    calls = [r for r in records if isinstance(r, CallbackRecord)]
    assert [(r.tensor, r.asked, r.answer) for r in calls] == [("y", True, False)] * 2
    events = trace_events(records)
    moments = [e for e in events if e.get("cat") == "callback"]
    assert {(e["ph"], e["name"], e["pid"]) for e in moments} == {("i", "callback y", 1), ("i", "callback y", 2)}
    hosts = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and e["args"]["name"] == "host"}
    assert {(e["pid"], e["tid"]) for e in moments} <= hosts
