"""A split as the library's graph, made once and computed as often as it stays the same.

The nodes of the split become nodes of the library; what they read from elsewhere becomes a `Shadow`, without an op, so
that the library's own walk over the sources stops there and counts uses within the split. A node that is also used
elsewhere is flagged as an output: a device that fuses ops must still write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...backend import unsupported_op
from ...errors import BackendError, ComputeError
from ...graph import GraphView, Snapshot
from ...tensor import Tensor
from ...types import TensorFlag
from ..host.indices import IndexUse, bad_index_error, cut_at_indices, find_bad_index, nodes_to_give
from .library import Handle
from .memory import LibraryBuffer
from .tensors import new_tensor, place, set_op

if TYPE_CHECKING:
    from .device import LibraryBackend

__all__ = ["LibraryPlan"]


@dataclass(slots=True)
class _Part:
    """A graph of the library, and the indices to look at before it."""

    checks: list[IndexUse]
    graph: Handle
    context: Handle


class LibraryPlan:
    """The nodes of a range as graphs of the library.

    Nearly always it is one graph; it is cut where a node chooses by indices that an earlier one makes and that could
    be out of bounds.

    Raises
    ------
    BackendError
        A tensor of a node is in memory that the device cannot use: an input of the split was not copied.
    UnsupportedOpError
        The device cannot run a node.
    """

    __slots__ = ("_buffers", "_keep", "_nodes", "backend", "parts", "snapshot", "version")

    def __init__(self, backend: LibraryBackend, view: GraphView) -> None:
        self.backend = backend
        nodes = view.nodes
        self.version = view.graph.version  # who else uses a node
        self.snapshot = Snapshot(nodes)
        todo = nodes_to_give(nodes, backend)
        uses = _uses(todo)
        counts = view.graph.use_counts
        self._nodes: dict[Tensor, Handle] = {}  # ours to the library's, of all parts
        self._buffers: set[LibraryBuffer] = set()  # where the tensors lie
        self._keep: list[object] = []  # shadows: tensors may be given others while the plan lives
        cuts = cut_at_indices(todo)
        ends = [start for start, _ in cuts[1:]] + [len(todo)]
        self.parts = [
            self._part(todo[start:end], checks, {n for n in todo[start:end] if counts.get(n) != uses.get(n, 0)})
            for (start, checks), end in zip(cuts, ends, strict=True)
        ]

    def is_for(self, backend: LibraryBackend, view: GraphView) -> bool:
        """Whether this is still the plan of a range, on a backend."""
        is_same = self.backend is backend and self.version == view.graph.version
        return is_same and self.snapshot.serves(view)

    def run(self) -> None:
        """Give the graphs to the device; it may still be at work when this returns.

        Raises
        ------
        BackendError
            The buffer of a tensor was closed.
        ExpertIdError
            An expert id is out of bounds; its node and those after it were not given.
        ComputeError
            A row index is, or the device failed.
        """
        backend = self.backend
        for buffer in self._buffers:
            if buffer.is_closed:
                raise BackendError(backend.name, f"a buffer in {buffer.buft.name} was closed and is still used")
        for part in self.parts:
            if part.checks:
                backend.synchronize()
                for use in part.checks:
                    bad = find_bad_index(use.indices, use.limit)
                    if bad is not None:
                        raise bad_index_error(use.node, backend.name, *bad, use.limit)
            status = backend.library.lib.ggml_backend_graph_compute_async(backend.handle, part.graph)
            if status != 0:
                raise ComputeError(backend.name, "the library could not compute a split", status=int(status))

    # -- making --------------------------------------------------------------

    def _part(self, nodes: Sequence[Tensor], checks: list[IndexUse], outputs: set[Tensor]) -> _Part:
        library = self.backend.library
        sources = {s for node in nodes for s in node.src if s is not None}
        size = len(nodes) + len(sources) + 1
        context = library.new_context(len(nodes), graph_size=size)
        graph = library.lib.ggml_new_graph_custom(context, size, False)
        for node in nodes:
            made = self._node(node, context)
            if node in outputs:
                made.flags |= int(TensorFlag.OUTPUT)
        inside = set(nodes)
        for node in nodes:
            made = self._nodes[node]
            for i, source in enumerate(node.src):
                if source is not None:
                    made.src[i] = self._nodes[source] if source in inside else self._elsewhere(source)
            library.lib.ggml_build_forward_expand(graph, made)
        if library.lib.ggml_graph_n_nodes(graph) != len(nodes):
            raise ComputeError(self.backend.name, "the nodes of a split are not in an order that can be computed")
        return _Part(checks, graph, context)

    def _node(self, node: Tensor, context: Handle) -> Handle:
        buffer = self._own(node)
        if not self.backend.device.supports_op(node):
            raise unsupported_op(node, (self.backend,))
        library = self.backend.library
        made = new_tensor(library, context, node)
        set_op(library, made, node)
        root = node.view_src
        place(buffer, made, node, None if root is None else self._nodes.get(root) or self._elsewhere(root))
        made.flags = node.flags & int(TensorFlag.INPUT | TensorFlag.OUTPUT | TensorFlag.COMPUTE)
        self._nodes[node] = made
        return made

    def _elsewhere(self, tensor: Tensor) -> Handle:
        """Return the library's tensor for one that this part does not make."""
        if tensor.is_empty and tensor.storage is None:
            context = self.backend.library.new_context(1)
            self._keep.append(context)
            return new_tensor(self.backend.library, context, tensor)
        made = self._own(tensor).shadow(tensor)
        self._keep.append(tensor.extra)
        return made

    def _own(self, tensor: Tensor) -> LibraryBuffer:
        storage = tensor.storage
        if (
            not isinstance(storage, LibraryBuffer)
            or tensor.data is None
            or not self.backend.supports_buft(storage.buft)
        ):
            where = "in no memory" if storage is None else f"in {storage.buft.name}"
            raise BackendError(
                self.backend.name, f"'{tensor.name}' is {where}, not in the device's memory", hint="it was not copied"
            )
        self._buffers.add(storage)
        return storage


def _uses(nodes: Sequence[Tensor]) -> dict[Tensor, int]:
    """Return how often each tensor is a source of the nodes."""
    counts: dict[Tensor, int] = {}
    for node in nodes:
        for source in node.src:
            if source is not None:
                counts[source] = counts.get(source, 0) + 1
    return counts
