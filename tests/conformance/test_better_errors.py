"""Where upstream aborts or crashes, pyggml has an error with the facts in its fields, or simply the result.

After each error the scheduler is used again: the next good graph computes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest

import pyggml as ggml
from pyggml.alloc import DynTallocr
from pyggml.backends.mock import BackendAbilities, BufferTypeAbilities, MockBufferType, MockDevice, MockMemory, Optimize
from pyggml.types import DeviceType

from .better import N_TOKEN, World, breaks, device_and_cpu

D, F, E = 32, 16, 8


# -- ids ---------------------------------------------------------------------------


@breaks("104-special-ids-too-large", "105-special-ids-negative")
@pytest.mark.parametrize("bad", [E, -1, 2**31 - 1])
@pytest.mark.parametrize("strict", [False, True])
def test_a_bad_id_is_located(bad: int, strict: bool) -> None:
    """An id that is no expert: which, where, of what weight and layer; nothing is computed after it."""
    world = World(strict=strict)
    rows = np.zeros((N_TOKEN, 2), "i4")
    rows[17, 1] = bad
    with world.graph:
        w = world.weight("f32", (D, F, E), "blk.5.ffn_up_exps.weight")
        y = ggml.mul_mat_id(w, world.activations(D), world.ids(rows))
    with pytest.raises(ggml.errors.ExpertIdError) as caught:
        world.run(y)
    error = caught.value
    assert (error.tensor, error.layer, error.ids) == ("blk.5.ffn_up_exps.weight", 5, "ids")
    assert (error.backend, error.token, error.slot, error.id, error.n_expert) == ("CPU", 17, 1, bad, E)
    assert "'ids': " in error.causes[0]
    assert np.isnan(y.numpy()).all()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    world.assert_usable()


@breaks("104-special-ids-too-large")
def test_a_bad_id_made_on_the_device_is_located() -> None:
    """Ids that the device itself computed are read back from it, and a bad one names the device."""
    world = World()
    table = np.resize([0, 1], (E, 2)).astype("i4")
    table[6] = [0, 99]
    with world.graph:
        rows = world.input("i32", (N_TOKEN,), "rows", np.arange(N_TOKEN) % E)
        ids = ggml.get_rows(world.input("i32", (2, E), "table", table), rows).named("ids")
        w = world.weight("f32", (D, F, E), "exps.weight")
        y = ggml.mul_mat_id(w, world.activations(D), ids)
    world.pin(ids, y)
    with pytest.raises(ggml.errors.ExpertIdError) as caught:
        world.run(y)
    error = caught.value
    assert (error.backend, error.layer, error.token, error.slot, error.id) == ("SIM0", None, 6, 1, 99)
    world.assert_usable()


# -- memory --------------------------------------------------------------------------


def _wide(world: World, n: int) -> ggml.Tensor:
    """Return a result of n rows that is computed on the device, ready to be run."""
    world.new_graph()
    with world.graph:
        x = world.input("f32", (256, n), "x", np.ones((n, 256), "f4"))
        y = ggml.scale(ggml.sqr(x), 3.0).named("y").set_output()
    world.graph.expand(y)
    world.pin(*world.graph.nodes)
    return y


def _try_alloc(world: World) -> None:
    world.allocate()


def _try_reserve(world: World) -> None:
    world.sched.reset()
    for tensor in world.pins:
        world.sched.set_tensor_backend(tensor, world.backends[0])
    world.sched.reserve(world.graph)


@breaks(
    "145-special-alloc-fails",
    "147-special-reserve-fails-then-small",
    "189-special-alloc-fails-then-small",
    "190-special-alloc-fails-then-same",
)
@pytest.mark.parametrize("attempt", [_try_alloc, _try_reserve])
@pytest.mark.parametrize("version", ["0.20", "0.26", "0.27"])
def test_too_small_a_device(attempt: Callable[[World], None], version: str) -> None:
    """A device without room: what was asked, what is there, for what; a smaller graph is computed afterwards."""
    world = World(profile="custom:1MiB,100GB/s,10GB/s", dialect=ggml.DIALECTS[version])
    for _ in range(2):  # the same graph again fails in the same way
        _wide(world, 4096)
        with pytest.raises(ggml.errors.OutOfMemoryError) as caught:
            attempt(world)
        error = caught.value
        assert error.buft == "SIM0"
        assert error.requested_bytes >= 4096 * 256 * 4
        assert error.available_bytes == 1 << 20
        assert "compute buffer" in error.purpose
        assert isinstance(error, MemoryError)
        y = _wide(world, 16)
        world.allocate()
        world.set_inputs()
        world.sched.compute(world.graph)
        assert (y.numpy() == 3.0).all()
    world.sched.close()
    assert world.gpu is not None
    assert world.gpu.device.used_bytes == 0


@breaks("188-special-alloc-fails-compute")
@pytest.mark.parametrize("version", ["0.20", "0.26", "0.27"])
def test_too_small_a_device_when_computing(version: str) -> None:
    """A compute that allocates by itself and cannot is the same error, and the next graph computes."""
    world = World(profile="custom:1MiB,100GB/s,10GB/s", dialect=ggml.DIALECTS[version])
    with world.graph:
        w = world.weight("f32", (256, 256, 16), "huge_exps.weight")
        y = ggml.mul_mat_id(w, world.activations(256), world.ids(np.zeros((N_TOKEN, 1), "i4")))
    world.graph.expand(y)
    with pytest.raises(ggml.errors.OutOfMemoryError) as caught:
        world.sched.compute(world.graph)
    assert caught.value.requested_bytes >= w.nbytes
    world.assert_usable()


@breaks("149-special-reserve-size-then-alloc")
def test_sizes_asked_then_allocated() -> None:
    """`reserve_size` tells the bytes and takes none; the same graph is then allocated and computed."""
    world = World()
    y = _wide(world, 64)
    sizes = world.sched.reserve_size(world.graph)
    assert world.gpu is not None
    assert world.gpu.device.used_bytes == 0
    world.allocate()
    world.set_inputs()
    world.sched.compute(world.graph)
    assert (y.numpy() == 3.0).all()
    assert len(sizes) == 2
    world.assert_usable()


@breaks("138-special-free-blocks")
def test_any_number_of_free_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that leaves more than 256 holes in memory is allocated, and computes what the CPU computes."""

    def build(world: World) -> list[ggml.Tensor]:
        n = 320
        x = world.input("f32", (64,), "x", np.arange(64))
        pairs = [(ggml.cont(ggml.view_1d(x, 32, offset=0)), ggml.cont(ggml.view_1d(x, 33, offset=4))) for _ in range(n)]
        total = None
        for a, _ in pairs:  # the first of each pair is given back first: a hole between two that stay
            total = ggml.cont(a) if total is None else ggml.add(a, total)
        last = None
        for _, b in pairs:
            last = ggml.cont(b) if last is None else ggml.add(b, last)
        world.graph.expand(*(t for pair in pairs for t in pair))
        assert total is not None
        assert last is not None
        return [total, last]

    n_free = []
    free_bytes = DynTallocr.free_bytes

    def counted(self: DynTallocr, *args: int) -> None:
        free_bytes(self, *args)
        n_free.append(max(len(chunk.free) for chunk in self.chunks))

    monkeypatch.setattr(DynTallocr, "free_bytes", counted)
    ours, cpu = device_and_cpu(build)
    assert max(n_free) > 256  # where upstream's table ends
    assert all(np.array_equal(a, b) for a, b in zip(ours, cpu, strict=True))
    assert ours[0].tolist() == [320 * i for i in range(32)]


@breaks("141-special-graph-too-large", "142-special-hash-full-alloc", "143-special-hash-full-null")
def test_graphs_of_any_size() -> None:
    """No table is too small for a graph: thousands of nodes, many of them views of tensors that are no nodes."""

    def build(world: World) -> list[ggml.Tensor]:
        y = world.input("f32", (8,), "x", np.ones(8))
        for i in range(1500):
            w = ggml.Tensor("f32", (8,), name=f"leaf{i}", flags=ggml.TensorFlag.INPUT)
            world.values[w] = np.ones(8)
            y = ggml.add(y, ggml.view_1d(w, 8, offset=0))
        return [y]

    ours, _ = device_and_cpu(build)
    assert ours[0].tolist() == [1501.0] * 8


@breaks("152-special-zero-size")
def test_tensors_without_bytes() -> None:
    """A graph of nothing but empty tensors is allocated and computed."""
    ours, cpu = device_and_cpu(lambda world: [ggml.neg(ggml.relu(world.input("f32", (0, 4), "x", np.zeros((4, 0)))))])
    assert ours[0].size == cpu[0].size == 0


def test_long_names_stay_apart() -> None:
    """Names of any length are kept whole, so that two that begin alike stay apart."""
    world = World()
    names = [100 * "n" + str(i) for i in range(2)]
    with world.graph:
        a, b = (world.input("f32", (4,), name, np.full(4, i)) for i, name in enumerate(names))
        y = ggml.sub(a, b)
    world.pin(y)
    assert world.run(y)[0].tolist() == [-1.0] * 4
    assert [t.name for t in world.sched.splits[0].inputs] == names


# -- use ---------------------------------------------------------------------------------


@breaks("154-special-alloc-twice")
def test_allocating_twice() -> None:
    """A second `alloc_graph` without `reset` says which graph is held; the held one still computes."""
    world = World()
    y = _wide(world, 4)
    world.allocate()
    world.set_inputs()
    with pytest.raises(ggml.errors.SchedError, match="allocated already") as caught:
        world.sched.alloc_graph(world.graph)
    assert "reset()" in str(caught.value)
    world.sched.compute(world.graph)
    assert (y.numpy() == 3.0).all()
    world.assert_usable()


def _mock_scheduler(**gpu: object) -> ggml.Scheduler:
    """Return a scheduler over a mock device of given abilities, and a mock CPU that lacks no op."""
    memory = MockMemory()
    bufts = {
        "GPU": MockBufferType(BufferTypeAbilities("GPU", alignment=64, extra_bytes=gpu.pop("extra", 0)), memory),  # type: ignore[arg-type]
        "CPU": MockBufferType(BufferTypeAbilities("CPU", alignment=64, is_host=True), memory),
    }
    devices = [
        MockDevice(BackendAbilities("GPU", DeviceType.GPU, "GPU", frozenset({"GPU"}), **gpu), bufts),  # type: ignore[arg-type]
        MockDevice(BackendAbilities("CPU", DeviceType.CPU, "CPU", frozenset({"CPU"})), bufts),
    ]
    return ggml.Scheduler([d.backend() for d in devices])


def _small_graph() -> tuple[ggml.Graph, list[ggml.Tensor]]:
    graph = ggml.Graph()
    with graph:
        a = ggml.cont(graph.input("f32", (64,), name="x")).named("a")
        b = ggml.cont(a).named("b")
    graph.expand(b)
    return graph, [a, b]


@breaks("160-special-no-backend")
def test_an_op_that_nobody_can_run() -> None:
    """An op that no backend supports: the node, its op, and who was asked."""
    world = World()
    x = ggml.Tensor("f32", (4,), name="x", flags=ggml.TensorFlag.INPUT)
    odd = ggml.Tensor("f32", (4,), name="odd", op=ggml.Op.CROSS_ENTROPY_LOSS, src=[x, x])
    world.graph.expand(odd)
    with pytest.raises(ggml.errors.UnsupportedOpError) as caught:
        world.sched.alloc_graph(world.graph)
    assert (caught.value.tensor, caught.value.op, caught.value.backends) == (
        "odd",
        "CROSS_ENTROPY_LOSS",
        ("SIM0", "CPU"),
    )
    world.assert_usable()


@breaks("161-special-preallocated")
def test_a_result_where_its_op_cannot_run() -> None:
    """A result that lies already where no backend can run its op: the error says where, and why that is no place."""
    world = World()
    assert world.gpu is not None
    state = ggml.Context()
    cache = state.new_tensor("f32", (4,), name="cache")
    state.alloc(world.gpu)
    odd = ggml.Tensor("f32", (4,), name="odd", op=ggml.Op.CROSS_ENTROPY_LOSS, src=[cache, cache], view_src=cache)
    world.graph.expand(odd)
    with pytest.raises(ggml.errors.UnsupportedOpError, match="already in a buffer of SIM0") as caught:
        world.sched.alloc_graph(world.graph)
    assert caught.value.tensor == "odd"
    world.assert_usable()


@breaks("162-special-no-cpu", "163-special-bad-buft")
def test_schedulers_that_cannot_be() -> None:
    """Without a CPU at the end, or with memory that a backend cannot use, there is a clear error and no scheduler."""
    cpu, gpu = ggml.CPU(threads=1), ggml.Sim()
    with pytest.raises(ggml.errors.SchedError, match="the last backend must be a CPU, not SIM0"):
        ggml.Scheduler([cpu, gpu])
    with pytest.raises(ggml.errors.SchedError, match="SIM0 cannot use memory of type CPU"):
        ggml.Scheduler([gpu, cpu], bufts=[cpu.buffer_type, cpu.buffer_type])
    with pytest.raises(ggml.errors.SchedError, match="at least one backend"):
        ggml.Scheduler([])


# -- backends that ask for what cannot be ---------------------------------------------------


@breaks("181-special-optimize-keep-leaf")
def test_keeping_a_tensor_until_no_node() -> None:
    """A backend that asks to keep a tensor until one that is no node of its split: both are named."""
    sched = _mock_scheduler(optimize=Optimize(order=(), keep=(("a", "GPU#x#0"),)))
    graph, nodes = _small_graph()
    for node in nodes:
        sched.set_tensor_backend(node, sched.backends[0])
    with pytest.raises(ggml.errors.SchedError, match="to keep 'a' until 'GPU#x#0', which is no node of a split"):
        sched.alloc_graph(graph)
    sched.reset()
    graph, nodes = _small_graph()
    for node in nodes:
        sched.set_tensor_backend(node, sched.backends[1])
    sched.alloc_graph(graph)
    sched.compute(graph)


@breaks("186-special-alloc-size-extra", "187-special-alloc-size-round")
def test_a_buffer_type_that_asks_for_too_much() -> None:
    """A buffer type that wants more than a tensor's bytes where it may not: tensor, op and both sizes are named."""
    sched = _mock_scheduler(extra=40)
    graph, nodes = _small_graph()
    for node in nodes:
        sched.set_tensor_backend(node, sched.backends[0])
    with pytest.raises(ggml.errors.AllocError, match="GPU asks for 296 bytes for CONT 'a' of 256 bytes"):
        sched.alloc_graph(graph)
    sched.reset()
    graph, nodes = _small_graph()
    for node in nodes:
        sched.set_tensor_backend(node, sched.backends[1])
    sched.alloc_graph(graph)
    sched.compute(graph)
