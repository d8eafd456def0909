"""`Passes`: runs the six passes on one graph after another, and keeps what upstream keeps between graphs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import compress
from weakref import WeakKeyDictionary

from .. import config
from ..buffer import Buffer, BufferType
from ..edits import EDITS
from ..errors import SchedError, check_kind
from ..graph import Graph, Snapshot
from ..tensor import Tensor
from ..types import BufferUsage
from .assign import OffloadOp
from .check import check_assignment, check_splits
from .debug import assignments_text
from .kept import IdTable
from .log import RunLog
from .plan import Plan
from .precedent import Precedent, Precedents
from .resources import Resources
from .split import CutMemory, Cutter, graph_size, make_sched_graph, optimize_splits
from .state import Assignment, Copies, Machine, SchedGraph
from .tenancy import Tenancy

__all__ = ["Passes"]


class Passes:
    """The passes over a machine's backends.

    Parameters
    ----------
    machine : Machine
        The backends and rules.
    resources : Resources
        Of the policies that read the plans.
    """

    def __init__(self, machine: Machine, resources: Resources) -> None:
        self._machine, self._resources = machine, resources
        self._memory = CutMemory()
        self.precedents = Precedents(machine)
        self.precedent: Precedent | None = None  #: of the latest graph
        self._node_ids, self._prev_node_ids = IdTable(), IdTable()
        self._leaf_ids, self._prev_leaf_ids = IdTable(), IdTable()
        self._graph_size = self._prev_graph_size = 0  # of the latest cut and the one before, as upstream counts
        #: by graph: which sources became copies, and the copies
        self._replaced_sources: WeakKeyDictionary[Graph, tuple[list[tuple[Tensor, int, Tensor]], Copies]] = (
            WeakKeyDictionary()
        )

    def cut(
        self,
        graph: Graph,
        asg: Assignment,
        offload_rule: OffloadOp | None,
        log: RunLog,
        *,
        n_copies: int,
        cur_copy: int,
        debug: int,
    ) -> tuple[Plan, SchedGraph]:
        """Assign and cut a graph.

        Parameters
        ----------
        asg : Assignment
            Has the user's pins; the passes add the rest.
        offload_rule : callable or None
            None: nothing is offloaded.
        debug : int
            Level of the text on stderr; 0: none.

        Returns
        -------
        Plan, SchedGraph
            What was decided, and the graph for the allocator.

        Raises
        ------
        UnsupportedOpError
            No backend can run a node, or the backend that it is pinned to cannot.

        Notes
        -----
        Mirrors `ggml_backend_sched_split_graph`.
        """
        start_s = log.now()
        cutter = Cutter(asg, self._machine, self._memory, n_copies=n_copies, cur_copy=cur_copy)
        self._replaced_sources[graph] = cutter.replaced_sources, cutter.copies
        precedent = self.precedents.decide(graph, cutter, offload_rule)
        cutter.copy_graph_inputs(graph)
        plan = cutter.plan(graph, self._resources)
        if debug:
            sys.stderr.write(assignments_text(plan, level=debug))
        asg.forget_counts()
        log.assigned(graph, asg, start_s)
        self._node_ids, self._prev_node_ids = self._prev_node_ids, self._node_ids
        self._leaf_ids, self._prev_leaf_ids = self._prev_leaf_ids, self._leaf_ids
        version = graph.version
        deps = optimize_splits(plan)
        known = precedent if not deps and graph.version == version else None  # else a backend changed the graph
        self.precedent = known if n_copies == 1 else None  # places depend on the current copy
        ids = None if known is None or not known.node_ids else (known.node_ids, known.leaf_ids)
        sched_graph = make_sched_graph(plan, deps, ids)
        if known is not None:
            known.node_ids, known.leaf_ids = sched_graph.node_backend_ids, sched_graph.leaf_backend_ids
        self._node_ids.write(sched_graph.node_backend_ids)
        self._leaf_ids.write(sched_graph.leaf_backend_ids)
        self._prev_graph_size, self._graph_size = self._graph_size, graph_size(plan, sched_graph)
        if config.check():
            check_assignment(plan)
            check_splits(plan)
        return plan, sched_graph

    def snapshot(self, graph: Graph, sched_graph: SchedGraph) -> Snapshot:
        """Return the snapshot of the latest graph, after it is allocated."""
        if self.precedent is None:
            return Snapshot(graph.nodes)
        _, copies = self._replaced_sources[graph]
        return self.precedent.snapshot(graph, copies, sched_graph.placeable)

    @property
    def is_resized(self) -> bool:
        """Return whether the latest graph has another size than the previous one, by upstream's count."""
        return self._graph_size != self._prev_graph_size

    def moved(self, graph: SchedGraph, bufts: Sequence[BufferType]) -> bool:
        """Return whether a tensor of the latest graph has another buffer type than the previous one at its position."""
        return self._node_ids.moved(self._prev_node_ids, len(graph.node_backend_ids), bufts) or self._leaf_ids.moved(
            self._prev_leaf_ids, len(graph.leaf_backend_ids), bufts
        )

    def restore(self, graph: Graph) -> None:
        """Undo what earlier cuts and allocations changed of a graph's tensors; forget views of memory that moved.

        Notes
        -----
        Differs: upstream leaves a leaf where another graph had it, as memory of the leaf's own, and lays results over it
        (`Repairs.reused_memory`).
        """
        check_kind("the graph", graph, Graph, hint="graph = pyggml.Graph(); graph.expand(result)", error=SchedError)
        undo = self._replaced_sources.pop(graph, None)
        tensors = [*graph.leafs, *graph.nodes]
        if undo is not None:
            replaced, copies = undo
            origin: dict[Tensor | None, Tensor] = {
                copy: src for src, by_backend in copies.items() for made in by_backend.values() for copy in made
            }
            EDITS.note()
            for node, j, src in replaced:
                sources = node.src
                if j < len(sources) and origin.get(sources[j]) is src:  # otherwise the user replaced it since
                    list.__setitem__(sources, j, src)
            buffers: list[Buffer | None] = [
                tensor.buffer for tensor in tensors
            ]  # a view's own, which placing sets, too
            placed = {b: b is not None and b.usage is BufferUsage.COMPUTE for b in set(buffers)}
            for tensor in compress(tensors, map(placed.__getitem__, buffers)):
                tensor.buffer = tensor.data = None
        else:
            elsewhere = {b: b is not None and self._is_compute_buffer(b) for b in {leaf.buffer for leaf in graph.leafs}}
            if any(elsewhere.values()):
                for leaf in graph.leafs:
                    if elsewhere[leaf.buffer]:
                        leaf.buffer = leaf.data = None
        for view in [t for t in tensors if t.view_src is not None and t.data is not None]:
            if view.is_stale_view:
                view.buffer = view.data = None

    def _is_compute_buffer(self, buffer: Buffer) -> bool:
        """Whether a graph of these passes was allocated in a buffer."""
        return isinstance(buffer.tenancy, Tenancy) and buffer.tenancy.owner is self

    def restore_all(self) -> None:
        """Undo the changes of every graph that still exists."""
        for graph in list(self._replaced_sources):
            self.restore(graph)
