"""The device that captures graphs, and hooks in llama.cpp's CPU device; in the child.

llama.cpp's scheduler asks devices what they support. While a model is loaded and a context is made, these devices
answer like cards that run everything in their own memory, and the CPU answers for itself, so that placement and choices
are those of a real run. Then the answers are *relaxed*: the devices can use any memory, and the CPU runs nothing. A
graph is then one split without copies, and no source of a node is replaced. Nothing is computed.
"""

from __future__ import annotations

from ..backends.libggml.library import Handle
from .device import CPUHooks, Functions, PythonDevice, put
from .library import LlamaLibrary
from .slots import N_WORDS

__all__ = ["CapturingCPU", "CapturingDevice", "Watcher"]

_ALIGNMENT = 128
#: Functions of a buffer without bytes.
_NO_BYTES: Functions = dict.fromkeys(("memset_tensor", "set_tensor", "get_tensor", "clear"), lambda *_: None)
#: Addresses of device memory start here; no process has memory there.
_NOWHERE = 1 << 44
_STEP = 1 << 16


class Watcher:
    """Receives llama.cpp's questions to devices, and decides how they are answered. This one ignores them all.

    Attributes
    ----------
    is_relaxed : bool
        Whether answers are relaxed.
    has_sizes : bool
        Whether tensors need their bytes. llama.cpp reserves no memory for a model without bytes but counts on what it
        would have reserved: a decode asks for memory of its own only if its tensors need more than was counted.
    has_memory : bool
        Whether devices give memory.
    """

    is_relaxed = False
    has_sizes = has_memory = True

    def bytes_of(self, n: int) -> int:
        """Return the bytes that a tensor of n bytes is said to need."""
        return n if self.has_sizes else min(n, 1)

    def asked(self, tensor: Handle, answer: bool) -> None:
        """Receive a question whether a device supports an op."""

    def split(self, graph: Handle) -> None:
        """Receive the graph of a split that has just been made."""

    def computed(self, graph: Handle) -> None:
        """Receive a graph to compute."""

    def failed(self, error: BaseException) -> None:
        """Receive an exception of the other methods."""


class CapturingDevice(PythonDevice):
    """A card that supports every op but computes nothing.

    Parameters
    ----------
    free, total : int
        Bytes of its memory.
    min_batch : int or None
        Fewest rows with which it offers to run an op with a host weight; None: never.
    row_padding : int
        Elements to a multiple of which the last row of a tensor of a quantised type is padded; 1: none are added.
    pinned : str
        Name of the buffer type of its pinned memory; may be changed. If empty, it has none.
    watcher : Watcher
        Receives questions and graphs.
    """

    def __init__(
        self,
        library: LlamaLibrary,
        name: str,
        *,
        free: int,
        total: int,
        min_batch: int | None,
        row_padding: int,
        watcher: Watcher,
        pinned: str = "",
    ) -> None:
        self.watcher, self.free, self.total, self.min_batch = watcher, free, total, min_batch
        self.row_padding, self.pinned = row_padding, pinned
        self._next = _NOWHERE
        self._op_names: dict[int, str] = {}
        self._bases: dict[int, int] = {}
        super().__init__(library, name)

    def _functions(self) -> dict[str, Functions]:
        return {
            "buffer_type": {
                "alloc_buffer": self._alloc_buffer,
                "get_alignment": lambda _: _ALIGNMENT,
                "get_alloc_size": self._alloc_size,
                "is_host": lambda _: self.watcher.is_relaxed,
            },
            "buffer": {
                "get_base": lambda buffer: self._bases.get(buffer, _NOWHERE),
                **_NO_BYTES,
            },
            "backend": {"graph_compute": self._compute, "graph_optimize": self._optimize},
            "device": {
                "get_host_buffer_type": self._pinned_type,
                "supports_op": self._supports_op,
                "supports_buft": lambda _, buft: self.watcher.is_relaxed or buft == self.buft,
                "offload_op": self._offload_op,
            },
        }

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        return self.free, self.total

    def failed(self, error: BaseException) -> None:
        """Pass an exception to the watcher."""
        self.watcher.failed(error)

    def _alloc_buffer(self, _: Handle, size: int) -> Handle:
        if not self.watcher.has_memory:
            return self.ffi.NULL
        made = self.new_buffer(size)
        self._bases[self.library.address(made)] = self._next
        self._next += -(-(size + 1) // _STEP) * _STEP
        return made

    def _pinned_type(self, _: Handle) -> Handle:
        if not self.pinned:
            return self.ffi.NULL
        lib = self.library.lib
        more: Functions = {
            "get_alignment": lambda _: _ALIGNMENT,
            "get_alloc_size": lambda _, t: self.watcher.bytes_of(int(lib.ggml_nbytes(t))),
        }
        cpu = lib.ggml_backend_cpu_buffer_type()
        return self.pinned_type(self.pinned, lambda size: lib.ggml_backend_buft_alloc_buffer(cpu, size), more)

    def _alloc_size(self, _: Handle, tensor: Handle) -> int:
        """Mirrors `ggml_backend_cuda_buffer_type_get_alloc_size`."""
        lib = self.library.lib
        size = int(lib.ggml_nbytes(tensor))
        if not self.watcher.has_sizes:
            return min(size, 1)
        if lib.ggml_is_quantized(tensor.type) and (rest := tensor.ne[0] % self.row_padding):
            size += int(lib.ggml_row_size(tensor.type, self.row_padding - rest))
        return size

    def _supports_op(self, _: Handle, tensor: Handle) -> bool:
        self.watcher.asked(tensor, True)
        return True

    def _offload_op(self, _: Handle, tensor: Handle) -> bool:
        """Mirrors the rule of ggml's CUDA device (`get_op_batch_size`)."""
        if self.min_batch is None:
            return False
        op = self._op_names.get(tensor.op)
        if op is None:
            op = self._op_names[tensor.op] = self.library.text(self.library.lib.ggml_op_name(tensor.op))
        ne = tensor.ne
        if op == "GET_ROWS":
            n = 0
        elif op == "MUL_MAT":
            n = ne[1]
        elif op in ("MUL_MAT_ID", "ROPE", "ROPE_BACK"):
            n = ne[2]
        else:
            n = ne[1] * ne[2] * ne[3]
        return bool(n >= self.min_batch)

    def _compute(self, _: int, graph: Handle) -> int:
        self.watcher.computed(graph)
        return 0

    def _optimize(self, _: int, graph: Handle, __: Handle) -> None:
        self.watcher.split(graph)


class CapturingCPU(CPUHooks):
    """Watches llama.cpp's calls of its CPU; nothing is computed.

    Attributes
    ----------
    watcher : Watcher
        Receives questions and graphs; may be changed at any time.
    """

    def __init__(self, library: LlamaLibrary, watcher: Watcher) -> None:
        self.watcher = watcher
        super().__init__(library)
        self._own = {
            "backend": self._pointers("backend", {"graph_compute": self._compute, "graph_optimize": self._optimize}),
            "buffer": self._pointers("buffer", _NO_BYTES),
        }
        buft = library.ffi.cast("void **", library.lib.ggml_backend_cpu_buffer_type())
        put(library, buft, "buffer_type", {"get_alloc_size": self._alloc_size}, self.failed)

    def _functions(self) -> Functions:
        return {"supports_op": self._supports_op, "init_backend": self._init_backend}

    def failed(self, error: BaseException) -> None:
        """Pass an exception to the watcher."""
        self.watcher.failed(error)

    def _supports_op(self, device: Handle, tensor: Handle) -> bool:
        answer = not self.watcher.is_relaxed and bool(self.original["supports_op"](device, tensor))
        self.watcher.asked(tensor, answer)
        return answer

    def _alloc_size(self, _: Handle, tensor: Handle) -> int:
        return self.watcher.bytes_of(int(self.library.lib.ggml_nbytes(tensor)))

    def _init_backend(self, device: Handle, params: Handle) -> Handle:
        made = self.original["init_backend"](device, params)
        words = self.library.ffi.cast("void **", made)
        for slot, function in self._own["backend"].items():
            words[slot] = function
        return made

    def fill(self, buffer: Handle) -> None:
        """Give a buffer that ggml made for 0 bytes, which has no functions, those that do nothing."""
        words = self.library.ffi.cast("void **", buffer)
        for slot, function in self._own["buffer"].items():
            if words[slot] == self.library.ffi.NULL:
                words[slot] = function

    def _pointers(self, kind: str, functions: Functions) -> dict[int, Handle]:
        """Return C functions by slot."""
        words = self.library.ffi.new("void *[]", N_WORDS)
        put(self.library, words, kind, functions, self.failed)
        slots = getattr(self.library.interfaces, kind).slots
        return {slots[name]: words[slots[name]] for name in functions}

    def _compute(self, _: int, graph: Handle) -> int:
        self.watcher.computed(graph)
        return 0

    def _optimize(self, _: int, graph: Handle, __: Handle) -> None:
        self.watcher.split(graph)
