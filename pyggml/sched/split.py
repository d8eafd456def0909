"""Passes 5 and 6: cut the graph into splits, find the inputs to copy, and make the graph for the allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from ..edits import EDITS
from ..errors import SchedError
from ..graph import Graph, GraphView
from ..tensor import Tensor, dup_layout, view_tensor
from ..types import MAX_SRC, SCHED_MAX_SPLIT_INPUTS, BufferUsage, TensorFlag
from .plan import Plan
from .resources import Resources
from .state import Assignment, Cause, Copies, Machine, SchedGraph, Split

__all__ = ["CutMemory", "Cutter", "graph_size", "make_sched_graph", "optimize_splits"]


class CutMemory:
    """State that upstream's split records keep between graphs.

    Attributes
    ----------
    backend_id : int
        Backend of the first split; a graph without computed nodes keeps it (`Repairs.empty_split`).
    capacities : list of int
        Capacity for inputs of each split's record (`Dialect.cut_at_input_capacity`).
    """

    __slots__ = ("backend_id", "capacities")

    def __init__(self) -> None:
        self.backend_id = 0
        self.capacities: list[int] = []

    def capacity(self, i_split: int) -> int:
        """Return the capacity of a split's record."""
        return self.capacities[i_split] if i_split < len(self.capacities) else 0

    def grow(self, i_split: int) -> None:
        """Double the capacity of a split's record permanently."""
        self.capacities.extend([0] * (i_split + 1 - len(self.capacities)))
        self.capacities[i_split] = 2 * self.capacities[i_split] or SCHED_MAX_SPLIT_INPUTS


class Cutter:
    """Pass 5, and pass 6 with pipeline copies; used once, for one graph. `plan` is the result.

    Attributes
    ----------
    splits : list of Split
        In the order of computation; only complete ones.
    copies : Copies
        Copies of split inputs and of graph inputs.
    graph_inputs : list of Tensor
        Inputs that have pipeline copies.
    replaced_sources : list of (Tensor, int, Tensor)
        Node, index and original source, for every source that was replaced by a copy.
    """

    __slots__ = (
        "asg",
        "copies",
        "cur_copy",
        "graph_inputs",
        "machine",
        "memory",
        "n_copies",
        "pins_are_suspect",
        "replaced_sources",
        "splits",
    )

    def __init__(self, asg: Assignment, machine: Machine, memory: CutMemory, *, n_copies: int, cur_copy: int) -> None:
        self.asg = asg
        self.machine = machine
        self.memory = memory
        self.n_copies = n_copies
        self.cur_copy = cur_copy
        self.pins_are_suspect = machine.repairs.pinned_weight and asg.has_pins
        self.splits: list[Split] = []
        self.copies: Copies = {}
        self.graph_inputs: list[Tensor] = []
        self.replaced_sources: list[tuple[Tensor, int, Tensor]] = []

    def cut(self, graph: Graph) -> None:
        """Cut at every change of backend, and before every weight that must be copied.

        Notes
        -----
        Mirrors `ggml_backend_sched_split_graph`, pass 5. A split that starts for its weight lets the allocator reuse
        the memory of the previous weight.
        """
        EDITS.note()
        nodes = graph.nodes
        ids = self.asg.ids
        backend_of = cast("Callable[[Tensor | None], int | None]", ids.get)  # None is nowhere
        i_first = next((i for i, node in enumerate(nodes) if not node.op.is_view), len(nodes))
        if i_first < len(nodes):
            self.memory.backend_id = ids[nodes[i_first]]
        elif self.machine.repairs.empty_split:
            self.memory.backend_id = ids[nodes[0]] if nodes else self.machine.cpu
        at, i_start = self.memory.backend_id, 0
        inputs: list[Tensor] = []
        by_source = self.machine.dialect.graph_inputs_from == "sources"
        suspect = self.pins_are_suspect
        looks_at_all = suspect or (by_source and self.n_copies > 1)
        for i, node in enumerate(nodes):
            if node.op.is_view:
                continue
            backend_id = ids[node]
            if backend_id == at and not looks_at_all:
                for src_at in map(backend_of, node.src):
                    if src_at != backend_id:
                        break
                else:
                    continue  # all sources are usable: most nodes
            if backend_id != at or (inputs and self._must_start(node, at, len(inputs))):
                self.add_split(graph, at, i_start, i, inputs)
                at, i_start, inputs = backend_id, i, []
            for j, src in enumerate(node.src):
                if src is None:
                    continue
                if by_source and self.n_copies > 1 and src.flags & TensorFlag.INPUT:
                    self._copy_graph_input(src)
                if ids.get(src) == backend_id and not suspect:
                    continue  # usable: most sources
                if self._needs_copy(src, at):
                    if at not in self.copies.get(src, ()):
                        self.copy_to(src, at)
                        self._note_input(len(inputs))
                        inputs.append(src)
                    self.replace_source(node, j, src, at)
        self.add_split(graph, at, i_start, len(nodes), inputs)

    def add_split(self, graph: Graph, backend_id: int, i_start: int, i_end: int, inputs: Iterable[Tensor]) -> None:
        """Complete a split."""
        self.splits.append(Split(backend_id, i_start, i_end, tuple(inputs), GraphView(graph, i_start, i_end)))

    def copy_to(self, src: Tensor, backend_id: int) -> None:
        """Make the copies of a tensor on a backend."""
        (made,) = self.copy_all([(src, backend_id)])
        for copy in made:
            self.asg.explain(copy, Cause.COPIED)

    def copy_all(self, sources: Iterable[tuple[Tensor, int]]) -> list[list[Tensor]]:
        """Make the copies of each tensor on a backend, without a cause (`Assignment.follow` has it)."""
        copies, names, made = self.copies, [b.name for b in self.machine.backends], list[list[Tensor]]()
        for src, backend_id in sources:
            of_src = [dup_layout(src, f"{names[backend_id]}#{src.name}#{c}") for c in range(self.n_copies)]
            made.append(of_src)
            known = copies.get(src)
            if known is None:
                copies[src] = {backend_id: of_src}
            else:
                known[backend_id] = of_src
            if self.n_copies > 1:
                for copy in of_src:
                    copy.set_input().set_output()  # the allocator must not overwrite it
        return made

    def replace_source(self, node: Tensor, j: int, src: Tensor, backend_id: int) -> None:
        """Let a node read the copy of its source."""
        self.replaced_sources.append((node, j, src))
        list.__setitem__(node.src, j, self.copies[src][backend_id][self.cur_copy])  # the caller counts the change

    def _needs_copy(self, src: Tensor, backend_id: int) -> bool:
        """Return whether a backend cannot use a source where it is.

        Notes
        -----
        Differs: a weight that the user pinned to a device whose kernels cannot reach it is copied (`pinned_weight`).
        """
        at = self.asg.ids.get(src)
        if at is None:
            raise SchedError(f"'{src.name}' has no backend: the tensor that it views is not in the graph")
        if at == backend_id and not (self.pins_are_suspect and self._is_pinned_in_memory(src)):
            return False
        return not self.machine.buffer_supported(src, backend_id, self.asg)

    def _is_pinned_in_memory(self, tensor: Tensor) -> bool:
        """Return whether the user pinned a tensor that already has memory, perhaps on another backend."""
        return self.asg.causes.get(tensor) is Cause.USER and tensor.storage is not None

    def _must_start(self, node: Tensor, backend_id: int, n_inputs: int) -> bool:
        """Return whether a node on the split's backend starts a new split."""
        is_full = self.machine.dialect.cut_at_input_capacity and n_inputs == self.memory.capacity(len(self.splits))
        for src in node.src:
            if src is None:
                continue
            is_weight = src.buffer is not None and src.buffer.usage is BufferUsage.WEIGHTS
            if is_weight and self._needs_copy(src, backend_id):
                return True
            if is_full and backend_id not in self.copies.get(src, ()) and self._needs_copy(src, backend_id):
                return True
        return False

    def _note_input(self, n_before: int) -> None:
        """Make room for one more input in the record of the incomplete split."""
        i_split = len(self.splits)
        if n_before >= self.memory.capacity(i_split):
            self.memory.grow(i_split)

    def plan(self, graph: Graph, resources: Resources) -> Plan:
        """Return what was decided.

        Parameters
        ----------
        resources : Resources
            Where a policy that reads the plan gets memory and queues.
        """
        return Plan(
            self.machine, graph, self.asg, tuple(self.splits), self.copies, tuple(self.graph_inputs),
            tuple(self.replaced_sources), self.n_copies, self.cur_copy, resources,
        )  # fmt: skip

    # pass 6: pipeline copies of the graph's inputs

    def copy_graph_inputs(self, graph: Graph) -> None:
        """Make the pipeline copies of every input leaf, used or not.

        Notes
        -----
        Mirrors `ggml_backend_sched_split_graph`, pass 6; before 0.26 the inputs were found in pass 5.
        """
        if self.n_copies > 1 and self.machine.dialect.graph_inputs_from == "leafs":
            for leaf in graph.leafs:
                if leaf.flags & TensorFlag.INPUT:
                    self._copy_graph_input(leaf, always_listed=True)

    def _copy_graph_input(self, tensor: Tensor, *, always_listed: bool = False) -> None:
        """Make the other copies of an input, which is itself the current copy."""
        backend_id = self.asg.ids[tensor]
        by_backend = self.copies.setdefault(tensor, {})
        is_new = backend_id not in by_backend
        if is_new:
            name = self.machine.backends[backend_id].name
            made = []
            for c in range(self.n_copies):
                copy = tensor if c == self.cur_copy else dup_layout(tensor, f"{name}#{tensor.name}#{c}")
                copy.set_input().set_output()
                if copy is not tensor:
                    self.asg.explain(copy, Cause.GRAPH_INPUT)
                made.append(copy)
            by_backend[backend_id] = made
        if is_new or always_listed:
            self.graph_inputs.append(tensor)


#: Tensors that must stay allocated until a node, by node, in the order of the requests.
AllocDeps = dict[Tensor, list[Tensor]]


def optimize_splits(plan: Plan) -> AllocDeps:
    """Let the backend of each split reorder its nodes.

    Returns
    -------
    dict
        The tensors that backends asked to keep, by node; empty in dialects without `alloc_deps`.
    """
    deps: AllocDeps = {}

    def add_alloc_dep(tensor: Tensor, until: Tensor) -> None:
        kept = deps.setdefault(until, [])
        if tensor not in kept:
            kept.append(tensor)

    def ignore(tensor: Tensor, until: Tensor) -> None:
        """Ignore the request, as before 0.26."""

    ask: Callable[[Tensor, Tensor], None] = add_alloc_dep if plan.machine.dialect.alloc_deps else ignore
    for split in plan.splits:
        plan.backends[split.backend_id].graph_optimize(split.graph, ask)
    return deps


def make_sched_graph(plan: Plan, deps: AllocDeps, ids: tuple[list[int], list[int]] | None = None) -> SchedGraph:
    """Return the graph for the allocator.

    Before each split it has, for each input, a view that keeps the source alive, and the copy to allocate.

    Parameters
    ----------
    ids : tuple of list of int, optional
        The backends of its nodes and leafs, where they are known from an equal graph.

    Raises
    ------
    SchedError
        A backend asked to keep a tensor until another that is not a node of a split.

    Notes
    -----
    Mirrors the end of `ggml_backend_sched_split_graph`.
    """
    of_graph, copies = list(plan.graph.nodes), plan.copies.values()
    made = SchedGraph(lambda: _nodes(plan, of_graph, deps))
    _add_leafs(plan, made)
    made.placeable = [
        *(copy for by_backend in copies for c in by_backend.values() for copy in c),
        *of_graph,
        *made.leafs,
    ]
    if ids is None:
        made.node_backend_ids, made.leaf_backend_ids = _backend_ids(plan, deps)
        _ = made.nodes
    else:
        made.node_backend_ids, made.leaf_backend_ids = ids
    return made


def _nodes(plan: Plan, of_graph: list[Tensor], deps: AllocDeps) -> list[Tensor]:
    nodes, copies, cur_copy = list[Tensor](), plan.copies, plan.cur_copy
    pending = set(deps)
    for split in plan.splits:
        b = split.backend_id
        for tensor in split.inputs:
            dep, copy = view_tensor(tensor), copies[tensor][b][cur_copy]
            dep.src = [tensor]
            if copy.buffer is not None:  # the graph was placed before anyone asked for these nodes
                dep.buffer = tensor.storage
            nodes += (dep, copy)
        in_split = of_graph[split.i_start : split.i_end]
        if not deps:
            nodes += in_split
            continue
        for node in in_split:
            nodes.append(node)
            kept = deps.get(node, ())
            for k in range(0, len(kept), MAX_SRC):
                dep = view_tensor(kept[k])
                dep.src = list(kept[k : k + MAX_SRC])
                nodes.append(dep)
            pending.discard(node)
    if pending:
        until = next(iter(pending))
        raise SchedError(
            f"a backend asked to keep '{deps[until][0].name}' until '{until.name}', which is no node of a split",
            hint="its graph_optimize is wrong",
        )
    return nodes


def _backend_ids(plan: Plan, deps: AllocDeps) -> tuple[list[int], list[int]]:
    """Return the backends of the nodes and leafs of the allocator's graph; -1 for a leaf that no node reads and that is no input."""
    ids, node_ids, leaf_ids = plan.assignment.ids, list[int](), list[int]()
    for split in plan.splits:
        b = split.backend_id
        for tensor in split.inputs:
            node_ids += (ids[tensor], b)
        for node in plan.graph.nodes[split.i_start : split.i_end]:
            node_ids.append(ids[node])
            if deps:
                node_ids += [b] * (-(-len(deps.get(node, ())) // MAX_SRC))
    if plan.n_copies > 1:
        for tensor in plan.graph_inputs:
            leaf_ids += [ids[tensor]] * plan.n_copies
        for split in plan.splits:
            leaf_ids += [split.backend_id] * (plan.n_copies * len(split.inputs))
    leaf_ids += [ids.get(leaf, -1) for leaf in plan.graph.leafs]
    return node_ids, leaf_ids


def _add_leafs(plan: Plan, made: SchedGraph) -> None:
    """Append the pipeline copies, which are allocated before all else, then the graph's leafs."""
    graph, copies = plan.graph, plan.copies
    if plan.n_copies > 1:
        for tensor in plan.graph_inputs:
            made.leafs += copies[tensor][plan.assignment.ids[tensor]]
        for split in plan.splits:
            for tensor in split.inputs:
                made.leafs += copies[tensor][split.backend_id]
    made.leafs += graph.leafs


def graph_size(plan: Plan, copy: SchedGraph) -> int:
    """Return the size of upstream's copy of a graph; a realloc callback is told whether it changed.

    Notes
    -----
    Mirrors `graph_size` in `ggml_backend_sched_split_graph`.
    """
    graph = plan.graph
    n_inputs = sum(len(split.inputs) for split in plan.splits)
    n_dep_nodes = len(copy.node_backend_ids) - len(graph.nodes) - 2 * n_inputs
    n_copied = 2 * plan.n_copies * (len(plan.graph_inputs) + n_inputs)
    return max(len(graph.nodes), len(graph.leafs)) + n_copied + n_dep_nodes
