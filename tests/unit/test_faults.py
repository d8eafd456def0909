"""Faults at chosen and drawn moments: a typed error, and then the same graph computes correctly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from race_worlds import World, two_devices

import pyggml as ggml
from pyggml.backends.sim import SimDevice
from pyggml.clock import VirtualClock
from pyggml.cost import CPU_PROFILE, PROFILES
from pyggml.errors import BackendError, ComputeError, DeviceUnavailableError, OutOfMemoryError

N_RUNS = 3
MOMENTS = ("alloc", "copy", "compute", "lost")


def _device(world: World, i: int) -> SimDevice:
    device = world.backends[i].device
    assert isinstance(device, SimDevice)
    return device


def _expected(parallel: bool) -> np.ndarray:
    world = two_devices(None, parallel=parallel)
    try:
        return world.run(N_RUNS)[-1]
    finally:
        world.close()


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Return what no fault gives."""
    return _expected(False)


def _recover(world: World) -> None:
    """Do what a user does after an error: bring devices back, write what was lost, start over."""
    for i in (0, 1):
        device = _device(world, i)
        device.clear_faults()
        if device.is_lost:
            device.recover()
    world.restore()


def _write_again(world: World) -> None:
    """Write the weights, however many more faults come on the way."""
    for _ in range(10):
        try:
            world.restore()
        except BackendError:
            for i in (0, 1):
                _device(world, i).recover()
        else:
            return


def _attempt(world: World) -> BackendError | OutOfMemoryError | None:
    """Compute, and return the error that came."""
    try:
        world.run(N_RUNS)
    except (BackendError, OutOfMemoryError) as error:
        return error
    return None


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("i_device", [0, 1])
@pytest.mark.parametrize("seed", [None, 3])
def test_first_moment_of_each_kind(moment, i_device, seed, expected):
    """The error says what failed and where; after it the same graph gives the right result."""
    world = two_devices(seed)
    _device(world, i_device).fail_at(moment)
    error = _attempt(world)
    kind = {"alloc": OutOfMemoryError, "copy": BackendError, "compute": ComputeError, "lost": DeviceUnavailableError}
    assert type(error) is kind[moment]
    assert f"SIM{i_device}" in str(error)
    _recover(world)
    assert np.array_equal(world.run(N_RUNS)[-1], expected)
    world.close()


def test_faults_may_be_asked_for_as_often_as_wanted(expected):
    """Each comes at its own moment; none comes twice."""
    world = two_devices(None)
    for after in (0, 1, 5):
        _device(world, 0).fail_at("copy", after=after)
    errors = [_attempt(world) for _ in range(4)]
    assert [type(e) for e in errors] == [BackendError, BackendError, BackendError, type(None)]
    _recover(world)
    assert np.array_equal(world.run(N_RUNS)[-1], expected)
    world.close()


def test_lost_device_stays_lost_and_the_others_go_on():
    """Nothing on it works until it comes back; a scheduler over the rest computes the same graph."""
    cpu, gpu = ggml.CPU(1), ggml.Sim("custom:64MiB,100GB/s,10GB/s", threads=1)
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (8, 2), name="x")
        y = ggml.sqr(ggml.scale(x, 2.0))
    graph.expand(y)
    value = np.arange(16, dtype="f4").reshape(2, 8)

    def compute(*backends) -> np.ndarray:
        with ggml.Scheduler(backends) as sched:
            sched.set_tensor_backend(y, backends[0])
            sched.alloc_graph(graph)
            x.set_array(value)
            sched.compute(graph)
            result = y.numpy()
            sched.reset()
        return result

    gpu.device.fail_at("lost", after=2)
    for _ in range(3):
        with pytest.raises(DeviceUnavailableError, match="lost"):
            compute(gpu, cpu)
    assert np.array_equal(compute(cpu), (2 * value) ** 2)
    gpu.device.recover()
    assert np.array_equal(compute(gpu, cpu), (2 * value) ** 2)


def test_memory_of_a_device_that_came_back_is_fresh():
    """What was in it reads as NaN."""
    world = two_devices(None)
    _device(world, 1).fail_at("lost")
    assert isinstance(_attempt(world), DeviceUnavailableError)
    _device(world, 1).recover()
    assert np.isnan(world.weights["sum"].numpy()).all()
    world.close()


@pytest.mark.parametrize("seed", [None, 4])
def test_a_slow_link_takes_time_and_nothing_else(seed, expected):
    """From the copy asked for on, virtual time is longer, and the result what it is; without the fault it is as before."""
    seconds = []
    for factor in (None, 100.0, None):
        world = two_devices(seed)
        world.sched.clock = VirtualClock([PROFILES["rtx4090-pcie4"]] * 2 + [CPU_PROFILE])
        if factor is not None:
            _device(world, 1).slow_link(factor, after=3)
        assert np.array_equal(world.run(N_RUNS)[-1], expected)
        seconds.append(world.sched.clock.host_s)
        world.close()
    assert seconds[0] == seconds[2]
    assert seconds[1] > 1.5 * seconds[0]


def _drawn_faults(first: int, n: int, *, parallel: bool) -> int:
    """Run with drawn faults, each checked against no fault, and return how many of them came."""
    expected = _expected(parallel)
    n_errors = 0
    for seed in range(first, first + n):
        rng = random.Random(seed)
        world = two_devices(seed if rng.random() < 0.5 else None, parallel=parallel)
        world.sched.clock = VirtualClock([PROFILES["rtx4090-pcie4"]] * 2 + [CPU_PROFILE])
        for _ in range(rng.randint(1, 3)):
            moment = rng.choice(MOMENTS)
            _device(world, rng.randrange(2)).fail_at(moment, after=rng.randrange(2 if moment == "alloc" else 20))
        if rng.random() < 0.3:
            _device(world, rng.randrange(2)).slow_link(rng.choice((2.0, 50.0)), after=rng.randrange(10))
        while (error := _attempt(world)) is not None:
            n_errors += 1
            lost = [_device(world, i) for i in (0, 1) if _device(world, i).is_lost]
            assert isinstance(error, DeviceUnavailableError) == bool(lost), f"seed {seed}: {error}"
            for device in lost:
                device.recover()
            _write_again(world)
        _recover(world)
        assert np.array_equal(world.run(N_RUNS)[-1], expected), f"seed {seed}"
        world.close()
    return n_errors


@pytest.mark.parametrize("parallel", [False, True])
def test_a_hundred_drawn_faults(parallel):
    """Each gives an error of its kind, and then the same graph the right result."""
    assert _drawn_faults(0, 60, parallel=parallel) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [False, True])
def test_a_thousand_drawn_faults(parallel):
    """As above, in runs that no other test makes."""
    assert _drawn_faults(1000, 600, parallel=parallel) >= 500
