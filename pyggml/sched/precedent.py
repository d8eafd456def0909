"""`Precedents`: how graphs were assigned and cut before, for graphs of the same structure.

Passes 1 to 5 depend on a graph's structure, on its pins, on the memory that its tensors already have, and on the backends'
answers about its nodes. If a new graph has the structure of an earlier one, backends are only asked about nodes with another
shape or other parameters. If all answers are equal, so are assignment and cut. The rules themselves are only in
`assign` and `split`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, chain, compress, count, repeat
from operator import itemgetter, ne
from typing import TYPE_CHECKING, Any

from ..backend import Backend, is_answered_by_kind
from ..dialect import Repairs
from ..edits import EDITS
from ..graph import Graph, GraphView, Snapshot
from ..tensor import Tensor
from .assign import OffloadOp, assign
from .policies import default_offload
from .split import Cutter
from .state import BufferUsers, Cause, Copies, Machine, OpCheck, Split

if TYPE_CHECKING:
    from .tape import Tape

__all__ = ["Precedent", "Precedents"]

#: Most kept graphs: of prompts and of single tokens, each of some lengths, with and without pins.
N_KEPT = 8

#: The number of pipeline copies, the offload rule, and each backend's `supports_op`.
_Rules = tuple[Any, ...]


class _Shape:
    """The facts of a graph that determine passes 1 to 5: first with its tensors, leafs before nodes, later without."""

    __slots__ = ("has_own_pins", "kinds", "layouts", "n_leafs", "n_sources", "pick", "roots", "sources", "tensors")

    tensors: list[Tensor]
    sources: list[Any]  #: of all tensors: tensors, later their positions, -1 for None
    roots: list[Any]  #: the tensor that each views, likewise
    pick: Callable[
        [list[Tensor | None]], tuple[Tensor | None, ...]
    ]  #: what is at the positions of `sources`, then of `roots`
    n_sources: list[int]
    kinds: list[list[Any]]  #: fields that the passes read, by tensor
    layouts: list[list[Any]]  #: fields that only backends read, by tensor

    def __init__(self, graph: Graph, pins: dict[Tensor, int], users: BufferUsers, *, by_kind: bool) -> None:
        self.n_leafs = len(graph.leafs)
        self.tensors = tensors = [*graph.leafs, *graph.nodes]
        sources = [t.src for t in tensors]  # a list of one field is made twice as fast as with an attrgetter
        self.n_sources = list(map(len, sources))
        self.sources = list(chain.from_iterable(sources))
        self.roots = [t.view_src for t in tensors]
        buffers = [t.buffer for t in tensors]
        places, memory = {}, {}  # facts about each buffer
        for b in set(buffers):
            places[b] = b and (users[b.buft], b.usage, b.is_host)
            memory[b] = b and (type(b), b.buft, b.usage, b.is_writable)
        # what the passes read
        self.kinds = [[t.op for t in tensors], [t.flags for t in tensors], list(map(places.__getitem__, buffers))]
        self.has_own_pins = True  #: whether all that is pinned is in the graph
        if pins:
            pinned = list(map(pins.get, tensors))
            self.kinds.append(pinned)
            self.has_own_pins = len(pinned) - pinned.count(None) == len(pins)
        # what only backends read, when they are asked about a node or its sources
        self.layouts = [
            [t._op_params for t in tensors],
            [t.layout_id for t in tensors],
            list(map(memory.__getitem__, buffers)),
        ]
        if not by_kind:  # what third-party backends may also read; see `answers_by_kind`
            self.layouts += [[t.view_offs for t in tensors], [t.name for t in tensors]]

    def is_built_as(self, kept: _Shape) -> bool:
        """Return whether this graph has the structure of a kept one: everything except layouts."""
        if self.n_leafs != kept.n_leafs or self.n_sources != kept.n_sources or self.kinds != kept.kinds:
            return False
        now: tuple[Tensor | None, ...] = (*self.sources, *self.roots, None, None)
        return now == kept.pick([*self.tensors, None])  # -1 is the last

    def forget_tensors(self) -> dict[Tensor | None, int] | None:
        """Replace tensors by their positions; return these, or None if a source or viewed tensor is outside."""
        position: dict[Tensor | None, int] = dict(zip(self.tensors, count()))
        position[None] = -1
        self.sources = list(map(position.get, self.sources))
        self.roots = list(map(position.get, self.roots))
        self.tensors = []
        if None in self.sources or None in self.roots:
            return None
        at = [*self.sources, *self.roots, -1, -1]  # of one position it would not return a tuple
        self.pick = itemgetter(*at)
        return position

    def changed_since(self, kept: _Shape) -> set[int]:
        """Return the positions whose layout, or that of a source or viewed tensor, may differ."""
        changed: set[int] = set()
        for now, was in zip(self.layouts, kept.layouts, strict=True):
            if now != was:
                changed.update(compress(count(), map(ne, now, was)))
        return changed | kept.users(changed)

    def users(self, used: set[int]) -> set[int]:
        """Return the positions of tensors that read or view some."""
        if not used:
            return set()
        owners = list(chain.from_iterable(map(repeat, count(), self.n_sources)))
        readers = compress(owners, map(used.__contains__, self.sources))
        return {*readers, *compress(count(), map(used.__contains__, self.roots))}


class _Structure:
    """What graphs that differ in layouts only have in common: which tensors are of one kind in all of them.

    A backend is asked about one node of each kind.

    Parameters
    ----------
    shape : _Shape
        Of the first graph, without tensors.
    answers : list of (int, int, bool)
        Node; the number of the backend that was asked whether it runs it, or (inverted) wants it; the answer.
    """

    __slots__ = ("_about", "_answers", "_first", "_pick", "_shape")

    def __init__(self, shape: _Shape, answers: list[tuple[int, int, bool]]) -> None:
        self._shape, self._answers = shape, answers
        self._first: list[int] = []  #: of all tensors, the first of each one's kind; empty until a second graph comes
        self._pick: Callable[[list[Any]], tuple[Any, ...]]  #: of a field of all tensors, those of these first ones
        self._about: list[tuple[int, int, bool]] = []  #: the answers about the first node of each kind

    def asked_about(self, shape: _Shape, kept: _Shape) -> list[tuple[int, int, bool]]:
        """Return the answers that may be others for a graph than for a kept one: about a node of each kind, or those that changed."""
        if not self._first:
            self._tell_apart([*self._shape.kinds, *self._shape.layouts])
        if any((*column, *column[:1] * 2) != self._pick(column) for column in shape.layouts):
            self._tell_apart([self._first, *shape.layouts])
        if 2 * len(self._about) < len(self._answers):
            return self._about
        changed = shape.changed_since(kept)
        return [about for about in self._answers if about[0] in changed]

    def _tell_apart(self, columns: list[list[Any]]) -> None:
        """Let tensors be of one kind that are equal in each column."""
        first_of: dict[Any, int] = {}
        first = [first_of.setdefault(of_tensor, i) for i, of_tensor in enumerate(zip(*columns, strict=True))]
        self._first, self._pick = first, itemgetter(*first, 0, 0)  # of one position it would not return a tuple
        known: dict[Any, tuple[int, int, bool]] = {}
        shape = self._shape
        starts = list(accumulate(shape.n_sources, initial=0))
        roots, kind_of = shape.roots, [*first, -1].__getitem__
        for i, number, answer in self._answers:
            sources = shape.sources[starts[i] : starts[i + 1]]
            around = (i, roots[i], *sources, *(roots[s] for s in sources if s >= 0))
            known.setdefault((number, answer, *map(kind_of, around)), (i, number, answer))
        self._about = list(known.values())


class Precedent:
    """How a graph was assigned and cut, by positions. Graphs with the same precedent have the same layout."""

    __slots__ = (
        "assigned", "backends", "causes", "copies", "leaf_ids", "memory", "memory_before", "node_ids", "replaced",
        "rules", "shape", "splits", "structure", "tapes", "unused", "wishes",
    )  # fmt: skip

    shape: _Shape  #: without tensors
    rules: _Rules  #: the functions that the passes call
    wishes: list[tuple[int, int, bool]]  #: the answers that a user's rule may have given
    assigned: list[int]  #: positions of assigned tensors
    backends: list[int]
    causes: list[Cause]
    splits: list[tuple[int, int, int, list[int]]]  #: backend, first node, end, inputs
    copies: list[tuple[int, int]]  #: source and backend
    replaced: list[tuple[int, int, int, int]]  #: node, index of the source, source, position in ``copies``
    node_ids: list[int]  #: backends of the nodes of the allocator's graph, once it was made
    leaf_ids: list[int]
    memory_before: tuple[int, tuple[int, ...]]  #: of the cutter
    memory: tuple[int, tuple[int, ...]]
    structure: _Structure
    tapes: dict[Repairs, Tape]  #: of computes of graphs with this structure, by the repairs that applied
    unused: frozenset[int]  #: leafs that no node reads

    def of(self, shape: _Shape) -> Precedent:
        """Return the precedent of another graph with the same answers."""
        made = Precedent()
        for name in self.__slots__:
            setattr(made, name, getattr(self, name))
        shape.tensors, shape.sources, shape.roots = [], self.shape.sources, self.shape.roots
        shape.pick, shape.kinds, shape.n_sources = self.shape.pick, self.shape.kinds, self.shape.n_sources
        made.shape = shape
        return made

    def changed_near(self, kept: Precedent, changed: set[int]) -> set[int]:
        """Return the positions in ``changed``, those with other layouts than kept, and those that read or view these or their views."""
        shape = self.shape
        near = set(changed)
        for now, was in zip(shape.layouts[:2], kept.shape.layouts, strict=False):
            if now != was:
                near.update(compress(count(), map(ne, now, was)))
        near |= shape.users(near)
        return near | shape.users({i for i in near if shape.roots[i] >= 0})

    def snapshot(self, graph: Graph, all_copies: Copies, placeable: list[Tensor]) -> Snapshot:
        """Return the snapshot of a graph that follows this precedent, from the facts known here.

        Parameters
        ----------
        placeable : list of Tensor
            See `SchedGraph`.
        """
        shape = self.shape
        leafs, nodes = list(graph.leafs), list(graph.nodes)
        if self.unused:
            unused = set(map(leafs.__getitem__, self.unused))
            placeable = [t for t in placeable if t not in unused]

        def facts() -> tuple[list[Tensor | None], list[int], list[tuple[int, ...]], list[int]]:
            tensors = [*leafs, *nodes]
            n_leafs, starts = shape.n_leafs, list(accumulate(shape.n_sources, initial=0))
            read = [None if i < 0 else tensors[i] for i in shape.sources]
            for i, j, _, k in self.replaced:
                i_src, b = self.copies[k]
                read[starts[i] + j] = all_copies[tensors[i_src]][b][0]
            return (
                read[starts[n_leafs] :],
                shape.n_sources[n_leafs:],
                shape.layouts[0][n_leafs:],
                shape.kinds[1][n_leafs:],
            )

        return Snapshot(nodes, placeable, facts)


class Precedents:
    """The latest graphs of a scheduler, and how they were assigned and cut.

    Parameters
    ----------
    machine : Machine
    """

    __slots__ = ("_answers", "_kept", "_machine")

    def __init__(self, machine: Machine) -> None:
        self._answers: list[tuple[Tensor, int, bool]] = []
        self._machine = replace(machine, listen=self._listen)
        self._kept: list[Precedent] = []

    def follow(self, other: Precedents) -> None:
        """Use the precedents of another scheduler."""
        self._kept = list(other._kept)

    def decide(self, graph: Graph, cutter: Cutter, offload: OffloadOp | None) -> Precedent | None:
        """Run passes 1 to 5, or follow an earlier graph; return the precedent for later graphs, or None.

        Raises
        ------
        GraphError, UnsupportedOpError, SchedError
            See `Graph.check`, `assign` and `Cutter.cut`.
        """
        asg, machine = cutter.asg, cutter.machine
        checks = machine.op_checks
        rules: _Rules = (cutter.n_copies, offload, *checks)
        shape = found = None
        has_pins_only = all(cause is Cause.USER for cause in asg.causes.values())
        if has_pins_only and (cutter.n_copies == 1 or machine.dialect.graph_inputs_from == "leafs"):
            shape = _Shape(graph, asg.ids, machine.users, by_kind=all(map(is_answered_by_kind, checks)))
            if shape.has_own_pins:
                found = self._find(shape, cutter, rules)
            else:
                shape = None
        if found is not None:
            del shape  # so that the garbage collector has less to visit
            _follow(found, graph, cutter)
        else:
            if machine.repairs.other_graph:
                graph.check()
            if shape is None:
                assign(graph, asg, machine, offload)
                cutter.cut(graph)
            else:
                found = self._first(graph, shape, cutter, rules)
        if found is not None:
            self._kept = [found, *(p for p in self._kept if p is not found)][:N_KEPT]
        return found

    def _find(self, shape: _Shape, cutter: Cutter, rules: _Rules) -> Precedent | None:
        """Return the precedent of a graph, or a new one that follows a precedent with the same answers."""
        memory, (_, offload, *checks) = _memory_of(cutter, shape), rules
        alike = [p for p in self._kept if p.memory_before == memory and p.rules == rules]
        latest = {p.structure: p for p in reversed(alike)}
        built = {s: kept for s, kept in latest.items() if shape.is_built_as(kept.shape)}
        if not built:
            return None
        # a user's rule may answer differently each time
        is_fixed = offload is None or (
            offload is default_offload
            and all(is_answered_by_kind(b.device.offload_op) for b in cutter.machine.backends[:-1])
        )
        same = [p for p in alike if p.structure in built and p.shape.layouts == shape.layouts]
        for kept in same or built.values():
            asked = [] if same else kept.structure.asked_about(shape, kept.shape)
            if not is_fixed:
                asked = [*(about for about in asked if about[1] >= 0), *kept.wishes]
            for i, number, answer in asked:
                if number < 0:
                    assert offload is not None
                    if offload(cutter.machine.backends[~number], shape.tensors[i]) != answer:
                        break
                elif checks[number](shape.tensors[i]) != answer:
                    break
            else:
                return kept if same else kept.of(shape)
        return None

    def _first(self, graph: Graph, shape: _Shape, cutter: Cutter, rules: _Rules) -> Precedent | None:
        """Run the passes and keep the result, unless the graph has sources outside itself."""
        before, offload = _memory_of(cutter, shape), rules[1]
        self._answers.clear()
        asg = cutter.asg
        assign(graph, asg, self._machine, None if offload is None else self._noting(offload))
        cutter.cut(graph)
        position = shape.forget_tensors()
        if position is None:
            return None
        made = Precedent()
        made.shape, made.rules, made.tapes = shape, rules, {}
        made.memory_before, made.memory = before, _memory_of(cutter)
        answers = [(position[node], number, answer) for node, number, answer in self._answers]
        made.structure, made.wishes = _Structure(shape, answers), [asked for asked in answers if asked[1] < 0]
        self._answers.clear()
        made.unused = frozenset(range(shape.n_leafs)).difference(shape.sources)
        made.assigned = sorted(position[t] for t in asg.ids)
        tensors = [*graph.leafs, *graph.nodes]
        assigned = [tensors[i] for i in made.assigned]
        made.backends = list(map(asg.ids.__getitem__, assigned))
        made.causes = list(map(asg.causes.__getitem__, assigned))
        made.splits = [(s.backend_id, s.i_start, s.i_end, [position[t] for t in s.inputs]) for s in cutter.splits]
        made.copies = [(position[t], b) for t, by_backend in cutter.copies.items() for b in by_backend]
        at = {copied: k for k, copied in enumerate(made.copies)}
        made.replaced = [
            (position[n], j, position[src], at[position[src], asg.ids[n]]) for n, j, src in cutter.replaced_sources
        ]
        made.node_ids, made.leaf_ids = [], []
        return made

    def _listen(self, backend_id: int, check: OpCheck) -> OpCheck:
        """Return what asks a backend, and takes down all answers."""
        take = self._answers.append

        def ask(node: Tensor) -> bool:
            answer = check(node)
            take((node, backend_id, answer))
            return answer

        return ask

    def _noting(self, offload: OffloadOp) -> OffloadOp:
        numbers = {backend: ~b for b, backend in enumerate(self._machine.backends)}

        def ask(backend: Backend, node: Tensor) -> bool:
            answer = offload(backend, node)
            self._answers.append((node, numbers[backend], answer))
            return answer

        return ask


def _memory_of(cutter: Cutter, shape: _Shape | None = None) -> tuple[int, tuple[int, ...]]:
    """Return what the cutter keeps of earlier graphs, as far as the dialect, and with ``shape`` the cut of that graph, uses it."""
    memory = cutter.memory
    # a node that is computed gives the first split its backend
    is_free = shape is not None and not all(op.is_view for op in shape.kinds[0][shape.n_leafs :])
    capacities = tuple(memory.capacities) if cutter.machine.dialect.cut_at_input_capacity else ()
    return 0 if is_free else memory.backend_id, capacities


def _follow(precedent: Precedent, graph: Graph, cutter: Cutter) -> None:
    """Assign and cut a graph like its precedent."""
    tensors = [*graph.leafs, *graph.nodes]
    at = tensors.__getitem__
    EDITS.note()
    cutter.splits = [
        Split._make((backend_id, i_start, i_end, tuple(map(at, inputs)), GraphView(graph, i_start, i_end)))
        for backend_id, i_start, i_end, inputs in precedent.splits
    ]
    copies = cutter.copy_all((tensors[i], b) for i, b in precedent.copies)
    replaced, put = cutter.replaced_sources, list.__setitem__
    for i, j, i_src, k in precedent.replaced:
        node = tensors[i]
        replaced.append((node, j, tensors[i_src]))
        put(node.src, j, copies[k][cutter.cur_copy])
    is_whole = len(precedent.assigned) == len(tensors)
    assigned = tensors if is_whole else list(map(at, precedent.assigned))
    cutter.asg.follow(assigned, precedent.backends, precedent.causes, list(chain.from_iterable(copies)))
    cutter.memory.backend_id, capacities = precedent.memory
    if capacities:
        cutter.memory.capacities[:] = capacities
