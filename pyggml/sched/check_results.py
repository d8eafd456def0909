"""`Rerun`: computes a split again with full copies and compares its results bit for bit (``PYGGML_CHECK=2``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from ..backend import Backend
from ..graph import GraphView
from ..tensor import Tensor
from .state import is_computed

__all__ = ["Rerun"]


class Rerun:
    """The memory that a split will overwrite, saved so that the split can be computed twice.

    Parameters
    ----------
    graph : GraphView
        The nodes.
    results : sequence of (Tensor, memoryview)
        Each node and its memory.
    copies : sequence of (memoryview, memoryview)
        Memory of each copy that the nodes read, and of its source.
    """

    __slots__ = ("before", "copies", "graph", "results")

    def __init__(
        self, graph: GraphView, results: list[tuple[Tensor, memoryview]], copies: list[tuple[memoryview, memoryview]]
    ) -> None:
        self.graph = graph
        self.results = results
        self.copies = copies
        self.before = [bytes(memory) for _, memory in results]

    @classmethod
    def prepare(cls, graph: GraphView, copies: Mapping[Tensor, Tensor]) -> Self | None:
        """Save the memory that a split will overwrite; return None if some of it cannot be read.

        Parameters
        ----------
        copies : mapping of Tensor to Tensor
            The copies that it reads, and their sources.
        """
        results = []
        for node in graph.nodes:
            if is_computed(node) and not node.is_empty:
                memory = _memory(node)
                if memory is None:
                    return None
                results.append((node, memory))
        pairs = []
        for copy, source in copies.items():
            to, whole = _memory(copy), _memory(source)
            if to is None or whole is None:
                return None
            pairs.append((to, whole))
        return cls(graph, results, pairs)

    def first_difference(self, backend: Backend) -> Tensor | None:
        """Compute the nodes again with full copies; return the first whose result differs.

        All memory is restored before it returns.
        """
        backend.synchronize()
        after = [bytes(memory) for _, memory in self.results]
        copies_after = [bytes(to) for to, _ in self.copies]
        for (_, memory), content in zip(self.results, self.before, strict=True):
            memory[:] = content
        for to, whole in self.copies:  # last: results may use the memory of copies that are not needed later
            to[:] = whole
        backend.graph_compute(self.graph)
        backend.synchronize()
        different = [
            node for (node, memory), content in zip(self.results, after, strict=True) if bytes(memory) != content
        ]
        for (to, _), content in zip(self.copies, copies_after, strict=True):
            to[:] = content
        for (_, memory), content in zip(self.results, after, strict=True):
            memory[:] = content
        return different[0] if different else None


def _memory(tensor: Tensor) -> memoryview | None:
    storage = tensor.storage
    return None if storage is None else storage.peek(tensor, 0, tensor.nbytes)
