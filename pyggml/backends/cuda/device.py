"""NVIDIA cards: device and pinned memory, streams and events, and the ops that an expert's feed-forward needs.

What has no kernel here (`CudaDevice.supports_op`) the scheduler gives to the CPU. A split becomes a plan of launches
once (`pyggml.kernels.cuda.launch`); computing it puts the launches on the backend's stream and returns. No op reads
anything on the host. All that depends on a real driver is behind `driver`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ... import config
from ...backend import Backend, Device, Event, answers_by_kind, op_batch_size, unsupported_op
from ...buffer import Buffer, BufferType
from ...errors import BackendError, ComputeError, DeviceUnavailableError
from ...graph import GraphView, Snapshot
from ...tensor import Tensor
from ...types import DeviceType, TensorFlag
from ..host.machine import HostBuffer
from .driver import Card, DriverEvent, Function, Stream, system_cards
from .ops import launches_of, reason_refused

if TYPE_CHECKING:
    from ...kernels.cuda.launch import Launch


#: as upstream's buffers
ALIGNMENT = 128
#: Oldest compute capability that kernels are compiled for.
MIN_CC = (7, 5)


class CudaBufferType(BufferType):
    """Memory of one card."""

    __slots__ = ("owner",)

    def __init__(self, owner: CudaDevice) -> None:
        super().__init__(owner.name, alignment=ALIGNMENT)
        self.owner = owner
        self.device = owner

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes of a tensor; rows of quantised types are padded to 512 elements.

        Notes
        -----
        Mirrors `ggml_backend_cuda_buffer_type_get_alloc_size`. Our kernels do not read so far, but sizes stay
        upstream's.
        """
        size = tensor.nbytes
        if tensor.type.is_quantized and tensor.ne[0] % 512:
            size += tensor.type.row_size(512 - tensor.ne[0] % 512)
        return size

    def _alloc(self, size: int) -> CudaBuffer:
        return CudaBuffer(self, size, self.owner.card.alloc(size))


class CudaBuffer(Buffer):
    """A piece of a card's memory. Copies through it are done when they return; they wait for no backend."""

    __slots__ = ("_is_open", "device")

    def __init__(self, buft: CudaBufferType, size: int, base: int) -> None:
        super().__init__(buft, size, base)
        self.device = buft.owner
        self._is_open = True

    @property
    def is_closed(self) -> bool:
        """Whether the memory was freed."""
        return not self._is_open

    def _at(self, tensor: Tensor, offset: int) -> int:
        self.check_open(tensor)
        assert tensor.data is not None
        return tensor.data + offset

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into the tensor."""
        self.device.copies.copy_in(self._at(tensor, offset), address, size)
        self.device.copies.synchronize()

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        self.device.copies.copy_out(address, self._at(tensor, offset), size)
        self.device.copies.synchronize()

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor."""
        self.device.copies.fill(self._at(tensor, offset), value, size)
        self.device.copies.synchronize()

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from this card's memory or another's; False for any other memory."""
        storage = src.storage
        if not isinstance(storage, CudaBuffer) or not storage.device.card.can_reach(self.device.card):
            return False
        stream = storage.device.copies
        stream.copy(self.device.card, self._at(dst, 0), storage._at(src, 0), src.nbytes)
        stream.synchronize()
        return True

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        self.device.copies.fill(self.base, value, self.size)
        self.device.copies.synchronize()

    def close(self) -> None:
        """Give the memory back to the card."""
        if self._is_open:
            self._is_open = False
            self.device.card.free(self.base)

    def __del__(self) -> None:
        # not open if making it failed; and at the end of the process the driver frees everything itself
        if hasattr(self, "_is_open") and not sys.is_finalizing():
            self.close()


class PinnedBufferType(BufferType):
    """Host memory that a card copies from and to without help.

    Notes
    -----
    Mirrors `ggml_backend_cuda_host_buffer_type`.
    """

    __slots__ = ("owner",)

    def __init__(self, owner: CudaDevice) -> None:
        super().__init__("CUDA_Host", alignment=ALIGNMENT, is_host=True)
        self.owner = owner
        self.device = owner

    def _alloc(self, size: int) -> PinnedBuffer:
        return PinnedBuffer(self, size, self.owner.card)


class PinnedBuffer(HostBuffer):
    """A piece of pinned host memory."""

    __slots__ = ()

    def __init__(self, buft: PinnedBufferType, size: int, card: Card) -> None:
        super().__init__(buft, card.alloc_host(size), size, card)

    def close(self) -> None:
        """Give the memory back to the system."""
        card, self.owner = self.owner, None
        if isinstance(card, Card):
            card.free_host(self.base)

    def __del__(self) -> None:
        if hasattr(self, "owner") and not sys.is_finalizing():
            self.close()


class CudaEvent(Event):
    """A point in a backend's stream."""

    __slots__ = ("driver_event",)

    def __init__(self, driver_event: DriverEvent) -> None:
        self.driver_event = driver_event

    def synchronize(self) -> None:
        """Block the host until the point is reached."""
        self.driver_event.synchronize()


class CudaDevice(Device):
    """A card.

    Parameters
    ----------
    card : Card
        The driver's view of it.

    Raises
    ------
    DeviceUnavailableError
        The card is older than the kernels' oldest target.
    """

    def __init__(self, card: Card) -> None:
        self.name = f"CUDA{card.index}"
        self.description = f"{card.name}, compute capability {card.cc[0]}.{card.cc[1]}"
        self.type = DeviceType.GPU
        if card.cc < MIN_CC:
            raise DeviceUnavailableError(
                self.name,
                f"{self.description} is too old: {MIN_CC[0]}.{MIN_CC[1]} is needed",
                hint="Turing (RTX 20, T4) and later have it",
            )
        self.card = card
        self._copies: Stream | None = None
        self._functions: dict[str, tuple[Function, tuple[str, ...]]] = {}
        self._buft = CudaBufferType(self)
        self._host_buft = PinnedBufferType(self)
        self._offload_min_batch = config.op_offload_min_batch()

    @property
    def buffer_type(self) -> CudaBufferType:
        """The card's memory."""
        return self._buft

    @property
    def host_buffer_type(self) -> PinnedBufferType:
        """Pinned host memory."""
        return self._host_buft

    @property
    def copies(self) -> Stream:
        """The stream of copies for which the host waits."""
        if self._copies is None:
            self._copies = self.card.stream()
        return self._copies

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        return self.card.memory()

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Whether there is a kernel for the op, its types and its strides."""
        return not reason_refused(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether it is this card's own memory."""
        return buft is self._buft

    @answers_by_kind
    def offload_op(self, op: Tensor) -> bool:
        """Whether the batch is large enough to be worth copying the weights.

        Notes
        -----
        Mirrors `ggml_backend_cuda_device_offload_op`.
        """
        return op_batch_size(op) >= self._offload_min_batch

    def event_new(self) -> CudaEvent:
        """Return a new event."""
        return CudaEvent(self.card.event())

    def backend(self) -> CudaBackend:
        """Return a new stream of work."""
        return CudaBackend(self)

    def function(self, name: str) -> tuple[Function, tuple[str, ...]]:
        """Return a kernel, compiled and loaded at its first use, and the types of its parameters."""
        known = self._functions.get(name)
        if known is None:
            try:
                from ...kernels.cuda import compiler

                ptx = compiler.ptx(name, compiler.target_for(self.card.cc))
                types = tuple(p.type for p in compiler.kernel(name).params)
            except (ImportError, OSError, RuntimeError) as error:  # what numba-cuda raises without its libraries
                raise BackendError(
                    self.name,
                    f"the kernel {name} cannot be compiled: {str(error).splitlines()[0]}",
                    hint=config.install_hint("cuda"),
                ) from error
            known = self._functions[name] = (self.card.load(ptx.text, ptx.entry), types)
        return known


class _Plan:
    """The launches of a range of nodes.

    Attributes
    ----------
    snapshot, scratch : Snapshot, int
        What the plan was made for: of the graph, the nodes' addresses, the scratch memory's address.
    """

    __slots__ = ("device", "launches", "scratch", "snapshot")

    def __init__(self, device: CudaDevice, snapshot: Snapshot, scratch: int, launches: list[Launch]) -> None:
        self.device, self.snapshot, self.scratch = device, snapshot, scratch
        self.launches = [(*device.function(one.kernel), one.grid, one.block, one.args) for one in launches]


class CudaBackend(Backend):
    """A stream of work on a card."""

    def __init__(self, device: CudaDevice) -> None:
        self.device: CudaDevice = device
        self.name = device.name
        self.stream = device.card.stream()
        self._copied = device.card.event()
        self._scratch = (0, 0)  #: address and size of what ops need beside their tensors
        self._is_open = True

    # -- work ----------------------------------------------------------------

    def graph_compute(self, graph: GraphView) -> None:
        """Put the nodes' launches on the stream; the plan is made at the first time and kept in the range.

        Raises
        ------
        BackendError
            A tensor of a node is in other memory: a split input was not copied.
        UnsupportedOpError
            A node has no kernel.
        OutOfMemoryError
            The card has no room for scratch memory.
        """
        for function, types, grid, block, args in self._plan(graph).launches:
            self.stream.launch(function, grid, block, args, types)

    def _plan(self, graph: GraphView) -> _Plan:
        nodes = graph.nodes
        kept = graph.plan
        if (
            isinstance(kept, _Plan)
            and kept.device is self.device
            and kept.snapshot.serves(graph)
            and kept.scratch == self._scratch[0]
        ):
            return kept
        todo = [n for n in nodes if n.flags & TensorFlag.COMPUTE and not n.op.is_empty and not n.is_empty]
        for node in todo:
            self._check(node)
        launches = self._launches(todo)
        plan = graph.plan = _Plan(self.device, Snapshot(nodes), self._scratch[0], launches)
        return plan

    def _launches(self, nodes: list[Tensor]) -> list[Launch]:
        from ...kernels.cuda.launch import Workspace

        needed = Workspace()
        for node in nodes:
            launches_of(node, needed)
        self._reserve_scratch(needed.size)
        work = Workspace(self._scratch[0], needed.sizes)
        return [one for node in nodes for one in launches_of(node, work)]

    def _check(self, node: Tensor) -> None:
        reason = reason_refused(node)
        if reason:
            raise unsupported_op(node, (self,), reason=reason)
        for tensor in (node, *node.src):
            if tensor is not None and not tensor.is_empty:
                self._own(tensor)

    def _own(self, tensor: Tensor) -> CudaBuffer:
        storage = tensor.storage
        if not isinstance(storage, CudaBuffer) or storage.device is not self.device or tensor.data is None:
            where = "in no memory" if storage is None else f"in {storage.buft.name}"
            raise BackendError(
                self.name, f"'{tensor.name}' is {where}, not in the card's memory", hint="it was not copied"
            )
        return storage

    def _reserve_scratch(self, size: int) -> None:
        """Make scratch memory at least so large; launches on one stream can share it."""
        address, have = self._scratch
        if size <= have:
            return
        self.synchronize()
        if have:
            self._scratch = (0, 0)
            self.device.card.free(address)
        self._scratch = (self.device.card.alloc(size), size)

    def synchronize(self) -> None:
        """Let the host wait until all work is done.

        Raises
        ------
        ComputeError
            Some of it failed on the card.
        """
        try:
            self.stream.synchronize()
        except BackendError as error:
            raise ComputeError(self.name, error.message, hint=error.hint) from error

    # -- copies --------------------------------------------------------------

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into a tensor, in stream order; the memory must stay until then."""
        self.stream.copy_in(self._own(tensor)._at(tensor, offset), address, size)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of a tensor to host memory, in stream order."""
        self.stream.copy_out(address, self._own(tensor)._at(tensor, offset), size)

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Copy from a card, in the order of both streams; False for any other memory.

        Notes
        -----
        Mirrors `ggml_backend_cuda_cpy_tensor_async`: the copy goes onto the source's stream, and this stream waits for
        it. Differs: the source's stream first waits for what this one still does, which may use the destination.
        """
        storage = src.storage
        if not isinstance(storage, CudaBuffer) or not isinstance(backend_src, CudaBackend):
            return False
        card = backend_src.device.card
        if storage.device is not backend_src.device or not card.can_reach(self.device.card):
            return False
        if src.is_empty:
            return True
        target = self._own(dst)._at(dst, 0)
        if backend_src is not self:
            self.stream.record(self._copied)
            backend_src.stream.wait(self._copied)
        backend_src.stream.copy(self.device.card, target, storage._at(src, 0), src.nbytes)
        if backend_src is not self:
            backend_src.stream.record(backend_src._copied)
            self.stream.wait(backend_src._copied)
        return True

    # -- events --------------------------------------------------------------

    def event_record(self, event: Event) -> None:
        """Let an event stand for all work given so far."""
        assert isinstance(event, CudaEvent)
        self.stream.record(event.driver_event)

    def event_wait(self, event: Event) -> None:
        """Let work given from now on wait for an event, also of another card."""
        if isinstance(event, CudaEvent):
            self.stream.wait(event.driver_event)
        else:  # as upstream does for events of another kind: nothing else is possible
            event.synchronize()

    def close(self) -> None:
        """Give the stream and its scratch memory back."""
        if self._is_open:
            self._is_open = False
            self.stream.synchronize()
            if self._scratch[1]:
                self.device.card.free(self._scratch[0])
            self.stream.close()


# -- the registry's questions ----------------------------------------------------


def devices() -> list[Device]:
    """Return the cards that can be used; none where there are none, with no error."""
    try:
        return [CudaDevice(card) for card in system_cards() if card.cc >= MIN_CC]
    except DeviceUnavailableError:
        return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> CudaDevice:
    """Return the card of a number (``cuda:1``); without one, the ``index``-th.

    Raises
    ------
    DeviceUnavailableError
        There is none; the text says why in one line.
    """
    if spec and not spec.isdecimal():
        raise DeviceUnavailableError("cuda", f"'{spec}' is no number of a card", hint="write cuda:0")
    cards: Sequence[Card] = system_cards()
    number = int(spec) if spec else index
    if number >= len(cards):
        there = "is one card" if len(cards) == 1 else f"are {len(cards)} cards"
        raise DeviceUnavailableError(f"cuda:{number}", f"there {there}", hint="see `pyggml devices`")
    return CudaDevice(cards[number])


def why_missing() -> str:
    """Say in one line why `devices` is empty; empty text if it is not."""
    try:
        cards = system_cards()
    except DeviceUnavailableError as error:
        return error.message.removeprefix("cuda: ")
    if any(card.cc >= MIN_CC for card in cards):
        return ""
    return f"{cards[0].name} is too old: compute capability {MIN_CC[0]}.{MIN_CC[1]} is needed"
