"""`Tenancy`: which tensors still own their bytes of the compute buffers, so that overwritten results are not read."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from ..buffer import Buffer
from ..errors import GraphError, SchedError
from ..tensor import Tensor
from ..types import Op
from .state import SchedGraph, is_computed

__all__ = ["Tenancy"]


class Tenancy:
    """The contents of the compute buffers after a graph was computed.

    Every compute buffer refers to it, and reading a tensor there calls `check_read`. Overwritten results are only
    searched then, so that a compute costs nothing.

    Parameters
    ----------
    graph : SchedGraph
        Nodes and copies in the order in which they are written.
    buffers : collection of Buffer
        The chunks of all compute buffers.
    owner : object
        Tells the buffers of one scheduler from those of another.

    Notes
    -----
    Differs: upstream reads whatever is there (`Repairs.reused_memory`).
    """

    __slots__ = ("_by", "_graph", "_lost", "_position", "is_over", "owner", "written_by_hand")

    def __init__(self, graph: SchedGraph, buffers: Collection[Buffer], owner: object) -> None:
        self.owner = owner
        self._graph = graph
        self._position: dict[Tensor, int] | None = None  # of what owns memory, in the order of writing
        self._lost: list[tuple[Tensor, Tensor]] | None = None
        self._by: dict[Tensor, Tensor | None] = {}
        self.is_over = False  #: whether the compute has ended
        self.written_by_hand: set[Tensor] = set()  #: tensors that the user has written since
        for buffer in buffers:
            buffer.tenancy = self

    def begin(self) -> None:
        """Verify that every input is set; then allow all reads until `end`.

        Raises
        ------
        SchedError
            An input was overwritten by the previous compute and not set again.
        """
        if self.is_over:
            for leaf, by in self._lost_inputs:
                if leaf not in self.written_by_hand and self._is_here(leaf):
                    raise SchedError(
                        f"'{leaf.name}' must be set again before the graph is computed again: "
                        f"{_what(by)} overwrote it the last time",
                        hint="or mark it as output (set_output) before alloc_graph, so that it keeps its memory",
                    )
        self.is_over = False
        self.written_by_hand.clear()

    def end(self) -> None:
        """Record that the compute has ended."""
        self.is_over = True

    def note_write(self, tensor: Tensor) -> None:
        """Note that a tensor was written by hand: it holds that, whatever was there."""
        if self.is_over:
            self.written_by_hand.add(tensor.view_src or tensor)

    def check_read(self, tensor: Tensor) -> None:
        """Refuse a tensor whose memory holds something else.

        Raises
        ------
        GraphError
            A node or a copy was written there after it, or another graph was computed there.
        """
        root = tensor.view_src or tensor
        if not self.is_over or root.is_empty or root in self.written_by_hand:
            return
        if root not in self._positions:
            raise GraphError(
                f"'{tensor.name}' cannot be read: another graph was computed in its memory",
                hint="read results before the scheduler allocates the next graph",
            )
        by = self._overwritten_by(root)
        if by is not None:
            raise GraphError(
                f"'{tensor.name}' cannot be read: its memory was given to {_what(by)} in the same compute",
                hint="mark it as output: set_output() before alloc_graph",
            )

    @property
    def _lost_inputs(self) -> list[tuple[Tensor, Tensor]]:
        """Leafs that computed nodes read, themselves or from a copy, and that others overwrite: with the first that does."""
        if self._lost is None:
            read = {
                s.view_src or s for node in self._graph.nodes if is_computed(node) for s in node.src if s is not None
            }
            for dep, copy in pairwise(self._graph.nodes):  # a view that keeps the source alive, then the copy
                if dep.op is Op.NONE and dep.view_src is not None and copy in read and dep.src[0] is not None:
                    read.add(dep.src[0].view_src or dep.src[0])
            own = [leaf for leaf in self._graph.leafs if leaf in read and leaf.view_src is None and self._is_here(leaf)]
            found = ((leaf, self._overwritten_by(leaf)) for leaf in own)
            self._lost = [(leaf, by) for leaf, by in found if by is not None]
        return self._lost

    @property
    def _positions(self) -> dict[Tensor, int]:
        if self._position is None:
            self._position = {leaf: -1 for leaf in self._graph.leafs}
            for i, node in enumerate(self._graph.nodes):
                for tensor in (*node.src, node):
                    if tensor is not None and tensor.view_src is None:
                        self._position.setdefault(tensor, i if tensor is node else -1)
        return self._position

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.buffer is not None and tensor.buffer.tenancy is self

    def _overwritten_by(self, root: Tensor) -> Tensor | None:
        """Return the first node or copy that was written over a tensor after it was."""
        if root not in self._by:
            self._by[root] = self._find(root)
        return self._by[root]

    def _find(self, root: Tensor) -> Tensor | None:
        lo = root.data
        if lo is None:
            return None
        hi = lo + root.nbytes
        for node in self._graph.nodes[self._positions[root] + 1 :]:
            at = node.data
            if at is None or node.buffer is not root.buffer or (node.view_src or node) is root:
                continue
            is_copy = node.op is Op.NONE and node.view_src is None
            if at < hi and lo < at + node.nbytes and (is_copy or is_computed(node)):
                return node
        return None


def _what(node: Tensor) -> str:
    return f"the copy '{node.name}'" if node.op is Op.NONE else f"{node.op_desc} '{node.name}'"
