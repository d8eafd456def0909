"""Mock devices: configurable abilities, recorded calls, no computation.

A replay gives each backend the abilities of a scheduler case and compares the calls with those of the real scheduler. A
plan (``mock:CUDA0``) shows what would happen on such a device.

Addresses are invented, far above those of any process, so that a call can take both kinds. Only tensors of type I32
have bytes, because no other values influence the scheduler; weights of any size cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...backend import AddAllocDep, Backend, Device, Event, answers_by_kind
from ...buffer import BufferType
from ...errors import ComputeError, DeviceUnavailableError
from ...graph import GraphView
from ...tensor import Tensor
from ...types import DeviceType
from .abilities import (
    BackendAbilities,
    BufferTypeAbilities,
    Note,
    OffloadWish,
    ignore,
    short_name,
)
from .memory import MockBufferType, MockMemory, copy_ints, lies_in, read_ints, write_ints


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
        """Free and total bytes: equal for every mock, and so large that they never decide."""
        return 1 << 50, 1 << 50

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Whether it says so."""
        return self._supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether it says so."""
        return buft.name in self.abilities.bufts

    @answers_by_kind
    def offload_op(self, op: Tensor) -> bool:
        """Return whether the device is configured to offload an op."""
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
        write_ints(self._memory, tensor, address, offset, size)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a read to host memory."""
        if not self._caps.get_async:
            super().get_tensor_async(tensor, address, offset, size)
            return
        self._note(["get_async", self._index, short_name(tensor), offset, size])
        read_ints(self._memory, tensor, address, offset, size)

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Note a copy from another backend."""
        sources = self._caps.cpy_async_from
        if sources is None:
            return super().cpy_tensor_async(backend_src, src, dst)
        assert isinstance(backend_src, MockBackend)
        done = lies_in(src, sources)
        self._note(["cpy_async", backend_src._index, self._index, short_name(src), short_name(dst), done])
        if done:
            copy_ints(self._memory, src, dst)
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
