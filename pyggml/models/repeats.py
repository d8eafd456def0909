"""`build_repeated`: builds the graphs of a plan from few of a model's layers, because most layers only repeat earlier ones.

The first graph is built whole and learnt: the order of its nodes, and which layers equal earlier ones except for their own
weights, caches and input. For other micro-batches one layer of each kind is built, and the others are copies with their own
sources. What is built must have the learnt structure; if it has not, the graph is built whole and learnt, too. A layer that
repeats another in one graph is taken to repeat it in all graphs of that structure. With ``PYGGML_CHECK`` each graph is compared
with one that is built whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

from .. import config
from ..graph import Graph
from ..graph_context import current
from ..tensor import Tensor, copy_node
from ..types import Op
from .graph import GraphParams, ModelGraph
from .weights import Weights

__all__ = ["Listing", "Pattern", "build_repeated"]

_facts_of = attrgetter("op", "layout_id", "_op_params", "view_offs")
_LISTS = ("topk", "norms", "attn_outputs", "flash_nodes", "pins", "delta_nodes")


class _OtherStructureError(Exception):
    """A graph has not the structure of the pattern."""


#: A tensor that is made for a graph, without its sizes: the tensor that has the same (if its layer is copied, one of an earlier
#: layer), op, name, flags, sources and `view_src`. Tensors are given by their places in the listing.
_Row = tuple[int, Op, str, int, tuple[int, ...], int]


class _Stage(NamedTuple):
    """What precedes the layers, one of them, or what follows them."""

    rows: list[_Row]
    expanded: list[int]  #: what `Graph.expand` is given
    result: int
    is_copied: bool  #: it is a layer that repeats an earlier one


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """The structure of a graph; tensors are given by their places in the listing.

    Attributes
    ----------
    stages : list of _Stage
        What is made, in order.
    nodes, leafs, use_counts, version
        As in `Graph`.
    lists : dict of str to list of (int, Any)
        The lists of `ModelGraph`; beside a tensor its layer, or None.
    """

    stages: list[_Stage]
    nodes: list[int]
    leafs: list[int]
    use_counts: dict[int, int]
    version: int
    lists: dict[str, list[tuple[int, Any]]]


class _ListedGraph(Graph):
    """A graph that remembers what is expanded, and can leave the order to a pattern."""

    __slots__ = ("expanded", "is_ordered")

    def __init__(self, *, is_ordered: bool) -> None:
        super().__init__()
        self.is_ordered = is_ordered
        self.expanded: list[Tensor] = []

    def expand(self, *tensors: Tensor) -> None:
        """Append the tensors, and before them everything that they need and the graph does not contain yet."""
        self.expanded += tensors
        if self.is_ordered:
            super().expand(*tensors)


class Listing:
    """The tensors of a graph in the order in which they are made, after None, the weights and the caches.

    Parameters
    ----------
    pattern : Pattern, optional
        What is built must be like this, and its repeated layers are copied; without it, all is built.
    """

    def __init__(self, p: GraphParams, weights: Weights, pattern: Pattern | None = None) -> None:
        self.weights, self.caches, self.pattern = weights, p.view.cache.tensors(), pattern
        # Any: the first is None, so that place 0 stands for no tensor
        self.tensors: list[Any] = [None, *weights.tensors, *(tensor for _, tensor in self.caches)]
        self.add = self.tensors.append
        self.graph = _ListedGraph(is_ordered=pattern is None)
        #: of each stage: where its tensors begin, what is expanded, and the result
        self.stages: list[tuple[int, list[Tensor], Tensor]] = []
        self._begin = len(self.tensors)

    def layer(self, build: Callable[[Tensor], Tensor], cur: Tensor) -> Tensor:
        """Return the output of the next layer, built or copied; ``cur`` is that of the one before."""
        if not self.stages:
            self.end_stage(cur)
        stage = None if self.pattern is None else self.pattern.stages[len(self.stages)]
        if stage is None or not stage.is_copied:
            cur = build(cur)
            self.end_stage(cur)
            return cur
        tensors, add = self.tensors, self.add
        at = tensors.__getitem__
        for like, _, name, flags, src, root in stage.rows:
            add(copy_node(tensors[like], name, flags, map(at, src), tensors[root]))
        cur = tensors[stage.result]
        self._note(cur)
        return cur

    def end_stage(self, result: Tensor) -> None:
        """End a stage. With a pattern, verify what was built, and give it its final names and flags."""
        self._note(result)
        if self.pattern is None:
            return
        tensors, stage = self.tensors, self.pattern.stages[len(self.stages) - 1]
        begin, expanded, _ = self.stages[-1]
        made = tensors[begin:]
        if len(made) != len(stage.rows) or [tensors[k] for k in (*stage.expanded, stage.result)] != [*expanded, result]:
            raise _OtherStructureError
        for tensor, (_, op, name, flags, src, root) in zip(made, stage.rows, strict=True):
            if tensor.op is not op or tensor.src != [tensors[k] for k in src] or tensor.view_src is not tensors[root]:
                raise _OtherStructureError
            tensor.name, tensor.flags = name, flags

    def _note(self, result: Tensor) -> None:
        self.stages.append((self._begin, self.graph.expanded, result))
        self.graph.expanded, self._begin = [], len(self.tensors)

    def ordered(self, made: ModelGraph, pattern: Pattern) -> ModelGraph:
        """Put the tensors into the graph's order and lists, and return it."""
        pick = self.tensors.__getitem__
        graph = Graph()
        graph.nodes, graph.leafs = list(map(pick, pattern.nodes)), list(map(pick, pattern.leafs))
        graph.use_counts = dict(zip(map(pick, pattern.use_counts), pattern.use_counts.values(), strict=True))
        graph.version = pattern.version
        made.graph = graph
        for name, entries in pattern.lists.items():
            setattr(made, name, [pick(k) if more is None else (pick(k), more) for k, more in entries])
        return made

    def pattern_of(self, made: ModelGraph) -> Pattern | None:
        """Return the structure of a graph that was built whole; None if it has tensors that are not in the listing."""
        place = {tensor: i for i, tensor in enumerate(self.tensors)}
        at, graph = place.__getitem__, made.graph
        try:
            return Pattern(
                self._learn(place),
                list(map(at, graph.nodes)),
                list(map(at, graph.leafs)),
                dict(zip(map(at, graph.use_counts), graph.use_counts.values(), strict=True)),
                graph.version,
                {
                    name: [(at(e), None) if isinstance(e, Tensor) else (at(e[0]), e[1]) for e in getattr(made, name)]
                    for name in _LISTS
                },
            )
        except KeyError:
            return None

    def _learn(self, place: dict[Any, int]) -> list[_Stage]:
        """Return the stages of a whole graph; a layer is copied if all its tensors equal those of an earlier one."""
        known: dict[object, int] = {}
        out = []
        at = place.__getitem__
        for i, (begin, expanded, result) in enumerate(self.stages):
            end = self.stages[i + 1][0] if i + 1 < len(self.stages) else len(self.tensors)
            made = self.tensors[begin:end]
            sources = [tuple(map(at, t.src)) for t in made]
            roots, calls = [place[t.view_src] for t in made], list(map(at, expanded))
            like = begin
            if 0 < i < len(self.stages) - 1:
                own = self._own(i - 1, place)
                own.update(zip(range(begin, end), range(-1, begin - end - 1, -1), strict=True))
                used = [*itertools.chain.from_iterable(sources), *roots, *calls, place[result]]
                kind = *map(_facts_of, made), *map(len, sources), *[own.get(k, k) for k in used]
                like = known.setdefault(kind, begin)
            places, names, flags = range(like, like + len(made)), [t.name for t in made], [t.flags for t in made]
            rows = list(zip(places, [t.op for t in made], names, flags, sources, roots, strict=True))
            out.append(_Stage(rows, calls, place[result], like != begin))
        return out

    def _own(self, layer: int, place: dict[Any, int]) -> dict[int, object]:
        """Return the places of what a layer does not share with others: its input, weights and caches."""
        caches = (tensor for i, tensor in self.caches if i == layer)
        return {
            place[self.stages[layer][2]]: "input",
            **{place[tensor]: name for name, tensor in self.weights.layers[layer].items()},
            **{place[tensor]: f"cache {i}" for i, tensor in enumerate(caches)},
        }


def build_repeated(
    build: Callable[[GraphParams, Weights], ModelGraph], p: GraphParams, weights: Weights, patterns: list[Pattern]
) -> ModelGraph:
    """Return the graph that a function builds; tensors of repeated layers are copied if it is like one of ``patterns``.

    Parameters
    ----------
    patterns : list of Pattern
        Of graphs with the same weights and parameters; that of a graph that is like none of them is added.
    """
    for pattern in patterns:
        listing = Listing(p, weights, pattern)
        try:
            made = listing.ordered(_listed(build, p, weights, listing), pattern)
        except _OtherStructureError:
            continue
        if config.check():
            _verify(made, build(p, weights))
        return made
    listing = Listing(p, weights)
    made = _listed(build, p, weights, listing)
    learnt = listing.pattern_of(made)
    if learnt is None:
        return made
    patterns.append(learnt)
    return listing.ordered(made, learnt)


def _listed(
    build: Callable[[GraphParams, Weights], ModelGraph], p: GraphParams, weights: Weights, listing: Listing
) -> ModelGraph:
    outside = current.set(listing)
    try:
        made = build(replace(p, listing=listing), weights)
    finally:
        current.reset(outside)
    listing.end_stage(made.logits)
    return made


def _verify(made: ModelGraph, whole: ModelGraph) -> None:
    """Verify that a graph with copied layers equals one that was built whole."""
    for copied, built in zip(_facts(made), _facts(whole), strict=True):
        assert copied == built, f"copied: {copied}; built: {built}"


def _facts(made: ModelGraph) -> list[object]:
    """Return all that is known of a graph, with places instead of tensors that are made for it."""
    graph = made.graph
    place: dict[Tensor | None, object] = {t: i for i, t in enumerate((*graph.nodes, *graph.leafs)) if t.op or t.flags}

    def at(t: Tensor | None) -> object:
        return place.get(t, t)

    out: list[object] = [len(graph.nodes), graph.version, {at(t): n for t, n in graph.use_counts.items()}]
    out += [(at(made.logits), at(made.embd))]
    for name in _LISTS:
        out.append([at(e) if isinstance(e, Tensor) else (at(e[0]), e[1]) for e in getattr(made, name)])
    for t in (*graph.nodes, *graph.leafs):
        out.append((t.name, t.op, t.type, t.ne, t.nb, t.nbytes, t.layout_id, t.op_params, t.flags, t.view_offs, t.data))
        out.append([at(t), at(t.view_src), *map(at, t.src)])
    return out
