"""Devices of another machine, through llama.cpp's ``rpc-server``, with its memory and kernels.

A name is ``rpc:HOST:PORT``, or ``rpc:HOST:PORT/1`` for the second device of a server. All devices of a server share one
connection (`protocol.py`), on which everything happens in order: copies and graphs are sent without waiting, reads
wait.

A server trusts its clients and aborts on unexpected data. So graphs are checked before they are sent (`indices`,
`ggml_safe`). If a server is gone, late or wrong, `RPCError` names the server and the command. The scheduler can then be
used with other devices, or with the same name opened again.

The protocol has no passwords and no encryption: use it in networks that you trust.
"""

from __future__ import annotations

import struct
import weakref

from ...backend import Backend, Device, Event, answers_by_kind
from ...buffer import BufferType
from ...errors import BackendError, DeviceUnavailableError, RPCError
from ...graph import GraphView
from ...tensor import Tensor
from ...types import DeviceType
from ..host.ggml_safe import is_safe_on_cpu
from .graph import KnownRange, RPCPlan
from .memory import RPCBuffer, RPCBufferType
from .protocol import Address, Command, Connection, parse_address

_MAX_DEVICES = 256


class RPCEvent(Event):
    """A place in the order of what a server is given."""

    __slots__ = ("_connection", "_n_graphs")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._n_graphs = 0

    def record(self) -> None:
        """Stand for all that was sent so far."""
        self._n_graphs = self._connection.n_graphs

    def synchronize(self) -> None:
        """Block the host until the server is done with it."""
        self._connection.synchronize(self._n_graphs)


class RPCDevice(Device):
    """A device of a server.

    Parameters
    ----------
    connection : Connection
        Shared by the devices of a server.
    number : int
        Which of them, from 0.

    Attributes
    ----------
    last_graph : tuple or None
        The graph that the server keeps for this device, and how many buffers were freed when it was sent.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection, self.number = connection, number
        host = f"[{connection.host}]" if ":" in connection.host else connection.host
        self.endpoint = f"{host}:{connection.port}"
        self.name = f"rpc:{self.endpoint}" + (f"/{number}" if number else "")
        major, minor, patch = connection.version
        self.description = f"device {number} of the server at {self.endpoint}, protocol {major}.{minor}.{patch}"
        self.type = DeviceType.GPU
        self.last_graph: tuple[object, int] | None = None
        self._buft = RPCBufferType(self)

    @property
    def buffer_type(self) -> RPCBufferType:
        """The device's memory."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all, as the server says."""
        answer = self.connection.ask(Command.GET_DEVICE_MEMORY, struct.pack("<I", self.number), 16)
        free, total = struct.unpack("<QQ", answer)
        return free, total

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Whether every server can be expected to run a node: what ggml's CPU does.

        Notes
        -----
        Differs: upstream says yes to everything, and a server whose device cannot run a node ends.
        """
        return is_safe_on_cpu(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether it is this device's own memory."""
        return buft is self._buft

    def event_new(self) -> RPCEvent:
        """Return a new event."""
        return RPCEvent(self.connection)

    def backend(self) -> RPCBackend:
        """Return a stream of work; all of them are in one order, the connection's."""
        return RPCBackend(self)


class RPCBackend(Backend):
    """Work for a device of a server, in the connection's order."""

    device: RPCDevice

    def __init__(self, device: RPCDevice) -> None:
        self.device = device
        self.name = device.name

    def graph_compute(self, graph: GraphView) -> None:
        """Send the nodes, which are translated at the first time; what fails on the server shows later.

        Raises
        ------
        BackendError
            A tensor of a node is in other memory: a split input was not copied.
        ExpertIdError
            An expert id is out of bounds.
        ComputeError
            A server is not known to run a node, or a row index is out of bounds.
        RPCError
            The connection is lost.
        """
        plan = graph.plan
        if not isinstance(plan, RPCPlan) or not plan.is_for(self, graph):
            plan = graph.plan = RPCPlan(self, graph)
        plan.run()

    def synchronize(self) -> None:
        """Wait until the server is done.

        Raises
        ------
        RPCError
            It failed, or does not answer in time.
        """
        self.device.connection.synchronize()

    def remote_of(self, tensor: Tensor) -> int:
        """Return what the server calls the buffer of a tensor.

        Raises
        ------
        BackendError
            The tensor is not in the device's memory.
        """
        storage = tensor.storage
        if not isinstance(storage, RPCBuffer) or storage.buft is not self.device.buffer_type or not storage.remote:
            where = "in no memory" if storage is None else f"in {storage.buft.name}"
            if isinstance(storage, RPCBuffer) and not storage.remote:
                where = "in a buffer that was closed"
            raise BackendError(self.name, f"'{tensor.name}' is {where}, not in the device's memory")
        return storage.remote

    @staticmethod
    def known_range(indices: Tensor) -> KnownRange | None:
        """Return what is known of indices without reading them from the server."""
        storage = indices.storage
        return storage.known_range(indices) if isinstance(storage, RPCBuffer) else None

    # -- copies: sent and read in the connection's order, as all else -------------

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Send host memory into a tensor."""
        self.remote_of(tensor)
        assert tensor.storage is not None
        tensor.storage.set_tensor(tensor, address, offset, size)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Read bytes of a tensor; they are there when this returns."""
        self.remote_of(tensor)
        assert tensor.storage is not None
        tensor.storage.get_tensor(tensor, address, offset, size)

    # -- events --------------------------------------------------------------

    def event_record(self, event: Event) -> None:
        """Let an event stand for all that was sent so far."""
        assert isinstance(event, RPCEvent)
        event.record()

    def event_wait(self, event: Event) -> None:
        """Do nothing for an event of the same server, whose order is kept; the host waits for any other."""
        if not isinstance(event, RPCEvent) or event._connection is not self.device.connection:
            event.synchronize()


# -- the registry's questions ----------------------------------------------------

_connections: weakref.WeakValueDictionary[Address, Connection] = weakref.WeakValueDictionary()
_devices: weakref.WeakValueDictionary[tuple[Connection, int], RPCDevice] = weakref.WeakValueDictionary()


def devices() -> list[Device]:
    """Return no device: servers are opened by name."""
    return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> RPCDevice:
    """Return a device of the server at an address: ``HOST:PORT``, or ``HOST:PORT/1`` for its second.

    A lost server gets a new connection.

    Raises
    ------
    DeviceUnavailableError
        This is no address, or the server has no such device.
    RPCError
        No server answers there.
    """
    where, slash, number_text = spec.partition("/")
    address = parse_address(where)
    if address is None or (slash and not number_text.isdecimal()):
        raise DeviceUnavailableError("rpc", f"'{spec}' is no address", hint="write rpc:HOST:PORT, or rpc:HOST:PORT/1")
    number = int(number_text) if slash else 0
    connection = _connect(address)
    (count,) = struct.unpack("<I", connection.ask(Command.DEVICE_COUNT, b"", 4))
    if count > _MAX_DEVICES:
        raise connection.fail(Command.DEVICE_COUNT, f"{count:,} devices are not to be believed")
    if number >= count:
        raise DeviceUnavailableError(f"rpc:{spec}", f"the server has {count} devices, counted from 0")
    found = _devices.get((connection, number))
    if found is None:
        found = _devices[connection, number] = RPCDevice(connection, number)
    return found


def _connect(address: Address) -> Connection:
    """Return the connection to a server, a new one if the last is lost or proves to be."""
    connection = _connections.get(address)
    if connection is not None and connection.is_open:
        try:
            connection.ask(Command.DEVICE_COUNT, b"", 4)
        except RPCError:  # the connection itself reports it to its users
            connection = None
    if connection is None or not connection.is_open:
        connection = _connections[address] = Connection(address)
    return connection


def why_missing() -> str:
    """Return how to name a server."""
    return "name a server by its address: rpc:HOST:PORT"
