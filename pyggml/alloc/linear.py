"""Tensors one after another in a buffer, for weights; and `Context`, which creates and allocates tensors together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, Self, runtime_checkable

from ..buffer import Buffer, BufferType, MultiBuffer, tensor_alloc, view_init
from ..edits import EDITS
from ..errors import AllocError, check_kind
from ..tensor import Tensor
from ..types import BufferUsage, Type
from .offsets import pad

__all__ = ["Context", "HasBufferType", "Tallocr", "alloc_tensors"]


class Tallocr:
    """Places tensors one after another in a buffer.

    Notes
    -----
    Mirrors `ggml_tallocr`.
    """

    __slots__ = ("alignment", "buffer", "offset")

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.alignment = buffer.buft.alignment
        self.offset = pad(buffer.base, self.alignment) - buffer.base

    def alloc(self, tensor: Tensor) -> None:
        """Place the next tensor.

        Raises
        ------
        AllocError
            It does not fit in the rest of the buffer.
        """
        size = pad(self.buffer.buft.alloc_size(tensor), self.alignment)
        if self.offset + size > self.buffer.size:
            raise AllocError(
                f"'{tensor.name}' needs {size:,} bytes in {self.buffer.buft.name}, "
                f"{self.buffer.size - self.offset:,} of {self.buffer.size:,} are left"
            )
        tensor_alloc(self.buffer, tensor, self.buffer.base + self.offset)
        self.offset += size


def alloc_tensors(
    tensors: Sequence[Tensor], buft: BufferType, *, usage: BufferUsage = BufferUsage.ANY
) -> Buffer | None:
    """Allocate tensors in the smallest number of buffers that the type's maximum size allows.

    Parameters
    ----------
    tensors : sequence of Tensor
        Views, and tensors that already have memory, take none.

    Returns
    -------
    Buffer or None
        A `MultiBuffer` if there are several; None if no tensor needed memory.

    Raises
    ------
    OutOfMemoryError
        The device has not so much; nothing stays allocated.

    Notes
    -----
    Mirrors `ggml_backend_alloc_ctx_tensors_from_buft`.
    """
    plan: list[tuple[int, list[Tensor]]] = []
    size = 0
    part: list[Tensor] = []
    for tensor in tensors:
        needs = 0
        if tensor.data is None and tensor.view_src is None:
            needs = pad(buft.alloc_size(tensor), buft.alignment)
        if size > 0 and size + needs > buft.max_size:
            plan.append((size, part))
            size, part = 0, []
        size += needs
        part.append(tensor)
    if size > 0:
        plan.append((size, part))

    buffers: list[Buffer] = []
    try:
        for buffer_size, placed in plan:
            buffer = buft.alloc_buffer(buffer_size)
            buffers.append(buffer)
            _place(placed, Tallocr(buffer))
    except AllocError:
        for tensor in tensors:
            if tensor.buffer in buffers:
                tensor.buffer = tensor.data = None
        for b in buffers:
            b.close()
        raise
    for tensor in part if size == 0 else ():  # views behind a tensor that filled its buffer
        if tensor.buffer is None and tensor.view_src is not None and tensor.view_src.buffer is not None:
            view_init(tensor)
    if not buffers:
        return None
    whole = buffers[0] if len(buffers) == 1 else MultiBuffer(buffers)
    whole.set_usage(usage)
    return whole


def _place(tensors: Iterable[Tensor], tallocr: Tallocr) -> None:
    for tensor in tensors:
        if tensor.view_src is not None:
            if tensor.buffer is None:
                view_init(tensor)
        elif tensor.data is None:
            tallocr.alloc(tensor)


@runtime_checkable
class HasBufferType(Protocol):
    """A device or a backend: an object with a default buffer type."""

    @property
    def buffer_type(self) -> BufferType:
        """The default buffer type."""


class Context:
    """Tensors that are created and allocated together, such as the weights of a model.

    Examples
    --------
    >>> import pyggml as ggml
    >>> weights = ggml.Context()
    >>> w = weights.new_tensor("f32", (4, 3), name="w")
    >>> buffer = weights.alloc(ggml.CPU(), usage="weights")
    >>> w.set_array([[1, 2, 3, 4]] * 3)
    >>> w.numpy().sum()
    np.float32(30.0)
    """

    __slots__ = ("buffers", "tensors")

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.buffers: list[Buffer] = []

    def new_tensor(self, type: Type | str, ne: Sequence[int], *, name: str = "") -> Tensor:
        """Return a new tensor without memory; ``ne`` is in ggml's order."""
        tensor = Tensor(type, ne, name=name)
        self.tensors.append(tensor)
        return tensor

    def add(self, tensor: Tensor) -> Tensor:
        """Add a tensor made elsewhere, such as a view, and return it."""
        self.tensors.append(tensor)
        return tensor

    def alloc(self, where: HasBufferType | BufferType, *, usage: BufferUsage | str = BufferUsage.ANY) -> Buffer | None:
        """Allocate the tensors that have no memory yet.

        Parameters
        ----------
        where : Backend, Device or BufferType
            Where to allocate.
        usage : BufferUsage or str
            ``"any"``, ``"weights"`` or ``"compute"``.

        Raises
        ------
        OutOfMemoryError
            The device has not so much; nothing stays allocated.
        GraphError
            ``where`` is no memory, or the usage does not exist.
        """
        check_kind("the place of tensors", where, BufferType | HasBufferType, hint="such as pyggml.CPU()")
        buft = where if isinstance(where, BufferType) else where.buffer_type
        usage = BufferUsage.of(usage)
        EDITS.note()
        buffer = alloc_tensors([t for t in self.tensors if t.buffer is None], buft, usage=usage)
        if buffer is not None:
            self.buffers.append(buffer)
        return buffer

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor of this name."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def close(self) -> None:
        """Free all memory now; the tensors have none afterwards.

        Raises
        ------
        BackendError
            Another thread is computing with it; nothing is freed.
        """
        for buffer in self.buffers:
            buffer.close()
        EDITS.note()
        for tensor in self.tensors:
            tensor.buffer = tensor.data = None
        self.buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Context of {len(self.tensors)} tensors, {sum(b.size for b in self.buffers):,} bytes>"
