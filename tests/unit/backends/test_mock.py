"""Mock devices by name, their made-up memory, and the fallbacks of what a backend lacks."""

from __future__ import annotations

import ctypes

import pytest

from pyggml.backend import REGISTRY, tensor_copy_async
from pyggml.backends import mock
from pyggml.buffer import tensor_alloc, tensor_copy
from pyggml.errors import DeviceUnavailableError, OutOfMemoryError
from pyggml.tensor import Tensor
from pyggml.types import DeviceType, Op

MIB = 1 << 20


def make(caps: mock.Capabilities, *, cpy_from: frozenset[str] | None = None):
    """Return two backends of the same abilities with a tensor each, and the list of their calls."""
    calls: list[list[object]] = []
    memory = mock.MockMemory()
    made = []
    for i, name in enumerate(("GPU0", "GPU1")):
        buft = mock.MockBufferType(mock.BufferTypeAbilities(name, cpy_from=cpy_from), memory, calls.append)
        abilities = mock.BackendAbilities(name, DeviceType.GPU, name, frozenset({name}), caps=caps)
        backend = mock.MockDevice(abilities, {name: buft}, index=i, note=calls.append).backend()
        tensor = Tensor("i32", (4,), name=f"t{i}")
        buffer = buft.alloc_buffer(64)
        tensor_alloc(buffer, tensor, buffer.base)
        made.append((backend, tensor))
    calls.clear()
    return *made, calls


def test_device_for_plans_by_name() -> None:
    """`mock:NAME` supports every op, has no host memory, and offloads nothing unless told."""
    device = REGISTRY.open("mock:CUDA0")
    op = Tensor("f32", (8, 64), op=Op.MUL_MAT)
    assert (device.name, device.type, device.host_buffer_type) == ("CUDA0", DeviceType.GPU, None)
    assert device.supports_op(op)
    assert not device.offload_op(op)
    assert device.supports_buft(device.buffer_type)
    assert not device.buffer_type.is_host


@pytest.mark.parametrize(("n_tokens", "offloaded"), [(31, False), (32, True)])
def test_offload_from_a_batch_on(n_tokens, offloaded) -> None:
    """`mock:NAME:offload=N` wants ops of N rows or more."""
    device = REGISTRY.open("mock:CUDA0:offload=32")
    assert device.offload_op(Tensor("f32", (8, n_tokens), op=Op.MUL_MAT)) is offloaded
    assert not device.offload_op(Tensor("f32", (8, n_tokens), op=Op.GET_ROWS))


@pytest.mark.parametrize("name", ["mock:", "mock:A:offload=x", "mock:A:speed=2"])
def test_bad_name_says_what_to_write(name) -> None:
    """A mock without a name, or with an unknown option, is refused with the way to write it."""
    with pytest.raises(DeviceUnavailableError, match="mock:NAME"):
        REGISTRY.open(name)


def test_no_mock_is_found() -> None:
    """No machine has mock devices by itself, and the reason is given."""
    assert mock.devices() == []
    assert "mock:NAME" in mock.why_missing()


def test_memory_is_sparse_and_zero() -> None:
    """A tebibyte costs nothing, is zero, and keeps what was written across a page's end."""
    memory = mock.MockMemory()
    base = memory.alloc(1 << 40, 128, "big")
    assert memory.read(base + (1 << 39), 8) == bytes(8)
    memory.write(base + 65_530, b"0123456789ab")
    assert memory.read(base + 65_529, 14) == b"\x000123456789ab\x00"
    assert memory.find(base + 65_530) == ["big", 65_530]
    memory.free(base)
    assert memory.find(base) == [None, 0]


def test_limit_of_allocation() -> None:
    """A buffer type with a limit raises above it, and notes that it failed."""
    calls: list[list[object]] = []
    abilities = mock.BufferTypeAbilities("GPU0", alloc_limit=MIB)
    buft = mock.MockBufferType(abilities, mock.MockMemory(), calls.append)
    buft.alloc_buffer(MIB)
    with pytest.raises(OutOfMemoryError):
        buft.alloc_buffer(MIB + 1)
    assert calls == [["alloc", "GPU0", MIB, True], ["alloc", "GPU0", MIB + 1, False]]


def test_padding_of_sizes() -> None:
    """Rows of quantised types are padded first, then the extra is added, then the sum is rounded up."""
    abilities = mock.BufferTypeAbilities("B", quant_row=512, extra_bytes=7, round_to_bytes=16)
    buft = mock.MockBufferType(abilities, mock.MockMemory())
    assert buft.alloc_size(Tensor("q8_0", (128, 2))) == -(-(2 * 4 * 34 + 12 * 34 + 7) // 16) * 16
    assert buft.alloc_size(Tensor("f32", (5,))) == 32


def test_lacking_calls_fall_back() -> None:
    """Without asynchronous calls a write is a wait and a blocking write, as for any other backend."""
    (backend, tensor), (other, source), calls = make(mock.Capabilities())
    data = ctypes.create_string_buffer(b"abcdefgh", 8)
    backend.set_tensor_async(tensor, ctypes.addressof(data), 4, 8)
    assert calls == [["sync", 0], ["buf_set", "@GPU0", "t0", 4, 8, [None, 0]]]
    calls.clear()
    tensor_copy_async(other, backend, source, tensor)
    assert [call[0] for call in calls] == ["sync", "sync", "buf_get", "buf_set"]
    assert tensor.tobytes() == bytes(16)
    assert backend.device.event_new() is None


def test_calls_that_are_there_are_noted() -> None:
    """With asynchronous calls each is noted under its own name and moves the bytes of I32 tensors."""
    caps = mock.Capabilities(set_async=True, get_async=True, events=True, cpy_async_from=frozenset({"GPU0"}))
    (backend, tensor), (other, target), calls = make(caps, cpy_from=frozenset({"GPU0"}))
    data = ctypes.create_string_buffer(b"abcdefgh", 8)
    backend.set_tensor_async(tensor, ctypes.addressof(data), 0, 8)
    tensor_copy_async(backend, other, tensor, target)
    out = ctypes.create_string_buffer(8)
    other.get_tensor_async(target, ctypes.addressof(out), 0, 8)
    assert out.raw == data.raw
    event = backend.device.event_new()
    assert event is not None
    backend.event_record(event)
    other.event_wait(event)
    event.synchronize()
    tensor_copy(tensor, target)
    assert calls == [
        ["set_async", 0, "t0", 0, 8, [None, 0]],
        ["cpy_async", 0, 1, "t0", "t1", True],
        ["get_async", 1, "t1", 0, 8],
        ["event_new", 0, 0],
        ["event_record", 0, 0, 0],
        ["event_wait", 1, 0, 0],
        ["event_sync", 0, 0],
        ["buf_cpy", "@GPU1", "t0", "t1", True],
    ]


def test_names_are_cut_as_in_a_trace() -> None:
    """A name of any length is printed with its first 63 bytes."""
    assert mock.short_name(Tensor("f32", (1,), name="n" * 100)) == "n" * 63
