"""Mock devices: every ability as asked for, every call noted, nothing computed.

Two uses. A replay gives each backend the abilities of a scheduler case and compares the calls with those that the real
scheduler made. A plan (``mock:CUDA0``) asks what would happen on a device that nobody owns.

Addresses are made up, far above any that the process can have, so that a call may be given either kind. Only tensors of
type I32 have bytes, as nothing else steers the scheduler; weights of any size cost nothing.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..backend import AddAllocDep, Backend, Device, Event, op_batch_size
from ..buffer import Buffer, BufferType
from ..errors import ComputeError, DeviceUnavailableError, OutOfMemoryError
from ..graph import GraphView
from ..tensor import Tensor
from ..types import MAX_NAME, SIZE_MAX, BufferUsage, DeviceType, Op, Type

__all__ = [
    "BackendAbilities",
    "BufferTypeAbilities",
    "Capabilities",
    "FailCompute",
    "MockBackend",
    "MockBuffer",
    "MockBufferType",
    "MockDevice",
    "MockEvent",
    "MockMemory",
    "Note",
    "OffloadWish",
    "OpSupport",
    "Optimize",
    "devices",
    "ignore",
    "open_device",
    "short_name",
    "why_missing",
]

#: Takes one call, in the form of a trace: its name, then its facts.
Note = Callable[[list[object]], None]


def ignore(call: list[object]) -> None:
    """Note nothing."""


def short_name(tensor: Tensor) -> str:
    """Return a name as traces print it, cut to the length of upstream's array."""
    return tensor.name[:MAX_NAME]


# -- abilities ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BufferTypeAbilities:
    """What a mock buffer type is and can do."""

    name: str
    is_host: bool = False
    alignment: int = 64  #: bytes
    max_size: int = SIZE_MAX  #: bytes of one buffer
    quant_row: int = 0  #: rows of quantised types are padded to a multiple of this many elements
    extra_bytes: int = 0  #: added to every tensor
    round_to_bytes: int = 1  #: sizes are rounded up to a multiple of it
    cpy_from: frozenset[str] | None = None  #: buffer types that its buffers copy from; None: no `cpy_tensor`
    alloc_limit: int = 0  #: bytes above which an allocation fails; 0: never


@dataclass(frozen=True, slots=True)
class OpSupport:
    """Which ops a mock device runs; view ops always, unless denied."""

    allow: frozenset[Op] | None = None  #: only these; None: all
    deny: frozenset[Op] = frozenset()  #: not these, if all are allowed
    min_batch: Mapping[Op, int] = field(default_factory=dict)
    deny_src0_types: frozenset[Type] = frozenset()

    def __call__(self, op: Tensor) -> bool:
        """Whether an op can be run."""
        kind = op.op
        if kind in self.deny if self.allow is None else kind not in self.allow and not kind.is_empty:
            return False
        least = self.min_batch.get(kind, 0)
        if least and op_batch_size(op) < least:
            return False
        src0 = op.src[0] if op.src and not kind.is_empty else None
        return src0 is None or src0.type not in self.deny_src0_types


@dataclass(frozen=True, slots=True)
class OffloadWish:
    """Which ops a mock device wants although their weights lie in host memory."""

    min_batch: int
    ops: frozenset[Op] | None = None  #: None: all

    def __call__(self, op: Tensor) -> bool:
        """Whether the op is wanted."""
        return (self.ops is None or op.op in self.ops) and op_batch_size(op) >= self.min_batch


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Optional calls that a mock backend has; without one, the default of `Backend` does."""

    synchronize: bool = True
    set_async: bool = False
    get_async: bool = False
    events: bool = False
    cpy_async_from: frozenset[str] | None = None  #: buffer types that it copies from; None: no `cpy_tensor_async`


@dataclass(frozen=True, slots=True)
class FailCompute:
    """Computing a graph that holds a node of this name fails."""

    node: str
    status: int = -1
    times: int | None = None  #: the first so many times; None: always


@dataclass(frozen=True, slots=True)
class Optimize:
    """What `graph_optimize` does: order nodes, and keep tensors allocated until another."""

    order: tuple[str, ...] = ()
    keep: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BackendAbilities:
    """What a mock device and its backend are and can do."""

    name: str
    type: DeviceType
    buft: str
    bufts: frozenset[str]
    ops: OpSupport = OpSupport()
    offload: OffloadWish | None = None
    caps: Capabilities = Capabilities()
    fail_compute: FailCompute | None = None
    optimize: Optimize | None = None


# -- memory ------------------------------------------------------------------

_PAGE = 1 << 16
#: Above every address of a process (2^57 at most), below 2^63 so that it fits a signed word.
_FIRST_ADDRESS = 1 << 60


class MockMemory:
    """An address space of made-up addresses, of which only pages written to exist.

    Notes
    -----
    Addresses are never given out twice, so bytes of a freed buffer do not come back: fresh memory is zero.
    """

    __slots__ = ("_bases", "_next", "_pages", "_ranges")

    def __init__(self) -> None:
        self._next = _FIRST_ADDRESS
        self._bases: list[int] = []  # ascending, of what is allocated now
        self._ranges: dict[int, tuple[int, str]] = {}  # base: end, label
        self._pages: dict[int, bytearray] = {}

    def alloc(self, size: int, alignment: int, label: str) -> int:
        """Return the address of new memory."""
        alignment = max(alignment, _PAGE)
        base = -(-self._next // alignment) * alignment
        end = base + max(-(-size // _PAGE), 1) * _PAGE
        self._next = end
        self._bases.append(base)
        self._ranges[base] = end, label
        return base

    def free(self, base: int) -> None:
        """Give memory back, and its bytes."""
        end, _ = self._ranges.pop(base)
        self._bases.remove(base)
        for page in [p for p in self._pages if base <= p * _PAGE < end]:
            del self._pages[page]

    def find(self, address: int) -> list[object]:
        """Return label and offset of the buffer at an address, ``[None, 0]`` if it is of none."""
        i = bisect_right(self._bases, address) - 1
        if i >= 0:
            base = self._bases[i]
            end, label = self._ranges[base]
            if address < end:
                return [label, address - base]
        return [None, 0]

    def copy(self, dst: int, src: int, size: int) -> None:
        """Copy bytes between addresses, made up or of the process."""
        self.write(dst, self.read(src, size))

    def read(self, address: int, size: int) -> bytes:
        """Return bytes at an address."""
        if address < _FIRST_ADDRESS:
            return ctypes.string_at(address, size)
        data = bytearray()
        while len(data) < size:
            number, start = divmod(address + len(data), _PAGE)
            n = min(_PAGE - start, size - len(data))
            page = self._pages.get(number)
            data += bytes(n) if page is None else page[start : start + n]
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address."""
        if address < _FIRST_ADDRESS:
            ctypes.memmove(address, data, len(data))
            return
        done = 0
        while done < len(data):
            number, start = divmod(address + done, _PAGE)
            n = min(_PAGE - start, len(data) - done)
            page = self._pages.setdefault(number, bytearray(_PAGE))
            page[start : start + n] = data[done : done + n]
            done += n


class MockBufferType(BufferType):
    """A buffer type of given abilities.

    Parameters
    ----------
    abilities : BufferTypeAbilities
    memory : MockMemory
        Shared by the buffer types that exchange addresses.
    note : Note
        Gets the calls.
    """

    __slots__ = ("abilities", "memory", "note")

    def __init__(self, abilities: BufferTypeAbilities, memory: MockMemory, note: Note = ignore) -> None:
        super().__init__(
            abilities.name, alignment=abilities.alignment, max_size=abilities.max_size, is_host=abilities.is_host
        )
        self.abilities = abilities
        self.memory = memory
        self.note = note

    def _alloc(self, size: int) -> MockBuffer:
        limit = self.abilities.alloc_limit
        fails = 0 < limit < size
        self.note(["alloc", self.name, size, not fails])
        if fails:
            raise OutOfMemoryError(self.name, size, limit, "a buffer")
        return MockBuffer(self, size, f"@{self.name}")

    def static_buffer(self, size: int, label: str, usage: BufferUsage) -> MockBuffer:
        """Return a buffer that was there before the scheduler: its allocation is not noted."""
        buffer = MockBuffer(self, size, label)
        buffer.usage = usage
        return buffer

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes that a tensor takes: ``nbytes`` and the padding asked for."""
        pad = self.abilities
        size = tensor.nbytes
        if pad.quant_row and tensor.type.is_quantized and (rest := tensor.ne[0] % pad.quant_row):
            size += tensor.type.row_size(pad.quant_row - rest)
        size += pad.extra_bytes
        return -(-size // pad.round_to_bytes) * pad.round_to_bytes


class MockBuffer(Buffer):
    """Memory of a mock buffer type.

    Attributes
    ----------
    label : str
        Its name in a trace: the id of a static buffer, or ``@`` and the buffer type.
    """

    __slots__ = ("label", "memory", "note")

    def __init__(self, buft: MockBufferType, size: int, label: str) -> None:
        super().__init__(buft, size, buft.memory.alloc(size, buft.alignment, label))
        self.label = label
        self.memory = buft.memory
        self.note = buft.note

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a write from host memory."""
        self.note(["buf_set", self.label, short_name(tensor), offset, size, self.memory.find(address)])
        _write(self.memory, tensor, address, offset, size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a read to host memory."""
        self.note(["buf_get", self.label, short_name(tensor), offset, size])
        _read(self.memory, tensor, address, offset, size)

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Note a copy from another buffer."""
        assert isinstance(self.buft, MockBufferType)
        sources = self.buft.abilities.cpy_from
        if sources is None:
            return super().cpy_tensor(src, dst)
        done = _lies_in(src, sources)
        self.note(["buf_cpy", self.label, short_name(src), short_name(dst), done])
        if done:
            _copy(self.memory, src, dst)
        return done

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Note that bytes of a tensor were set to a value."""
        self.note(["buf_memset", self.label, short_name(tensor), offset, size, value])
        if tensor.type is Type.I32 and tensor.data is not None:
            self.memory.write(tensor.data + offset, bytes([value]) * size)

    def clear(self, value: int) -> None:
        """Note that all bytes were set to a value; they are not."""
        self.note(["buf_clear", self.label, value])

    def close(self) -> None:
        """Note that the memory was given back."""
        self.note(["free", self.label, self.size])
        self.memory.free(self.base)


def _write(memory: MockMemory, tensor: Tensor, address: int, offset: int, size: int) -> None:
    if tensor.type is Type.I32 and tensor.data is not None:
        memory.copy(tensor.data + offset, address, size)


def _read(memory: MockMemory, tensor: Tensor, address: int, offset: int, size: int) -> None:
    if tensor.type is Type.I32 and tensor.data is not None:
        memory.copy(address, tensor.data + offset, size)


def _copy(memory: MockMemory, src: Tensor, dst: Tensor) -> None:
    if src.type is Type.I32 and src.data is not None and dst.data is not None:
        memory.copy(dst.data, src.data, src.nbytes)


def _lies_in(tensor: Tensor, bufts: frozenset[str]) -> bool:
    buffer = tensor.storage
    return buffer is not None and buffer.buft.name in bufts


# -- devices -----------------------------------------------------------------


class MockDevice(Device):
    """A device of given abilities.

    Parameters
    ----------
    abilities : BackendAbilities
    bufts : mapping of str to MockBufferType
        The buffer types that the abilities name.
    index : int
        What calls name the backend by.
    note : Note
        Gets the calls.
    """

    def __init__(
        self, abilities: BackendAbilities, bufts: Mapping[str, MockBufferType], *, index: int = 0, note: Note = ignore
    ) -> None:
        self.name = abilities.name
        self.description = "mock device: plans, computes nothing"
        self.type = abilities.type
        self.abilities = abilities
        self.index = index
        self.note = note
        self.node_data: Mapping[Tensor, bytes] = {}  #: bytes that appear where a node is computed
        self._buft = bufts[abilities.buft]
        self._supports_op = abilities.ops
        self._n_events = 0

    @property
    def buffer_type(self) -> MockBufferType:
        """Memory that its results go to."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all: so many that they never decide, and the same for every mock."""
        return 1 << 50, 1 << 50

    def supports_op(self, op: Tensor) -> bool:
        """Whether it says so."""
        return self._supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether it says so."""
        return buft.name in self.abilities.bufts

    def offload_op(self, op: Tensor) -> bool:
        """Whether it was told to want an op."""
        wish = self.abilities.offload
        return super().offload_op(op) if wish is None else wish(op)

    def event_new(self) -> MockEvent | None:
        """Note a new event."""
        if not self.abilities.caps.events:
            return None
        event = MockEvent(self, self._n_events)
        self._n_events += 1
        self.note(["event_new", self.index, event.number])
        return event

    def backend(self) -> MockBackend:
        """Return a stream of calls."""
        return MockBackend(self)


class MockEvent(Event):
    """The so-manieth event of a mock device."""

    __slots__ = ("device", "number")

    def __init__(self, device: MockDevice, number: int) -> None:
        self.device = device
        self.number = number

    def synchronize(self) -> None:
        """Note that the host waits."""
        self.device.note(["event_sync", self.device.index, self.number])


class MockBackend(Backend):
    """The calls on a mock device."""

    device: MockDevice

    def __init__(self, device: MockDevice) -> None:
        self.device = device
        self.name = device.name
        self._index = device.index
        self._note = device.note
        self._caps = device.abilities.caps
        self._memory = device.buffer_type.memory
        fail = device.abilities.fail_compute
        self._failures_left = None if fail is None else fail.times

    def graph_compute(self, graph: GraphView) -> None:
        """Note the nodes, then fail or put the data of nodes in place, as told."""
        nodes = graph.nodes
        names = [short_name(node) for node in nodes]
        self._note(["compute", self._index, names])
        fail = self.device.abilities.fail_compute
        if fail is not None and self._failures_left != 0 and fail.node in names:
            if self._failures_left is not None:
                self._failures_left -= 1
            raise ComputeError(self.name, "told to fail", status=fail.status, node=fail.node)
        node_data = self.device.node_data
        if node_data:
            for node in nodes:
                data = node_data.get(node)
                if data is not None and node.data is not None:
                    self._memory.write(node.data, data)

    def synchronize(self) -> None:
        """Note that the host waits."""
        if self._caps.synchronize:
            self._note(["sync", self._index])

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a write from host memory."""
        if not self._caps.set_async:
            super().set_tensor_async(tensor, address, offset, size)
            return
        self._note(["set_async", self._index, short_name(tensor), offset, size, self._memory.find(address)])
        _write(self._memory, tensor, address, offset, size)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a read to host memory."""
        if not self._caps.get_async:
            super().get_tensor_async(tensor, address, offset, size)
            return
        self._note(["get_async", self._index, short_name(tensor), offset, size])
        _read(self._memory, tensor, address, offset, size)

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Note a copy from another backend."""
        sources = self._caps.cpy_async_from
        if sources is None:
            return super().cpy_tensor_async(backend_src, src, dst)
        assert isinstance(backend_src, MockBackend)
        done = _lies_in(src, sources)
        self._note(["cpy_async", backend_src._index, self._index, short_name(src), short_name(dst), done])
        if done:
            _copy(self._memory, src, dst)
        return done

    def event_record(self, event: Event) -> None:
        """Note that an event was recorded."""
        assert isinstance(event, MockEvent)
        self._note(["event_record", self._index, event.device.index, event.number])

    def event_wait(self, event: Event) -> None:
        """Note that the backend waits for an event."""
        assert isinstance(event, MockEvent)
        self._note(["event_wait", self._index, event.device.index, event.number])

    def graph_optimize(self, graph: GraphView, add_alloc_dep: AddAllocDep) -> None:
        """Note the nodes, then order them and ask for lives, as told."""
        optimize = self.device.abilities.optimize
        if optimize is None:
            return
        nodes = graph.nodes
        self._note(["optimize", self._index, [short_name(node) for node in nodes]])
        nodes = _in_order(nodes, optimize.order)
        graph.reorder(nodes)
        for name, until_name in optimize.keep:
            tensor, until = _find(nodes, name), _find(nodes, until_name)
            if tensor is not None and until is not None:
                add_alloc_dep(tensor, until)


def _in_order(nodes: list[Tensor], order: tuple[str, ...]) -> list[Tensor]:
    """Return the nodes, the named ones in the order of their names, in the places that they had."""
    by_name: dict[str, Tensor] = {}
    for node in nodes:
        by_name.setdefault(short_name(node), node)
    named = [by_name[name] for name in order if name in by_name]
    places = [i for i, node in enumerate(nodes) if short_name(node) in order]
    ordered = list(nodes)
    for i, node in zip(places, named, strict=False):
        ordered[i] = node
    return ordered


def _find(nodes: list[Tensor], name: str) -> Tensor | None:
    """Return the node of a name, else the source of a node that has it."""
    for node in nodes:
        if short_name(node) == name:
            return node
    for node in nodes:
        for src in node.src:
            if src is not None and short_name(src) == name:
                return src
    return None


# -- the registry's functions ------------------------------------------------


def devices() -> list[Device]:
    """Return no device: mocks are made by name only."""
    return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> Device:
    """Return the device for plans that ``NAME[:offload=N]`` asks for.

    Raises
    ------
    DeviceUnavailableError
        There is no name, or an option is none of ours.
    """
    name, *options = spec.split(":")
    usage = "write mock:NAME or mock:NAME:offload=N, such as mock:CUDA0:offload=32"
    if not name:
        raise DeviceUnavailableError("mock", "a mock device needs a name", hint=usage)
    wish = None
    for option in options:
        key, _, value = option.partition("=")
        if key != "offload" or not value.isdecimal():
            raise DeviceUnavailableError(f"mock:{name}", f"'{option}' is no option", hint=usage)
        wish = OffloadWish(int(value))
    # 128: alignment of CUDA's buffers, the device that plans most often stand for
    buft = MockBufferType(BufferTypeAbilities(name, alignment=128), MockMemory())
    abilities = BackendAbilities(name, DeviceType.GPU, name, frozenset({name}), offload=wish)
    device = MockDevice(abilities, {name: buft})
    buft.device = device
    return device


def why_missing() -> str:
    """Say why `devices` is empty."""
    return "mock devices are made by name: mock:NAME[:offload=N]"
