"""Makes a pyggml device available to llama.cpp: its memory, kernels, streams and events; in the child.

llama.cpp's scheduler calls the device through ggml's interfaces. Each call becomes the call of the same name of
`Device`, `Backend` or `Buffer`, and is reported to a `Ledger`. Addresses in ggml's tensors are the device's own, so C
code that uses them as host memory fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..backend import Backend, Device, Event
from ..backends.host.machine import HostBlock
from ..backends.host.plan import HostPlan
from ..backends.host.race_watch import HOST, accesses_of
from ..backends.libggml.library import Handle
from ..backends.sim.device import SimBackend, SimDevice
from ..backends.sim.memory import SimBuffer
from ..buffer import Buffer, BufferType
from ..errors import BackendError, PyggmlError
from ..graph import GraphView
from ..tensor import Tensor
from ..types import Type
from .device import CPUHooks, Functions, PythonDevice, functions_of, put
from .host_memory import HostMemory
from .known import KnownCalls, repeats
from .ledger import Ledger, copied_name
from .library import DeviceLibrary
from .tensors import Translator

if TYPE_CHECKING:
    from pyggml.kernels.cpu.pool import Pool

__all__ = ["ComputingCPU", "ComputingDevice", "Machine"]


class Machine:
    """All pyggml devices in this process's llama.cpp.

    Attributes
    ----------
    devices : list of ComputingDevice
    error : BaseException or None
        The first exception in a call by llama.cpp since the last `take_error`.
    on_graph : callable or None
        Receives each graph that a device is given, and its stream; returns True if it computed the graph.
    dropped : set of str
        Waits that devices skip although llama.cpp requests them, by slot; for experiments.
    """

    def __init__(self, library: DeviceLibrary, cpu: Device) -> None:
        self.library = library
        self.host = HostMemory(library, cpu)
        self.translator = Translator(library, self.buffer_of)
        self.host.on_change = self.forget
        self.devices: list[ComputingDevice] = []
        self.buffers: dict[int, Buffer] = {}
        self.streams: dict[int, tuple[int, Backend]] = {}
        self.events: dict[int, tuple[int, int, Event]] = {}
        self.error: BaseException | None = None
        self.dropped: set[str] = set()
        self.on_graph: Callable[[int, Handle], bool] | None = None
        self.known = KnownCalls(library, self._refused, self.failed)
        self.ledger: Ledger

    def buffer_of(self, address: int) -> Buffer:
        """Return pyggml's buffer for one of ggml's."""
        return self.buffers.get(address) or self.host.of(address)

    def forget(self) -> None:
        """Forget tensors by address, because a buffer was freed."""
        self.known.take_events(None)
        self.known.forget()
        self.translator.forget()
        self.ledger.forget()

    # -- decodes -------------------------------------------------------------

    def begin(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """Begin a decode of micro-batches: tokens, tokens in the cache before, and outputs of each."""
        is_plain = len(parts) == 1 and not (self.ledger.takes_records or self.dropped or self.on_graph)
        self.known.begin(is_on=is_plain and repeats([d.device for d in self.devices]))
        self.ledger.begin(parts)

    def end(self) -> None:
        """End a decode: llama.cpp has waited for all work."""
        self.known.take_events(self.ledger)
        self.known.stop()
        self.ledger.end()

    def start(self) -> float:
        """Return the time at which a call begins, after those that were answered without Python."""
        self.known.take_events(None)
        return self.ledger.now()

    # -- failures ------------------------------------------------------------

    def _refused(self, plan: HostPlan, pool: Pool) -> None:
        plan.refuse(pool.take_error())

    def failed(self, error: BaseException) -> None:
        """Record the first exception; later ones follow from it."""
        self.known.stop()
        if self.error is None:
            self.error = error

    def take_error(self) -> BaseException | None:
        """Return the first exception since the last call as a `PyggmlError`, and forget it."""
        error, self.error = self.error, None
        if error is None or isinstance(error, PyggmlError):
            return error
        made = BackendError("llama", f"a callback raised {type(error).__name__}: {error}")
        made.__cause__ = error
        return made


class ComputingDevice(PythonDevice):
    """A pyggml device in llama.cpp's registry.

    Parameters
    ----------
    index : int
        Index among the machine's devices.
    threads : int, optional
        Threads that run the kernels of a simulated device.
    name : str
        Its name in llama.cpp; by default that of the device's memory.
    """

    is_async = has_events = True

    def __init__(
        self, machine: Machine, device: Device, index: int, *, threads: int | None = None, name: str = ""
    ) -> None:
        self.machine, self.device, self.index, self.threads = machine, device, index, threads
        self._n_events = 0
        self._events: dict[int, Handle] = {}
        super().__init__(machine.library, name or device.buffer_type.name)
        machine.devices.append(self)
        at = machine.library.interfaces
        machine.known.cover(self._buffer_functions.word, _covered(at.buffer.slots, "set_tensor", "get_tensor"))
        waits = ("get_tensor_async", "cpy_tensor_async", "synchronize", "graph_compute")
        machine.known.cover(self._backend_words, _covered(at.backend.slots, *waits))

    def _functions(self) -> dict[str, Functions]:
        buft = self.device.buffer_type
        return {
            "buffer_type": {
                "alloc_buffer": self._alloc_buffer,
                "get_alignment": lambda _: buft.alignment,
                "get_alloc_size": self._alloc_size,
            },
            "buffer": {
                "free_buffer": self._free_buffer,
                "get_base": lambda buffer: self.machine.buffers[buffer].base,
                "memset_tensor": self._memset,
                "set_tensor": self._set,
                "get_tensor": self._get,
                "cpy_tensor": self._copy,
                "clear": lambda buffer, value: self.machine.buffers[buffer].clear(value),
            },
            "backend": {
                "set_tensor_async": self._set_async,
                "get_tensor_async": self._get_async,
                "cpy_tensor_async": self._copy_async,
                "synchronize": self._synchronize,
                "graph_compute": self._compute,
                "event_record": self._event_record,
                "event_wait": self._event_wait,
            },
            "device": {
                "get_host_buffer_type": lambda _: self.host_buft,
                "supports_op": lambda _, t: self.machine.translator.ask(t, self.device.supports_op),
                "supports_buft": lambda _, buft: buft == self.buft,
                "offload_op": lambda _, t: self.device.offload_op(self.machine.translator.tensor(t, has_op=True)),
                "event_new": self._event_new,
                "event_free": self._event_free,
                "event_synchronize": self._event_synchronize,
            },
        }

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        return self.device.memory()

    def failed(self, error: BaseException) -> None:
        """Pass an exception to the machine."""
        self.machine.failed(error)

    # -- memory --------------------------------------------------------------

    def _alloc_buffer(self, _: Handle, size: int) -> Handle:
        buffer = self.device.buffer_type.alloc_buffer(size)
        made = self.new_buffer(size)
        self.machine.buffers[self.library.address(made)] = buffer
        return made

    def _free_buffer(self, address: int) -> None:
        self.machine.forget()
        self.machine.buffers.pop(address).close()

    def _alloc_size(self, _: Handle, t: Handle) -> int:
        translator = self.machine.translator
        if translator.is_quantized(t):
            return self.device.buffer_type.alloc_size(translator.tensor(t))
        return int(self.library.lib.ggml_nbytes(t))

    @property
    def host_buft(self) -> Handle:
        """Return the device's pinned buffer type, made on first use; null if it has none."""
        buft = self.device.host_buffer_type
        if buft is None:
            return self.ffi.NULL
        if buft.name not in self._pinned:
            self.machine.host.use_pinned(buft)
        return self.pinned_type(
            buft.name, partial(self._alloc_pinned, buft), {"get_alignment": lambda _: buft.alignment}
        )

    def _alloc_pinned(self, buft: BufferType, size: int) -> Handle:
        block = HostBlock(size, owner=buft.name, purpose="a buffer")
        made = self.library.lib.ggml_backend_cpu_buffer_from_ptr(self.library.pointer(block.address), size)
        self.machine.host.add(made, buft.name)

        def free(address: int) -> None:
            self.machine.host.remove(address)
            block.close()

        put(self.library, self.ffi.cast("void **", made), "buffer", {"free_buffer": free}, self.failed)
        return made

    # -- copies --------------------------------------------------------------

    def _placed(self, t: Handle) -> tuple[Tensor, Buffer]:
        tensor = self.machine.translator.known(t)
        buffer = tensor.buffer
        assert buffer is not None
        return tensor, buffer

    def _memset(self, _: int, t: Handle, value: int, offset: int, size: int) -> None:
        tensor, buffer = self._placed(t)
        buffer.memset_tensor(tensor, value, offset, size)

    def _set(self, _: int, t: Handle, data: int, offset: int, size: int) -> None:
        tensor, buffer = self._placed(t)
        start_s = self.machine.start()
        buffer.set_tensor(tensor, data, offset, size)
        self.machine.ledger.wrote(self.index, tensor, data, offset, size, start_s, is_async=False)
        if self.machine.known.is_on and isinstance(buffer, SimBuffer):
            ledger, name = self.machine.ledger, copied_name(tensor.name)

            def repeat(data: int, offset: int, size: int) -> None:
                buffer.device.at("copy", tensor.name)
                for traffic in buffer.counters:
                    traffic.count_in(size)
                if name is not None:
                    ledger.wrote(self.index, tensor, data, offset, size, 0.0, is_async=False)

            self.machine.known.learn_copy(
                "set_tensor", t, buffer.arena(tensor), buffer.counters, repeat, tells_address=name is not None
            )

    def _get(self, _: int, t: Handle, data: int, offset: int, size: int) -> None:
        tensor, buffer = self._placed(t)
        start_s = self.machine.start()
        buffer.get_tensor(tensor, data, offset, size)
        self.machine.ledger.read(self.index, tensor, data, size, start_s, is_async=False)
        self._learn_read("get_tensor", t, tensor, buffer, is_async=False)

    def _learn_read(self, kind: str, t: Handle, tensor: Tensor, buffer: Buffer, *, is_async: bool) -> None:
        if not (self.machine.known.is_on and isinstance(buffer, SimBuffer)):
            return
        ledger = self.machine.ledger

        def repeat(_: int, offset: int, size: int) -> None:
            buffer.device.at("copy", tensor.name)
            for traffic in buffer.counters:
                traffic.count_out(size)
            ledger.read(self.index, tensor, 0, size, 0.0, is_async=is_async)

        self.machine.known.learn_copy(kind, t, buffer.arena(tensor), buffer.counters, repeat, tells_address=False)

    def _copy(self, _: int, src: Handle, dst: Handle) -> bool:
        (source, _buffer), (target, buffer) = self._placed(src), self._placed(dst)
        start_s = self.machine.start()
        if not buffer.cpy_tensor(source, target):
            return False
        self.machine.ledger.moved(None, self.index, source, target, start_s, is_async=False)
        return True

    def _set_async(self, stream: int, t: Handle, data: int, offset: int, size: int) -> None:
        tensor, _ = self._placed(t)
        start_s = self.machine.start()
        self.machine.streams[stream][1].set_tensor_async(tensor, data, offset, size)
        self.machine.ledger.wrote(self.index, tensor, data, offset, size, start_s, is_async=True)

    def _get_async(self, stream: int, t: Handle, data: int, offset: int, size: int) -> None:
        tensor, buffer = self._placed(t)
        start_s = self.machine.start()
        self.machine.streams[stream][1].get_tensor_async(tensor, data, offset, size)
        self.machine.ledger.read(self.index, tensor, data, size, start_s, is_async=True)
        if tensor.type is not Type.I32:  # not ids of experts, which are read at once
            self._learn_read("get_tensor_async", t, tensor, buffer, is_async=True)

    def _copy_async(self, stream_src: int, stream_dst: int, src: Handle, dst: Handle) -> bool:
        source = self.machine.streams.get(stream_src)
        if source is None:
            if self.machine.known.is_on:
                self.machine.known.learn_stream("cpy_tensor_async", stream_src, None)
            return False
        start_s = self.machine.start()
        tensors = self._placed(src)[0], self._placed(dst)[0]
        if not self.machine.streams[stream_dst][1].cpy_tensor_async(source[1], *tensors):
            return False
        self.machine.ledger.moved(source[0], self.index, *tensors, start_s, is_async=True)
        return True

    # -- streams -------------------------------------------------------------

    def stream_made(self, address: int) -> None:
        """Open a stream of the device."""
        self.machine.known.forget()
        open_stream: Callable[..., Backend] = self.device.backend
        self.machine.streams[address] = self.index, open_stream(threads=self.threads)

    def stream_freed(self, address: int) -> None:
        """Close the stream."""
        _, stream = self.machine.streams.pop(address)
        stream.synchronize()
        stream.close()

    def _synchronize(self, stream: int) -> None:
        if "synchronize" in self.machine.dropped:
            return
        start_s = self.machine.start()
        self.machine.streams[stream][1].synchronize()
        self.machine.ledger.waited("synchronize", self.index, None, start_s)
        if self.machine.known.is_on:
            ledger = self.machine.ledger
            self.machine.known.learn_stream(
                "synchronize", stream, lambda *_: ledger.waited("synchronize", self.index, None, 0.0)
            )

    def _compute(self, stream: int, graph: Handle) -> int:
        machine = self.machine
        if machine.error is not None:
            return -1
        if machine.on_graph is not None and machine.on_graph(stream, graph):
            return 0
        view, nodes, uid = machine.translator.view(graph)
        start_s = machine.start()
        machine.streams[stream][1].graph_compute(view)
        machine.ledger.launched(self.index, view, nodes, uid, start_s)
        if machine.known.is_on and uid:
            self._learn_graph(stream, view, nodes, uid)
        return 0

    def _learn_graph(self, stream: int, view: GraphView, nodes: int, uid: int) -> None:
        backend, ledger, device = self.machine.streams[stream][1], self.machine.ledger, self.device
        if not (isinstance(backend, SimBackend) and isinstance(device, SimDevice)):
            return
        first = view.nodes[0].name if len(view) else ""

        def repeat(*_: int) -> None:
            device.at("compute", first)
            ledger.launched(self.index, view, nodes, uid, 0.0)

        plan = backend.plan_of(view)
        self.machine.known.learn_graph(stream, uid, nodes, plan, backend.pool, 0, repeat)

    # -- events --------------------------------------------------------------

    def _event_new(self, _: Handle) -> Handle:
        event = self.device.event_new()
        if event is None:
            return self.ffi.NULL
        made = self.ffi.new("void *[2]", [self.handle, self.ffi.NULL])
        address = self.library.address(made)
        self._events[address] = made
        self.machine.events[address] = self.index, self._n_events % self.machine.ledger.n_copies, event
        self._n_events += 1
        return self.ffi.cast("void *", made)

    def _event_free(self, _: Handle, address: int) -> None:
        self.machine.events.pop(address, None)
        self._events.pop(address, None)

    def _event_record(self, stream: int, address: int) -> None:
        if "event_record" in self.machine.dropped:
            return
        _, copy, event = self.machine.events[address]
        start_s = self.machine.start()
        self.machine.streams[stream][1].event_record(event)
        self.machine.ledger.recorded_event(self.index, copy, start_s)

    def _event_wait(self, stream: int, address: int) -> None:
        if "event_wait" in self.machine.dropped:
            return
        _, copy, event = self.machine.events[address]
        start_s = self.machine.start()
        self.machine.streams[stream][1].event_wait(event)
        self.machine.ledger.waited("event_wait", self.index, copy, start_s)

    def _event_synchronize(self, _: Handle, address: int) -> None:
        if "event_synchronize" in self.machine.dropped:
            return
        of, copy, event = self.machine.events[address]
        start_s = self.machine.start()
        event.synchronize()
        self.machine.ledger.waited("event_synchronize", of, copy, start_s)


def _covered(slots: dict[str, int], *names: str) -> dict[str, int]:
    return {name: slots[name] for name in names}


class ComputingCPU(CPUHooks):
    """llama.cpp's CPU device, which computes as usual; its computes and buffers are reported to the ledger."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        super().__init__(machine.library)
        library = machine.library
        self._hook_memory(library, library.lib.ggml_backend_cpu_buffer_type())

    def _functions(self) -> Functions:
        return {"init_backend": self._init_backend, "buffer_from_host_ptr": self._from_host}

    def failed(self, error: BaseException) -> None:
        """Pass an exception to the machine."""
        self.machine.failed(error)

    def _hook_memory(self, library: DeviceLibrary, buft: Handle) -> None:
        words = library.ffi.cast("void **", buft)
        name = library.text(library.lib.ggml_backend_buft_name(buft))
        alloc = functions_of(library, words, "buffer_type", ["alloc_buffer"])["alloc_buffer"]

        def allocate(buft: Handle, size: int) -> Handle:
            return self._added(alloc(buft, size), name)

        put(library, words, "buffer_type", {"alloc_buffer": allocate}, self.failed)

    def _from_host(self, device: Handle, pointer: Handle, size: int, largest: int) -> Handle:
        made = self.original["buffer_from_host_ptr"](device, pointer, size, largest)
        lib = self.library.lib
        return self._added(made, self.library.text(lib.ggml_backend_buft_name(lib.ggml_backend_buffer_get_type(made))))

    def _added(self, buffer: Handle, name: str) -> Handle:
        """Add a buffer, and remove it when it is freed."""
        library = self.library
        if buffer == library.ffi.NULL:
            return buffer
        self.machine.host.add(buffer, name)
        words = library.ffi.cast("void **", buffer)
        slot = library.interfaces.buffer.slots["free_buffer"]
        free: Any = None
        if words[slot] != library.ffi.NULL:
            free = functions_of(library, words, "buffer", ["free_buffer"])["free_buffer"]

        def freed(address: int) -> None:
            self.machine.host.remove(address)
            if free is not None:
                free(address)

        put(library, words, "buffer", {"free_buffer": freed}, self.failed)
        return buffer

    def _init_backend(self, device: Handle, params: Handle) -> Handle:
        made = self.original["init_backend"](device, params)
        words = self.library.ffi.cast("void **", made)
        compute = functions_of(self.library, words, "backend", ["graph_compute"])["graph_compute"]

        def computing(stream: int, graph: Handle) -> int:
            machine = self.machine
            if machine.error is not None:
                return -1
            view, nodes, uid = machine.translator.view(graph)
            if HOST.is_busy:
                HOST.by_host(accesses_of(view))
            start_s = machine.start()
            status = int(compute(stream, graph))
            ledger = machine.ledger
            ledger.launched(ledger.cpu, view, nodes, uid, start_s)
            if machine.known.is_on and uid:
                machine.known.learn_graph(
                    stream, uid, nodes, None, None, own, lambda *_: ledger.launched(ledger.cpu, view, nodes, uid, 0.0)
                )
            return status

        own = int(self.library.ffi.cast("intptr_t", compute))
        self.machine.known.forget()
        put(self.library, words, "backend", {"graph_compute": computing}, self.failed)
        slots = self.library.interfaces.backend.slots
        self.machine.known.cover(words, {"graph_compute": slots["graph_compute"]})
        return made
