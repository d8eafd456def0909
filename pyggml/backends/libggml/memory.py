"""The library's buffer types and buffers: its memory, its alignment, its sizes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ...buffer import Buffer, BufferType
from ...errors import AllocError, BackendError, OutOfMemoryError
from ...tensor import Tensor
from ...types import SIZE_MAX, BufferUsage
from .library import Handle
from .tensors import MAX_ANSWERS, Shadow, can_translate, question, signature

if TYPE_CHECKING:
    from .device import LibraryDevice

__all__ = ["LibraryBuffer", "LibraryBufferType"]

_FILL_BYTES = 1 << 20


class LibraryBufferType(BufferType):
    """A buffer type of the library.

    Parameters
    ----------
    name : str
        As it shows in reports.
    handle
        The library's.
    """

    __slots__ = ("_dummy", "_sizes", "handle", "library", "owner")

    def __init__(self, name: str, handle: Handle, owner: LibraryDevice) -> None:
        library = owner.library
        lib = library.lib
        max_size = int(lib.ggml_backend_buft_get_max_size(handle))
        super().__init__(
            name,
            alignment=int(lib.ggml_backend_buft_get_alignment(handle)),
            max_size=min(max_size, SIZE_MAX),
            is_host=bool(lib.ggml_backend_buft_is_host(handle)),
        )
        self.handle, self.library, self.owner, self.device = handle, library, owner, owner
        self._dummy: Handle = None
        self._sizes: dict[tuple[object, ...], int] = {}

    @property
    def dummy(self) -> Handle:
        """A buffer of no bytes."""
        if self._dummy is None:
            made = self.library.lib.ggml_backend_buft_alloc_buffer(self.handle, 0)
            self._dummy = self.library.ffi.gc(made, self.library.lib.ggml_backend_buffer_free)
        return self._dummy

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes that the library gives a tensor, which may depend on what makes it."""
        if not can_translate(self.library, tensor):
            return tensor.nbytes
        key = signature(tensor)
        known = self._sizes.get(key)
        if known is None:
            if len(self._sizes) >= MAX_ANSWERS:
                self._sizes.clear()
            asked, _context = question(self.library, tensor)
            known = self._sizes[key] = int(self.library.lib.ggml_backend_buft_get_alloc_size(self.handle, asked))
        return known

    def _alloc(self, size: int) -> LibraryBuffer:
        made = self.library.lib.ggml_backend_buft_alloc_buffer(self.handle, size)
        if made == self.library.ffi.NULL:
            free, total = self.owner.memory()
            raise OutOfMemoryError(self.name, size, free if total else None, "a buffer")
        return LibraryBuffer(self, made)


class LibraryBuffer(Buffer):
    """A buffer of the library. Copies through it are done when they return.

    Parameters
    ----------
    owner : object, optional
        Whose memory it is, if not the library's; kept alive.
    is_writable : bool
        Whether the memory may be written; a mapped file's may not.
    """

    __slots__ = ("_handle", "_owner", "buft", "library")

    buft: LibraryBufferType

    def __init__(
        self, buft: LibraryBufferType, handle: Handle, *, owner: object = None, is_writable: bool = True
    ) -> None:
        library = buft.library
        size = int(library.lib.ggml_backend_buffer_get_size(handle))
        super().__init__(buft, size, library.address(library.lib.ggml_backend_buffer_get_base(handle)))
        self.library = library
        self._handle = handle
        self._owner = owner
        self.is_writable = is_writable

    @property
    def is_closed(self) -> bool:
        """Whether the memory was freed."""
        return self._handle is None

    def target(self, tensor: Tensor) -> Handle:
        """Return the library's tensor for one of ours that is to be written."""
        if not self.is_writable:
            raise AllocError(
                f"'{tensor.name}' lies in read-only memory of {self.buft.name} and cannot be written",
                hint="copy it to a tensor in a buffer of its own",
            )
        return self.shadow(tensor)

    @property
    def handle(self) -> Handle:
        """The library's buffer.

        Raises
        ------
        BackendError
            It was closed.
        """
        if self._handle is None:
            raise BackendError(self.buft.name, "a buffer was closed and is still used")
        return self._handle

    def shadow(self, tensor: Tensor) -> Handle:
        """Return the library's tensor for one of ours that lies here."""
        known = tensor.extra
        if (
            isinstance(known, Shadow)
            and known.buffer is self
            and known.data == tensor.data
            and self._handle is not None
        ):
            return known.handle
        made = tensor.extra = Shadow(self, tensor)
        return made.handle

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into the tensor."""
        self.library.lib.ggml_backend_tensor_set(self.target(tensor), self.library.pointer(address), offset, size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        self.library.lib.ggml_backend_tensor_get(self.shadow(tensor), self.library.pointer(address), offset, size)

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor; by copies, as not every buffer of the library can do it itself."""
        block = self.library.ffi.new("char[]", bytes([value & 255]) * min(size, _FILL_BYTES))
        shadow = self.target(tensor)
        for at in range(0, size, _FILL_BYTES):
            self.library.lib.ggml_backend_tensor_set(shadow, block, offset + at, min(_FILL_BYTES, size - at))

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from any memory of the same library; False for any other."""
        storage = src.storage
        if not isinstance(storage, LibraryBuffer) or storage.library is not self.library:
            return False
        self.library.lib.ggml_backend_tensor_copy(storage.shadow(src), self.target(dst))
        return True

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if not self.is_writable:
            raise AllocError(f"a buffer of {self.buft.name} cannot be cleared: it is read-only")
        self.library.lib.ggml_backend_buffer_clear(self.handle, value & 255)

    def reset(self) -> None:
        """Let the device forget what it noted on tensors here."""
        self.library.lib.ggml_backend_buffer_reset(self.handle)

    def set_usage(self, usage: BufferUsage) -> None:
        """Say what the buffer holds, to the library too."""
        super().set_usage(usage)
        self.library.lib.ggml_backend_buffer_set_usage(self.handle, int(usage))

    def close(self) -> None:
        """Give the memory back to the library."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self.library.lib.ggml_backend_buffer_free(handle)
            self._owner = None

    def __del__(self) -> None:
        # without a handle if making it failed; and at the end of the process the system takes all back
        if hasattr(self, "_handle") and not sys.is_finalizing():
            self.close()
