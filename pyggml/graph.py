"""`Graph`: the order in which tensors are computed.

Ops make tensors with sources. A graph puts the tensors that a result needs into an order. The order of nodes and leafs and
the names of unnamed tensors are upstream's, because splits are ranges of nodes and traces contain names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Self

from .edits import EDITS
from .errors import GraphError
from .notebook import html_table
from .tensor import Tensor
from .types import MAX_SRC, Op, TensorFlag, Type

if TYPE_CHECKING:
    import os
    from contextvars import Token

    from .graph_context import Collector
    from .viz.show import Page

__all__ = ["Graph", "GraphView", "Snapshot"]

_uids = itertools.count(1)
_NONE, _COMPUTE, _PARAM = Op.NONE, int(TensorFlag.COMPUTE), int(TensorFlag.PARAM)  # quicker than members


class Graph:
    """The nodes to compute, in order, and the leafs that they start from.

    Parameters
    ----------
    size : int, optional
        The maximum number of nodes, and of leafs; no limit by default.

    Attributes
    ----------
    nodes : list of Tensor
        Results of ops, each after all its sources.
    leafs : list of Tensor
        Weights and inputs, in the order in which they were found.
    use_counts : dict of Tensor to int
        How often each tensor is a source of a node.
    version : int
        Grows with every change; a plan of another version is invalid.

    Notes
    -----
    Mirrors `struct ggml_cgraph`. Differs: the size has no limit by default.

    Examples
    --------
    >>> import pyggml as ggml
    >>> graph = ggml.Graph()
    >>> with graph:
    ...     x = graph.input("f32", (4, 2), name="x")
    ...     y = ggml.scale(x, 2.0).named("y")
    >>> graph.expand(y)
    >>> [n.name for n in graph.nodes], [n.name for n in graph.leafs]
    (['y'], ['x'])
    """

    __slots__ = ("__weakref__", "_token", "leafs", "made", "nodes", "size", "use_counts", "version")

    nodes: list[Tensor]
    leafs: list[Tensor]
    use_counts: dict[Tensor, int]
    made: list[Tensor]  #: tensors made inside ``with graph``, needed or not
    size: int | None
    version: int

    def __init__(self, size: int | None = None) -> None:
        self.nodes, self.leafs, self.made = [], [], []
        self.use_counts = {}
        self.size = size
        self.version = 0
        self._token: Token[Collector | None] | None = None

    # -- building ------------------------------------------------------------

    def expand(self, *tensors: Tensor) -> None:
        """Append the tensors, and before them everything that they need and the graph does not contain yet.

        Raises
        ------
        GraphError
            The graph is full, a tensor is its own ancestor, or what is given is not a tensor.

        Notes
        -----
        Mirrors `ggml_build_forward_expand`: depth first, sources in order.
        """
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise GraphError(f"expand: {tensor!r:.60} is not a tensor", hint="give each tensor as an argument")
            self._visit(tensor, compute=True)
        self.version += 1

    def select(self, tensors: Sequence[Tensor], chosen: int) -> Tensor:
        """Append all of the tensors, but flag only the chosen one, and what it needs, to be computed.

        Returns
        -------
        Tensor
            The chosen tensor.

        Notes
        -----
        Mirrors `ggml_build_forward_select`: the graph has the same nodes for any choice; backends skip nodes without
        the COMPUTE flag.
        """
        for i, tensor in enumerate(tensors):
            self._visit(tensor, compute=i == chosen)
        self.version += 1
        return tensors[chosen]

    def input(self, type: Type | str, ne: Sequence[int], *, name: str = "") -> Tensor:
        """Return a new tensor flagged as an input, collected by this graph."""
        tensor = Tensor(type, ne, name=name, flags=TensorFlag.INPUT)
        self.made.append(tensor)
        return tensor

    def add(self, tensor: Tensor) -> None:
        """Collect a tensor made inside ``with graph``."""
        self.made.append(tensor)

    def __enter__(self) -> Self:
        from . import graph_context

        self._token = graph_context.current.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        from . import graph_context

        if self._token is not None:
            graph_context.current.reset(self._token)
            self._token = None

    def _visit(self, root: Tensor, *, compute: bool) -> None:
        """Visit depth first with an explicit stack, because graphs are deeper than Python's recursion limit."""
        counts, append, flag_compute = self.use_counts, self._append, self._flag_compute
        if root in counts:
            if compute:
                flag_compute(root)
            return
        none, flag = _NONE, _COMPUTE if compute else 0
        if root.op is not none:
            root.flags |= flag
        counts[root] = 0
        tensor, sources = root, iter(root.src)
        above: list[tuple[Tensor, Iterator[Tensor | None]]] = []
        open_ = {root}
        while True:
            for src in sources:
                if src is None:
                    continue
                if src in counts:
                    if src in open_ and src is not tensor:  # CAST is its own second source
                        raise GraphError(f"'{src.name}' is its own ancestor, through '{tensor.name}'")
                    counts[src] += 1
                    if flag and (src.op is not none or src.src):
                        flag_compute(src)
                    continue
                counts[src] = 1
                if src.op is not none:
                    src.flags |= flag
                elif not src.src:  # a weight or an input, which needs nothing
                    append(src)
                    continue
                open_.add(src)
                above.append((tensor, sources))
                tensor, sources = src, iter(src.src)
                break
            else:
                open_.discard(tensor)
                append(tensor)
                if not above:
                    return
                tensor, sources = above.pop()

    def _flag_compute(self, tensor: Tensor) -> None:
        """Flag a tensor that the graph already contains, and what it needs, to be computed."""
        none, flag = _NONE, _COMPUTE
        if tensor.op is not none:
            tensor.flags |= flag
        stack = [tensor]
        while stack:
            for src in stack.pop().src:
                if src is not None and not src.flags & flag and src.op is not none:
                    src.flags |= flag
                    stack.append(src)

    def _append(self, tensor: Tensor) -> None:
        is_leaf = tensor.op is _NONE and not tensor.flags & _PARAM
        into, kind = (self.leafs, "leaf") if is_leaf else (self.nodes, "node")
        if self.size is not None and len(into) >= self.size:
            raise GraphError(
                f"the graph is full: '{tensor.name}' would be {kind} {len(into)} of at most {self.size}",
                hint="create Graph with a larger size, or without one",
            )
        if len(tensor.src) > MAX_SRC:
            raise GraphError(f"'{tensor.name}' has {len(tensor.src)} sources; the maximum is {MAX_SRC}")
        if not tensor.name:
            tensor.name = f"{kind}_{len(into)}"
        into.append(tensor)

    # -- reading -------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """Return the first tensor of this name: a node, a leaf, or a tensor made in this graph's context."""
        for tensor in itertools.chain(self.nodes, self.leafs, self.made):
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def view(self, i_start: int, i_end: int) -> GraphView:
        """Return the nodes ``i_start .. i_end - 1`` as a range that a backend can compute."""
        return GraphView(self, i_start, i_end)

    def check(self) -> None:
        """Verify that every source comes before its node.

        Raises
        ------
        GraphError
            A node comes before one of its sources, or a source is missing.
        """
        seen: set[Tensor | None] = {None, *self.leafs}
        for i, node in enumerate(self.nodes):
            seen.add(node)
            if not seen.issuperset(node.src):
                j, src = next((j, src) for j, src in enumerate(node.src) if src is not None and src not in seen)
                raise GraphError(f"node {i} '{node.name}' comes before its source {j} '{src.name}', or lacks it")

    def show(self, path: str | os.PathLike[str] | None = None) -> Page:
        """Open a page of the nodes, their shapes and sources in the browser; in a notebook it appears below the cell.

        Parameters
        ----------
        path : path-like, optional
            The file to write; by default a temporary file.

        Returns
        -------
        Page
            Its ``path`` is the file.
        """
        from .viz.objects import view_of_graph  # pyggml.viz imports this module
        from .viz.show import show_page

        return show_page(view_of_graph(self), path=path)

    def __repr__(self) -> str:
        return f"<Graph of {len(self.nodes)} nodes, {len(self.leafs)} leafs>"

    def _repr_html_(self) -> str:
        """Return the nodes as a table, for notebooks."""
        return _nodes_table(f"Graph of {len(self.nodes)} nodes, {len(self.leafs)} leafs", self.nodes, 0)


_Facts = tuple[list[Tensor | None], list[int], list[tuple[int, ...]], list[int]]


class Snapshot:
    """The state on which a plan of nodes depends: the nodes, their sources, parameters and flags, and all addresses.

    Parameters
    ----------
    nodes : sequence of Tensor
    tensors : list of Tensor, optional
        Nodes and sources, each once, where the caller knows them.
    facts : callable, optional
        With ``tensors``: returns the other facts as they are now, if they are asked for later.
    """

    __slots__ = ("_facts", "edits", "nodes", "places", "tensors")

    nodes: list[Tensor]
    tensors: list[Tensor]  #: nodes and sources, each once
    places: list[int | None]  #: addresses of `tensors`
    edits: int  #: number of the latest change when this was taken or last compared (`EDITS`)

    def __init__(
        self, nodes: Sequence[Tensor], tensors: list[Tensor] | None = None, facts: Callable[[], _Facts] | None = None
    ) -> None:
        self.edits = EDITS.latest
        self.nodes = list(nodes)
        self._facts: _Facts | Callable[[], _Facts]
        if tensors is None or facts is None:
            sources = list(itertools.chain.from_iterable(map(_sources_of, nodes)))
            n_sources = list(map(len, map(_sources_of, nodes)))
            self._facts = sources, n_sources, list(map(_params_of, nodes)), list(map(_flags_of, nodes))
            tensors = [t for t in dict.fromkeys(itertools.chain(nodes, sources)) if t is not None]
        else:
            self._facts = facts
        self.tensors = tensors
        self.places = list(map(_place_of, self.tensors))

    @property
    def facts(self) -> _Facts:
        """Sources of all nodes one after the other, how many each has, parameters and flags of each."""
        if callable(self._facts):
            self._facts = self._facts()
        return self._facts

    def still_holds(self, nodes: Sequence[Tensor]) -> bool:
        """Return whether nothing changed. Compares everything only if `EDITS` counted a change since."""
        now = EDITS.latest
        if self.edits == now:
            return self.nodes == nodes
        if not self.holds(nodes):
            return False
        self.edits = now
        return True

    def holds(self, nodes: Sequence[Tensor]) -> bool:
        """Return whether the nodes are the same and nothing about them changed."""
        if self.nodes != nodes or self.places != list(map(_place_of, self.tensors)):
            return False
        sources, _, params, flags = self.facts
        return (
            sources == list(itertools.chain.from_iterable(map(_sources_of, nodes)))
            and params == list(map(_params_of, nodes))
            and flags == list(map(_flags_of, nodes))
        )

    def serves(self, view: GraphView) -> bool:
        """Return whether a plan of these nodes is still valid for a range.

        For a verified range only addresses are compared, and only if `EDITS` counted a change since.
        """
        now = EDITS.latest
        if not view.is_verified:
            return self.holds(view.nodes)
        if self.edits != now:
            if self.places != list(map(_place_of, self.tensors)) or self.nodes != view.nodes:
                return False
            self.edits = now
        return True

    def first_change(self, nodes: Sequence[Tensor]) -> str:
        """Return what changed, for an error; an empty text if nothing did."""
        sources, n_sources, params, flags = self.facts
        rest = iter(sources)
        for i, (was, node) in enumerate(itertools.zip_longest(self.nodes, nodes)):
            if was is None or node is None or was is not node:
                return f"node {i} is {_name(node)}, and was {_name(was)}"
            for j, (old, new) in enumerate(itertools.zip_longest(itertools.islice(rest, n_sources[i]), node.src)):
                if old is not new:
                    return f"source {j} of '{node.name}' is {_name(new)}, and was {_name(old)}"
            if params[i] != node.op_params or flags[i] != node.flags:
                return f"'{node.name}' has other {'parameters' if flags[i] == node.flags else 'flags'}"
        moved = [t for t, place in zip(self.tensors, self.places, strict=True) if t.data != place]
        return f"'{moved[0].name}' is at another place in memory, or in none" if moved else ""


def _name(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"'{tensor.name}'"


_params_of, _flags_of, _place_of, _sources_of = map(attrgetter, ("_op_params", "flags", "data", "src"))


class GraphView:
    """A range of a graph's nodes, which a backend computes.

    Attributes
    ----------
    graph : Graph
        The graph of the nodes. A backend's `graph_optimize` may change their order in place.
    i_start, i_end : int
        The range, without ``i_end``.
    uid : int
        Unique in the process; the key of a backend's plans.
    plan : object
        A backend's plan for these nodes, which lives as long as the view.
    is_verified : bool
        Whether the caller of the backend has verified that nodes, sources and parameters are those of the plan.
    memo : dict
        Values that observers computed once from these nodes, by observer.

    Notes
    -----
    Mirrors `ggml_graph_view`.
    """

    __slots__ = ("graph", "i_end", "i_start", "is_verified", "memo", "plan", "uid")

    def __init__(self, graph: Graph, i_start: int, i_end: int) -> None:
        self.graph = graph
        self.i_start = i_start
        self.i_end = i_end
        self.uid = next(_uids)
        self.plan: object = None
        self.is_verified = False
        self.memo: dict[str, Any] = {}  # values have the types of their observers

    @property
    def nodes(self) -> list[Tensor]:
        """The nodes, as a new list."""
        return self.graph.nodes[self.i_start : self.i_end]

    def __len__(self) -> int:
        return self.i_end - self.i_start

    def view(self, i_start: int, i_end: int) -> GraphView:
        """Return a range of this range."""
        part = GraphView(self.graph, self.i_start + i_start, self.i_start + i_end)
        part.is_verified = self.is_verified
        return part

    def reorder(self, nodes: Sequence[Tensor]) -> None:
        """Put the same nodes in another order, in the graph itself.

        Raises
        ------
        GraphError
            The nodes are not the same.
        """
        if set(nodes) != set(self.nodes) or len(nodes) != len(self):
            raise GraphError("a range can be reordered, but its nodes cannot be changed")
        self.graph.nodes[self.i_start : self.i_end] = nodes
        self.graph.version += 1

    def __repr__(self) -> str:
        return f"<GraphView of nodes {self.i_start}..{self.i_end - 1} of {self.graph!r}>"

    def _repr_html_(self) -> str:
        """Return the nodes as a table, for notebooks; numbers are those in the whole graph."""
        title = f"Nodes {self.i_start}..{self.i_end - 1} of a graph of {len(self.graph.nodes)}"
        return _nodes_table(title, self.nodes, self.i_start)


def _nodes_table(title: str, nodes: Sequence[Tensor], i_start: int) -> str:
    rows = (
        (i, t.name, t.op_desc, t.type.ggml_name, t.dims, ", ".join("-" if s is None else s.name for s in t.src))
        for i, t in enumerate(nodes, i_start)
    )
    columns = ("node", "name", "op", "type", "ne", "sources")
    return html_table(title, columns, rows, n_rows=len(nodes), right=("node",))
