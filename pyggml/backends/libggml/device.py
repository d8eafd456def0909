"""Devices of a real ggml library, with its memory and kernels, for pyggml's scheduler.

A name such as ``libggml:CPU``, ``libggml:CUDA0`` or ``libggml:Vulkan0`` contains the library's name of the device. The
library is the package ``libggml-python``, that of ``PYGGML_LIBGGML``, or the one in the name:
``libggml:/opt/llama.cpp/bin#CUDA0``.

A failed assertion of the library ends the process and cannot be caught. So everything is checked before it is handed to
the library: where tensors are, whether the device supports each node, what is known about its CPU device (`ggml_safe`),
and indices (`indices`). The library and pyggml have separate threads (`kernels.cpu.pool`). Both can run in one process;
neither survives a fork.
"""

from __future__ import annotations

import sys

from ...backend import Backend, Device, Event, answers_by_kind
from ...buffer import BufferType
from ...errors import ComputeError, DeviceUnavailableError
from ...graph import GraphView
from ...tensor import Tensor
from ...types import DeviceType
from ..host.ggml_safe import is_safe_on_cpu
from ..host.machine import available_cores, is_writable
from .graph import LibraryPlan
from .library import Handle, Library, load_library
from .memory import LibraryBuffer, LibraryBufferType
from .tensors import MAX_ANSWERS, can_translate, question, signature

_TYPES = {0: DeviceType.CPU, 1: DeviceType.GPU, 2: DeviceType.IGPU}


class LibraryEvent(Event):
    """An event of the library."""

    __slots__ = ("_library", "handle")

    def __init__(self, library: Library, handle: Handle) -> None:
        self._library = library
        self.handle = library.ffi.gc(handle, library.lib.ggml_backend_event_free)

    def synchronize(self) -> None:
        """Block the host until the point is reached."""
        self._library.lib.ggml_backend_event_synchronize(self.handle)


class LibraryDevice(Device):
    """A device of the library.

    Parameters
    ----------
    handle
        The library's.
    """

    def __init__(self, library: Library, handle: Handle) -> None:
        lib = library.lib
        self.library, self.handle = library, handle
        self.library_name = library.text(lib.ggml_backend_dev_name(handle))
        self.name = f"libggml:{self.library_name}"
        described = library.text(lib.ggml_backend_dev_description(handle))
        self.description = f"{described}, by ggml {library.version}"
        self.type = _TYPES.get(int(lib.ggml_backend_dev_type(handle)), DeviceType.ACCEL)
        self._buft = self._buffer_type(lib.ggml_backend_dev_buffer_type(handle))
        host = lib.ggml_backend_dev_host_buffer_type(handle)
        self._mapped_buft: LibraryBufferType | None = None
        self._host_buft = None if host == library.ffi.NULL else self._buffer_type(host)
        # these say yes to everything: to what ends this process, or a server's
        self._is_trusting = self.type is DeviceType.CPU or self.library_name.startswith("RPC")
        self._answers: dict[tuple[object, ...], bool] = {}

    def _buffer_type(self, handle: Handle) -> LibraryBufferType:
        name = self.library.text(self.library.lib.ggml_backend_buft_name(handle))
        return LibraryBufferType(f"libggml:{name}", handle, self)

    @property
    def buffer_type(self) -> LibraryBufferType:
        """The device's memory."""
        return self._buft

    @property
    def host_buffer_type(self) -> LibraryBufferType | None:
        """Pinned host memory, if the device has such."""
        return self._host_buft

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        sizes = self.library.ffi.new("size_t[2]")
        self.library.lib.ggml_backend_dev_memory(self.handle, sizes, sizes + 1)
        return int(sizes[0]), int(sizes[1])

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Return whether the device supports the node, and is known not to end the process."""
        if not can_translate(self.library, op) or (self._is_trusting and not is_safe_on_cpu(op)):
            return False
        return self._ask(op)

    def _ask(self, op: Tensor) -> bool:
        key = signature(op)
        known = self._answers.get(key)
        if known is None:
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            asked, _context = question(self.library, op)
            known = self._answers[key] = bool(self.library.lib.ggml_backend_dev_supports_op(self.handle, asked))
        return known

    def supports_buft(self, buft: BufferType) -> bool:
        """Return whether the memory is the same library's and the device supports it."""
        if not isinstance(buft, LibraryBufferType) or buft.library is not self.library:
            return False
        return bool(self.library.lib.ggml_backend_dev_supports_buft(self.handle, buft.handle))

    @answers_by_kind
    def offload_op(self, op: Tensor) -> bool:
        """Return whether the device offers to run an op with host weights."""
        if not can_translate(self.library, op):
            return False
        asked, _context = question(self.library, op)
        return bool(self.library.lib.ggml_backend_dev_offload_op(self.handle, asked))

    def buffer_from_host(self, address: int, size: int, owner: object) -> LibraryBuffer | None:
        """Return a buffer over existing memory, such as a mapped file's, which ``owner`` keeps alive.

        None for devices that do not compute on the processor, and if the address is not aligned.

        Notes
        -----
        Mirrors `ggml_backend_cpu_buffer_from_ptr`. Differs: read-only memory stays so; an address that is not aligned
        gives None, upstream aborts.
        """
        library = self.library
        if self.type is not DeviceType.CPU or address % self._buft.alignment:
            return None
        made = library.lib.ggml_backend_cpu_buffer_from_ptr(library.pointer(address), size)
        if self._mapped_buft is None:
            self._mapped_buft = self._buffer_type(library.lib.ggml_backend_buffer_get_type(made))
        return LibraryBuffer(self._mapped_buft, made, owner=owner, is_writable=is_writable(owner))

    def event_new(self) -> LibraryEvent | None:
        """Return a new event, if the device has such."""
        made = self.library.lib.ggml_backend_event_new(self.handle)
        return None if made == self.library.ffi.NULL else LibraryEvent(self.library, made)

    def backend(self, *, threads: int | None = None) -> LibraryBackend:
        """Return a new stream of work; ``threads`` is for devices that compute on the processor."""
        return LibraryBackend(self, threads=threads)


class LibraryBackend(Backend):
    """A stream of work on a device of the library.

    Raises
    ------
    DeviceUnavailableError
        The library cannot start it.
    """

    device: LibraryDevice

    def __init__(self, device: LibraryDevice, *, threads: int | None = None) -> None:
        self.device = device
        self.library = library = device.library
        self.name = device.name
        made = library.lib.ggml_backend_dev_init(device.handle, library.ffi.NULL)
        if made == library.ffi.NULL:
            raise DeviceUnavailableError(self.name, "the library cannot start it")
        self._handle: Handle = made
        self._set_threads(available_cores() if threads is None else threads)

    def _set_threads(self, threads: int) -> None:
        library = self.library
        reg = library.lib.ggml_backend_dev_backend_reg(self.device.handle)
        found = library.lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_set_n_threads")
        if found != library.ffi.NULL:
            library.ffi.cast("void (*)(void *, int)", found)(self._handle, threads)

    @property
    def handle(self) -> Handle:
        """The library's backend.

        Raises
        ------
        DeviceUnavailableError
            It was closed.
        """
        if self._handle is None:
            raise DeviceUnavailableError(self.name, "it was closed")
        return self._handle

    def graph_compute(self, graph: GraphView) -> None:
        """Hand the nodes to the device; they are translated the first time.

        Raises
        ------
        BackendError
            A tensor of a node is in other memory: a split input was not copied.
        ExpertIdError
            An expert id is out of bounds.
        ComputeError
            The device cannot run a node, a row index is out of bounds, or the device failed.
        """
        plan = graph.plan
        if not isinstance(plan, LibraryPlan) or not plan.is_for(self, graph):
            plan = graph.plan = LibraryPlan(self, graph)
        plan.run()

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self.library.lib.ggml_backend_synchronize(self.handle)

    # -- copies --------------------------------------------------------------

    def _shadow(self, tensor: Tensor, *, is_target: bool = False) -> Handle:
        storage = tensor.storage
        if not isinstance(storage, LibraryBuffer) or storage.library is not self.library or tensor.data is None:
            raise ComputeError(self.name, "a tensor is not in the library's memory", node=tensor.name)
        return storage.target(tensor) if is_target else storage.shadow(tensor)

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into a tensor, in stream order; the memory must stay until then."""
        self.library.lib.ggml_backend_tensor_set_async(
            self.handle, self._shadow(tensor, is_target=True), self.library.pointer(address), offset, size
        )

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of a tensor to host memory, in stream order."""
        self.library.lib.ggml_backend_tensor_get_async(
            self.handle, self._shadow(tensor), self.library.pointer(address), offset, size
        )

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Copy from another device of the same library, as it does that; False for any other."""
        storage = src.storage
        if (
            not isinstance(backend_src, LibraryBackend)
            or backend_src.library is not self.library
            or not isinstance(storage, LibraryBuffer)
            or storage.library is not self.library
        ):
            return False
        if src.is_empty:
            return True
        self.library.lib.ggml_backend_tensor_copy_async(
            backend_src.handle, self.handle, storage.shadow(src), self._shadow(dst, is_target=True)
        )
        return True

    # -- events --------------------------------------------------------------

    def event_record(self, event: Event) -> None:
        """Record an event after all work submitted so far."""
        assert isinstance(event, LibraryEvent)
        self.library.lib.ggml_backend_event_record(event.handle, self.handle)

    def event_wait(self, event: Event) -> None:
        """Make work submitted from now on wait for an event; for an event of another kind the host waits."""
        if isinstance(event, LibraryEvent) and self.library is event._library:
            self.library.lib.ggml_backend_event_wait(self.handle, event.handle)
        else:
            event.synchronize()

    def close(self) -> None:
        """End the stream."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self.library.lib.ggml_backend_free(handle)

    def __del__(self) -> None:
        # without a handle if making it failed; and at the end of the process the system takes all back
        if hasattr(self, "_handle") and not sys.is_finalizing():
            self.close()


# -- the registry's questions ----------------------------------------------------

_devices: dict[Library, list[LibraryDevice]] = {}


def _of_library(given: str = "") -> list[LibraryDevice]:
    """Return a library's devices, always the same objects, because schedulers compare buffer types by identity."""
    library = load_library(given)
    if library not in _devices:
        _devices[library] = [LibraryDevice(library, handle) for handle in library.device_handles()]
    return _devices[library]


def devices() -> list[Device]:
    """Return the devices of the installed or configured library; an empty list, not an error, without one."""
    try:
        return list(_of_library())
    except DeviceUnavailableError:
        return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> LibraryDevice:
    """Return the device of a name as the library has it (``CUDA0``), or of a library and a name (``PATH#CUDA0``).

    Without a name it is the ``index``-th device that is not a CPU, or else the CPU.

    Raises
    ------
    DeviceUnavailableError
        There is no library, or it lacks the device.
    """
    path, _, name = spec.rpartition("#")
    found = _of_library(path)
    if not name:
        chosen = [d for d in found if d.type is not DeviceType.CPU][index : index + 1] or found[:1]
    else:
        chosen = [d for d in found if d.library_name.lower() == name.lower()]
    if not chosen:
        names = ", ".join(d.library_name for d in found) or "none"
        raise DeviceUnavailableError(
            f"libggml:{spec}",
            "the library has no such device",
            hint=f"its devices: {names}; from {load_library(path).path}",
        )
    return chosen[0]


def why_missing() -> str:
    """Return one line that says why `devices` is empty; an empty text if it is not."""
    try:
        return "" if _of_library() else f"{load_library().path} offers no device"
    except DeviceUnavailableError as error:
        return str(error).removeprefix("libggml: ")
