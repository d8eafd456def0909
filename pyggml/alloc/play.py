"""`Play`: goes through a graph with sizes only, to find a place for each result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tensor import Tensor
from ..types import SIZE_MAX, Op, TensorFlag
from .offsets import pad

if TYPE_CHECKING:
    from .graph import Gallocr

__all__ = ["NOWHERE", "Life", "Place", "Play", "places_of"]


class Life:
    """The state of one tensor while a graph is played through."""

    __slots__ = ("allocated", "buffer_id", "chunk", "n_children", "n_views", "offset")

    def __init__(self) -> None:
        self.n_children = 0
        self.n_views = 0
        self.buffer_id = 0
        self.chunk = 0
        self.offset = 0
        self.allocated = False


@dataclass(slots=True)
class Place:
    """The place of a tensor at one position of the graph."""

    buffer_id: int  #: -1: it has memory, or is a view
    chunk: int
    offset: int
    size_max: int  #: bytes that a tensor here may have


NOWHERE = Place(-1, -1, SIZE_MAX, 0)


def places_of(laid_out: Sequence[tuple[Place, list[Place]]], srcs: Sequence[Sequence[Tensor | None]]) -> list[Place]:
    """Return the places of sources and nodes in a row; where a node has more sources than it had, they have none."""
    places: list[Place] = []
    for (_, known), present in zip(laid_out, srcs, strict=True):
        places += known[: len(present)]
        places += [NOWHERE] * (len(present) - len(known))
    places += [dst for dst, _ in laid_out]
    return places


class Play:
    """One pass through a graph: which tensors are needed by others, and their places.

    Notes
    -----
    Mirrors `ggml_gallocr_alloc_graph_impl`.
    """

    __slots__ = ("alloc_size", "bufts", "galloc", "lives", "tallocs")

    def __init__(self, galloc: Gallocr) -> None:
        self.galloc = galloc
        self.tallocs = galloc.tallocs
        self.alloc_size: Callable[[int, Tensor], int] = galloc.alloc_size
        self.lives: dict[Tensor, Life] = {}

    def _life(self, tensor: Tensor) -> Life:
        life = self.lives.get(tensor)
        if life is None:
            life = self.lives[tensor] = Life()
        return life

    def run(
        self,
        nodes: Sequence[Tensor],
        leafs: Sequence[Tensor],
        node_buffer_ids: Sequence[int],
        leaf_buffer_ids: Sequence[int],
    ) -> dict[Tensor, Life]:
        """Go through a graph and return the place of each tensor."""
        for leaf, buffer_id in zip(leafs, leaf_buffer_ids, strict=True):
            self._allocate(leaf, buffer_id)
        self._count(nodes, node_buffer_ids)
        life_of = self._life
        for node, buffer_id in zip(nodes, node_buffer_ids, strict=True):
            for parent in node.src:
                if parent is not None:
                    self._allocate(parent, buffer_id)
            self._allocate(node, buffer_id)
            for parent in node.src:
                if parent is None:
                    continue
                life = life_of(parent)
                life.n_children -= 1
                if life.n_children == 0 and life.n_views == 0:
                    self._release(parent, life)
        return self.lives

    def _count(self, nodes: Sequence[Tensor], node_buffer_ids: Sequence[int]) -> None:
        """Count children and views, and allocate flagged inputs before anything that could overwrite them."""
        life_of = self._life
        is_input = int(TensorFlag.INPUT)
        for node, buffer_id in zip(nodes, node_buffer_ids, strict=True):
            # nodes without op are the scheduler's dependencies: their sources count, they do not
            if node.view_src is not None and node.op is not Op.NONE:
                life_of(node.view_src).n_views += 1
            if node.flags & is_input:
                self._allocate(node, buffer_id)
            for src in node.src:
                if src is not None:
                    life_of(src).n_children += 1
                    if src.flags & is_input:
                        self._allocate(src, buffer_id)

    def _allocate(self, tensor: Tensor, buffer_id: int) -> None:
        """Give a tensor without memory a parent's place, or a new one.

        Notes
        -----
        Mirrors `ggml_gallocr_allocate_node`. Upstream's reuse of a view's memory is not mirrored: it asks that the
        view be allocated by itself, which never holds.
        """
        if tensor.data is not None or tensor.buffer is not None or tensor.view_src is not None:
            return
        life = self._life(tensor)
        if life.allocated:
            return
        life.allocated = True
        if self.galloc.can_inplace(tensor.op):
            for parent in tensor.src:
                if parent is not None and self._take_over(tensor, life, parent):
                    return
        life.buffer_id = buffer_id
        life.chunk, life.offset = self.tallocs[buffer_id].alloc(self.alloc_size(buffer_id, tensor))

    def _take_over(self, tensor: Tensor, life: Life, parent: Tensor) -> bool:
        """Put a result in the place of a parent that no other node needs, if the layouts agree."""
        parent_life = self._life(parent)
        if (
            not parent_life.allocated
            or parent_life.n_children != 1
            or parent_life.n_views != 0
            or parent.flags & TensorFlag.OUTPUT
            or parent.type is not tensor.type
            or parent.ne != tensor.ne
            or parent.nb != tensor.nb
        ):
            return False
        buffer_id = parent_life.buffer_id
        talloc = self.tallocs[buffer_id]
        spare = pad(self.alloc_size(buffer_id, parent), talloc.alignment)
        used = pad(self.alloc_size(buffer_id, tensor), talloc.alignment)
        if used > spare:  # upstream asserts that this never is
            return False
        life.buffer_id, life.chunk, life.offset = buffer_id, parent_life.chunk, parent_life.offset
        parent_life.allocated = False  # so that the memory is not freed with the parent
        if spare > used:
            talloc.free_bytes(life.chunk, life.offset + used, spare - used)
        return True

    def _release(self, tensor: Tensor, life: Life) -> None:
        """Free the memory of a tensor that no node needs any more, or of the tensor that it shows."""
        root = tensor.view_src
        if root is not None:
            life = self._life(root)
            life.n_views -= 1
            if life.n_views != 0 or life.n_children != 0:
                return
            tensor = root
        if life.allocated and not tensor.flags & TensorFlag.OUTPUT:
            talloc = self.tallocs[life.buffer_id]
            talloc.free_bytes(life.chunk, life.offset, self.alloc_size(life.buffer_id, tensor))
            life.allocated = False
