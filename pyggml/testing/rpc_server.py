"""A server of ggml's RPC protocol that computes on pyggml's CPU, for tests of clients, with faults on request.

It has protocol version 7.0 or 8.0 and behaves like upstream's server: one connection at a time, no answer to seven of
the commands, and a closed connection after an invalid message. It checks messages at least as strictly::

    with RPCServer(version=(8, 0, 0)) as server:
        device = REGISTRY.open(f"rpc:{server.host}:{server.port}")
        server.fault = Fault(Command.GRAPH_COMPUTE, "close")
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Self

from ..backends.host import CPU
from ..backends.rpc.protocol import NO_ANSWER, TENSOR, Command
from ..buffer import Buffer, tensor_copy, tensor_get, tensor_set
from ..errors import PyggmlError
from ..graph import Graph
from ..tensor import Tensor
from ..types import MAX_SRC, Op, Type

__all__ = ["Fault", "RPCServer"]

#: Most bytes of a message; larger ones are refused before memory is allocated.
_MAX_BYTES = 1 << 30
#: Seconds between checks of a sleeping server whether it should end.
_NAP_S = 0.01


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a server at a command.

    Attributes
    ----------
    kind : str
        ``close``: close the connection instead of answering; ``cut``: close it after half of the answer; ``size``:
        state a wrong size; ``stall``: stop answering; ``trickle``: send a byte at a time, slowly; ``lie``: send
        ``answer``, with the right size, instead of the correct answer.
    skip : int
        Number of correct answers before the fault.
    """

    command: Command
    kind: Literal["close", "cut", "size", "stall", "trickle", "lie"]
    answer: bytes = b""
    skip: int = 0


class _Refused(Exception):
    """An invalid message, after which the server closes the connection."""


class RPCServer:
    """A server in a thread, on a free port of this machine.

    Parameters
    ----------
    version : tuple of int
        Protocol version: ``(7, 0, 0)`` or ``(8, 0, 0)``; others are only used in the greeting.
    n_devices : int
        Number of devices, which are all this CPU.
    fault : Fault, optional
        The fault; may be set at any time.

    Attributes
    ----------
    host, port : str, int
        The address on which it listens.
    counts : Counter of Command
        Number of received commands.
    refused : list of str
        Reasons why it closed connections.
    """

    def __init__(
        self, *, version: tuple[int, int, int] = (7, 0, 0), n_devices: int = 1, fault: Fault | None = None
    ) -> None:
        self.version, self.n_devices, self.fault = version, n_devices, fault
        self.counts: Counter[Command] = Counter()
        self.refused: list[str] = []
        self.n_open_buffers = 0
        self._is_ending = False
        self._backend = CPU(threads=1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_NAP_S)
        self.host, self.port = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, name="pyggml-rpc-server", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """The name of its first device."""
        return f"rpc:{self.host}:{self.port}"

    def close(self) -> None:
        """End the server and its connections."""
        self._is_ending = True
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- connections ---------------------------------------------------------

    def _serve(self) -> None:
        while not self._is_ending:
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                continue
            with peer:
                peer.settimeout(_NAP_S)
                try:
                    _Client(self, peer).serve()
                except (_Refused, PyggmlError, struct.error) as error:
                    self.refused.append(str(error))
                except (ConnectionError, EOFError):
                    pass

    def take_fault(self, command: Command) -> Fault | None:
        """Return the fault of this command, or None."""
        fault = self.fault
        if fault is None or fault.command is not command or self.counts[command] <= fault.skip:
            return None
        return fault

    def nap(self) -> None:
        """Sleep briefly; raise EOFError if the server should end."""
        if self._is_ending:
            raise EOFError
        time.sleep(_NAP_S)


class _Client:
    """One connection: its buffers, and the last graph of each device."""

    def __init__(self, server: RPCServer, peer: socket.socket) -> None:
        self.server, self.peer = server, peer
        self.buffers: dict[int, Buffer] = {}
        self.graphs: dict[tuple[int, int], Graph] = {}  # by device and, since 8.0, id
        self._next = 1

    def serve(self) -> None:
        """Process commands until either side ends the connection."""
        first = True
        while True:
            command = Command(self._take(1)[0])
            (size,) = struct.unpack("<Q", self._take(8))
            if size > _MAX_BYTES or (first and command is not Command.HELLO):
                raise _Refused(f"{command.name} of {size:,} bytes, first: {first}")
            payload = bytes(self._take(size))
            first = False
            self.server.counts[command] += 1
            fault = self.server.take_fault(command)
            if fault is not None and fault.kind == "close":
                return
            answer = self._answer(command, payload)
            if command not in NO_ANSWER:
                self._give(answer, fault)
            elif fault is not None and fault.kind == "stall":
                self._stall()

    def _take(self, n: int) -> bytearray:
        out = bytearray(n)
        view, at = memoryview(out), 0
        while at < n:
            try:
                got = self.peer.recv_into(view[at:])
            except TimeoutError:
                self.server.nap()
                continue
            if got == 0:
                raise EOFError
            at += got
        return out

    def _give(self, answer: bytes, fault: Fault | None) -> None:
        kind = None if fault is None else fault.kind
        if fault is not None and kind == "lie":
            answer = fault.answer
        size = len(answer) + (8 if kind == "size" else 0)
        message = struct.pack("<Q", size) + answer
        if kind == "cut":
            self._send(message[: 8 + len(answer) // 2])
            raise EOFError
        if kind == "stall":
            self._stall()
        if kind == "trickle":
            for byte in message:
                self._send(bytes([byte]))
                for _ in range(20):
                    self.server.nap()
        self._send(message)

    def _send(self, message: bytes) -> None:
        view = memoryview(message)
        while view:
            try:
                view = view[self.peer.send(view) :]
            except TimeoutError:
                self.server.nap()

    def _stall(self) -> None:
        """Do nothing until the client gives up."""
        while True:
            self._take(1)

    # -- commands ------------------------------------------------------------

    def _answer(self, command: Command, payload: bytes) -> bytes:
        """Process a command and return the answer; empty for commands without one."""
        if command is Command.SET_TENSOR:
            self._set(payload)
            return b""
        if command is Command.GRAPH_COMPUTE:
            self._compute(payload)
            return b""
        handler = getattr(self, f"_{command.name.lower()}", None)
        if handler is None:
            raise _Refused(f"{command.name} is not served")
        answer: bytes = handler(payload)
        return answer

    def _hello(self, payload: bytes) -> bytes:
        if len(payload) != 24:
            raise _Refused(f"a greeting of {len(payload)} bytes")
        return struct.pack("<BBBB24s", *self.server.version, 0, b"")

    def _device_count(self, payload: bytes) -> bytes:
        return struct.pack("<I", self.server.n_devices)

    def _device(self, payload: bytes) -> int:
        (device,) = struct.unpack_from("<I", payload)
        if device >= self.server.n_devices:
            raise _Refused(f"device {device} of {self.server.n_devices}")
        return int(device)

    def _get_alignment(self, payload: bytes) -> bytes:
        self._device(payload)
        return struct.pack("<Q", self.server._backend.buffer_type.alignment)

    def _get_max_size(self, payload: bytes) -> bytes:
        self._device(payload)
        return struct.pack("<Q", self.server._backend.buffer_type.max_size)

    def _get_device_memory(self, payload: bytes) -> bytes:
        self._device(payload)
        return struct.pack("<QQ", *self.server._backend.device.memory())

    def _alloc_buffer(self, payload: bytes) -> bytes:
        device, size = struct.unpack("<IQ", payload)
        self._device(struct.pack("<I", device))
        try:
            buffer = self.server._backend.buffer_type.alloc_buffer(size)
        except MemoryError:
            return struct.pack("<QQ", 0, 0)
        number, self._next = self._next, self._next + 1
        self.buffers[number] = buffer
        self.server.n_open_buffers += 1
        return struct.pack("<QQ", number, buffer.size)

    def _buffer(self, number: int) -> Buffer:
        if number not in self.buffers:
            raise _Refused(f"there is no buffer {number}")
        return self.buffers[number]

    def _buffer_get_base(self, payload: bytes) -> bytes:
        return struct.pack("<Q", self._buffer(*struct.unpack("<Q", payload)).base)

    def _free_buffer(self, payload: bytes) -> bytes:
        (number,) = struct.unpack("<Q", payload)
        self._buffer(number).close()
        del self.buffers[number]
        self.graphs.clear()  # their nodes may be in it
        self.server.n_open_buffers -= 1
        return b""

    def _buffer_clear(self, payload: bytes) -> bytes:
        number, value = struct.unpack("<QB", payload)
        self._buffer(number).clear(value)
        return b""

    def _init_tensor(self, payload: bytes) -> bytes:
        self._placed(payload)
        return b""

    def _get_alloc_size(self, payload: bytes) -> bytes:
        self._device(payload)
        if len(payload) != 4 + (1 + MAX_SRC) * TENSOR.size:
            raise _Refused(f"a question of {len(payload):,} bytes")
        return struct.pack("<Q", self._tensor(payload, 4).tensor.nbytes)

    def _set(self, payload: bytes) -> None:
        at = TENSOR.size
        flag, offset = struct.unpack_from("<BQ", payload, at)
        if flag > 1:
            raise _Refused(f"a cache flag of {flag}")
        import numpy as np

        data = np.frombuffer(payload, np.uint8, offset=at + 9)
        tensor_set(self._placed(payload), data.ctypes.data, offset, data.size)

    def _get_tensor(self, payload: bytes) -> bytes:
        import numpy as np

        offset, size = struct.unpack_from("<QQ", payload, TENSOR.size)
        tensor = self._placed(payload)
        if size > tensor.nbytes:
            raise _Refused(f"{size:,} bytes of {tensor.nbytes:,} asked for")
        out = np.empty(size, np.uint8)
        tensor_get(tensor, out.ctypes.data, offset, size)
        return out.tobytes()

    def _copy_tensor(self, payload: bytes) -> bytes:
        tensor_copy(self._placed(payload), self._placed(payload[TENSOR.size :]))
        return b"\1"

    # -- tensors and graphs --------------------------------------------------

    def _tensor(self, data: bytes, at: int) -> _Received:
        fields = TENSOR.unpack_from(data, at)
        number, type, remote = fields[:3]
        ne, nb, op, params, flags = fields[3:7], fields[7:11], fields[11], fields[12:28], fields[28]
        src, (view_src, _view_offs, address, name, _) = fields[29:39], fields[39:]
        if type not in list(Type) or op not in list(Op):
            raise _Refused(f"type {type}, op {op}")
        tensor = Tensor(
            Type(type), ne, nb, name=name.rstrip(b"\0").decode(), op=Op(op), op_params=tuple(params), flags=flags
        )
        if remote:
            buffer = self._buffer(remote)
            if not buffer.base <= address or address + tensor.nbytes > buffer.base + buffer.size:
                raise _Refused(f"'{tensor.name}' is not inside its buffer")
            tensor.buffer, tensor.data = buffer, address
        elif address:
            raise _Refused(f"'{tensor.name}' has an address and no buffer")
        return _Received(number, tensor, src, view_src)

    def _placed(self, payload: bytes) -> Tensor:
        tensor = self._tensor(payload, 0).tensor
        if tensor.buffer is None:
            raise _Refused(f"'{tensor.name}' lies nowhere")
        return tensor

    def _compute(self, payload: bytes) -> None:
        device, uid, at = self._graph_head(payload)
        (n_nodes,) = struct.unpack_from("<I", payload, at)
        numbers = struct.unpack_from(f"<{n_nodes}Q", payload, at + 4)
        at += 4 + 8 * n_nodes
        (n_tensors,) = struct.unpack_from("<I", payload, at)
        if len(payload) != at + 4 + n_tensors * TENSOR.size:
            raise _Refused(f"{n_tensors} tensors in {len(payload) - at - 4:,} bytes")
        received = [self._tensor(payload, at + 4 + i * TENSOR.size) for i in range(n_tensors)]
        by_number = {one.number: one.tensor for one in received}
        named = {n for one in received for n in (*one.src, one.view_src)} | set(numbers)
        if named - by_number.keys() - {0}:
            raise _Refused("a tensor is named that was not sent")
        if 0 in by_number or len(by_number) != n_tensors:
            raise _Refused("numbers of tensors are 0 or stand twice")
        graph = Graph()
        for one in received:
            n_src = max((i + 1 for i, n in enumerate(one.src) if n), default=0)
            one.tensor.src = [None if n == 0 else by_number[n] for n in one.src[:n_src]]
        graph.nodes = [by_number[n] for n in numbers]
        graph.leafs = [one.tensor for one in received if one.tensor.op is Op.NONE]
        graph.check()
        if self.server.version < (8, 0):
            self.graphs = {key: g for key, g in self.graphs.items() if key[0] != device}
        self.graphs[device, uid] = graph
        self._run(graph)

    def _graph_head(self, payload: bytes) -> tuple[int, int, int]:
        """Return device, id of the graph, and length of the head."""
        device = self._device(payload)
        if self.server.version < (8, 0):
            return device, 0, 4
        return device, int(struct.unpack_from("<Q", payload, 4)[0]), 12

    def _graph_recompute(self, payload: bytes) -> bytes:
        device, uid, _ = self._graph_head(payload)
        if (device, uid) not in self.graphs:
            raise _Refused(f"graph {uid} of device {device} is not kept")
        self._run(self.graphs[device, uid])
        return b""

    def _run(self, graph: Graph) -> None:
        self.server._backend.graph_compute(graph.view(0, len(graph.nodes)))


@dataclass(frozen=True, slots=True)
class _Received:
    """A received tensor, and the ids of the tensors that it names."""

    number: int
    tensor: Tensor
    src: tuple[int, ...]
    view_src: int
