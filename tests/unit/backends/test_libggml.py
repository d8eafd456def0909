"""The real library under our scheduler: `libggml:CPU` alone, beside our CPU, and refusals where the library would abort."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backend import REGISTRY, op_batch_size
from pyggml.backends.libggml import LibraryBackend, LibraryDevice, devices, open_device, why_missing
from pyggml.backends.libggml.library import find_library, load_library
from pyggml.buffer import tensor_alloc, tensor_copy, tensor_memset, tensor_set
from pyggml.errors import (
    AllocError,
    BackendError,
    ComputeError,
    DeviceUnavailableError,
    ExpertIdError,
    OutOfMemoryError,
)
from pyggml.makers.quantize import quantize
from pyggml.types import BufferUsage, Op, Type

#: Of the squared error to the squares, between kernels that round activations in their own ways (BF16's most).
BOUND = 1e-5
#: The library rounds activations for K-quants by 256, our kernels by 32; upstream's own bound for MUL_MAT_ID is 5e-4.
K_BOUND = 1e-4
TYPES = ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "mxfp4"]


@pytest.fixture(scope="module")
def device() -> LibraryDevice:
    """Give the installed library's CPU."""
    return open_device("CPU")


@pytest.fixture
def library_cpu(device) -> Iterator[LibraryBackend]:
    """Give a stream of work on it."""
    backend = device.backend(threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def cpu() -> ggml.Backend:
    """Give our own CPU."""
    return ggml.CPU(threads=1)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Return the squared error over the squares."""
    return float(((got - want) ** 2).sum() / (want**2).sum())


class Experts:
    """One MUL_MAT_ID over 8 experts, its weight in some device's memory."""

    def __init__(self, type: str, where: ggml.Device, *, n_tokens: int = 40) -> None:
        rng = np.random.default_rng(1)
        self.weights = ggml.Context()
        self.up = self.weights.new_tensor(type, (256, 48, 8), name="blk.3.ffn_up_exps.weight")
        self.weights.alloc(where, usage="weights")
        packed = np.ascontiguousarray(quantize(rng.standard_normal((8, 48, 256), np.float32), Type.of(type)))
        assert packed.nbytes == self.up.nbytes
        tensor_set(self.up, packed.ctypes.data, 0, packed.nbytes)
        self.graph = ggml.Graph()
        with self.graph:
            self.x = self.graph.input("f32", (256, 1, n_tokens), name="x")
            self.ids = self.graph.input("i32", (2, n_tokens), name="ids")
            self.y = ggml.mul_mat_id(self.up, self.x, self.ids).named("y")
        self.graph.expand(self.y)
        self.values = rng.standard_normal((n_tokens, 1, 256), np.float32)
        self.chosen = rng.integers(0, 8, (n_tokens, 2), np.int32) // 2 * 2  # experts 0, 2, 4, 6

    def run(self, sched: ggml.Scheduler) -> np.ndarray:
        """Return the result."""
        sched.reset()
        sched.alloc_graph(self.graph)
        self.x.set_array(self.values)
        self.ids.set_array(self.chosen)
        sched.compute(self.graph)
        return self.y.numpy()


# -- results ------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_experts_of_every_type(library_cpu, cpu, type):
    """MUL_MAT_ID alone on the library gives what our CPU gives, and so does each used expert copied into its memory."""
    want = Experts(type, cpu.device).run(ggml.Scheduler([cpu]))
    alone = Experts(type, library_cpu.device).run(ggml.Scheduler([library_cpu]))
    bound = K_BOUND if type.endswith("_k") else BOUND
    assert nmse(alone, want) < bound
    sched = ggml.Scheduler([library_cpu, cpu], offload_rule=lambda backend, op: backend is library_cpu)
    copied = Experts(type, cpu.device)
    assert nmse(copied.run(sched), want) < bound
    assert sched.tensor_backend(copied.y) is library_cpu
    weight_bytes = copied.up.nbytes
    assert 0 < sched.stats.bytes_copied < sched.stats.bytes_full
    assert sched.stats.bytes_full - sched.stats.bytes_copied > weight_bytes / 3


@pytest.mark.parametrize("flash", [False, True], ids=["softmax", "flash"])
def test_attention(library_cpu, cpu, flash):
    """Attention over permuted views, with rows written into a cache, gives what our CPU gives."""

    def run(backend: ggml.Backend) -> np.ndarray:
        rng = np.random.default_rng(5)
        cache = ggml.Context()
        k_all = cache.new_tensor("f16", (64 * 2, 32), name="k")
        v_all = cache.new_tensor("f16", (64 * 2, 32), name="v")
        cache.alloc(backend.device)
        k_all.set_array(rng.standard_normal((32, 128), np.float32))
        v_all.set_array(rng.standard_normal((32, 128), np.float32))
        graph = ggml.Graph()
        with graph:
            q_in = graph.input("f32", (64, 4, 8), name="q")
            new = graph.input("f32", (128, 8), name="new")
            rows = graph.input("i64", (8,), name="rows")
            positions = graph.input("i32", (8,), name="positions")
            mask = graph.input("f16" if flash else "f32", (32, 8), name="mask")
            roped = ggml.rope_ext(q_in, positions, None, 64, 2, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
            stored = ggml.set_rows(k_all, new, rows)
            q = ggml.permute(roped, 0, 2, 1, 3)
            k = ggml.permute(ggml.view_3d(stored, 64, 2, 32, 128, 256, 0), 0, 2, 1, 3)
            v = ggml.permute(ggml.view_3d(v_all, 64, 2, 32, 128, 256, 0), 0, 2, 1, 3)
            if flash:
                out = ggml.flash_attn_ext(q, k, v, mask, 0.125, 0.0, 0.0)
            else:
                p = ggml.soft_max_ext(ggml.mul_mat(k, q), mask, 0.125, 0.0)
                out = ggml.mul_mat(ggml.cont(ggml.transpose(v)), p)
        graph.expand(out)
        sched = ggml.Scheduler([backend])
        sched.alloc_graph(graph)
        q_in.set_array(rng.standard_normal((8, 4, 64), np.float32))
        new.set_array(rng.standard_normal((8, 128), np.float32))
        rows.set_array(np.arange(20, 28))
        positions.set_array(np.arange(20, 28, dtype=np.int32))
        mask.set_array(np.where(np.arange(32)[None] > np.arange(20, 28)[:, None], -np.inf, 0).astype(np.float32))
        sched.compute(graph)
        return out.numpy()

    assert nmse(run(library_cpu), run(cpu)) < BOUND


def test_a_computed_result_is_used_on_both_sides(library_cpu, cpu):
    """A node that its own split and a later one on another device read is written although the library could fuse it."""
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (64, 3), name="x")
        scale = graph.input("f32", (64,), name="scale")
        normed = ggml.rms_norm(x, 1e-6).named("normed")
        scaled = ggml.mul(normed, scale).named("scaled")
        both = ggml.add(normed, scaled).named("both")
    graph.expand(both)
    sched = ggml.Scheduler([library_cpu, cpu])
    for node, backend in ((normed, library_cpu), (scaled, library_cpu), (both, cpu)):
        sched.set_tensor_backend(node, backend)
    sched.alloc_graph(graph)
    values = np.random.default_rng(2).standard_normal((3, 64), np.float32)
    x.set_array(values)
    scale.set_array(np.full(64, 3.0, np.float32))
    sched.compute(graph)
    assert [s.backend_id for s in sched.splits] == [0, 1]
    want = 4 * values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(both.numpy(), want, rtol=1e-5)


def test_a_plan_is_kept_while_the_graph_stays_the_same(library_cpu):
    """The second run of an allocated graph translates nothing; a graph allocated anew is translated anew."""
    experts = Experts("q8_0", library_cpu.device)
    sched = ggml.Scheduler([library_cpu])
    first = experts.run(sched)
    plan = sched.splits[0].graph.plan
    sched.compute(experts.graph)
    assert sched.splits[0].graph.plan is plan
    experts.values = experts.values * 2
    assert nmse(experts.run(sched), 2 * first) < BOUND


# -- memory --------------------------------------------------------------------


def test_memory_is_the_librarys(device):
    """Sizes, alignment and bounds come from the library; bytes go in and out, are set, cleared and copied."""
    free, total = device.memory()
    assert 0 < free <= total
    assert device.buffer_type.alignment == 32
    context = ggml.Context()
    a, b = context.new_tensor("i32", (5,), name="a"), context.new_tensor("i32", (5,), name="b")
    buffer = context.alloc(device)
    assert buffer.buft is device.buffer_type
    assert a.data % 32 == b.data % 32 == 0
    a.set_array(np.arange(5, dtype=np.int32))
    tensor_memset(b, 0xFF, 0, 20)
    assert b.numpy().tolist() == [-1] * 5
    assert buffer.cpy_tensor(a, b)
    assert b.numpy().tolist() == [0, 1, 2, 3, 4]
    buffer.clear(0)
    assert a.numpy().tolist() == [0] * 5


def test_a_copy_between_libraries_goes_through_the_host(device, cpu):
    """Our memory and the library's exchange tensors."""
    ours, theirs = ggml.Context(), ggml.Context()
    a, b = ours.new_tensor("f32", (7,), name="a"), theirs.new_tensor("f32", (7,), name="b")
    ours.alloc(cpu.device)
    theirs.alloc(device)
    a.set_array(np.arange(7))
    tensor_copy(a, b)
    np.testing.assert_array_equal(b.numpy(), np.arange(7))


def test_too_much_memory_is_refused(device):
    """An allocation that fails raises, and says what was asked for."""
    with pytest.raises(OutOfMemoryError) as caught:
        device.buffer_type.alloc_buffer(1 << 60)
    assert (caught.value.buft, caught.value.requested_bytes) == ("libggml:CPU", 1 << 60)


def test_a_closed_buffer_is_not_touched(device):
    """Reading from memory that was given back raises."""
    context = ggml.Context()
    a = context.new_tensor("f32", (7,), name="a")
    context.alloc(device).close()
    with pytest.raises(BackendError, match="closed"):
        a.numpy()


def test_a_plan_does_not_outlive_its_memory(library_cpu):
    """Computing with weights that were given back raises, although the plan holds their address."""
    experts = Experts("q8_0", library_cpu.device)
    sched = ggml.Scheduler([library_cpu])
    experts.run(sched)
    experts.up.buffer.close()
    with pytest.raises(BackendError, match="closed and is still used"):
        sched.compute(experts.graph)


def test_memory_of_others_is_used_in_place(library_cpu, cpu):
    """A buffer over host memory needs no copy; what is read-only stays so, and odd addresses are turned down."""
    device = library_cpu.device
    block = np.zeros(4096 + 32, np.uint8)
    start = -block.ctypes.data % 32
    values = block[start : start + 4096].view(np.float32)
    values[:] = np.arange(1024)
    values.flags.writeable = False
    buffer = device.buffer_from_host(values.ctypes.data, values.nbytes, values)
    assert device.buffer_from_host(values.ctypes.data + 4, 64, values) is None
    weight = ggml.Tensor("f32", (1024,), name="weight")
    tensor_alloc(buffer, weight, values.ctypes.data)
    buffer.set_usage(BufferUsage.WEIGHTS)
    graph = ggml.Graph()
    with graph:
        doubled = ggml.scale(weight, 2.0).named("doubled")
    graph.expand(doubled)
    sched = ggml.Scheduler([library_cpu, cpu])
    sched.alloc_graph(graph)
    sched.compute(graph)
    assert sched.tensor_backend(doubled) is library_cpu
    assert sched.stats.bytes_copied == 0
    np.testing.assert_array_equal(doubled.numpy(), 2 * values)
    for write in (lambda: weight.set_array(values), lambda: tensor_memset(weight, 0, 0, 4), lambda: buffer.clear(0)):
        with pytest.raises(AllocError, match="read-only"):
            write()
    np.testing.assert_array_equal(values, np.arange(1024))


def test_a_closed_backend_says_so(device):
    """Closing twice is no error; waiting afterwards is."""
    backend = device.backend()
    backend.close()
    backend.close()
    with pytest.raises(DeviceUnavailableError, match="closed"):
        backend.synchronize()


# -- what would end the process ---------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
def test_a_bad_expert_id_is_an_error(library_cpu, bad):
    """The library asserts that ids are experts; here the error names token and slot, and the scheduler goes on."""
    experts = Experts("q8_0", library_cpu.device)
    sched = ggml.Scheduler([library_cpu])
    want = experts.run(sched)
    good = experts.chosen.copy()
    experts.chosen[17, 1] = bad
    with pytest.raises(ExpertIdError) as caught:
        experts.run(sched)
    e = caught.value
    assert (e.tensor, e.layer, e.token, e.slot, e.id, e.n_expert) == (experts.up.name, 3, 17, 1, bad, 8)
    experts.chosen = good
    assert nmse(experts.run(sched), want) == 0


def test_a_bad_row_is_an_error(library_cpu):
    """GET_ROWS with an index out of bounds names the index."""
    graph = ggml.Graph()
    with graph:
        table = graph.input("f32", (4, 6), name="table")
        rows = graph.input("i32", (3,), name="rows")
        out = ggml.get_rows(table, rows).named("out")
    graph.expand(out)
    sched = ggml.Scheduler([library_cpu])
    sched.alloc_graph(graph)
    table.set_array(np.arange(24).reshape(6, 4))
    rows.set_array(np.array([0, 6, 1], np.int32))
    with pytest.raises(ComputeError, match=r"row index 6 is not in 0\.\.5: 'rows'\[1\]"):
        sched.compute(graph)


def test_indices_that_the_split_itself_makes_are_checked(library_cpu):
    """Indices made by arithmetic in the same split are looked at between the nodes; those of a sort need no look."""
    graph = ggml.Graph()
    with graph:
        table = graph.input("f32", (4, 6), name="table")
        numbers = graph.input("f32", (3,), name="numbers")
        rows = ggml.cast(ggml.scale(numbers, 2.0), "i32").named("rows")
        out = ggml.get_rows(table, rows).named("out")
        order = ggml.argsort(numbers, 0).named("order")
        sorted_ = ggml.get_rows(ggml.reshape_2d(out, 4, 3), order).named("sorted")
    graph.expand(sorted_)
    sched = ggml.Scheduler([library_cpu])
    sched.alloc_graph(graph)
    table.set_array(np.arange(24).reshape(6, 4))
    numbers.set_array(np.array([2.0, 0.0, 1.0]))
    sched.compute(graph)
    plan = sched.splits[0].graph.plan
    assert len(plan.parts) == 2
    assert [use.indices.name for part in plan.parts for use in part.checks] == ["rows"]
    np.testing.assert_array_equal(sorted_.numpy(), np.arange(24).reshape(6, 4)[[0, 2, 4]])
    table.set_array(np.arange(24).reshape(6, 4))
    numbers.set_array(np.array([2.0, 0.0, 3.0]))
    with pytest.raises(ComputeError, match=r"row index 6 .* 'rows'\[2\]"):
        sched.compute(graph)


def test_what_the_librarys_cpu_would_abort_at_is_not_supported(device):
    """Types and strides that its kernels assert are turned down beforehand, though the library itself says yes."""
    i32 = ggml.Tensor("i32", (8, 2), name="i")
    f32 = ggml.Tensor("f32", (8, 2), name="f")
    turned = ggml.transpose(f32)
    refused = [
        ggml.Tensor("i32", (8, 2), op=Op.ADD, src=[i32, i32]),
        ggml.Tensor("f32", (2, 8), op=Op.SCALE, src=[turned], op_params=(0, 0)),
        ggml.Tensor("f16", (8, 2), op=Op.CPY, src=[i32, ggml.Tensor("f16", (8, 2))]),
        ggml.Tensor("f32", (8, 2), op=Op.CONV_3D, src=[f32, f32]),
    ]
    assert [device.supports_op(node) for node in refused] == [False] * 4
    assert all(device._ask(node) for node in refused)
    assert device.supports_op(ggml.add(f32, f32))


def test_a_node_in_foreign_memory_is_not_computed(library_cpu, cpu):
    """A tensor that was not copied into the library's memory is an error before anything is given to it."""
    context = ggml.Context()
    a = context.new_tensor("f32", (4,), name="a")
    context.alloc(cpu.device)
    graph = ggml.Graph()
    with graph:
        out = ggml.scale(a, 2.0).named("out")
    graph.expand(out)
    out.buffer, out.data = a.buffer, a.data
    with pytest.raises(BackendError, match="'out' is in CPU"):
        library_cpu.graph_compute(graph.view(0, 1))


# -- finding libraries and devices --------------------------------------------------


def test_devices_are_found_by_name(device):
    """The registry lists the installed library's devices; names are the library's, in any case."""
    assert device in devices()
    assert why_missing() == ""
    assert REGISTRY.open("libggml:cpu") is device
    assert REGISTRY.open("libggml:") is device
    assert REGISTRY.open(f"libggml:{find_library()}#CPU") is device
    assert REGISTRY.open(f"libggml:{find_library().parent}#CPU") is device
    assert device.library.types >= {Type.F32, Type.MXFP4, Type.Q6_K}
    with pytest.raises(DeviceUnavailableError, match=r"no such device \(its devices: CPU"):
        REGISTRY.open("libggml:CUDA7")


def test_a_library_that_is_none_is_refused(tmp_path, monkeypatch):
    """A missing path, a file that is no library, and a library that is no ggml each say what they are."""
    with pytest.raises(DeviceUnavailableError, match="no ggml at"):
        REGISTRY.open(f"libggml:{tmp_path / 'nothing'}#CPU")
    with pytest.raises(DeviceUnavailableError, match="no ggml at"):
        REGISTRY.open(f"libggml:{tmp_path}#CPU")
    (tmp_path / "libggml.so").write_bytes(b"no library")
    monkeypatch.setenv("PYGGML_LIBGGML", str(tmp_path / "libggml.so"))
    assert devices() == []
    assert "cannot be loaded" in why_missing()
    other = next(p for p in Path(find_library_of("numpy")).rglob("*.so"))
    with pytest.raises(DeviceUnavailableError, match="no ggml_init"):
        load_library(str(other))


def find_library_of(package: str) -> str:
    """Return the folder of an installed package."""
    return str(Path(sys.modules[package].__file__).parent)


def test_a_newer_library_in_another_package(cpu):
    """The ggml 0.26 inside xllamacpp runs beside 0.20 in one process, with the same results."""
    import importlib.util

    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    newer = REGISTRY.open(f"libggml:{spec.origin}#CPU")
    assert newer.library.version.startswith("0.26")
    backend = newer.backend(threads=1)
    got = Experts("q4_k", newer).run(ggml.Scheduler([backend]))
    assert nmse(got, Experts("q4_k", cpu.device).run(ggml.Scheduler([cpu]))) < K_BOUND
    assert not newer.supports_buft(open_device("CPU").buffer_type)
    backend.close()


def test_large_batches_are_not_offloaded_to_a_cpu(device, cpu):
    """The library's CPU does not ask for ops with host weights; only a rule moves them there."""
    node = Experts("f32", cpu.device).y
    assert op_batch_size(node) == 40
    assert not device.offload_op(node)
