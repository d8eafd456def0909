"""Memory of a remote device: what a server allocates, and the only way to its bytes."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Literal

from ...buffer import Buffer, BufferType
from ...errors import BackendError, OutOfMemoryError
from ...tensor import Tensor
from ...types import Type
from .graph import KnownRange, pack_alloc_question, pack_place
from .protocol import Command, host_memory

if TYPE_CHECKING:
    from .device import RPCDevice

__all__ = ["RPCBuffer", "RPCBufferType"]

_MAX_ALIGNMENT = 1 << 16
_FILL_BYTES = 1 << 20
#: Indices whose least and largest are noted as they are written.
_INDEX_TYPES: dict[Type, Literal["i", "q"]] = {Type.I32: "i", Type.I64: "q"}


def _asks_for_padding(tensor: Tensor) -> bool:
    """Whether a server's device may want more than `nbytes` for the type.

    Notes
    -----
    Mirrors the condition in `ggml_backend_rpc_buffer_init_tensor`.
    """
    return tensor.type.is_quantized and tensor.ne[0] % 512 != 0 and tensor.view_src is None


class RPCBufferType(BufferType):
    """Memory of a remote device.

    Notes
    -----
    Mirrors `ggml_backend_rpc_buffer_type`. Differs: answers are checked for sense before they are used.
    """

    __slots__ = ("_limit", "_sizes", "owner")

    def __init__(self, owner: RPCDevice) -> None:
        connection, number = owner.connection, struct.pack("<I", owner.number)
        (alignment,) = struct.unpack("<Q", connection.ask(Command.GET_ALIGNMENT, number, 8))
        (max_size,) = struct.unpack("<Q", connection.ask(Command.GET_MAX_SIZE, number, 8))
        if alignment & (alignment - 1) or not 0 < alignment <= _MAX_ALIGNMENT:
            raise connection.fail(Command.GET_ALIGNMENT, f"{alignment} is no alignment")
        if max_size == 0:
            raise connection.fail(Command.GET_MAX_SIZE, "no buffer may have any bytes")
        super().__init__(f"RPC{owner.number}[{owner.endpoint}]", alignment=alignment, max_size=max_size)
        self.owner = owner
        self.device = owner
        total = owner.memory()[1]
        self._limit = min(max_size, total) if total else max_size  #: bytes that a tensor can take at most
        self._sizes: dict[tuple[object, ...], int] = {}

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes that the server gives a tensor; it is asked only where they may be more than `nbytes`.

        Notes
        -----
        Mirrors `ggml_backend_rpc_buffer_type_get_alloc_size`, with its key: sources are not part of it.
        """
        if not tensor.op.may_expand and not _asks_for_padding(tensor):
            return tensor.nbytes
        key = (tensor.op, tensor.op_params, tensor.type, tensor.ne, tensor.nb)
        known = self._sizes.get(key)
        if known is None:
            connection = self.owner.connection
            question = pack_alloc_question(tensor, self.owner.number)
            (known,) = struct.unpack("<Q", connection.ask(Command.GET_ALLOC_SIZE, question, 8))
            if known > self._limit:
                raise connection.fail(Command.GET_ALLOC_SIZE, f"'{tensor.name}' cannot take {known:,} bytes")
            self._sizes[key] = known
        return max(known, tensor.nbytes)

    def _alloc(self, size: int) -> RPCBuffer:
        owner = self.owner
        connection = owner.connection
        answer = connection.ask(Command.ALLOC_BUFFER, struct.pack("<IQ", owner.number, size), 16)
        remote, got = struct.unpack("<QQ", answer)
        if remote == 0:
            free, total = owner.memory()
            raise OutOfMemoryError(self.name, size, free if total else None, "a buffer")
        if got < size:
            raise connection.fail(Command.ALLOC_BUFFER, f"{got:,} bytes came for {size:,}")
        (base,) = struct.unpack("<Q", connection.ask(Command.BUFFER_GET_BASE, struct.pack("<Q", remote), 8))
        if base == 0 or base % self.alignment or base + got >= 1 << 64:
            raise connection.fail(Command.BUFFER_GET_BASE, f"{base:#x} is no start of {got:,} bytes of memory")
        return RPCBuffer(self, remote, got, base)


class RPCBuffer(Buffer):
    """A piece of a remote device's memory."""

    __slots__ = ("_n_clears", "connection", "remote")

    def __init__(self, buft: RPCBufferType, remote: int, size: int, base: int) -> None:
        super().__init__(buft, size, base)
        self.connection = buft.owner.connection
        self.remote = remote  #: what the server calls it; 0 once closed
        self._n_clears = 0

    @property
    def is_closed(self) -> bool:
        """Whether the memory was freed."""
        return not self.remote

    def _place(self, tensor: Tensor) -> bytes:
        self.check_open(tensor)
        assert tensor.data is not None
        if not self.base <= tensor.data or tensor.data + tensor.nbytes > self.base + self.size:
            raise BackendError(self.buft.name, f"'{tensor.name}' is not inside {self!r}")
        return pack_place(tensor, self.remote)

    def init_tensor(self, tensor: Tensor) -> None:
        """Let the server clear what it pads a quantised tensor with.

        Notes
        -----
        Mirrors `ggml_backend_rpc_buffer_init_tensor`.
        """
        if _asks_for_padding(tensor):
            self.connection.tell(Command.INIT_TENSOR, self._place(tensor))

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Send host memory into the tensor; it is free again when this returns.

        Notes
        -----
        Mirrors `ggml_backend_rpc_buffer_set_tensor`. Differs: weights are sent always, never by a hash of them.
        """
        self._note(tensor, address, offset, size)
        head = self._place(tensor) + struct.pack("<BQ", 0, offset)
        self.connection.tell(Command.SET_TENSOR, head, host_memory(address, size))

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Read bytes of the tensor into host memory, after all that was sent before."""
        question = self._place(tensor) + struct.pack("<QQ", offset, size)
        self.connection.ask_into(Command.GET_TENSOR, question, host_memory(address, size))

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor; by sending them, as not every server's device can do it itself."""
        self._forget(tensor)
        place, block = self._place(tensor), bytes([value & 255]) * min(size, _FILL_BYTES)
        for at in range(0, size, _FILL_BYTES):
            head = place + struct.pack("<BQ", 0, offset + at)
            self.connection.tell(Command.SET_TENSOR, head, block[: size - at])

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from memory of the same server; False for any other, and where the server cannot."""
        storage = src.storage
        if not isinstance(storage, RPCBuffer) or storage.connection is not self.connection:
            return False
        self._forget(dst)
        answer = self.connection.ask(Command.COPY_TENSOR, storage._place(src) + self._place(dst), 1)
        return answer != b"\0"

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if not self.remote:
            raise BackendError(self.buft.name, "a buffer was closed and cannot be cleared")
        self._n_clears += 1
        self.connection.tell(Command.BUFFER_CLEAR, struct.pack("<QB", self.remote, value & 255))

    def close(self) -> None:
        """Give the memory back to the server, before the next command."""
        remote, self.remote = self.remote, 0
        if remote and self.connection.is_open:
            self.connection.free_later(remote)

    def __del__(self) -> None:
        # no name if making it failed; and at the end of the process the server frees all itself
        if hasattr(self, "remote") and not sys.is_finalizing():
            self.close()

    # -- what is known of indices ----------------------------------------------

    def _note(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        self._forget(tensor)
        kind = _INDEX_TYPES.get(tensor.type)
        if kind is not None and tensor.view_src is None and offset == 0 and size == tensor.nbytes:
            values = host_memory(address, size).cast(kind)
            tensor.extra = KnownRange((self, self._n_clears, tensor.data), min(values), max(values))

    @staticmethod
    def _forget(tensor: Tensor) -> None:
        root = tensor.view_src or tensor
        if isinstance(root.extra, KnownRange):
            root.extra = None

    def known_range(self, tensor: Tensor) -> KnownRange | None:
        """Return what is known of numbers that were written here, and only from here."""
        root = tensor.view_src or tensor
        known = root.extra
        if isinstance(known, KnownRange) and known.place == (self, self._n_clears, root.data):
            return known
        return None
