"""Buffers of the CPU and of the simulated device: what is written comes back, and nothing else is touched."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyggml as ggml
from pyggml.backend import Backend, tensor_copy_async
from pyggml.buffer import (
    Buffer,
    tensor_alloc,
    tensor_copy,
    tensor_get,
    tensor_memset,
    tensor_set,
)
from pyggml.errors import AllocError, GraphError, OutOfMemoryError
from pyggml.tensor import Tensor
from pyggml.types import Type

SIZE = 4096
BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: ggml.CPU(threads=1),
    "sim": lambda: ggml.Sim("custom:64MiB,100GB/s,10GB/s", threads=1),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """One backend of each kind that has memory."""
    return BACKENDS[request.param]()


def place(backend: Backend, type: str | Type = "i8", ne: tuple[int, ...] = (SIZE,), name: str = "t") -> Tensor:
    """Return a tensor in a buffer of its own."""
    tensor = Tensor(type, ne, name=name)
    buffer = backend.buffer_type.alloc_buffer(backend.buffer_type.alloc_size(tensor))
    tensor_alloc(buffer, tensor, buffer.base)
    return tensor


def store(tensor: Tensor, data: bytes, offset: int = 0) -> None:
    """Write bytes into a tensor."""
    raw = np.frombuffer(data, np.uint8)
    tensor_set(tensor, raw.ctypes.data, offset, raw.nbytes)


def load(tensor: Tensor, offset: int = 0, size: int | None = None) -> bytes:
    """Read bytes of a tensor."""
    raw = np.empty(tensor.nbytes - offset if size is None else size, np.uint8)
    tensor_get(tensor, raw.ctypes.data, offset, raw.nbytes)
    return raw.tobytes()


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
writes = st.lists(st.tuples(ranges, st.sampled_from(["set", "memset"]), st.integers(0, 255)), max_size=12)


@pytest.mark.parametrize("kind", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(steps=writes)
def test_writes_come_back_as_from_an_array(kind: str, steps: list[tuple[list[int], str, int]]) -> None:
    """Any order of writes and fills leaves what the same steps leave in a numpy array."""
    tensor = place(BACKENDS[kind]())
    tensor_memset(tensor, 0, 0, SIZE)
    model = np.zeros(SIZE, np.uint8)
    for (first, end), how, value in steps:
        data = np.arange(value, value + end - first, dtype=np.uint32).astype(np.uint8)
        if how == "set":
            tensor_set(tensor, data.ctypes.data, first, end - first)
            model[first:end] = data
        else:
            tensor_memset(tensor, value, first, end - first)
            model[first:end] = value
    assert load(tensor) == model.tobytes()
    if steps:
        (first, end), _, _ = steps[-1]
        assert load(tensor, first, end - first) == model[first:end].tobytes()


@pytest.mark.parametrize(("offset", "size"), [(-1, 4), (SIZE - 3, 4), (0, SIZE + 1), (SIZE, 1)])
def test_bounds(backend: Backend, offset: int, size: int) -> None:
    """What lies outside of the tensor can be neither read nor written, and the error says where it ends."""
    tensor = place(backend)
    raw = np.zeros(SIZE + 8, np.uint8)
    for call in (tensor_set, tensor_get):
        with pytest.raises(GraphError, match="4,096 bytes"):
            call(tensor, raw.ctypes.data, offset, size)
    with pytest.raises(GraphError, match="4,096 bytes"):
        tensor_memset(tensor, 0, offset, size)


def test_neighbours_are_not_touched(backend: Backend) -> None:
    """A write to one tensor changes no byte of the tensors beside it."""
    buffer = backend.buffer_type.alloc_buffer(3 * 64)
    left, middle, right = (Tensor("i8", (64,), name=n) for n in "lmr")
    for i, tensor in enumerate((left, middle, right)):
        tensor_alloc(buffer, tensor, buffer.base + 64 * i)
    buffer.clear(7)
    store(middle, b"\1" * 64)
    assert load(left) == load(right) == b"\7" * 64
    assert load(middle) == b"\1" * 64


@pytest.mark.parametrize("src_kind", BACKENDS)
@pytest.mark.parametrize("dst_kind", BACKENDS)
def test_copies_between_buffers(src_kind: str, dst_kind: str) -> None:
    """A tensor can be copied between any two kinds of memory, at once and in stream order."""
    src_backend, dst_backend = BACKENDS[src_kind](), BACKENDS[dst_kind]()
    data = np.arange(SIZE, dtype=np.uint32).astype(np.uint8).tobytes()
    src, dst, dst2 = place(src_backend, name="src"), place(dst_backend, name="dst"), place(dst_backend, name="dst2")
    store(src, data)
    tensor_copy(src, dst)
    tensor_copy_async(src_backend, dst_backend, src, dst2)
    dst_backend.synchronize()
    assert load(dst) == load(dst2) == data


def test_async_copies_are_in_stream_order(backend: Backend) -> None:
    """What was given to a stream first is done first, and all of it after a synchronization."""
    tensor = place(backend, ne=(16,))
    first, second, out = (np.full(16, v, np.uint8) for v in (1, 2, 0))
    backend.set_tensor_async(tensor, first.ctypes.data, 0, 16)
    backend.set_tensor_async(tensor, second.ctypes.data, 4, 8)
    backend.get_tensor_async(tensor, out.ctypes.data, 0, 16)
    backend.synchronize()
    assert out.tolist() == [1] * 4 + [2] * 8 + [1] * 4


@pytest.mark.parametrize(
    "type", ["f32", "f16", "bf16", "i8", "i16", "i32", "i64", "f64", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
)
def test_arrays_of_all_types(backend: Backend, type: str) -> None:
    """An array written into a tensor comes back, as near as its type can hold it."""
    values = np.random.default_rng(1).integers(-100, 100, (3, 2, 64)).astype("f4")
    tensor = place(backend, type, (64, 2, 3))
    tensor.set_array(values)
    got = tensor.numpy()
    assert got.shape == values.shape
    step = {"q4_0": 100 / 8, "q4_1": 200 / 15, "q5_0": 100 / 16, "q5_1": 200 / 31, "q8_0": 100 / 127}.get(type, 0.0)
    assert np.abs(got.astype("f8") - values).max() <= step
    assert tensor.tobytes() == load(tensor)


def test_empty_tensors(backend: Backend) -> None:
    """A tensor without elements takes no memory, can be written with nothing and read as nothing."""
    tensor = place(backend, "f32", (4, 0))
    tensor.set_array(np.zeros((0, 4), "f4"))
    assert tensor.numpy().size == 0
    assert tensor.storage is not None
    assert tensor.storage.size == 0


def test_alignment_of_own_buffers(backend: Backend) -> None:
    """Own allocations start at a multiple of 64, and the type's alignment is kept too."""
    for size in (1, 100, 1 << 22):
        buffer = backend.buffer_type.alloc_buffer(size)
        assert buffer.base % max(64, backend.buffer_type.alignment) == 0
        assert buffer.size == size


def test_too_much_memory(backend: Backend) -> None:
    """What can never fit raises an error with the facts, and leaves the backend usable."""
    with pytest.raises(OutOfMemoryError) as caught:
        backend.buffer_type.alloc_buffer(1 << 50)
    assert caught.value.requested_bytes == 1 << 50
    assert caught.value.buft == backend.buffer_type.name
    assert caught.value.available_bytes is not None
    assert 0 < caught.value.available_bytes < 1 << 50
    assert place(backend).storage is not None


def test_closed_buffer_says_so(backend: Backend) -> None:
    """A tensor in a closed buffer can be neither read nor written."""
    tensor = place(backend)
    assert tensor.storage is not None
    tensor.storage.close()
    tensor.storage.close()
    with pytest.raises(ggml.PyggmlError, match=r"'t' is in a buffer .*closed"):
        store(tensor, b"1")
    with pytest.raises(ggml.PyggmlError, match=r"'t' is in a buffer .*closed"):
        load(tensor)


# -- existing memory ---------------------------------------------------------


def host_buffer(owner: object, address: int, size: int) -> Buffer | None:
    """Return the CPU's buffer over existing memory."""
    return ggml.CPU(threads=1).device.buffer_from_host(address, size, owner)


def test_existing_memory_is_used_in_place() -> None:
    """A buffer over an array is the array: no byte is copied, and writes show on both sides."""
    array = np.zeros(256, np.uint8)
    first = -array.ctypes.data % 32
    buffer = host_buffer(array, array.ctypes.data + first, 128)
    assert buffer is not None
    assert buffer.is_host
    assert buffer.buft.name == "CPU_Mapped"
    tensor = Tensor("i8", (128,), name="t")
    tensor_alloc(buffer, tensor, buffer.base)
    store(tensor, b"\5" * 128)
    assert array[first : first + 128].tolist() == [5] * 128
    array[first] = 9
    assert load(tensor, 0, 1) == b"\11"


def test_mapped_file_cannot_be_written(tmp_path: Path) -> None:
    """A tensor in a read-only mapping is read in place; each way to write it raises an error that says so."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 16)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(mapped, np.uint8)
    buffer = host_buffer(view, view.ctypes.data, view.nbytes)
    assert buffer is not None
    tensor = Tensor("i8", (4096,), name="w")
    tensor_alloc(buffer, tensor, buffer.base)
    assert load(tensor) == bytes(range(256)) * 16
    other = place(ggml.CPU(threads=1))
    for write in (
        lambda: store(tensor, b"\1"),
        lambda: tensor_memset(tensor, 0, 0, 1),
        lambda: buffer.clear(0),
        lambda: tensor_copy(other, tensor),
    ):
        with pytest.raises(AllocError, match="read-only"):
            write()
    assert path.read_bytes() == bytes(range(256)) * 16


def test_unaligned_memory_is_refused() -> None:
    """Memory that starts where no tensor may is not taken: the caller copies instead."""
    array = np.zeros(256, np.uint8)
    assert host_buffer(array, array.ctypes.data - array.ctypes.data % 32 + 33, 64) is None
