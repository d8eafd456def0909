"""Memory of simulated devices: reachable only through buffers, with counted traffic, with or without bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

    def count_in(self, size: int, n: int = 1) -> None:
        """Count copies to the memory."""
        self.bytes_in += size
        self.n_in += n

    def count_out(self, size: int, n: int = 1) -> None:
        """Count copies from the memory."""
        self.bytes_out += size
        self.n_out += n


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

    def arena(self, tensor: Tensor) -> int:
        """Return where the bytes of a tensor are stored."""
        if not self._is_open:
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
        if self.device.watch is not None:
            self._watch(tensor, offset, size, is_write=True)
        if HOST.is_busy:
            HOST.by_host([host_access(address, size, tensor, is_write=False)])
        self._write(self._where(tensor, address, offset), address, size, tensor.name)

    def writing(self, tensor: Tensor, address: int, offset: int, size: int) -> Callable[[], None]:
        """Return a function that copies host memory into the tensor at its current place."""
        return partial(self._write, self._where(tensor, address, offset), address, size, tensor.name)

    def _where(self, tensor: Tensor, address: int, offset: int) -> int | None:
        """Return where host memory is copied to; None if the device has no data."""
        if self._block is None:
            if not self._is_open or tensor.view_src is not None:
                self.check_open(tensor)
            return None
        where = self.arena(tensor) + offset
        if address >= FIRST_ADDRESS:
            raise BackendError(self.device.name, f"what is copied to '{tensor.name}' has no data, the device has")
        return where

    def _write(self, where: int | None, address: int, size: int, name: str) -> None:
        device = self.device
        device.at("copy", name)
        if where is not None:
            ctypes.memmove(where, address, size)
        self.count_in(size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        if self.device.watch is not None:
            self._watch(tensor, offset, size, is_write=False)
        if HOST.is_busy:
            HOST.by_host([host_access(address, size, tensor, is_write=True)])
        self._read(self._from(tensor, address, offset), address, size, tensor.name)

    def reading(self, tensor: Tensor, address: int, offset: int, size: int) -> Callable[[], None]:
        """Return a function that copies bytes of the tensor at its current place to host memory."""
        return partial(self._read, self._from(tensor, address, offset), address, size, tensor.name)

    def _from(self, tensor: Tensor, address: int, offset: int) -> int | None:
        """Return where bytes for the host are; None if neither end has data."""
        is_bare = self._block is None and address >= FIRST_ADDRESS
        return None if is_bare else self.arena(tensor) + offset

    def _read(self, where: int | None, address: int, size: int, name: str) -> None:
        device = self.device
        device.at("copy", name)
        if where is not None:
            ctypes.memmove(address, where, size)
        self.count_out(size)

    def count_in(self, size: int, n: int = 1) -> None:
        """Count bytes that came in with ``n`` copies, for itself and the device."""
        for traffic in self.counters:
            traffic.count_in(size, n)

    def count_out(self, size: int, n: int = 1) -> None:
        """Count bytes that went out, for itself and the device."""
        for traffic in self.counters:
            traffic.count_out(size, n)

    def peek(self, tensor: Tensor, offset: int, size: int) -> memoryview | None:
        """Return the bytes in place; None if there are none, or if work can be late."""
        if self._block is None or self.device.seed is not None:
            return None
        return bytes_at(self.arena(tensor) + offset, size)

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor."""
        self.check_open(tensor)
        self._watch(tensor, offset, size, is_write=True)
        if self._block is not None:
            ctypes.memset(self.arena(tensor) + offset, value, size)

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
        to, start = (None, None) if self._block is None else (self.arena(dst), storage.arena(src))
        n_bytes, name = src.nbytes, dst.name

        def copy() -> None:
            for device in {self.device: 0, storage.device: 0}:
                device.at("copy", name)
            if to is not None and start is not None:
                ctypes.memmove(to, start, n_bytes)
            if storage.device is not self.device:
                storage.count_out(n_bytes)
                self.count_in(n_bytes)

        return copy

    def _watch(self, tensor: Tensor, offset: int, size: int, *, is_write: bool) -> None:
        """With a seed, check the host's access to memory."""
        watch = self.device.watch
        if watch is not None and tensor.data is not None:
            watch.by_host([access_to(tensor, is_write=is_write, offset=offset, size=size)])

    @property
    def counters(self) -> tuple[Traffic, Traffic]:
        """The counts of its bytes: its own, and the device's."""
        return self.traffic, self.device.traffic

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
