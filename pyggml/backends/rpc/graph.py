"""Tensors and graphs as a server wants them: packed structs that name each other by numbers."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...backend import unsupported_op
from ...errors import BackendError
from ...graph import GraphView, Snapshot
from ...tensor import Tensor
from ...types import MAX_NAME, MAX_SRC, Op
from ..host.indices import IndexUse, bad_index_error, cut_at_indices, find_bad_index, nodes_to_give
from .protocol import MAX_U32, TENSOR, Command

if TYPE_CHECKING:
    from .device import RPCBackend

__all__ = ["NO_TENSOR", "KnownRange", "RPCPlan", "pack_alloc_question", "pack_place"]

NO_TENSOR = bytes(TENSOR.size)
_N_PARAMS = 16


@dataclass(frozen=True, slots=True)
class KnownRange:
    """Least and largest of the numbers that were written into a tensor of indices; kept in the tensor's ``extra``.

    Reading them back from far away would cost as much as computing a split.
    """

    place: object  #: of the buffer and its state when they were written
    low: int
    high: int


def pack_place(tensor: Tensor, remote: int) -> bytes:
    """Return a tensor without an op: type, layout, buffer and address, for copies and as what a graph starts from."""
    return _pack(tensor, 1, remote)


def _pack(
    tensor: Tensor,
    number: int,
    remote: int,
    *,
    op: Op = Op.NONE,
    src: Sequence[int] = (),
    view_src: int = 0,
    use_count: int = 0,
) -> bytes:
    if max(*tensor.ne, *tensor.nb) > MAX_U32:
        raise BackendError(
            "rpc", f"'{tensor.name}' has sizes or strides of 4 GiB and more, which the protocol has no room for"
        )
    words = tensor.op_params if op is not Op.NONE else ()
    return TENSOR.pack(
        number,
        int(tensor.type),
        remote,
        *tensor.ne,
        *tensor.nb,
        int(op),
        *words,
        *(0,) * (_N_PARAMS - len(words)),
        tensor.flags,
        *src,
        *(0,) * (MAX_SRC - len(src)),
        view_src,
        tensor.view_offs if view_src else 0,
        (tensor.data or 0) if remote else 0,
        tensor.name.encode()[:MAX_NAME],
        use_count,
    )


def pack_alloc_question(tensor: Tensor, device: int) -> bytes:
    """Return what asks how many bytes a tensor takes: it and its sources, without places."""
    numbers = [0 if s is None else i + 2 for i, s in enumerate(tensor.src)]
    sources = [NO_TENSOR if s is None else _pack(s, i + 2, 0, op=s.op) for i, s in enumerate(tensor.src)]
    sources += [NO_TENSOR] * (MAX_SRC - len(sources))
    return struct.pack("<I", device) + _pack(tensor, 1, 0, op=tensor.op, src=numbers) + b"".join(sources)


@dataclass(eq=False, slots=True)
class _Part:
    """A graph in the server's words, and the indices to look at before it."""

    checks: list[IndexUse]
    body: bytes
    uid: int = 0  #: of the connection; given when it is first sent


class RPCPlan:
    """The nodes of a range as graphs of a server; cut where indices must be looked at in between.

    Raises
    ------
    BackendError
        A tensor of a node lies elsewhere: a split input was not copied.
    UnsupportedOpError
        A node is none that a server is known to run.
    """

    __slots__ = ("_leafs", "backend", "parts", "snapshot", "version")

    def __init__(self, backend: RPCBackend, view: GraphView) -> None:
        self.backend = backend
        nodes = view.nodes
        self.version = view.graph.version  # who else uses a node
        self.snapshot = Snapshot(nodes)
        todo = nodes_to_give(nodes, backend)
        for node in todo:
            if not backend.device.supports_op(node):
                raise unsupported_op(node, (backend,), reason="servers are not known to run it")
        cuts = cut_at_indices(todo)
        ends = [start for start, _ in cuts[1:]] + [len(todo)]
        counts = view.graph.use_counts
        self._leafs: list[Tensor] = []  # one for each buffer that weights and inputs lie in
        self.parts = [
            _Part(checks, self._body(todo[start:end], counts))
            for (start, checks), end in zip(cuts, ends, strict=True)
            if end > start
        ]

    def is_for(self, backend: RPCBackend, view: GraphView) -> bool:
        """Whether this is still the plan of a range, on a backend."""
        is_same = self.backend is backend and self.version == view.graph.version
        return is_same and self.snapshot.serves(view)

    def _body(self, nodes: Sequence[Tensor], counts: Mapping[Tensor, int]) -> bytes:
        """Return numbers of nodes, then all tensors: first those that come from elsewhere."""
        numbers: dict[Tensor, int] = {}
        inside = set(nodes)
        elsewhere: list[Tensor] = []
        for node in nodes:
            for tensor in (*node.src, node.view_src):
                if tensor is not None and tensor not in inside and tensor not in numbers:
                    numbers[tensor] = len(numbers) + 1
                    elsewhere.append(tensor)
        for node in nodes:
            numbers[node] = len(numbers) + 1
        remote_of = self.backend.remote_of
        packed = [
            _pack(t, numbers[t], 0 if t.is_empty and t.storage is None else remote_of(t), use_count=counts.get(t, 0))
            for t in elsewhere
        ]
        packed += [
            _pack(
                node,
                numbers[node],
                remote_of(node),
                op=node.op,
                src=[0 if s is None else numbers[s] for s in node.src],
                view_src=0 if node.view_src is None else numbers[node.view_src],
                use_count=counts.get(node, 0),
            )
            for node in nodes
        ]
        self._leafs += {t.storage: t for t in (*elsewhere, *nodes) if t.storage is not None}.values()
        head = struct.pack(f"<I{len(nodes)}QI", len(nodes), *(numbers[n] for n in nodes), len(packed))
        return head + b"".join(packed)

    def run(self) -> None:
        """Send the graphs; a graph that the server computed last is only named.

        Raises
        ------
        BackendError
            The buffer of a tensor was closed.
        ExpertIdError
            An expert id is out of bounds; its node and those after it were not sent.
        ComputeError
            A row index is.
        RPCError
            The connection is lost.
        """
        backend = self.backend
        for tensor in self._leafs:
            backend.remote_of(tensor)  # its buffer may have been closed
        for part in self.parts:
            for use in part.checks:
                known = backend.known_range(use.indices)
                if known is not None and known.low >= 0 and known.high < use.limit:
                    continue
                bad = find_bad_index(use.indices, use.limit)
                if bad is not None:
                    raise bad_index_error(use.node, backend.name, *bad, use.limit)
            self._send(part)

    def _send(self, part: _Part) -> None:
        device = self.backend.device
        connection = device.connection
        part.uid = part.uid or connection.new_graph_uid()
        has_uid = connection.version >= (8, 0)
        head = struct.pack("<IQ", device.number, part.uid) if has_uid else struct.pack("<I", device.number)
        if device.last_graph == (part, connection.n_frees) and not connection.has_frees:
            connection.tell(Command.GRAPH_RECOMPUTE, head)
        else:
            device.last_graph = None
            connection.tell(Command.GRAPH_COMPUTE, head, part.body)
            device.last_graph = (part, connection.n_frees)
