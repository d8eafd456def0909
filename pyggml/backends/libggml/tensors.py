"""Our tensors as the library's: `Shadow` for tensors in its memory, questions about ops, and the fields of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import AllocError, BackendError
from ...ops.modes import skips_ids
from ...tensor import Tensor
from ...types import Op
from .library import Handle, Library

if TYPE_CHECKING:
    from .memory import LibraryBuffer

__all__ = ["Shadow", "can_translate", "new_tensor", "question", "set_op", "signature"]

#: Signatures of the answers that are kept; a session has some thousands.
MAX_ANSWERS = 20_000


class Shadow:
    """The library's tensor for one of ours: what copies in and out, and sources from elsewhere, are given as.

    It has no op, so that a graph which reads it takes it as it is. It is kept in the tensor's ``extra``: devices that
    keep notes of their own on a tensor (as those with another layout of quantised weights) find them again.
    """

    __slots__ = ("buffer", "context", "data", "handle")

    def __init__(self, buffer: LibraryBuffer, tensor: Tensor) -> None:
        library = buffer.library
        self.buffer, self.data = buffer, tensor.data
        self.context = library.new_context(1)
        self.handle = new_tensor(library, self.context, tensor)
        root = tensor.view_src
        place(buffer, self.handle, tensor, None if root is None else buffer.shadow(root))


def new_tensor(library: Library, context: Handle, tensor: Tensor) -> Handle:
    """Return a new tensor of the library with type, ``ne``, ``nb`` and name of ours; no op, no memory."""
    made = library.lib.ggml_new_tensor_4d(context, int(tensor.type), *tensor.ne)
    made.nb = tensor.nb
    if tensor.name:
        library.lib.ggml_set_name(made, tensor.name.encode()[:63])
    return made


def place(buffer: LibraryBuffer, made: Handle, tensor: Tensor, root: Handle | None) -> None:
    """Give a tensor of the library the memory that ours has.

    Parameters
    ----------
    root : handle, optional
        The library's tensor that owns the memory, if ours is a view.

    Raises
    ------
    AllocError
        The library wants more room for it than there is.
    BackendError
        The device cannot prepare it.
    """
    library = buffer.library
    lib = library.lib
    assert tensor.data is not None
    if root is not None:
        made.view_src, made.view_offs = root, tensor.view_offs
        status = lib.ggml_backend_view_init(made)
    else:
        size = lib.ggml_backend_buft_get_alloc_size(buffer.buft.handle, made)
        if not buffer.base <= tensor.data or tensor.data + size > buffer.base + buffer.size:
            raise AllocError(f"'{tensor.name}' needs {size:,} bytes and does not fit into {buffer!r}")
        status = lib.ggml_backend_tensor_alloc(buffer.handle, made, library.pointer(tensor.data))
    if status != 0:
        raise BackendError(buffer.buft.name, f"'{tensor.name}' cannot be prepared, status {status}")


def can_translate(library: Library, tensor: Tensor) -> bool:
    """Whether the library has the op and all types of a node."""
    if tensor.op not in library.ops or (tensor.op in (Op.UNARY, Op.GLU) and _sub_op(library, tensor) is None):
        return False
    if skips_ids(tensor):
        return False
    return tensor.type in library.types and all(s is None or s.type in library.types for s in tensor.src)


def _sub_op(library: Library, tensor: Tensor) -> int | None:
    return library.sub_ops.get((tensor.op, tensor.param_i32(0)))


def set_op(library: Library, made: Handle, tensor: Tensor) -> None:
    """Write op and parameters of ours into a tensor of the library that has the op (`can_translate`)."""
    made.op = library.ops[tensor.op]
    for i, word in enumerate(tensor.op_params):
        made.op_params[i] = word
    if tensor.op in (Op.UNARY, Op.GLU):
        made.op_params[0] = _sub_op(library, tensor)


def signature(tensor: Tensor) -> tuple[object, ...]:
    """Return all of a node that an answer about it can depend on."""
    sources = tuple(
        None if s is None else (s.type, s.ne, s.nb, None if (b := s.storage) is None else b.buft) for s in tensor.src
    )
    return (tensor.op, tensor.op_params, tensor.type, tensor.ne, tensor.nb, sources)


def question(library: Library, tensor: Tensor) -> tuple[Handle, Handle]:
    """Return a node without data, to ask a device about, and the context that keeps it."""
    from .memory import LibraryBufferType

    context = library.new_context(1 + len(tensor.src))
    made = new_tensor(library, context, tensor)
    set_op(library, made, tensor)
    for i, source in enumerate(tensor.src):
        if source is None:
            continue
        asked = new_tensor(library, context, source)
        storage = source.storage
        if storage is not None and isinstance(storage.buft, LibraryBufferType) and storage.buft.library is library:
            asked.buffer = storage.buft.dummy  # some devices ask what kind of memory weights are in
        made.src[i] = asked
    return made, context
