"""From which node to which each tensor needs its memory, and which tensors of a layout overlap meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..tensor import Tensor, are_same_layout
from ..types import Op, TensorFlag

if TYPE_CHECKING:
    from .graph import GallocGraph

__all__ = ["Stay", "lives_of", "overlaps", "takes_over"]


@dataclass(eq=False, slots=True)
class Stay:
    """A tensor in a compute buffer, with the first and the last node that need it."""

    tensor: Tensor
    start: int
    end: int
    lo: int  #: first byte
    hi: int  #: first byte after it


def lives_of(graph: GallocGraph) -> dict[Tensor, tuple[int, int]]:
    """Return, for each tensor that owns memory, the first and the last node that need it; -1 is before all nodes."""
    nodes = graph.nodes
    forever, is_input, is_output, none = len(nodes), int(TensorFlag.INPUT), int(TensorFlag.OUTPUT), Op.NONE
    starts: dict[Tensor, int] = {leaf: -1 for leaf in graph.leafs if leaf.view_src is None}
    ends: dict[Tensor, int] = {}
    for i, node in enumerate(nodes):
        root = node.view_src
        if root is None or node.op is not none:  # else a dependency made by the scheduler: its sources count
            root = root or node
            if root not in starts:
                starts[root] = -1 if root.flags & is_input else i
            ends[root] = i
        for src in node.src:
            if src is not None:
                root = src.view_src or src
                if root not in starts:
                    starts[root] = -1 if root.flags & is_input else i
                ends[root] = i
    return {t: (start, forever if t.flags & is_output else ends.get(t, start)) for t, start in starts.items()}


def overlaps(stays: Iterable[Stay]) -> Iterator[tuple[Stay, Stay]]:
    """Yield each tensor of one buffer with an earlier one that is still needed when it is written, if they overlap."""
    present: list[Stay] = []
    for stay in sorted(stays, key=lambda s: s.start):
        start, lo, hi = stay.start, stay.lo, stay.hi
        still = [stay]
        for other in present:
            if other.end >= start:
                still.append(other)
                if lo < other.hi and other.lo < hi:
                    yield stay, other
        present = still


def takes_over(stay: Stay, other: Stay, can_inplace: Callable[[Op], bool]) -> bool:
    """Return whether a result may be computed in place of a source: its last use, element by element."""
    node, source = stay.tensor, other.tensor
    read = [src for src in node.src if src is source or (src is not None and src.view_src is source)]
    return (
        other.end == stay.start
        and other.lo == stay.lo
        and bool(read)
        and all(src is source for src in read)
        and are_same_layout(node, source)
        and can_inplace(node.op)
    )
