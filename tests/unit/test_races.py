"""Devices that do their work late: with every wait of the scheduler results are right, without one they are not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from race_worlds import (
    Saboteur,
    World,
    chain,
    host_then_device,
    one_device,
    rewritten_experts,
    two_devices,
    two_streams,
    without,
)

import pyggml as ggml
from pyggml.backends.host.race_watch import HOST
from pyggml.backends.sim import Hazard, SimBackend
from pyggml.buffer import tensor_copy
from pyggml.dialect import DIALECTS

N_SEEDS = 20
N_RUNS = 8  # twice as many as there are pipeline copies
Make = Callable[..., World]


def _results(make: Make, seed: int | None, **options) -> list[np.ndarray]:
    world = make(seed, **options)
    try:
        return world.run(N_RUNS)
    finally:
        world.close()


def _hazards(make: Make, **options) -> list[Hazard]:
    """Return the hazards that one seed names."""
    world = make(0, **options)
    try:
        world.run(N_RUNS)
        devices = dict.fromkeys(b.device for b in world.backends if isinstance(b, SimBackend))
        return [hazard for device in devices for hazard in device.hazards]
    finally:
        world.close()


def _wrong_seeds(make: Make, **options) -> list[int]:
    """Return the seeds whose results are not those of devices that work at once, bit for bit."""
    expected = _results(make, None, **options)
    assert all(np.isfinite(r).all() for r in expected)
    wrong = []
    for seed in range(N_SEEDS):
        got = _results(make, seed, **options)
        if len(got) != len(expected) or not all(map(np.array_equal, got, expected)):
            wrong.append(seed)
    return wrong


@pytest.mark.parametrize("make", [one_device, two_devices, host_then_device])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("version", list(DIALECTS))
def test_every_legal_order_gives_the_right_result(make, parallel, version):
    """Whatever the devices do late, the waits of the scheduler are enough."""
    assert not _wrong_seeds(make, parallel=parallel, dialect=DIALECTS[version])
    assert not _hazards(make, parallel=parallel, dialect=DIALECTS[version])


def test_every_legal_order_gives_the_right_result_under_a_callback():
    """What the callback sees is what was computed."""
    assert not _wrong_seeds(two_devices, watch="h3")
    assert not _hazards(two_devices, watch="h3")


#: Places that wait, and a graph on which each alone keeps the result right.
_NEEDED = [
    ("host_wait:previous_split", two_streams, {}),
    ("host_wait:previous_split", two_streams, {"parallel": True}),
    ("host_wait:input", one_device, {}),
    ("host_wait:input", one_device, {"parallel": True}),
    ("host_wait:fallback", host_then_device, {"parallel": True}),
    ("stream_wait:copy", two_devices, {}),
    ("synchronize:source", two_devices, {}),
    ("synchronize:source", two_devices, {"parallel": True}),
    ("synchronize:part", two_devices, {"watch": "h1"}),
    ("synchronize:weight", rewritten_experts, {}),
    ("read_wait:ids", two_devices, {}),
]


@pytest.mark.parametrize(("place", "make", "options"), _NEEDED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_wait_taken_out_is_caught(place, make, options):
    """Without one of the waits some order gives a wrong number or NaN; with it none does."""
    assert not _wrong_seeds(make, **options)
    with without(place):
        assert _wrong_seeds(make, **options)


#: What the host reads into memory of Python is not watched.
_NAMED = [needed for needed in _NEEDED if needed[0] != "read_wait:ids"]


@pytest.mark.parametrize(("place", "make", "options"), _NAMED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_wait_taken_out_is_named(place, make, options):
    """Any one seed names who used the memory, and which wait is missing; with the wait there is nothing to name."""
    assert not _hazards(make, **options)
    with without(place):
        hazards = _hazards(make, **options)
    assert hazards
    assert all("does not wait for SIM" in h.missing for h in hazards)


def test_a_hazard_says_who_wrote_and_who_read():
    """The host reads what a device still computes; the text has the node, the tensor and the wait."""
    with without("synchronize:part"):
        first = _hazards(two_devices, watch="h1")[0]
    assert str(first) == (
        "the host reads 'h1', but SIM0 writes 'h1' in MUL_MAT 'h1', and the host does not wait for SIM0"
    )


def test_devices_that_work_at_once_look_for_no_hazards():
    """Without a seed there is no late work and nothing to find."""
    world = two_devices(None)
    try:
        world.run(1)
        assert [b.device.hazards for b in world.backends[:2]] == [[], []]
    finally:
        world.close()


def test_no_wait_is_left_untried():
    """Every place that waits is in the list above."""
    with without(""):
        for make in (one_device, two_devices, host_then_device, two_streams):
            for parallel in (False, True):
                _results(make, 0, parallel=parallel)
        _results(two_devices, 0, watch="h1")
        _results(rewritten_experts, 0)
    assert Saboteur.met == {place for place, _, _ in _NEEDED}


def test_events_that_are_not_recorded_are_caught(monkeypatch):
    """A wait for an event that stands for nothing holds nobody."""
    monkeypatch.setattr(SimBackend, "event_record", lambda self, event: None)
    assert _wrong_seeds(host_then_device, parallel=True)
    assert _wrong_seeds(one_device, parallel=True)


def test_split_without_inputs_races_in_0_20_and_not_since():
    """Version 0.20 waits for nothing before a split that copies nothing; 0.21 waits for the split before."""
    wrong = {v: bool(_wrong_seeds(two_streams, dialect=dialect)) for v, dialect in DIALECTS.items()}
    assert wrong == {"0.20": True, "0.21": False, "0.26": False, "0.27": False}
    named = {v: bool(_hazards(two_streams, dialect=dialect)) for v, dialect in DIALECTS.items()}
    assert named == wrong


def test_pipeline_copy_of_a_device_without_inputs_races():
    """A known hole of upstream: with pipeline copies only a device's own stream waits for the last use of a copy.

    The bytes come on the source's stream, as CUDA's do. What else holds the host back is the wait before a user's input
    is copied; a device that no input goes to, more than four graphs behind, is overtaken.
    """
    assert _wrong_seeds(chain, parallel=True)
    assert _hazards(chain, parallel=True)
    assert not _wrong_seeds(chain)
    assert not _hazards(chain)


def test_one_seed_gives_one_order():
    """A race shows the same wrong numbers each time."""
    with without("stream_wait:copy"):
        for seed in range(5):
            first, second = (_results(two_devices, seed) for _ in range(2))
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))


# -- memory of the host ------------------------------------------------------


def test_a_host_weight_overwritten_while_its_experts_are_copied_is_named():
    """Nobody may write experts between `compute_async` and `synchronize`: a late copy still reads them."""
    world = rewritten_experts(0)
    try:
        world.start(0)
        world.weights["experts"].set_array(np.zeros((6, 16, 16)))
        assert [str(h) for h in world.backends[0].device.hazards] == [
            "the host writes 'experts', but SIM0 reads host memory for 'SIM0#experts#0', and the host does not wait for SIM0"
        ]
        world.sched.synchronize()
        world.start(1)
        world.sched.synchronize()
        world.weights["experts"].set_array(np.zeros((6, 16, 16)))
        assert len(world.backends[0].device.hazards) == 1
    finally:
        world.close()


@pytest.fixture
def read_late() -> Iterator[tuple[SimBackend, ggml.Tensor, ggml.Tensor]]:
    """Give a stream that works late, a tensor of its device, and one of the host to read it into."""
    sim, cpu = ggml.Sim(threads=1, seed=0), ggml.CPU(threads=1)
    on_device, on_host = ggml.Context(), ggml.Context()
    there, here = (c.new_tensor("f32", (8,), name=n) for c, n in ((on_device, "there"), (on_host, "here")))
    on_device.alloc(sim)
    on_host.alloc(cpu)
    here.set_array(np.zeros(8))
    there.set_array(np.arange(8))
    sim.get_tensor_async(there, here.data, 0, there.nbytes)
    yield sim, there, here
    sim.synchronize()


@pytest.mark.parametrize("reader", ["the user", "the CPU's work", "another copy to the device"])
def test_host_memory_that_is_read_before_it_was_waited_for_is_named(read_late, reader):
    """What a device still writes is no result yet, whoever reads it; after the wait it is."""
    sim, there, here = read_late

    def read() -> None:
        if reader == "the user":
            here.numpy()
        elif reader == "another copy to the device":
            tensor_copy(here, there)
        else:
            graph = ggml.Graph()
            with graph:
                y = ggml.sqr(here)
            graph.expand(y)
            with ggml.Scheduler([ggml.CPU(threads=1)]) as sched:
                sched.compute(graph)

    read()
    first = next(h for h in sim.device.hazards if h.earlier == "SIM0 writes host memory from 'there'")
    assert first.later.startswith("the host reads ")
    assert first.missing == "the host does not wait for SIM0"
    n = len(sim.device.hazards)
    sim.synchronize()
    read()
    assert len(sim.device.hazards) == n
    assert not HOST.is_busy


def test_streams_that_are_gone_are_forgotten():
    """Work of a device that nobody has any more names no hazards of the next user of the same memory."""
    context = ggml.Context()
    here = context.new_tensor("f32", (8,), name="here")
    context.alloc(ggml.CPU(threads=1))
    sim = ggml.Sim(threads=1, seed=0)
    own = ggml.Context()
    there = own.new_tensor("f32", (8,), name="there")
    own.alloc(sim)
    sim.get_tensor_async(there, here.data, 0, there.nbytes)
    assert HOST.is_busy
    device = sim.device
    del sim
    gc.collect()
    here.set_array(np.zeros(8))
    assert not HOST.is_busy
    assert not device.hazards
