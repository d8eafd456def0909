"""Emulated device memory: numpy byte buffers behind 64-bit addresses, with bounds and alignment checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SEG = 40  #: each allocation owns its own window of 2**40 addresses
SHARED_BASE = 1 << 62  #: windows of the generic address space
LOCAL_BASE = 3 << 61
GUARD = 64  #: unused bytes after each allocation


class PtxError(Exception):
    """Base of all errors of the emulated kernel."""


class OutOfBounds(PtxError):
    """An access outside every allocation."""


class Misaligned(PtxError):
    """An address that is not a multiple of the access's size."""


class Uninitialised(PtxError):
    """A read of bytes that were not written."""


class Race(PtxError):
    """Accesses of two warps to one word, at least one a write, without a barrier between."""


class BarrierError(PtxError):
    """Threads of one block that wait at different barriers."""


class Unsupported(PtxError):
    """PTX that the emulator does not know."""


class Buffer:
    """One allocation; a kernel takes it, or an integer address inside it, as a pointer."""

    __slots__ = ("addr", "init", "name", "nbytes", "raw", "readonly", "views")

    def __init__(self, addr: int, nbytes: int, name: str, readonly: bool = False) -> None:
        self.addr, self.nbytes, self.name, self.readonly = addr, nbytes, name, readonly
        # 0xFF.. is a NaN in every float type: a read of fresh memory poisons what it reaches
        self.raw: Array = np.full((nbytes + 31) // 16 * 16 + GUARD, 0xFF, np.uint8)
        self.init: Array | None = None  #: a bool for each byte, if uninitialised reads are tracked
        self.views: dict[str, Array] = {}

    def view(self, dt: str) -> Array:
        """Return the bytes as another type."""
        v = self.views.get(dt)
        if v is None:
            v = self.views[dt] = self.raw.view(dt)
        return v

    def __int__(self) -> int:
        return self.addr


class Memory:
    """A device's global memory.

    Parameters
    ----------
    track_init : bool
        Whether reading bytes that were not written is an error.
    """

    def __init__(self, track_init: bool = False) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.next = 1
        self.track_init = track_init

    def alloc(self, nbytes: int, name: str = "", readonly: bool = False) -> Buffer:
        """Return a new buffer, all bytes 0xFF."""
        b = Buffer(self.next << SEG, int(nbytes), name or f"buf{self.next}", readonly)
        if self.track_init:
            b.init = np.zeros(len(b.raw), bool)
        self.buffers[self.next] = b
        self.next += 1
        return b

    def upload(self, array: npt.ArrayLike, name: str = "", readonly: bool = False) -> Buffer:
        """Return a new buffer that holds an array."""
        a = np.ascontiguousarray(array)
        b = self.alloc(a.nbytes, name, readonly)
        self.write(b, a)
        return b

    def write(self, buf: Buffer, array: npt.ArrayLike, offset: int = 0) -> None:
        """Copy an array from the host to byte ``offset`` of a buffer."""
        a = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        if offset < 0 or offset + a.size > buf.nbytes:
            raise OutOfBounds(f"host write of {a.size} bytes at {offset} in {buf.name} ({buf.nbytes} bytes)")
        buf.raw[offset : offset + a.size] = a
        if buf.init is not None:
            buf.init[offset : offset + a.size] = True

    def read(
        self, buf: Buffer, dtype: npt.DTypeLike = np.uint8, shape: int | tuple[int, ...] = -1, offset: int = 0
    ) -> Array:
        """Return a copy of a buffer's bytes as an array; by default all of them."""
        dt = np.dtype(dtype)
        n = (buf.nbytes - offset) // dt.itemsize if shape == -1 else int(np.prod(shape))
        if offset < 0 or offset + n * dt.itemsize > buf.nbytes:
            raise OutOfBounds(f"host read of {n * dt.itemsize} bytes at {offset} in {buf.name} ({buf.nbytes} bytes)")
        return buf.raw[offset : offset + n * dt.itemsize].copy().view(dt).reshape(shape)

    def locate(self, address: int) -> tuple[Buffer, int]:
        """Return the buffer that contains an address, and the offset in it."""
        b = self.buffers.get(address >> SEG)
        if b is None or not b.addr <= address <= b.addr + b.nbytes:
            raise OutOfBounds(f"{address:#x} lies in no buffer")
        return b, address - b.addr

    def free(self, buf: Buffer) -> None:
        """Free a buffer; its addresses are never used again."""
        self.buffers.pop(buf.addr >> SEG, None)
