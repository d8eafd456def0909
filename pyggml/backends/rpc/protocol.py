"""ggml's RPC protocol, the client's side: messages, and a connection on which nothing waits for ever.

A request is a command (1 byte), a size (8) and as many bytes; an answer is a size and as many bytes. All integers are
little-endian. Seven commands have no answer: whether they went well shows at the next one that has, as a server closes
the connection on what it does not like. It works through them in order, one connection at a time.

Two versions are spoken, as the server's greeting says: 7.0 (ggml 0.26) and 8.0 (ggml 0.27), in which a graph has an
id. Both number ops as `Op` does; a version that may not is refused.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
import time
from collections import deque
from enum import IntEnum

from ... import config
from ...errors import RPCError

__all__ = ["MAX_U32", "NO_ANSWER", "TENSOR", "Address", "Command", "Connection", "host_memory", "parse_address"]

MAX_U32 = 2**32 - 1
#: id, type, buffer, ne, nb, op, op_params, flags, src, view_src, view_offs, data, name, use count
TENSOR = struct.Struct("<QIQ4I4II16ii10QQQQ64si")
_HEADER = struct.Struct("<BQ")
_SIZE = struct.Struct("<Q")
_GREETING = struct.Struct("<BBBB24s")
_CAPABILITIES = bytes(24)  # of transports other than TCP: none
_VERSIONS = {(7, 0), (8, 0)}
#: A message may take this much longer than the timeout for each byte: links slower than 256 KiB/s are given up.
_SECONDS_PER_BYTE = 1 / (256 * 1024)
_PIECE_BYTES = 1 << 20


class Command(IntEnum):
    """What can be asked of a server."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17


#: Commands that a server does not answer.
NO_ANSWER = frozenset({
    Command.FREE_BUFFER, Command.BUFFER_CLEAR, Command.SET_TENSOR, Command.GRAPH_COMPUTE, Command.INIT_TENSOR,
    Command.GRAPH_RECOMPUTE, Command.MEMSET_TENSOR,
})  # fmt: skip

Address = tuple[str, int]


def parse_address(text: str) -> Address | None:
    """Return host and port of ``HOST:PORT``; None if it is none. IPv6 hosts stand in brackets.

    Examples
    --------
    >>> parse_address("[::1]:50052"), parse_address("localhost")
    (('::1', 50052), None)
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return None
    return host, int(port)


class Connection:
    """A connection to a server. A process needs one per server, because a server serves one client at a time.

    After any failure it is closed, because the meaning of the next byte would be unknown. Later calls fail at once,
    with the first cause in the text.

    Parameters
    ----------
    timeout_s : float, optional
        Seconds in which the server must accept, take a message, or begin to answer; ``PYGGML_RPC_TIMEOUT`` if not
        given. Answers come after all work before them, so it must be longer than the longest split takes.

    Attributes
    ----------
    version : tuple of int
        Of the protocol: major, minor, patch.
    n_graphs, n_done : int
        Graphs given to the server to compute, and how many of them are known to be done.

    Raises
    ------
    RPCError
        Nobody answers there, or something that does not speak a version of the protocol that is known here.
    """

    def __init__(self, address: Address, *, timeout_s: float | None = None) -> None:
        self.host, self.port = address
        self.timeout_s = config.rpc_timeout_s() if timeout_s is None else timeout_s
        self.version = (0, 0, 0)
        self.n_graphs = self.n_done = 0
        self.n_frees = 0  #: buffers freed: a server forgets its graphs at each
        self._lost = ""
        self._n_uids = 0
        self._lock = threading.RLock()
        self._unanswered: list[Command] = []
        self._to_free: deque[int] = deque()
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.create_connection(address, timeout=self.timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            self._lost = f"cannot connect: {_words(error)}"
            raise self._error(Command.HELLO, self._lost, hint="is rpc-server running there?") from error
        self._greet()

    def _greet(self) -> None:
        greeting = self.ask(Command.HELLO, _CAPABILITIES, _GREETING.size)
        major, minor, patch, _, _ = _GREETING.unpack(greeting)
        self.version = (major, minor, patch)
        if (major, minor) not in _VERSIONS or patch != 0:
            known = " and ".join(f"{a}.{b}.0" for a, b in sorted(_VERSIONS))
            raise self._fail(
                Command.HELLO,
                f"the server speaks version {major}.{minor}.{patch} of the protocol; {known} are known here",
                hint="run an rpc-server of llama.cpp of late 2026",
            )

    # -- exchanges -----------------------------------------------------------

    def tell(self, command: Command, *parts: bytes | memoryview) -> None:
        """Send a command that has no answer.

        Raises
        ------
        RPCError
            The connection is lost, or the server takes no bytes any more.
        """
        with self._lock:
            self._free_buffers()
            self._send(command, parts)

    def ask(self, command: Command, payload: bytes, n_bytes: int) -> bytes:
        """Send a command and return its answer, which has to be of a size.

        Raises
        ------
        RPCError
            The connection is lost, the answer is late, cut short, or of another size.
        """
        answer = bytearray(n_bytes)
        self.ask_into(command, payload, memoryview(answer))
        return bytes(answer)

    def ask_into(self, command: Command, payload: bytes, into: memoryview) -> None:
        """Send a command and write its answer, which has to be of a size, into memory. Raises as `ask`."""
        with self._lock:
            self._free_buffers()
            self._send(command, (payload,))
            size = bytearray(_SIZE.size)
            self._receive(command, memoryview(size), "an answer")
            (n_bytes,) = _SIZE.unpack(size)
            if n_bytes != len(into):
                raise self._fail(command, f"the server answers with {n_bytes:,} bytes where {len(into):,} are due")
            self._receive(command, into, f"an answer of {len(into):,} bytes")
            self.n_done = self.n_graphs
            self._unanswered.clear()

    def synchronize(self, n_graphs: int | None = None) -> None:
        """Wait until the graphs sent so far, or the first ``n_graphs``, are computed.

        Sent bytes need no wait: they have left the host's memory, and the server processes them in order.

        Raises
        ------
        RPCError
            The server closed the connection: one of the commands without an answer failed.
        """
        with self._lock:
            if self.n_done < (self.n_graphs if n_graphs is None else n_graphs):
                self.ask(Command.DEVICE_COUNT, b"", 4)

    def free_later(self, remote: int) -> None:
        """Free a buffer before the next command; safe wherever Python collects garbage."""
        self._to_free.append(remote)

    @property
    def has_frees(self) -> bool:
        """Whether buffers are to be freed before the next command."""
        return bool(self._to_free)

    def _free_buffers(self) -> None:
        while self._to_free and self._socket is not None:
            self._send(Command.FREE_BUFFER, (_SIZE.pack(self._to_free.popleft()),))
            self.n_frees += 1

    def _send(self, command: Command, parts: tuple[bytes | memoryview, ...]) -> None:
        if self._socket is None:
            raise self._error(command, f"the connection is lost: {self._lost}", hint="open the device again")
        total = sum(len(part) for part in parts)
        deadline = time.monotonic() + self.timeout_s + total * _SECONDS_PER_BYTE
        header = _HEADER.pack(command, total)
        small = total < _PIECE_BYTES
        messages = [header + b"".join(parts)] if small else [header, *parts]
        try:
            for message in messages:
                view = memoryview(message)
                for at in range(0, len(view), _PIECE_BYTES):
                    self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                    self._socket.sendall(view[at : at + _PIECE_BYTES])
        except TimeoutError as error:
            raise self._fail(command, f"the server takes no bytes within {self.timeout_s:g} s", hint=_SLOW) from error
        except OSError as error:
            raise self._fail(command, _broken(error), hint=_LOOK) from error
        self.n_graphs += command in (Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE)
        if command in NO_ANSWER:
            self._unanswered.append(command)
            del self._unanswered[:-3]

    def _receive(self, command: Command, into: memoryview, what: str) -> None:
        assert self._socket is not None
        deadline = time.monotonic() + self.timeout_s + len(into) * _SECONDS_PER_BYTE
        at = 0
        try:
            while at < len(into):
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                n = self._socket.recv_into(into[at:])
                if n == 0:
                    message = f"the server closed the connection after {at:,} bytes of {what}"
                    raise self._fail(command, message, hint=_LOOK)
                at += n
        except TimeoutError as error:
            message = f"{at:,} bytes of {what} came within {self.timeout_s:g} s"
            raise self._fail(command, message, hint=_SLOW) from error
        except OSError as error:
            raise self._fail(command, _broken(error), hint=_LOOK) from error

    def new_graph_uid(self) -> int:
        """Return an id for a graph that no other of this connection has."""
        self._n_uids += 1
        return self._n_uids

    # -- ending --------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it can still be used, as far as is known."""
        return self._socket is not None

    def fail(self, command: Command, message: str) -> RPCError:
        """Close the connection, as its other end cannot be trusted, and return the error to raise."""
        return self._fail(command, message)

    def _fail(self, command: Command, message: str, *, hint: str = "") -> RPCError:
        error = self._error(command, message, hint=hint)
        self._lost = self._lost or f"{command.name}: {message}"
        self.n_done = self.n_graphs  # it was told: who waits after this waits for nothing, and who uses it is refused
        self.close()
        return error

    def _error(self, command: Command, message: str, *, hint: str = "") -> RPCError:
        unanswered = tuple(c.name for c in self._unanswered if c is not command)
        return RPCError(self.host, self.port, command.name, message, unanswered=unanswered, hint=hint)

    def close(self) -> None:
        """End the connection; the server frees all that was allocated through it."""
        own, self._socket = self._socket, None
        self._lost = self._lost or "it was closed"
        self._to_free.clear()
        if own is not None:
            own.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()

    def __repr__(self) -> str:
        state = "open" if self.is_open else "lost"
        return f"<Connection to {self.host}:{self.port}, protocol {'.'.join(map(str, self.version))}, {state}>"


_SLOW = "if its work takes longer, set PYGGML_RPC_TIMEOUT to more seconds"
_LOOK = "the server's own output may say why"


def _words(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _broken(error: OSError) -> str:
    if isinstance(error, ConnectionError):  # reset or a broken pipe: it went without taking all that was sent
        return "the server closed the connection"
    return f"the connection broke: {_words(error)}"


def host_memory(address: int, size: int) -> memoryview:
    """Return bytes of the process as a view that sockets read from and write to."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")
