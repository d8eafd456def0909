"""A device of ggml that is written in Python, and what is changed of llama.cpp's own CPU device, in the child.

The scheduler of llama.cpp asks devices what they support. While a model is loaded and a context is made, the devices
here answer as cards that run everything in their own memory, and the CPU answers for itself: placement and choices are
those of a real run. Then the answers are *relaxed*: the devices can use any memory and the CPU runs nothing. A graph
is then one split without copies, and no source of a node is rewritten. Nothing is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..backends.libggml.library import Handle
from .library import LlamaLibrary
from .slots import N_WORDS, Table

__all__ = ["CPUHooks", "PythonDevice", "Watcher"]

_GPU = 1
_ALIGNMENT = 128
#: Addresses of device memory start here; no process has memory there.
_NOWHERE = 1 << 44
_STEP = 1 << 16

#: The registry keeps pointers to a device for as long as the process lives.
_alive: list[object] = []


class Watcher(Protocol):
    """Is told what llama.cpp asks devices, and decides whether answers are relaxed."""

    is_relaxed: bool

    def asked(self, device: str, tensor: Handle, answer: bool) -> None:
        """Take note of a question whether a device supports an op."""

    def computed(self, graph: Handle) -> None:
        """Take note of a graph that is to be computed."""


def _put(
    library: LlamaLibrary, words: Handle, table: Table, functions: dict[str, tuple[str, Callable[..., Any]]]
) -> None:
    """Write functions into the slots of an object."""
    for name, (signature, function) in functions.items():
        made = library.ffi.callback(signature, function)
        _alive.append(made)
        words[table.slots[name]] = library.ffi.cast("void *", made)


class PythonDevice:
    """A device with a registry, a buffer type, buffers and streams of its own.

    Parameters
    ----------
    library : LlamaLibrary
        Where it is registered.
    name : str
        Of the device and its buffer type.
    free, total : int
        Bytes of its memory.
    min_batch : int or None
        Rows from which on it offers to run an op whose weight is in host memory; None: it never does.
    watcher : Watcher
        See there.

    Attributes
    ----------
    handle, buft : pointer
        The device and its buffer type.
    """

    def __init__(
        self, library: LlamaLibrary, name: str, *, free: int, total: int, min_batch: int | None, watcher: Watcher
    ) -> None:
        _alive.append(self)
        self.library, self.ffi, self.watcher = library, library.ffi, watcher
        self.name, self.free, self.total, self.min_batch = name, free, total, min_batch
        self._next = _NOWHERE
        self._op_names: dict[int, str] = {}
        self._c_name = self.ffi.new("char[]", name.encode())
        self._guid = self.ffi.new("unsigned char[16]", b"pyggml-in-python")
        self._backends: list[Handle] = []
        self._made = [self.ffi.new("void *[]", N_WORDS) for _ in range(3)]
        self.buft, self.handle, self.registry = (self.ffi.cast("void *", m) for m in self._made)
        self._buffer_functions = self.ffi.new("struct iface *")
        self._backend_words = self.ffi.new("void *[]", N_WORDS)
        self._fill()
        library.lib.ggml_backend_register(self.registry)
        if library.lib.ggml_backend_dev_by_name(name.encode()) != self.handle:
            raise RuntimeError(f"llama.cpp did not register the device {name}")

    def _fill(self) -> None:
        ffi, at = self.ffi, self.library.interfaces
        buft, device, registry = self._made
        tensor = "struct ggml_tensor *"
        _put(self.library, buft, at.buffer_type, {
            "get_name": ("void *(void *)", lambda _: self._c_name),
            "alloc_buffer": ("void *(void *, size_t)", self._alloc_buffer),
            "get_alignment": ("size_t(void *)", lambda _: _ALIGNMENT),
            "is_host": ("bool(void *)", lambda _: self.watcher.is_relaxed),
        })  # fmt: skip
        buft[at.buffer_type.fields["device"]] = self.handle
        self._bases: dict[int, int] = {}
        _put(self.library, self._buffer_functions.word, at.buffer, {
            "get_base": ("intptr_t(intptr_t)", lambda buffer: self._bases.get(buffer, _NOWHERE)),
            "memset_tensor": (f"void(void *, {tensor}, uint8_t, size_t, size_t)", lambda *_: None),
            "set_tensor": (f"void(void *, {tensor}, void *, size_t, size_t)", lambda *_: None),
            "get_tensor": (f"void(void *, {tensor}, void *, size_t, size_t)", lambda *_: None),
            "clear": ("void(void *, uint8_t)", lambda *_: None),
        })  # fmt: skip
        _put(self.library, self._backend_words, at.backend, {
            "get_name": ("void *(void *)", lambda _: self._c_name),
            "free": ("void(void *)", lambda _: None),
            "graph_compute": ("int(void *, void *)", self._compute),
        })  # fmt: skip
        self._backend_words[at.backend.fields["guid"]] = ffi.cast("void *", self._guid)
        self._backend_words[at.backend.fields["device"]] = self.handle
        _put(self.library, device, at.device, {
            "get_name": ("void *(void *)", lambda _: self._c_name),
            "get_description": ("void *(void *)", lambda _: self._c_name),
            "get_memory": ("void(void *, size_t *, size_t *)", self._memory),
            "get_type": ("int(void *)", lambda _: _GPU),
            "get_props": ("void(void *, struct props *)", self._props),
            "init_backend": ("void *(void *, void *)", self._init_backend),
            "get_buffer_type": ("void *(void *)", lambda _: self.buft),
            "supports_op": (f"bool(void *, {tensor})", self._supports_op),
            "supports_buft": ("bool(void *, void *)", lambda _, buft: self.watcher.is_relaxed or buft == self.buft),
            "offload_op": (f"bool(void *, {tensor})", self._offload_op),
        })  # fmt: skip
        device[at.device.fields["reg"]] = self.registry
        _put(self.library, registry, at.registry, {
            "get_name": ("void *(void *)", lambda _: self._c_name),
            "get_device_count": ("size_t(void *)", lambda _: 1),
            "get_device": ("void *(void *, size_t)", lambda *_: self.handle),
        })  # fmt: skip
        ffi.cast("int *", registry)[0] = at.api_version

    def _alloc_buffer(self, _: Handle, size: int) -> Handle:
        made = self.library.lib.ggml_backend_buffer_init(self.buft, self._buffer_functions[0], self.ffi.NULL, size)
        self._bases[self.library.address(made)] = self._next
        self._next += -(-(size + 1) // _STEP) * _STEP
        return made

    def _memory(self, _: Handle, free: Handle, total: Handle) -> None:
        free[0], total[0] = self.free, self.total

    def _props(self, _: Handle, props: Handle) -> None:
        props.name = props.description = self._c_name
        props.memory_free, props.memory_total, props.type = self.free, self.total, _GPU
        props.device_id = self.ffi.NULL  # all abilities stay off: neither events nor copies of a pipeline

    def _init_backend(self, *_: Handle) -> Handle:
        made = self.ffi.new("void *[]", list(self._backend_words))
        self._backends.append(made)
        return self.ffi.cast("void *", made)

    def _supports_op(self, _: Handle, tensor: Handle) -> bool:
        self.watcher.asked(self.name, tensor, True)
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

    def _compute(self, _: Handle, graph: Handle) -> int:
        self.watcher.computed(graph)
        return 0


class CPUHooks:
    """Stands between llama.cpp and its CPU device: what is asked is watched, and nothing is computed.

    Attributes
    ----------
    watcher : Watcher
        May be changed at any time.
    """

    def __init__(self, library: LlamaLibrary, watcher: Watcher) -> None:
        _alive.append(self)
        self.library, self.watcher = library, watcher
        ffi, at = library.ffi, library.interfaces
        self.handle = library.lib.ggml_backend_dev_by_type(0)
        words = ffi.cast("void **", self.handle)
        supports, init = (words[at.device.slots[name]] for name in ("supports_op", "init_backend"))
        self._supports = ffi.cast("bool(*)(void *, struct ggml_tensor *)", supports)
        self._init = ffi.cast("void *(*)(void *, void *)", init)
        compute = ffi.callback("int(void *, void *)", self._compute)
        _alive.append(compute)
        self._compute_pointer = ffi.cast("void *", compute)
        _put(library, words, at.device, {
            "supports_op": ("bool(void *, struct ggml_tensor *)", self._supports_op),
            "init_backend": ("void *(void *, void *)", self._init_backend),
        })  # fmt: skip

    def supports(self, tensor: Handle) -> bool:
        """Whether llama.cpp's CPU runs an op, asked past the watcher."""
        return bool(self._supports(self.handle, tensor))

    def _supports_op(self, device: Handle, tensor: Handle) -> bool:
        answer = not self.watcher.is_relaxed and bool(self._supports(device, tensor))
        self.watcher.asked("CPU", tensor, answer)
        return answer

    def _init_backend(self, device: Handle, params: Handle) -> Handle:
        made = self._init(device, params)
        slot = self.library.interfaces.backend.slots["graph_compute"]
        self.library.ffi.cast("void **", made)[slot] = self._compute_pointer
        return made

    def _compute(self, _: Handle, graph: Handle) -> int:
        self.watcher.computed(graph)
        return 0
