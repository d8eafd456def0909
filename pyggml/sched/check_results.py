"""`Rerun`: a split computed once more with whole copies of its inputs, and its results compared bit for bit (``PYGGML_CHECK=2``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from ..backend import Backend
from ..graph import GraphView
from ..tensor import Tensor
from .state import is_computed

__all__ = ["Rerun"]


class Rerun:
    """What a split is about to write over, kept so that it can be computed twice.

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
        """Keep what a split is about to write over; None if some of its memory cannot be seen.

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
        """Compute the nodes again with whole copies; return the first whose result is another.

        All memory is as before the call when it returns.
        """
        backend.synchronize()
        after = [bytes(memory) for _, memory in self.results]
        copies_after = [bytes(to) for to, _ in self.copies]
        for (_, memory), content in zip(self.results, self.before, strict=True):
            memory[:] = content
        for to, whole in self.copies:  # last: results may lie where a copy was that nobody needs any more
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
