"""`Play`: goes through a graph with sizes only, to find a place for each result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from ..tensor import Tensor, are_same_layout
from ..types import SIZE_MAX, Op, TensorFlag
from .offsets import pad

if TYPE_CHECKING:
    from .graph import Gallocr

__all__ = ["NOWHERE", "Place", "Play", "places_of"]


@dataclass(slots=True)
class Place:
    """Where a tensor is."""

    buffer_id: int  #: -1: it has memory, or is a view
    chunk: int
    offset: int
    size: int  #: bytes that it takes; another tensor here may have as many
    allocated: bool = field(default=True, compare=False)  #: while a graph is played through: whether it still is here


NOWHERE = Place(-1, -1, SIZE_MAX, 0)


def places_of(laid_out: Iterable[Place], n_srcs: Sequence[int], srcs: Sequence[Sequence[Tensor | None]]) -> list[Place]:
    """Return the places of other sources and the nodes in a row; where a node has more sources than it had, they have none."""
    places, rest = list[Place](), iter(laid_out)
    for n, present in zip(n_srcs, srcs, strict=True):
        places += list(islice(rest, n))[: len(present)]
        places += [NOWHERE] * (len(present) - n)
    return [*places, *rest]


class Play:
    """One pass through a graph: which tensors are needed by others, and their places.

    Notes
    -----
    Mirrors `ggml_gallocr_alloc_graph_impl`.
    """

    __slots__ = ("can_inplace", "children", "galloc", "lives", "sizes", "tallocs", "views")

    def __init__(self, galloc: Gallocr) -> None:
        self.galloc = galloc
        self.tallocs = galloc.tallocs
        self.sizes = galloc.sizes()
        self.lives: dict[Tensor, Place] = {}
        self.children: defaultdict[Tensor, int] = defaultdict(int)  #: nodes that still read a tensor
        self.views: dict[Tensor, int] = {}  #: views of a tensor that are still read, if there are any
        self.can_inplace: dict[Op, bool] = {}

    def run(
        self,
        nodes: Sequence[Tensor],
        leafs: Sequence[Tensor],
        node_buffer_ids: Sequence[int],
        leaf_buffer_ids: Sequence[int],
    ) -> dict[Tensor, Place]:
        """Go through a graph and return the place of each tensor that gets memory."""
        lives, children, views, allocate = self.lives, self.children, self.views, self._allocate
        for leaf, buffer_id in zip(leafs, leaf_buffer_ids, strict=True):
            if leaf.data is None:
                allocate(leaf, buffer_id)
        for node, buffer_id, parents in zip(nodes, node_buffer_ids, self._count(nodes, node_buffer_ids), strict=True):
            for parent in parents:
                if parent.view_src is None:
                    life = lives.get(parent)
                    if life is None or not life.allocated:
                        allocate(parent, buffer_id)
            if node.view_src is None and node.data is None:
                allocate(node, buffer_id)
            for parent in parents:
                children[parent] = left = children[parent] - 1
                if left == 0 and parent not in views:
                    self._release(parent)
        return lives

    def _count(self, nodes: Sequence[Tensor], node_buffer_ids: Sequence[int]) -> list[list[Tensor]]:
        """Count children and views, and allocate flagged inputs before anything that could overwrite them.

        Returns
        -------
        list of list of Tensor
            The sources of each node that have no memory: all others are not placed here.
        """
        parents: list[list[Tensor]] = []
        children, views, allocate = self.children, self.views, self._allocate
        is_input, none = int(TensorFlag.INPUT), Op.NONE
        for node, buffer_id in zip(nodes, node_buffer_ids, strict=True):
            # nodes without op are the scheduler's dependencies: their sources count, they do not
            root = node.view_src
            if root is not None and node.op is not none:
                views[root] = views.get(root, 0) + 1
            if node.flags & is_input:
                allocate(node, buffer_id)
            own: list[Tensor] = []
            for src in node.src:
                if src is not None and src.data is None:
                    own.append(src)
                    children[src] += 1
                    if src.flags & is_input:
                        allocate(src, buffer_id)
            parents.append(own)
        return parents

    def _allocate(self, tensor: Tensor, buffer_id: int) -> None:
        """Give a tensor without memory a parent's place, or a new one.

        Notes
        -----
        Mirrors `ggml_gallocr_allocate_node`. Upstream's reuse of a view's memory is not mirrored: it asks that the
        view be allocated by itself, which never holds.
        """
        if tensor.data is not None or tensor.buffer is not None or tensor.view_src is not None:
            return
        life = self.lives.get(tensor)
        if life is not None and life.allocated:
            return
        op = tensor.op
        can_inplace = self.can_inplace.get(op)
        if can_inplace is None:
            can_inplace = self.can_inplace[op] = self.galloc.can_inplace(op)
        if can_inplace:
            n_readers = self.children.get
            for parent in tensor.src:
                if parent is not None and n_readers(parent) == 1 and self._take_over(tensor, parent):
                    return
        size = self.sizes[buffer_id](tensor)
        self.lives[tensor] = Place(buffer_id, *self.tallocs[buffer_id].alloc(size), size)

    def _take_over(self, tensor: Tensor, parent: Tensor) -> bool:
        """Put a result in the place of a parent that no other node reads, if no view shows it and the layouts agree."""
        life = self.lives.get(parent)
        if (
            life is None
            or not life.allocated
            or parent in self.views
            or parent.flags & TensorFlag.OUTPUT
            or not are_same_layout(parent, tensor)
        ):
            return False
        talloc, size = self.tallocs[life.buffer_id], self.sizes[life.buffer_id](tensor)
        spare = pad(life.size, talloc.alignment)
        used = pad(size, talloc.alignment)
        if used > spare:  # upstream asserts that this never is
            return False
        self.lives[tensor] = Place(life.buffer_id, life.chunk, life.offset, size)
        life.allocated = False  # so that the memory is not freed with the parent
        if spare > used:
            talloc.free_bytes(life.chunk, life.offset + used, spare - used)
        return True

    def _release(self, tensor: Tensor) -> None:
        """Free the memory of a tensor that no node needs any more, or of the tensor that it shows."""
        root = tensor.view_src
        if root is not None:
            self.views[root] = left = self.views.get(root, 0) - 1
            if left == 0:
                del self.views[root]
            if left != 0 or self.children[root] != 0:
                return
            tensor = root
        life = self.lives.get(tensor)
        if life is not None and life.allocated and not tensor.flags & TensorFlag.OUTPUT:
            self.tallocs[life.buffer_id].free_bytes(life.chunk, life.offset, life.size)
            life.allocated = False
