"""A device of another machine, through llama.cpp's ``rpc-server``: its memory and its kernels under our scheduler.

A name is ``rpc:HOST:PORT``, or ``rpc:HOST:PORT/1`` for the second device that a server offers. All devices of a server
share one connection (`_rpc_protocol`), on which everything happens in order: copies and graphs are sent and not waited
for, reading waits.

A server trusts its clients and ends at what it does not expect. So graphs are checked before they are sent (`_indices`,
`_libggml_safe`), and where a server is gone, late or wrong, `RPCError` says where and at what; the scheduler can be
used again with other devices, or with the same name opened anew.

The protocol has no passwords and no encryption: use it in networks that you trust.
"""

from __future__ import annotations

import struct
import sys
import weakref
from typing import Literal

from ..backend import Backend, Device, Event
from ..buffer import Buffer, BufferType
from ..errors import BackendError, DeviceUnavailableError, OutOfMemoryError, RPCError
from ..graph import GraphView
from ..tensor import Tensor
from ..types import DeviceType, Type
from ._libggml_safe import is_safe_on_cpu
from ._rpc_graph import KnownRange, RPCPlan, pack_alloc_question, pack_place
from ._rpc_protocol import Address, Command, Connection, host_memory, parse_address

__all__ = ["RPCBackend", "RPCBuffer", "RPCBufferType", "RPCDevice", "RPCEvent", "devices", "open_device", "why_missing"]

_MAX_ALIGNMENT = 1 << 16
_MAX_DEVICES = 256
_FILL_BYTES = 1 << 20
#: Indices whose least and largest are noted as they are written.
_INDEX_TYPES: dict[Type, Literal["i", "q"]] = {Type.I32: "i", Type.I64: "q"}


def _asks_for_padding(tensor: Tensor) -> bool:
    """Whether a server's device may want more than `nbytes` for the type.

    Notes
    -----
    Mirrors the condition in `ggml_backend_rpc_buffer_init_tensor`.
    """
    return tensor.type.is_quantized and tensor.ne[0] % 512 != 0 and tensor.view_src is None


class RPCBufferType(BufferType):
    """Memory of a remote device.

    Notes
    -----
    Mirrors `ggml_backend_rpc_buffer_type`. Differs: answers are checked for sense before they are used.
    """

    __slots__ = ("_limit", "_sizes", "owner")

    def __init__(self, owner: RPCDevice) -> None:
        connection, number = owner.connection, struct.pack("<I", owner.number)
        (alignment,) = struct.unpack("<Q", connection.ask(Command.GET_ALIGNMENT, number, 8))
        (max_size,) = struct.unpack("<Q", connection.ask(Command.GET_MAX_SIZE, number, 8))
        if alignment & (alignment - 1) or not 0 < alignment <= _MAX_ALIGNMENT:
            raise connection.fail(Command.GET_ALIGNMENT, f"{alignment} is no alignment")
        if max_size == 0:
            raise connection.fail(Command.GET_MAX_SIZE, "no buffer may have any bytes")
        super().__init__(f"RPC{owner.number}[{owner.endpoint}]", alignment=alignment, max_size=max_size)
        self.owner = owner
        self.device = owner
        total = owner.memory()[1]
        self._limit = min(max_size, total) if total else max_size  #: bytes that a tensor can take at most
        self._sizes: dict[tuple[object, ...], int] = {}

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes that the server gives a tensor; it is asked only where they may be more than `nbytes`.

        Notes
        -----
        Mirrors `ggml_backend_rpc_buffer_type_get_alloc_size`, with its key: sources are not part of it.
        """
        if not tensor.op.may_expand and not _asks_for_padding(tensor):
            return tensor.nbytes
        key = (tensor.op, tensor.op_params, tensor.type, tensor.ne, tensor.nb)
        known = self._sizes.get(key)
        if known is None:
            connection = self.owner.connection
            question = pack_alloc_question(tensor, self.owner.number)
            (known,) = struct.unpack("<Q", connection.ask(Command.GET_ALLOC_SIZE, question, 8))
            if known > self._limit:
                raise connection.fail(Command.GET_ALLOC_SIZE, f"'{tensor.name}' cannot take {known:,} bytes")
            self._sizes[key] = known
        return max(known, tensor.nbytes)

    def _alloc(self, size: int) -> RPCBuffer:
        owner = self.owner
        connection = owner.connection
        answer = connection.ask(Command.ALLOC_BUFFER, struct.pack("<IQ", owner.number, size), 16)
        remote, got = struct.unpack("<QQ", answer)
        if remote == 0:
            free, total = owner.memory()
            raise OutOfMemoryError(self.name, size, free if total else None, "a buffer")
        if got < size:
            raise connection.fail(Command.ALLOC_BUFFER, f"{got:,} bytes came for {size:,}")
        (base,) = struct.unpack("<Q", connection.ask(Command.BUFFER_GET_BASE, struct.pack("<Q", remote), 8))
        if base == 0 or base % self.alignment or base + got >= 1 << 64:
            raise connection.fail(Command.BUFFER_GET_BASE, f"{base:#x} is no start of {got:,} bytes of memory")
        return RPCBuffer(self, remote, got, base)


class RPCBuffer(Buffer):
    """A piece of a remote device's memory."""

    __slots__ = ("_n_clears", "connection", "remote")

    def __init__(self, buft: RPCBufferType, remote: int, size: int, base: int) -> None:
        super().__init__(buft, size, base)
        self.connection = buft.owner.connection
        self.remote = remote  #: what the server calls it; 0 once closed
        self._n_clears = 0

    def _place(self, tensor: Tensor) -> bytes:
        if not self.remote:
            raise BackendError(self.buft.name, f"'{tensor.name}' lies in a buffer that was closed")
        assert tensor.data is not None
        if not self.base <= tensor.data or tensor.data + tensor.nbytes > self.base + self.size:
            raise BackendError(self.buft.name, f"'{tensor.name}' is not inside {self!r}")
        return pack_place(tensor, self.remote)

    def init_tensor(self, tensor: Tensor) -> None:
        """Let the server clear what it pads a quantised tensor with.

        Notes
        -----
        Mirrors `ggml_backend_rpc_buffer_init_tensor`.
        """
        if _asks_for_padding(tensor):
            self.connection.tell(Command.INIT_TENSOR, self._place(tensor))

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Send host memory into the tensor; it is free again when this returns.

        Notes
        -----
        Mirrors `ggml_backend_rpc_buffer_set_tensor`. Differs: weights are sent always, never by a hash of them.
        """
        self._note(tensor, address, offset, size)
        head = self._place(tensor) + struct.pack("<BQ", 0, offset)
        self.connection.tell(Command.SET_TENSOR, head, host_memory(address, size))

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Read bytes of the tensor into host memory, after all that was sent before."""
        question = self._place(tensor) + struct.pack("<QQ", offset, size)
        self.connection.ask_into(Command.GET_TENSOR, question, host_memory(address, size))

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor; by sending them, as not every server's device can do it itself."""
        self._forget(tensor)
        place, block = self._place(tensor), bytes([value & 255]) * min(size, _FILL_BYTES)
        for at in range(0, size, _FILL_BYTES):
            head = place + struct.pack("<BQ", 0, offset + at)
            self.connection.tell(Command.SET_TENSOR, head, block[: size - at])

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from memory of the same server; False for any other, and where the server cannot."""
        storage = src.storage
        if not isinstance(storage, RPCBuffer) or storage.connection is not self.connection:
            return False
        self._forget(dst)
        answer = self.connection.ask(Command.COPY_TENSOR, storage._place(src) + self._place(dst), 1)
        return answer != b"\0"

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if not self.remote:
            raise BackendError(self.buft.name, "a buffer was closed and cannot be cleared")
        self._n_clears += 1
        self.connection.tell(Command.BUFFER_CLEAR, struct.pack("<QB", self.remote, value & 255))

    def close(self) -> None:
        """Give the memory back to the server, before the next command."""
        remote, self.remote = self.remote, 0
        if remote and self.connection.is_open:
            self.connection.free_later(remote)

    def __del__(self) -> None:
        # no name if making it failed; and at the end of the process the server frees all itself
        if hasattr(self, "remote") and not sys.is_finalizing():
            self.close()

    # -- what is known of indices ----------------------------------------------

    def _note(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        self._forget(tensor)
        kind = _INDEX_TYPES.get(tensor.type)
        if kind is not None and tensor.view_src is None and offset == 0 and size == tensor.nbytes:
            values = host_memory(address, size).cast(kind)
            tensor.extra = KnownRange((self, self._n_clears, tensor.data), min(values), max(values))

    @staticmethod
    def _forget(tensor: Tensor) -> None:
        root = tensor.view_src or tensor
        if isinstance(root.extra, KnownRange):
            root.extra = None

    def known_range(self, tensor: Tensor) -> KnownRange | None:
        """Return what is known of numbers that were written here, and only from here."""
        root = tensor.view_src or tensor
        known = root.extra
        if isinstance(known, KnownRange) and known.place == (self, self._n_clears, root.data):
            return known
        return None


class RPCEvent(Event):
    """A place in the order of what a server is given."""

    __slots__ = ("_connection", "_n_sent")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._n_sent = 0

    def record(self) -> None:
        """Stand for all that was sent so far."""
        self._n_sent = self._connection.n_sent

    def synchronize(self) -> None:
        """Block the host until the server is done with it."""
        self._connection.synchronize(self._n_sent)


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
            A tensor of a node lies elsewhere: a split input was not copied.
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
            The tensor does not lie in the device's memory.
        """
        storage = tensor.storage
        if not isinstance(storage, RPCBuffer) or storage.buft is not self.device.buffer_type or not storage.remote:
            where = "nowhere" if storage is None else f"in {storage.buft.name}"
            raise BackendError(self.name, f"'{tensor.name}' lies {where}, not in the device's memory")
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
    """Return nothing: servers are named, not looked for."""
    return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> RPCDevice:
    """Return a device of the server at an address: ``HOST:PORT``, or ``HOST:PORT/1`` for its second.

    A server that was lost is connected to anew.

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
        except RPCError:  # it went while nobody looked: its users hear of it from the connection itself
            connection = None
    if connection is None or not connection.is_open:
        connection = _connections[address] = Connection(address)
    return connection


def why_missing() -> str:
    """Say that servers are not looked for."""
    return "name a server by its address: rpc:HOST:PORT"
