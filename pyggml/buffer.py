"""`BufferType` and `Buffer`: memory of a device, and the only access to its bytes.

Every buffer has an address ``base`` and every tensor in it an address ``data``, in the buffer's own address space. For
host memory these are addresses of the process; for other devices only the buffer can use them. Data to copy in or out
is given as a host address and a size, like upstream's ``void *``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .edits import EDITS
from .errors import AllocError, BackendError, GraphError
from .tensor import Tensor, are_same_layout
from .types import SIZE_MAX, BufferUsage

if TYPE_CHECKING:
    from .backend import Device

__all__ = [
    "Buffer",
    "BufferType",
    "MultiBuffer",
    "tensor_alloc",
    "tensor_copy",
    "tensor_get",
    "tensor_memset",
    "tensor_set",
    "view_init",
]


class BufferType(ABC):
    """One kind of memory.

    Parameters
    ----------
    name : str
        The name in reports and in ``-ot``.
    alignment : int
        Tensors start at multiples of this; a power of 2.
    max_size : int
        Size of the largest possible buffer, in bytes.
    is_host : bool
        Whether the CPU can use its addresses.

    Notes
    -----
    Mirrors `ggml_backend_buffer_type_i`. Buffer types are compared by identity, as upstream compares pointers.
    """

    __slots__ = ("alignment", "device", "is_host", "max_size", "name")

    def __init__(self, name: str, *, alignment: int, max_size: int = SIZE_MAX, is_host: bool = False) -> None:
        self.name = name
        self.alignment = alignment
        self.max_size = max_size
        self.is_host = is_host
        self.device: Device | None = None  #: set by the device that owns the type

    @abstractmethod
    def _alloc(self, size: int) -> Buffer:
        """Return a new buffer of at least one byte, or raise `OutOfMemoryError`."""

    def alloc_buffer(self, size: int) -> Buffer:
        """Return a new buffer.

        Raises
        ------
        OutOfMemoryError
            The device has too little memory.

        Notes
        -----
        Mirrors `ggml_backend_buft_alloc_buffer`: a size of 0 gives a dummy buffer without device memory.
        """
        return self._alloc(size) if size > 0 else self._alloc_empty()

    def _alloc_empty(self) -> Buffer:
        """Return a buffer without bytes; with a device that only plans, copies from and to its tensors go through."""
        return EmptyBuffer(self, 0)

    def alloc_size(self, tensor: Tensor) -> int:
        """Return the bytes that a tensor takes: ``nbytes``, or more if kernels read past the end."""
        return tensor.nbytes

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Tenants(Protocol):
    """Which tensor owns which bytes of a compute buffer; see the scheduler's `Tenancy`."""

    is_over: bool  #: whether tensors may be lost: the compute has ended

    def check_read(self, tensor: Tensor) -> None:
        """Raise `GraphError` if the tensor's memory now holds another tensor."""

    def note_write(self, tensor: Tensor) -> None:
        """Record that the user wrote the tensor."""


class Buffer(ABC):
    """One allocation of memory.

    Attributes
    ----------
    buft : BufferType
        The kind of memory.
    size : int
        The size in bytes.
    base : int
        The address of the first byte, in the buffer's own address space.
    usage : BufferUsage
        What it holds. Offloading and used-expert copies apply to WEIGHTS.
    is_writable : bool
        Whether its memory can be written; False for a mapped file.
    tenancy : Tenants or None
        For a scheduler's compute buffer: which tensors it holds after a compute.

    Notes
    -----
    Mirrors `ggml_backend_buffer_i`. The memory is freed when nothing refers to the buffer, or by `close`.
    Callers use `tensor_set` and similar functions, which check bounds.
    """

    __slots__ = ("__weakref__", "base", "buft", "is_writable", "size", "tenancy", "usage")

    def __init__(self, buft: BufferType, size: int, base: int = 0) -> None:
        self.buft = buft
        self.size = size
        self.base = base
        self.usage = BufferUsage.ANY
        self.is_writable = True
        self.tenancy: Tenants | None = None

    @abstractmethod
    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy ``size`` bytes from a host address to byte ``offset`` of the tensor."""

    @abstractmethod
    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy ``size`` bytes from byte ``offset`` of the tensor to a host address."""

    @abstractmethod
    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set ``size`` bytes of the tensor to a value."""

    @abstractmethod
    def clear(self, value: int) -> None:
        """Set all bytes to a value."""

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy a tensor of another buffer into a tensor of this one; return False if the copy must go through the host."""
        return False

    def count_in(self, size: int, n: int = 1) -> None:
        """Count bytes that came in with ``n`` copies, which are not made: there are no data. By default nothing is counted."""
        return

    def count_out(self, size: int, n: int = 1) -> None:
        """Count bytes that went out; see `count_in`."""
        return

    def peek(self, tensor: Tensor, offset: int, size: int) -> memoryview | None:
        """Return bytes of the tensor for a check, without a call of the device; None if they are not available.

        Returns the memory itself or a copy of it. The result can be None at any time, for example while work is queued.
        """
        return None

    def init_tensor(self, tensor: Tensor) -> None:
        """Prepare a tensor that was just placed in this buffer; by default nothing."""
        return

    def reset(self) -> None:
        """Discard what `init_tensor` made; by default nothing."""
        return

    def set_usage(self, usage: BufferUsage) -> None:
        """Set the usage: what the buffer holds."""
        self.usage = usage

    def close(self) -> None:
        """Free the memory now; tensors in it must no longer be used."""
        return

    @property
    def is_host(self) -> bool:
        """Whether the CPU can use its addresses."""
        return self.buft.is_host

    @property
    def is_closed(self) -> bool:
        """Whether the memory was freed; always False for buffers on which `close` has no effect."""
        return False

    def check_open(self, tensor: Tensor) -> None:
        """Raise `BackendError` if the buffer of the tensor was closed, or if what it views has other memory since."""
        if self.is_closed:
            raise BackendError(
                self.buft.name,
                f"'{tensor.name}' is in a buffer that was closed",
                hint="keep buffers open while their tensors are used",
            )
        if tensor.is_stale_view:
            assert tensor.view_src is not None
            raise BackendError(
                self.buft.name,
                f"'{tensor.name}' views memory that '{tensor.view_src.name}' had before",
                hint="make the view again, or allocate its graph again",
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.size:,} bytes in {self.buft.name}, {self.usage.name.lower()}>"


class EmptyBuffer(Buffer):
    """A buffer without bytes, for any buffer type."""

    __slots__ = ()

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Refuse: the buffer has no bytes."""
        raise AllocError(f"'{tensor.name}' is in an empty buffer of {self.buft.name}")

    get_tensor = set_tensor

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Refuse: the buffer has no bytes."""
        raise AllocError(f"'{tensor.name}' is in an empty buffer of {self.buft.name}")

    def clear(self, value: int) -> None:
        """Do nothing."""


class MultiBuffer(Buffer):
    """Several buffers that are allocated, flagged and freed together.

    Notes
    -----
    Mirrors `ggml_backend_multi_buffer_alloc_buffer`. Tensors are in the parts, never in the multi-buffer itself.
    """

    __slots__ = ("buffers",)

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        super().__init__(buffers[0].buft, sum(b.size for b in buffers))
        self.buffers = tuple(buffers)

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Refuse: tensors are in the parts."""
        raise AllocError(f"'{tensor.name}' cannot be in a multi-buffer, only in one of its parts")

    get_tensor = set_tensor

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Refuse: tensors are in the parts."""
        raise AllocError(f"'{tensor.name}' cannot be in a multi-buffer, only in one of its parts")

    def clear(self, value: int) -> None:
        """Set all bytes of all parts."""
        for b in self.buffers:
            b.clear(value)

    def set_usage(self, usage: BufferUsage) -> None:
        """Set the usage of all parts."""
        self.usage = usage
        for b in self.buffers:
            b.set_usage(usage)

    def close(self) -> None:
        """Free the memory of all parts."""
        for b in self.buffers:
            b.close()


# -- tensors in buffers ------------------------------------------------------


def tensor_alloc(buffer: Buffer, tensor: Tensor, address: int) -> None:
    """Place a tensor at an address of a buffer.

    Raises
    ------
    AllocError
        The tensor already has memory, is a view, or does not fit.

    Notes
    -----
    Mirrors `ggml_backend_tensor_alloc`.
    """
    if tensor.buffer is not None or tensor.data is not None or tensor.view_src is not None:
        state = "is a view" if tensor.view_src is not None else "already has memory"
        raise AllocError(f"'{tensor.name}' cannot be placed in {buffer.buft.name}: it {state}")
    size = buffer.buft.alloc_size(tensor)
    if not buffer.base <= address or address + size > buffer.base + buffer.size:
        raise AllocError(
            f"'{tensor.name}' of {size:,} bytes does not fit at offset "
            f"{address - buffer.base:,} of a buffer of {buffer.size:,} bytes in {buffer.buft.name}"
        )
    EDITS.note()
    tensor.buffer = buffer
    tensor.data = address
    buffer.init_tensor(tensor)


def view_init(tensor: Tensor) -> None:
    """Give a view the memory of the tensor that it shows.

    Notes
    -----
    Mirrors `ggml_backend_view_init`.
    """
    root = tensor.view_src
    if root is None or root.buffer is None or root.data is None or tensor.buffer is not None:
        raise AllocError(f"the view '{tensor.name}' cannot be initialised: the tensor that it shows has no memory")
    tensor.buffer = root.buffer
    tensor.data = root.data + tensor.view_offs
    tensor.buffer.init_tensor(tensor)


def _checked(tensor: Tensor, offset: int, end: int, verb: str) -> Buffer:
    buffer = tensor.storage
    if buffer is None or tensor.data is None:
        raise GraphError(f"'{tensor.name}' cannot be {verb}: it has no memory yet")
    if offset < 0 or end < offset or end > tensor.nbytes or (tensor.type.block_size > 1 and end > tensor.last_byte):
        raise GraphError(f"'{tensor.name}' has {tensor.last_byte:,} bytes; {offset:,}..{end - 1:,} cannot be {verb}")
    if buffer.tenancy is not None:
        if verb == "read":
            buffer.tenancy.check_read(tensor)
        else:
            buffer.tenancy.note_write(tensor)
    return buffer


def tensor_set(tensor: Tensor, address: int, offset: int, size: int) -> None:
    """Copy host memory into a tensor.

    Parameters
    ----------
    address : int
        Host address of the first byte.
    offset, size : int
        Bytes; the range must be inside the tensor.

    Raises
    ------
    GraphError
        The tensor has no memory, or the range is outside its bounds.

    Notes
    -----
    Mirrors `ggml_backend_tensor_set`.
    """
    if size:
        _checked(tensor, offset, offset + size, "written").set_tensor(tensor, address, offset, size)


def tensor_get(tensor: Tensor, address: int, offset: int, size: int) -> None:
    """Copy bytes of a tensor to host memory; see `tensor_set`.

    Notes
    -----
    Mirrors `ggml_backend_tensor_get`.
    """
    if size:
        _checked(tensor, offset, offset + size, "read").get_tensor(tensor, address, offset, size)


def tensor_memset(tensor: Tensor, value: int, offset: int, size: int) -> None:
    """Set bytes of a tensor.

    Notes
    -----
    Mirrors `ggml_backend_tensor_memset`.
    """
    if size:
        _checked(tensor, offset, offset + size, "written").memset_tensor(tensor, value, offset, size)


def tensor_copy(src: Tensor, dst: Tensor) -> None:
    """Copy a whole tensor in the most direct way that the buffers support.

    Raises
    ------
    GraphError
        The layouts differ, or one has no memory.

    Notes
    -----
    Mirrors `ggml_backend_tensor_copy`: one write from host memory, one read to host memory, otherwise device to device;
    if that is not possible, through the host.
    """
    if not are_same_layout(src, dst):
        raise GraphError(f"'{src.name}' cannot be copied to '{dst.name}': their layouts differ")
    if src is dst:
        return
    src_buffer, dst_buffer, at, to = src.storage, dst.storage, src.data, dst.data
    if src_buffer is None or dst_buffer is None or at is None or to is None:
        bare = src if src_buffer is None or at is None else dst
        raise GraphError(f"'{src.name}' cannot be copied to '{dst.name}': '{bare.name}' has no memory yet")
    size = src.nbytes
    if src.type.block_size > 1:
        _checked(src, 0, size, "read")
    elif src_buffer.tenancy is not None:
        src_buffer.tenancy.check_read(src)
    if src_buffer.buft.is_host:
        if size:
            if dst_buffer.tenancy is not None:
                dst_buffer.tenancy.note_write(dst)
            dst_buffer.set_tensor(dst, at, 0, size)
    elif dst_buffer.buft.is_host:
        if size:
            src_buffer.get_tensor(src, to, 0, size)
    elif not dst_buffer.cpy_tensor(src, dst):
        import numpy as np

        staging = np.empty(size, np.uint8)
        tensor_get(src, staging.ctypes.data, 0, size)
        tensor_set(dst, staging.ctypes.data, 0, size)
