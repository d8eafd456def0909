"""`PythonDevice`: a ggml device written in Python; `CPUHooks`: hooks in llama.cpp's CPU device; in the child.

Both consist of objects whose words are Python functions, registered in llama.cpp. Subclasses define the functions:
`capturing` receives graphs and computes nothing, `computing` runs them on a pyggml device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..backends.libggml.library import Handle
from .library import DeviceLibrary
from .slots import N_WORDS, Table

__all__ = ["CPUHooks", "Functions", "PythonDevice", "functions_of", "keep_for_ever", "put"]

_GPU = 1
_TENSOR = "struct ggml_tensor *"

#: Functions by the names of their slots.
Functions = dict[str, Callable[..., Any]]

#: The registry keeps pointers to a device for as long as the process lives.
_alive: list[object] = []

#: The C types of the functions.
_SIGNATURES = {
    "buffer_type": {
        "get_name": "void *(void *)",
        "alloc_buffer": "void *(void *, size_t)",
        "get_alignment": "size_t(void *)",
        "get_alloc_size": f"size_t(void *, {_TENSOR})",
        "is_host": "bool(void *)",
    },
    "buffer": {
        "free_buffer": "void(intptr_t)",
        "get_base": "intptr_t(intptr_t)",
        "memset_tensor": f"void(intptr_t, {_TENSOR}, uint8_t, size_t, size_t)",
        "set_tensor": f"void(intptr_t, {_TENSOR}, intptr_t, size_t, size_t)",
        "get_tensor": f"void(intptr_t, {_TENSOR}, intptr_t, size_t, size_t)",
        "cpy_tensor": f"bool(intptr_t, {_TENSOR}, {_TENSOR})",
        "clear": "void(intptr_t, uint8_t)",
    },
    "backend": {
        "get_name": "void *(intptr_t)",
        "free": "void(intptr_t)",
        "set_tensor_async": f"void(intptr_t, {_TENSOR}, intptr_t, size_t, size_t)",
        "get_tensor_async": f"void(intptr_t, {_TENSOR}, intptr_t, size_t, size_t)",
        "cpy_tensor_async": f"bool(intptr_t, intptr_t, {_TENSOR}, {_TENSOR})",
        "synchronize": "void(intptr_t)",
        "graph_compute": "int(intptr_t, struct cgraph_head *)",
        "graph_optimize": "void(intptr_t, struct cgraph_head *, void *)",
        "event_record": "void(intptr_t, intptr_t)",
        "event_wait": "void(intptr_t, intptr_t)",
    },
    "device": {
        "get_name": "void *(void *)",
        "get_description": "void *(void *)",
        "get_memory": "void(void *, size_t *, size_t *)",
        "get_type": "int(void *)",
        "get_props": "void(void *, struct props *)",
        "init_backend": "void *(void *, void *)",
        "get_buffer_type": "void *(void *)",
        "get_host_buffer_type": "void *(void *)",
        "buffer_from_host_ptr": "void *(void *, void *, size_t, size_t)",
        "supports_op": f"bool(void *, {_TENSOR})",
        "supports_buft": "bool(void *, void *)",
        "offload_op": f"bool(void *, {_TENSOR})",
        "event_new": "void *(void *)",
        "event_free": "void(void *, intptr_t)",
        "event_synchronize": "void(void *, intptr_t)",
    },
    "registry": {
        "get_name": "void *(void *)",
        "get_device_count": "size_t(void *)",
        "get_device": "void *(void *, size_t)",
    },
}
#: The result for C of a function that raised, if 0 does not mean failure.
_FAILED = {"graph_compute": -1}

OnError = Callable[[BaseException], None]


def keep_for_ever(thing: object) -> None:
    """Keep an object alive because llama.cpp may have a pointer to it."""
    _alive.append(thing)


def put(library: DeviceLibrary, words: Handle, kind: str, functions: Functions, on_error: OnError) -> None:
    """Write functions into the slots of an object; if one raises, ``on_error`` gets the exception and C a failure."""
    table: Table = getattr(library.interfaces, kind)

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
        on_error(error)

    for name, function in functions.items():
        made = library.ffi.callback(
            _SIGNATURES[kind][name], function, onerror=told, **({"error": _FAILED[name]} if name in _FAILED else {})
        )
        _alive.append(made)
        words[table.slots[name]] = library.ffi.cast("void *", made)


class PythonDevice(ABC):
    """A device with its own registry, buffer type, buffers and streams.

    Parameters
    ----------
    library : DeviceLibrary
        The library in which it is registered until the process ends.
    name : str
        Name of the device and its buffer type.

    Attributes
    ----------
    handle, buft : pointer
        The device and its buffer type.
    """

    is_async: bool = False
    has_events: bool = False

    def __init__(self, library: DeviceLibrary, name: str) -> None:
        _alive.append(self)
        self.library, self.ffi, self.name = library, library.ffi, name
        self._c_name = self.ffi.new("char[]", name.encode())
        self._guid = self.ffi.new("unsigned char[16]", b"pyggml-in-python")
        self._backends: dict[int, Handle] = {}
        self._pinned: dict[str, Handle] = {}
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
        own = self._functions()

        def fill(words: Handle, kind: str, functions: Functions) -> None:
            put(self.library, words, kind, functions | own.get(kind, {}), self.failed)

        fill(buft, "buffer_type", {"get_name": self._own_name})
        buft[at.buffer_type.fields["device"]] = self.handle
        fill(self._buffer_functions.word, "buffer", {})
        fill(self._backend_words, "backend", {"get_name": self._own_name, "free": self._free_backend})
        self._backend_words[at.backend.fields["guid"]] = ffi.cast("void *", self._guid)
        self._backend_words[at.backend.fields["device"]] = self.handle
        fill(device, "device", {
            "get_name": self._own_name,
            "get_description": self._own_name,
            "get_memory": self._memory,
            "get_type": lambda _: _GPU,
            "get_props": self._props,
            "init_backend": self._init_backend,
            "get_buffer_type": lambda _: self.buft,
        })  # fmt: skip
        device[at.device.fields["reg"]] = self.registry
        fill(registry, "registry", {
            "get_name": self._own_name, "get_device_count": lambda _: 1, "get_device": lambda *_: self.handle,
        })  # fmt: skip
        ffi.cast("int *", registry)[0] = at.api_version

    def _own_name(self, _: Handle) -> Handle:
        return self._c_name

    def new_buffer(self, size: int) -> Handle:
        """Return a new ggml buffer of the device's buffer type."""
        lib = self.library.lib
        return lib.ggml_backend_buffer_init(self.buft, self._buffer_functions[0], self.ffi.NULL, size)

    def pinned_type(self, name: str, alloc: Callable[[int], Handle], more: Functions) -> Handle:
        """Return the buffer type of the device's pinned memory, made once for each name: its buffers are the CPU's by another name.

        Parameters
        ----------
        alloc : callable
            Returns a CPU buffer of so many bytes, or null.
        more : dict
            Functions of the buffer type besides its name and buffers.

        Notes
        -----
        Mirrors `ggml_backend_cuda_host_buffer_type`.
        """
        if name not in self._pinned:
            at, words, c_name = (
                self.library.interfaces,
                self.ffi.new("void *[]", N_WORDS),
                self.ffi.new("char[]", name.encode()),
            )
            buft = self._pinned[name] = self.ffi.cast("void *", words)

            def alloc_buffer(_: Handle, size: int) -> Handle:
                made = alloc(size)
                if made != self.ffi.NULL:
                    self.ffi.cast("void **", made)[at.buffer.fields["buft"]] = buft
                return made

            own: Functions = {"get_name": lambda _: c_name, "alloc_buffer": alloc_buffer, "is_host": lambda _: True}
            put(self.library, words, "buffer_type", own | more, self.failed)
            words[at.buffer_type.fields["device"]] = self.handle
            keep_for_ever((words, c_name))
        return self._pinned[name]

    def _memory(self, _: Handle, free: Handle, total: Handle) -> None:
        free[0], total[0] = self.memory()

    def _props(self, _: Handle, props: Handle) -> None:
        props.name = props.description = self._c_name
        (props.memory_free, props.memory_total), props.type = self.memory(), _GPU
        props.device_id = self.ffi.NULL
        props.caps.is_async, props.caps.events = self.is_async, self.has_events

    def _init_backend(self, *_: Handle) -> Handle:
        made = self.ffi.new("void *[]", list(self._backend_words))
        address = self.library.address(made)
        self.stream_made(address)
        self._backends[address] = made
        return self.ffi.cast("void *", made)

    def _free_backend(self, address: int) -> None:
        self.stream_freed(address)
        self._backends.pop(address, None)

    # -- for subclasses ------------------------------------------------------

    @abstractmethod
    def _functions(self) -> dict[str, Functions]:
        """Return functions by kind of object and slot."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""

    @abstractmethod
    def failed(self, error: BaseException) -> None:
        """Receive an exception of a function that llama.cpp called."""

    def stream_made(self, address: int) -> None:
        """Receive a new stream; by default do nothing."""
        return

    def stream_freed(self, address: int) -> None:
        """Receive the end of a stream; by default do nothing."""
        return


class CPUHooks(ABC):
    """Replaces functions of llama.cpp's CPU device.

    The original functions are kept in ``original``, by slot.
    """

    def __init__(self, library: DeviceLibrary) -> None:
        _alive.append(self)
        self.library = library
        self.handle = library.lib.ggml_backend_dev_by_type(0)
        words = library.ffi.cast("void **", self.handle)
        own = self._functions()
        self.original = functions_of(library, words, "device", [*own, "supports_op"])
        put(library, words, "device", own, self.failed)

    def supports(self, tensor: Handle) -> bool:
        """Return whether llama.cpp's CPU supports an op, without the hooks."""
        return bool(self.original["supports_op"](self.handle, tensor))

    @abstractmethod
    def _functions(self) -> Functions:
        """Return the replacements of the CPU device's functions, by slot."""

    @abstractmethod
    def failed(self, error: BaseException) -> None:
        """Receive an exception of a function that llama.cpp called."""


def functions_of(library: DeviceLibrary, words: Handle, kind: str, names: list[str]) -> dict[str, Handle]:
    """Return callable functions from the slots of one of ggml's objects."""
    table: Table = getattr(library.interfaces, kind)
    found = {}
    for name in names:
        returned, _, arguments = _SIGNATURES[kind][name].partition("(")
        found[name] = library.ffi.cast(f"{returned}(*)({arguments}", words[table.slots[name]])
    return found
