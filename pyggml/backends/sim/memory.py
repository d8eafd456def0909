"""Memory of simulated devices: reachable only through buffers, with counted traffic, with or without bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...buffer import Buffer, BufferType
from ...errors import BackendError
from ...tensor import Tensor
from ..host.dataless import FIRST_ADDRESS
from ..host.machine import HostBlock, bytes_at
from ..host.race_watch import HOST, access_to, host_access

if TYPE_CHECKING:
    from .device import SimDevice

__all__ = ["POISON", "SimBuffer", "SimBufferType", "Traffic"]

#: As CUDA's buffers.
ALIGNMENT = 128
#: All bits set is NaN in every float type, and no sensible id.
POISON = 0xFF


@dataclass(slots=True)
class Traffic:
    """Bytes and calls that went in and out of a device's memory."""

    bytes_in: int = 0
    n_in: int = 0
    bytes_out: int = 0
    n_out: int = 0


class SimBufferType(BufferType):
    """The memory of one simulated device."""

    __slots__ = ("owner",)

    def __init__(self, owner: SimDevice) -> None:
        super().__init__(owner.name, alignment=ALIGNMENT)
        self.owner = owner
        self.device = owner

    def alloc_size(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor; rows of quantised types are padded to 512 elements, because CUDA's kernels read that far.

        Notes
        -----
        Mirrors `ggml_backend_cuda_buffer_type_get_alloc_size`.
        """
        size = tensor.nbytes
        if tensor.type.is_quantized and tensor.ne[0] % 512:
            size += tensor.type.row_size(512 - tensor.ne[0] % 512)
        return size

    def _alloc(self, size: int) -> SimBuffer:
        return self.owner.alloc(self, size)

    def _alloc_empty(self) -> Buffer:
        return super()._alloc_empty() if self.owner.has_data else SimBuffer(self, 0, 0, None)


class SimBuffer(Buffer):
    """One allocation in a simulated device's memory.

    Attributes
    ----------
    traffic : Traffic
        The bytes and calls through this buffer.
    """

    __slots__ = ("_block", "_is_open", "device", "traffic")

    def __init__(self, buft: SimBufferType, size: int, base: int, block: HostBlock | None) -> None:
        super().__init__(buft, size, base)
        self.device = buft.owner
        self.traffic = Traffic()
        self._block = block
        self._is_open = True

    def _arena(self, tensor: Tensor) -> int:
        """Return where the bytes of a tensor are stored."""
        self.check_open(tensor)
        if self._block is None:
            raise BackendError(
                self.device.name,
                f"'{tensor.name}' has no data: the device only plans",
                hint="open the device with data to compute",
            )
        assert tensor.data is not None
        return self._block.address + tensor.data - self.base

    @property
    def is_closed(self) -> bool:
        """Whether the memory was freed."""
        return not self._is_open

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into the tensor."""
        self._watch(tensor, offset, size, is_write=True)
        self._watch_host(tensor, address, size, is_write=False)
        self.writing(tensor, address, offset, size)()

    def writing(self, tensor: Tensor, address: int, offset: int, size: int) -> Callable[[], None]:
        """Return a function that copies host memory into the tensor at its current place."""
        self.check_open(tensor)
        where = None if self._block is None else self._arena(tensor) + offset
        if where is not None and address >= FIRST_ADDRESS:
            raise BackendError(self.device.name, f"what is copied to '{tensor.name}' has no data, the device has")
        name = tensor.name

        def write() -> None:
            self.device.at("copy", name)
            if where is not None:
                ctypes.memmove(where, address, size)
            self._count_in(size)

        return write

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        self._watch(tensor, offset, size, is_write=False)
        self._watch_host(tensor, address, size, is_write=True)
        self.reading(tensor, address, offset, size)()

    def reading(self, tensor: Tensor, address: int, offset: int, size: int) -> Callable[[], None]:
        """Return a function that copies bytes of the tensor at its current place to host memory."""
        is_bare = self._block is None and address >= FIRST_ADDRESS  # neither end has data
        where = None if is_bare else self._arena(tensor) + offset
        name = tensor.name

        def read() -> None:
            self.device.at("copy", name)
            if where is not None:
                ctypes.memmove(address, where, size)
            self._count_out(size)

        return read

    def peek(self, tensor: Tensor, offset: int, size: int) -> memoryview | None:
        """Return the bytes in place; None if there are none, or if work can be late."""
        if self._block is None or self.device.seed is not None:
            return None
        return bytes_at(self._arena(tensor) + offset, size)

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor."""
        self.check_open(tensor)
        self._watch(tensor, offset, size, is_write=True)
        if self._block is not None:
            ctypes.memset(self._arena(tensor) + offset, value, size)

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy within the device, or from another simulated one; return False for any other memory."""
        if not isinstance(src.storage, SimBuffer):
            return False
        src.storage._watch(src, 0, src.nbytes, is_write=False)
        self._watch(dst, 0, src.nbytes, is_write=True)
        self.copying(src, dst)()
        return True

    def copying(self, src: Tensor, dst: Tensor) -> Callable[[], None]:
        """Return a function that copies a tensor of a simulated device, both at their current places."""
        storage = src.storage
        assert isinstance(storage, SimBuffer)
        self.check_open(dst)
        to, start = (None, None) if self._block is None else (self._arena(dst), storage._arena(src))
        n_bytes, name = src.nbytes, dst.name

        def copy() -> None:
            for device in {self.device: 0, storage.device: 0}:
                device.at("copy", name)
            if to is not None and start is not None:
                ctypes.memmove(to, start, n_bytes)
            if storage.device is not self.device:
                storage._count_out(n_bytes)
                self._count_in(n_bytes)

        return copy

    def _watch(self, tensor: Tensor, offset: int, size: int, *, is_write: bool) -> None:
        """With a seed, check the host's access to memory."""
        watch = self.device.watch
        if watch is not None and tensor.data is not None:
            watch.by_host([access_to(tensor, is_write=is_write, offset=offset, size=size)])

    @staticmethod
    def _watch_host(tensor: Tensor, address: int, size: int, *, is_write: bool) -> None:
        if HOST.is_busy:
            HOST.by_host([host_access(address, size, tensor, is_write=is_write)])

    def _count_in(self, size: int) -> None:
        for traffic in (self.traffic, self.device.traffic):
            traffic.bytes_in += size
            traffic.n_in += 1

    def _count_out(self, size: int) -> None:
        for traffic in (self.traffic, self.device.traffic):
            traffic.bytes_out += size
            traffic.n_out += 1

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if self._block is not None:
            self._block.fill(value)

    def close(self) -> None:
        """Free the memory when no work uses it any more."""
        if self._is_open:
            self.device.finish()  # as cudaFree
            self._is_open = False
            self.device.free(self.size)
        if self._block is not None:
            self._block.close()
            self._block = None

    def __del__(self) -> None:
        if hasattr(self, "_is_open"):  # not so if making it failed
            self.close()
