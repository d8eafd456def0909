"""The simulated device: memory out of reach, everything counted, faults on demand."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backend import REGISTRY
from pyggml.backends.sim import SimBackend, SimDevice, counted
from pyggml.buffer import tensor_alloc, tensor_copy
from pyggml.cost import PROFILES, parse_profile
from pyggml.errors import BackendError, ComputeError, DeviceUnavailableError, OutOfMemoryError
from pyggml.tensor import Tensor

MIB = 1024**2


@pytest.fixture
def sim() -> SimBackend:
    """A device of 16 MiB."""
    return ggml.Sim("custom:16MiB,100GB/s,10GB/s", threads=1)


def place(backend: ggml.Backend, type: str, ne: tuple[int, ...], name: str = "t") -> Tensor:
    """Return a tensor in a buffer of its own."""
    tensor = Tensor(type, ne, name=name)
    buffer = backend.buffer_type.alloc_buffer(backend.buffer_type.alloc_size(tensor))
    tensor_alloc(buffer, tensor, buffer.base)
    return tensor


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "f64"])
def test_fresh_memory_is_nan(sim: SimBackend, type: str) -> None:
    """What nobody wrote reads as NaN in every float type."""
    tensor = place(sim, type, (64, 3))
    assert np.isnan(tensor.numpy()).all()


def test_fresh_ids_are_no_experts(sim: SimBackend) -> None:
    """What nobody wrote reads as -1 in integer types, which chooses nothing."""
    assert (place(sim, "i32", (8,)).numpy() == -1).all()


def test_addresses_are_of_no_process(sim: SimBackend) -> None:
    """A device address is above all that a process can have mapped, so that host code which uses it cannot go on."""
    tensor = place(sim, "f32", (8,))
    assert tensor.data is not None
    assert tensor.data >= 1 << 56
    assert not sim.buffer_type.is_host
    assert not ggml.CPU(threads=1).supports_buft(sim.buffer_type)


def test_devices_have_memory_of_their_own(sim: SimBackend) -> None:
    """A device uses only its own memory; addresses of two devices do not overlap."""
    other = ggml.Sim("custom:16MiB,100GB/s,10GB/s", index=1)
    assert other.name == "SIM1"
    assert sim.supports_buft(sim.buffer_type)
    assert not sim.supports_buft(other.buffer_type)
    a, b = place(sim, "f32", (8,)), place(other, "f32", (8,))
    assert a.data is not None
    assert b.data is not None
    assert abs(a.data - b.data) >= 1 << 50


def test_capacity(sim: SimBackend) -> None:
    """The profile's memory is all there is; it comes back when a buffer is closed or forgotten."""
    assert sim.device.memory() == (16 * MIB, 16 * MIB)
    first = sim.buffer_type.alloc_buffer(10 * MIB)
    assert sim.device.memory() == (6 * MIB, 16 * MIB)
    with pytest.raises(
        OutOfMemoryError, match=r"SIM0: out of memory: 7\.0 MiB needed for a buffer, 6\.0 MiB available"
    ):
        sim.buffer_type.alloc_buffer(7 * MIB)
    first.close()
    second = sim.buffer_type.alloc_buffer(16 * MIB)
    assert sim.device.memory() == (0, 16 * MIB)
    del second
    assert sim.device.memory() == (16 * MIB, 16 * MIB)


def test_everything_that_crosses_the_border_is_counted(sim: SimBackend) -> None:
    """Bytes and calls are counted by buffer and by device; what stays inside is not."""
    a, b = place(sim, "f32", (64,), "a"), place(sim, "f32", (64,), "b")
    a.set_array(np.zeros(64))
    with counted(sim.device) as seen:
        tensor_copy(a, b)
        sim.cpy_tensor_async(sim, a, b)
    assert (seen.bytes_in, seen.bytes_out) == (0, 0)
    b.numpy()
    assert a.storage is not None
    assert b.storage is not None
    assert (a.storage.traffic.bytes_in, a.storage.traffic.n_in) == (256, 1)
    assert (b.storage.traffic.bytes_out, b.storage.traffic.n_out) == (256, 1)
    assert (sim.device.traffic.bytes_in, sim.device.traffic.bytes_out) == (256, 256)


def test_copies_between_devices_count_on_both_sides(sim: SimBackend) -> None:
    """A copy to another device leaves one and enters the other."""
    other = ggml.Sim("custom:16MiB,100GB/s,10GB/s", index=1)
    a, b = place(sim, "f32", (64,), "a"), place(other, "f32", (64,), "b")
    a.set_array(np.arange(64))
    assert other.cpy_tensor_async(sim, a, b)
    assert (sim.device.traffic.bytes_out, other.device.traffic.bytes_in) == (256, 256)
    assert b.numpy().tolist() == list(range(64))
    host = place(ggml.CPU(threads=1), "f32", (64,))
    assert not sim.cpy_tensor_async(ggml.CPU(threads=1), host, a)


# -- computing ---------------------------------------------------------------


def scaled(backend: ggml.Backend) -> tuple[ggml.Graph, Tensor, Tensor]:
    """Return a graph of one node, its source and itself, all in the backend's memory."""
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (8,), name="x")
        y = ggml.scale(x, 2.0).named("y")
    graph.expand(y)
    for tensor in (x, y):
        buffer = backend.buffer_type.alloc_buffer(tensor.nbytes)
        tensor_alloc(buffer, tensor, buffer.base)
    return graph, x, y


@pytest.mark.parametrize("make", [lambda: ggml.CPU(threads=1), lambda: ggml.Sim(threads=1)], ids=["cpu", "sim"])
def test_compute(make: object) -> None:
    """Nodes are computed in the backend's own memory; the plan is kept with the range of nodes."""
    backend = make()  # type: ignore[operator]
    graph, x, y = scaled(backend)
    view = graph.view(0, len(graph.nodes))
    for start in (0, 5):
        x.set_array(np.arange(start, start + 8))
        backend.graph_compute(view)
        backend.synchronize()
        assert y.numpy().tolist() == [2 * (start + i) for i in range(8)]
    kept = view.plan
    backend.graph_compute(view)
    assert view.plan is kept


def test_plan_follows_a_tensor_that_moved(sim: SimBackend) -> None:
    """A range whose nodes were placed anew is planned anew: nothing is written to where they were."""
    graph, x, y = scaled(sim)
    view = graph.view(0, 1)
    x.set_array(np.arange(8))
    sim.graph_compute(view)
    old = y.storage
    buffer = sim.buffer_type.alloc_buffer(y.nbytes)
    y.buffer = y.data = None
    tensor_alloc(buffer, y, buffer.base)
    assert old is not None
    old.close()
    sim.graph_compute(view)
    assert y.numpy().tolist() == [2 * i for i in range(8)]


def test_device_does_not_touch_host_memory(sim: SimBackend) -> None:
    """A node whose source lies in host memory is refused by name: it should have been copied."""
    graph, x, _ = scaled(sim)
    x.buffer = x.data = None
    host = ggml.CPU(threads=1).buffer_type.alloc_buffer(x.nbytes)
    tensor_alloc(host, x, host.base)
    with pytest.raises(BackendError, match="SIM0: 'x' is in CPU, not in the device's memory"):
        sim.graph_compute(graph.view(0, 1))


def test_cpu_does_not_touch_device_memory(sim: SimBackend) -> None:
    """The CPU refuses a node whose source lies on a device, instead of ending the process."""
    cpu = ggml.CPU(threads=1)
    graph, x, _ = scaled(cpu)
    x.buffer = x.data = None
    device = sim.buffer_type.alloc_buffer(x.nbytes)
    tensor_alloc(device, x, device.base)
    with pytest.raises(BackendError, match="CPU: 'x' is in SIM0, not in host memory"):
        cpu.graph_compute(graph.view(0, 1))


def test_unallocated_node(sim: SimBackend) -> None:
    """A node without memory cannot be computed, and the error names it."""
    graph = ggml.Graph()
    with graph:
        y = ggml.scale(graph.input("f32", (8,), name="x"), 2.0).named("y")
    graph.expand(y)
    for backend in (sim, ggml.CPU(threads=1)):
        with pytest.raises(ComputeError, match="'y'"):
            backend.graph_compute(graph.view(0, 1))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="memory cannot be protected here")
def test_split_runs_with_host_memory_unreadable(sim: SimBackend) -> None:
    """A device split computes while its original inputs' pages cannot be read: it works on its copies alone."""
    cpu = ggml.CPU(threads=1)
    weights = ggml.Context()
    w = weights.new_tensor("f32", (32, 64), name="w")
    buffer = weights.alloc(cpu, usage="weights")
    assert buffer is not None
    w.set_array(np.ones((64, 32)))
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (32, 40), name="x")
        y = ggml.mul_mat(w, x).named("y")
    graph.expand(y)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    compute, n_guarded = sim.graph_compute, 0

    def guarded(view: ggml.GraphView) -> None:
        nonlocal n_guarded
        assert protect(buffer.base, buffer.size, 0) == 0
        try:
            compute(view)
            sim.synchronize()
        finally:
            protect(buffer.base, buffer.size, 3)
        n_guarded += 1

    sim.graph_compute = guarded  # type: ignore[method-assign]
    sched = ggml.Scheduler([sim, cpu])
    sched.alloc_graph(graph)
    x.set_array(np.ones((40, 32)))
    sched.compute(graph)
    assert n_guarded == 1
    assert (y.numpy() == 32).all()


# -- abilities ---------------------------------------------------------------


def test_offload_rule(sim: SimBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It offers to take host weights' ops from 32 rows on, counted as upstream counts, or from the number asked for."""

    def node(rows: int) -> Tensor:
        return ggml.mul_mat(Tensor("f32", (32, 8)), Tensor("f32", (32, rows)))

    def experts(tokens: int) -> Tensor:
        return ggml.mul_mat_id(Tensor("f32", (32, 8, 4)), Tensor("f32", (32, 1, tokens)), Tensor("i32", (2, tokens)))

    assert [sim.offload_op(node(n)) for n in (31, 32)] == [False, True]
    assert [sim.offload_op(experts(n)) for n in (31, 32)] == [False, True]
    assert not sim.offload_op(ggml.get_rows(Tensor("f32", (32, 999)), Tensor("i32", (100,))))
    assert sim.offload_op(ggml.scale(Tensor("f32", (2, 8, 4)), 1.0))
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "5")
    assert [ggml.Sim().offload_op(node(n)) for n in (4, 5)] == [False, True]


def test_events(sim: SimBackend) -> None:
    """An event stands for the work given before it; host and other streams can wait for it."""
    event = sim.device.event_new()
    event.synchronize()  # never recorded: nothing to wait for
    tensor = place(sim, "i8", (4,))
    raw = np.ones(4, np.uint8)
    sim.set_tensor_async(tensor, raw.ctypes.data, 0, 4)
    sim.event_record(event)
    assert (event.backend, event.n_submitted) == (sim, 1)
    ggml.Sim(index=1).event_wait(event)
    event.synchronize()


def test_pinned_memory_only_if_the_profile_has_it() -> None:
    """A card of the table offers a host buffer type, a custom device if it is asked to; the CPU can use it."""
    assert ggml.Sim("custom:16MiB,100GB/s,10GB/s").device.host_buffer_type is None
    assert ggml.Sim("rtx4090-pcie4").device.host_buffer_type is not None
    pinned = ggml.Sim("custom:16MiB,100GB/s,10GB/s,pinned").device.host_buffer_type
    assert pinned is not None
    assert (pinned.name, pinned.is_host) == ("SIM0_Host", True)
    assert ggml.CPU(threads=1).supports_buft(pinned)


def test_metadata_only() -> None:
    """A device that only plans has the profile's memory but no bytes: of any size, counted, and never read."""
    sim = ggml.Sim("custom:900GiB,100GB/s,10GB/s", data=False)
    tensor = place(sim, "f32", (1 << 30, 64), "w")
    raw = np.zeros(4, np.uint8)
    sim.set_tensor_async(tensor, raw.ctypes.data, 0, 4)
    assert sim.device.traffic.bytes_in == 4
    assert sim.device.memory()[0] == (900 - 256) * 1024**3
    with pytest.raises(BackendError, match="'w' has no data"):
        sim.get_tensor_async(tensor, raw.ctypes.data, 0, 4)
    graph, x, _ = scaled(sim)
    sim.graph_compute(graph.view(0, 1))
    x.buffer = None
    with pytest.raises(BackendError, match="'x' is in no memory"):
        sim.graph_compute(graph.view(0, 1))


# -- faults ------------------------------------------------------------------


def test_faults_come_once_and_when_asked(sim: SimBackend) -> None:
    """A fault that was asked for is a typed error at that moment; afterwards the device works."""
    graph, x, y = scaled(sim)
    sim.device.fail_at("alloc")
    with pytest.raises(OutOfMemoryError, match="needed for"):
        sim.buffer_type.alloc_buffer(64)
    sim.device.fail_at("copy", after=1)
    x.set_array(np.arange(8))
    with pytest.raises(BackendError, match="copy of 'x' failed"):
        x.set_array(np.zeros(8))
    sim.device.fail_at("compute")
    with pytest.raises(ComputeError, match="'y'"):
        sim.graph_compute(graph.view(0, 1))
    assert math.isnan(y.numpy()[0])
    sim.graph_compute(graph.view(0, 1))
    assert y.numpy().tolist() == [2 * i for i in range(8)]


# -- profiles ----------------------------------------------------------------


def test_profiles_have_sources_and_sense() -> None:
    """Each profile says where its numbers are from; memory is faster than the link."""
    assert {"rtx4090-pcie4", "h100-pcie5", "rtx3090-pcie4", "a100-pcie4"} <= set(PROFILES)
    for p in PROFILES.values():
        assert p.source
        assert p.memory_bytes >= 1 << 30
        assert p.memory_bytes_per_s > p.link.bytes_per_s > 1e9
    link = PROFILES["rtx4090-pcie4"].link
    assert link.seconds(0) == link.latency_s
    assert link.seconds(10**9) > link.seconds(10**8) > link.seconds(1)


@pytest.mark.parametrize("text", ["rtx9999", "custom:", "custom:1GiB,1GB/s", "custom:0GiB,1GB/s,1GB/s", "custom:a,b,c"])
def test_unknown_profiles(text: str) -> None:
    """What is no profile is refused with the names of those that are."""
    with pytest.raises(DeviceUnavailableError, match="sim:"):
        parse_profile(text)


def test_registry() -> None:
    """Devices are opened by name and numbered within a list."""
    a, b, cpu = REGISTRY.open_all(["sim:rtx3090-pcie4", "sim:custom:1GiB,100GB/s,10GB/s", "cpu"])
    assert [d.name for d in (a, b, cpu)] == ["SIM0", "SIM1", "CPU"]
    assert isinstance(a, SimDevice)
    assert a.memory()[1] == 24 * 1024**3
    with pytest.raises(DeviceUnavailableError, match="no such device"):
        REGISTRY.open("tpu:0")
    with pytest.raises(DeviceUnavailableError, match="cpu:7"):
        REGISTRY.open("cpu:7")


def test_threads() -> None:
    """As many threads are shared by all backends that have as many; none are started before something is computed."""
    cpu, sim = ggml.CPU(threads=2), ggml.Sim(threads=2)
    assert cpu.pool is sim.pool
    assert ggml.CPU(threads=1).pool is not cpu.pool
    with pytest.raises(DeviceUnavailableError, match="0 threads"):
        ggml.CPU(threads=0)


def test_empty_tensors_are_copied_between_devices() -> None:
    """A tensor without elements that is computed on one device and read on another has nothing to copy."""
    first, second = (ggml.Sim("rtx4090-pcie4", index=i) for i in (0, 1))
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (0, 4))
        made = ggml.scale(x, 2.0)
        read = ggml.scale(made, 3.0)
        other = ggml.scale(graph.input("f32", (4,)), 2.0)  # so that the first device has memory
    graph.expand(read, other)
    sched = ggml.Scheduler([first, second, ggml.CPU(threads=1)])
    for node, backend in ((made, first), (other, first), (read, second)):
        sched.set_tensor_backend(node, backend)
    sched.alloc_graph(graph)
    sched.compute(graph)
    assert read.ne == (0, 4, 1, 1)
