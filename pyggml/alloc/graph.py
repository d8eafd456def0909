"""`Gallocr`: the graph allocator, for results.

It first goes through a graph with sizes only (`Gallocr.reserve_n`): each result gets an offset when its node comes, and
the offset is free again after the last use. Then it allocates one buffer of the required size per buffer type, and
places the tensors of that graph, or of any other graph that fits (`Gallocr.alloc_graph`). Offsets are upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from operator import attrgetter, itemgetter
from typing import Any, Protocol

from ..buffer import Buffer, BufferType
from ..dialect import DEFAULT_DIALECT, Dialect
from ..errors import AllocError, OutOfMemoryError
from ..tensor import Tensor, are_same_layout
from ..types import BufferUsage, Op
from .lives import Stay, lives_of, overlaps, takes_over
from .offsets import DynTallocr
from .play import NOWHERE, Place, Play, places_of

__all__ = ["GallocGraph", "Gallocr"]


class GallocGraph(Protocol):
    """The parts of a graph that the graph allocator reads."""

    @property
    def nodes(self) -> list[Tensor]:
        """The results, in the order of computation."""

    @property
    def leafs(self) -> list[Tensor]:
        """Inputs and weights."""


class GraphKind(Protocol):
    """What a caller knows about a graph from earlier graphs."""

    @property
    def structure(self) -> object:
        """Equal for graphs with the same nodes in the same order, with the same sources and flags."""


class _VBuffer:
    """The buffers (chunks) of one buffer type."""

    __slots__ = ("chunks",)

    def __init__(self) -> None:
        self.chunks: list[Buffer] = []

    @property
    def size(self) -> int:
        return sum(b.size for b in self.chunks)

    def close(self) -> None:
        for b in self.chunks:
            b.close()
        self.chunks = []


class Gallocr:
    """A graph allocator for several buffer types.

    Parameters
    ----------
    bufts : sequence of BufferType
        One for each buffer id; ids with the same type share memory.
    dialect : Dialect
        Its `clamp_inplace` and `alloc_size_check` are used.
    keeps_needed : bool
        Whether a graph gets a new layout if in the current one a tensor would overwrite another that is still needed.
        Upstream looks at sizes only: after a graph of the same sizes with other sources, or with other outputs, it
        overwrites results before they are read.

    Notes
    -----
    Mirrors `ggml_gallocr`. Differs: no limits of hash size or free blocks; after a failed allocation or a
    `reserve_n_size`, the next graph is reserved again; upstream uses a null buffer.
    """

    __slots__ = (
        "_check_size",
        "_clamp_inplace",
        "_leafs",
        "_measured",
        "_n_srcs",
        "_placed",
        "_places",
        "buffers",
        "bufts",
        "is_reserved",
        "keeps_needed",
        "tallocs",
    )

    def __init__(
        self, bufts: Sequence[BufferType], *, dialect: Dialect = DEFAULT_DIALECT, keeps_needed: bool = True
    ) -> None:
        self.bufts = list(bufts)
        self.buffers: list[_VBuffer | None] = [None] * len(self.bufts)
        by_type: dict[BufferType, DynTallocr] = {}
        for buft in self.bufts:
            by_type.setdefault(buft, DynTallocr(buft.alignment, buft.max_size))
        self.tallocs = [by_type[buft] for buft in self.bufts]
        self._clamp_inplace = dialect.clamp_inplace
        self._check_size = dialect.alloc_size_check
        self.keeps_needed = keeps_needed
        self._leafs: list[Place] = []
        self._n_srcs: list[int] = []  #: sources of each node
        self._places: list[Place] = []  #: of the sources of all nodes, then of the nodes
        #: the latest graph that was only measured
        self._measured: tuple[GallocGraph, dict[Tensor, Place]] | None = None
        self._placed: dict[object, _Placed] = {}  #: graphs that were placed, by structure; good for buffers and layout
        self.is_reserved = True  #: whether the buffers fit the places; at first there are none, for an empty graph

    # -- reserving -----------------------------------------------------------

    def reserve_n(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> None:
        """Choose a layout for a graph, and allocate buffers if the current ones are too small.

        Raises
        ------
        OutOfMemoryError
            A buffer cannot be allocated; the next graph gets a new layout.

        Notes
        -----
        Mirrors `ggml_gallocr_reserve_n`.
        """
        self._lay_out(graph, node_buffer_ids, leaf_buffer_ids)
        self._fit_buffers(allocate=True)
        self.is_reserved = True

    def reserve_n_size(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> list[int]:
        """Return the bytes that `reserve_n` would need for each buffer id; free buffers that are too small.

        Notes
        -----
        Mirrors `ggml_gallocr_reserve_n_size`. Differs: if a buffer was freed, the next graph gets a new layout;
        upstream places it at null.
        """
        self._lay_out(graph, node_buffer_ids, leaf_buffer_ids)
        self._fit_buffers(allocate=False)
        used = {place.buffer_id for place in (*self._places, *self._leafs)}
        self.is_reserved = all(i < 0 or self.buffers[i] is not None for i in used)
        return [sum(chunk.max_size for chunk in talloc.chunks) for talloc in self.tallocs]

    def measure(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> list[int]:
        """Return the bytes that `reserve_n` would need by buffer id; buffers stay, the next graph gets a new layout."""
        self._measured = graph, self._play(graph, node_buffer_ids, leaf_buffer_ids)
        return [sum(chunk.max_size for chunk in talloc.chunks) for talloc in self.tallocs]

    def reserve_measured(self, graph: GallocGraph) -> bool:
        """Do as `reserve_n` for the graph that was measured last, if this is it and nothing was reserved or placed since.

        Returns
        -------
        bool
            Whether it was that graph.

        Raises
        ------
        OutOfMemoryError
            See `reserve_n`.
        """
        measured = self._measured
        if measured is None or measured[0] is not graph:
            return False
        self._note_places(graph, measured[1])
        self._fit_buffers(allocate=True)
        self.is_reserved = True
        return True

    def _play(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> dict[Tensor, Place]:
        self.is_reserved, self._placed, self._measured = False, {}, None
        for talloc in self.tallocs:
            talloc.reset()
        nodes, leafs = graph.nodes, graph.leafs
        return Play(self).run(nodes, leafs, node_buffer_ids or [0] * len(nodes), leaf_buffer_ids or [0] * len(leafs))

    def _lay_out(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> None:
        self._note_places(graph, self._play(graph, node_buffer_ids, leaf_buffer_ids))

    def _note_places(self, graph: GallocGraph, lives: dict[Tensor, Place]) -> None:
        nodes, leafs = graph.nodes, graph.leafs
        srcs = [node.src for node in nodes]
        sizes = self.sizes()
        places: dict[Tensor | None, Place] = dict.fromkeys(chain(nodes, leafs, *srcs), NOWHERE)
        for tensor in places:
            if tensor is not None and tensor.view_src is None and tensor.data is None:
                # one with a buffer, but without data, was not placed
                places[tensor] = lives.get(tensor) or Place(0, 0, 0, sizes[0](tensor))
        at = places.__getitem__
        self._leafs = list(map(at, leafs))
        self._n_srcs = list(map(len, srcs))
        self._places = [*map(at, chain.from_iterable(srcs)), *map(at, nodes)]

    def _fit_buffers(self, *, allocate: bool) -> None:
        """Free and allocate buffers until each is large enough for the layout."""
        for i, talloc in enumerate(self.tallocs):
            first = self.tallocs.index(talloc)
            if first < i:
                self.buffers[i] = self.buffers[first]
            old = self.buffers[i]
            needed = [chunk.max_size for chunk in talloc.chunks]
            if old is not None:
                sizes = [b.size for b in old.chunks]
                if all(n <= (sizes[c] if c < len(sizes) else 0) for c, n in enumerate(needed)):
                    continue
                old.close()
            self.buffers[i] = None
            if allocate:
                self.buffers[i] = self._alloc_vbuffer(self.bufts[i], needed)

    @staticmethod
    def _alloc_vbuffer(buft: BufferType, sizes: Sequence[int]) -> _VBuffer:
        vbuffer = _VBuffer()
        try:
            for size in sizes:
                vbuffer.chunks.append(_compute_buffer(buft, size))
        except OutOfMemoryError as error:
            vbuffer.close()
            raise OutOfMemoryError(
                error.buft,
                error.requested_bytes,
                error.available_bytes,
                "results of the graph (its compute buffer)",
                hint="use smaller micro-batches (-ub) or a smaller context (-c), or place less on the device",
            ) from error
        return vbuffer

    # -- placing -------------------------------------------------------------

    def alloc_graph(
        self,
        graph: GallocGraph,
        kind: GraphKind | None = None,
        placeable: Sequence[Tensor] = (),
        *,
        is_laid_out: bool = False,
    ) -> bool:
        """Place the tensors of a graph by the layout; return False if it does not fit and there are several buffer types.

        Parameters
        ----------
        kind : GraphKind, optional
            What the caller knows: graphs of one structure differ only in the tensors' sizes, so they are placed
            equally if they fit; graphs of one kind all fit if one does.
        placeable : sequence of Tensor
            With a kind: all that may get memory of its own, in one order for graphs of a structure.
        is_laid_out : bool
            Whether the layout was made for this graph, which then fits.

        Raises
        ------
        OutOfMemoryError
            With one buffer type the graph is reserved automatically, which can fail.

        Notes
        -----
        Mirrors `ggml_gallocr_alloc_graph`.
        """
        placed = None
        if kind is not None and self.is_reserved:
            placed = self._placed.get(kind.structure)
        if placed is not None and not placed.fits(placeable, kind, self.sizes()):
            placed = None
        found = None
        if placed is None:
            found = self._find_places(graph, is_laid_out=is_laid_out) if self.is_reserved else None
            if found is None:
                if len(self.bufts) > 1:
                    return False
                self.reserve_n(graph, None, None)
                found = self._find_places(graph, is_laid_out=True)
                assert found is not None
        for vbuffer in self.buffers:
            if vbuffer is not None:
                for b in vbuffer.chunks:
                    b.reset()
        if found is None:
            assert placed is not None
            placed.place(placeable)
        else:
            owners, views, taken_over = found
            tensors = self._place(graph.leafs, owners, views)
            if kind is not None:
                placed = _Placed.of(placeable, tensors, owners, taken_over)
                if placed is not None:
                    self._placed = {kind.structure: placed, **dict(list(self._placed.items())[: _N_PLACED - 1])}
        return True

    def _find_places(self, graph: GallocGraph, *, is_laid_out: bool) -> _Found | None:
        """Return places of nodes and sources without memory, views, and takeovers; None if the layout does not fit.

        Notes
        -----
        Mirrors `ggml_gallocr_needs_realloc`: what stands at each position must fit there. In a graph like the one that
        was laid out a tensor stands at positions of one place only, and is looked at once.
        """
        nodes = graph.nodes
        if len(self._n_srcs) != len(nodes) or len(self._leafs) != len(graph.leafs):
            return None
        srcs = [node.src for node in nodes]
        places = self._places
        if list(map(len, srcs)) != self._n_srcs:
            places = places_of(places, self._n_srcs, srcs)
        tensors: list[Tensor | None] = [*chain.from_iterable(srcs), *nodes]
        first: dict[Tensor | None, Place] = {}
        pairs: Iterable[tuple[Tensor | None, Place]] = first.items()
        if list(map(first.setdefault, tensors, places)) != places:
            pairs = _by_node(nodes, places)  # the first place counts
        sizes = self.sizes()
        owners: list[tuple[Tensor, Place]] = []
        views: list[Tensor] = []
        for tensor, place in pairs:
            if tensor is None or tensor.buffer is not None:
                continue
            if tensor.view_src is not None:
                views.append(tensor)
            elif tensor.data is None:
                i = place.buffer_id
                if i < 0 or (not is_laid_out and sizes[i](tensor) > place.size):
                    return None
                owners.append((tensor, place))
        taken_over = self._takeovers(graph, owners) if self.keeps_needed else []
        if taken_over is None:
            if not is_laid_out:
                return None
            taken_over = []
        return owners, views, taken_over

    def _takeovers(
        self, graph: GallocGraph, owners: Iterable[tuple[Tensor, Place]]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Return results that are computed in place of a source, with it; None if a tensor is overwritten too early."""
        places: dict[Tensor, Place] = {}
        for tensor, place in (*zip(graph.leafs, self._leafs, strict=True), *owners):
            if place.size:
                places.setdefault(tensor, place)
        stays: dict[tuple[int, int], list[Stay]] = {}
        for tensor, (start, end) in lives_of(graph).items():
            at = places.get(tensor)
            if at is not None:
                stay = Stay(tensor, start, end, at.offset, at.offset + at.size)
                stays.setdefault((id(self.tallocs[at.buffer_id]), at.chunk), []).append(stay)
        pairs = [pair for chunk in stays.values() for pair in overlaps(chunk)]
        if not all(takes_over(stay, other, self.can_inplace) for stay, other in pairs):
            return None
        return [(stay.tensor, other.tensor) for stay, other in pairs]

    def _place(
        self, leafs: Sequence[Tensor], owners: Iterable[tuple[Tensor, Place]], views: Iterable[Tensor]
    ) -> list[Tensor]:
        """Give tensors the memory of their places, leafs first; then views that of what they view, if it has some.

        Returns
        -------
        list of Tensor
            Those that have it now.
        """
        chunks = [[] if v is None else list(v.chunks) for v in self.buffers]
        for talloc, buft, had in zip(self.tallocs, self.bufts, chunks, strict=True):
            # chunks of empty tensors only; upstream places these in a null buffer and aborts
            had += [_compute_buffer(buft, 0) for _ in talloc.chunks[len(had) :]]
        placed: list[Tensor] = []
        at_leafs = [(t, p) for t, p in zip(leafs, self._leafs, strict=True) if t.buffer is None]
        for tensor, place in (*at_leafs, *owners):
            if tensor.data is None and tensor.view_src is None:
                tensor.buffer = buffer = chunks[place.buffer_id][place.chunk]
                tensor.data = buffer.base + place.offset
                placed.append(tensor)
        for view in (*[t for t, _ in at_leafs if t.view_src is not None], *views):
            root = view.view_src
            if root is not None and root.buffer is not None and root.data is not None and view.buffer is None:
                view.buffer = root.buffer
                view.data = root.data + view.view_offs
                placed.append(view)
        _init(placed)
        return placed

    # -- sizes ---------------------------------------------------------------

    def sizes(self) -> list[Callable[[Tensor], int]]:
        """Return what tells the bytes of a tensor in each buffer; as `alloc_size`, but quicker to call."""
        return [self._checked_size(i) if self._check_size else buft.alloc_size for i, buft in enumerate(self.bufts)]

    def _checked_size(self, buffer_id: int) -> Callable[[Tensor], int]:
        size_of, check = self.bufts[buffer_id].alloc_size, self._check_expansion

        def ask(tensor: Tensor) -> int:
            size = size_of(tensor)
            if size > tensor.nbytes:
                check(buffer_id, tensor, size)
            return size

        return ask

    def alloc_size(self, buffer_id: int, tensor: Tensor) -> int:
        """Bytes that a tensor takes in a buffer.

        Raises
        ------
        AllocError
            The buffer type asks for more than ``nbytes`` where the dialect does not allow it.

        Notes
        -----
        Mirrors `ggml_backend_buft_get_alloc_size`.
        """
        return self.sizes()[buffer_id](tensor)

    def _check_expansion(self, buffer_id: int, tensor: Tensor, size: int) -> None:
        if tensor.op.is_empty or tensor.type.is_quantized or tensor.op.may_expand:
            return
        raise AllocError(
            f"{self.bufts[buffer_id].name} asks for {size:,} bytes for {tensor.op.name} '{tensor.name}' of "
            f"{tensor.nbytes:,} bytes: only quantised types and a few ops may ask for more",
            hint="the buffer type's alloc_size is wrong for this op, or use a dialect without alloc_size_check",
        )

    def can_inplace(self, op: Op) -> bool:
        """Return whether a result of the op may use a source's memory."""
        return op.can_inplace and (op is not Op.CLAMP or self._clamp_inplace)

    def buffer_size(self, buffer_id: int) -> int:
        """Return the bytes of a compute buffer; 0 if an earlier id has the same buffer.

        Notes
        -----
        Mirrors `ggml_gallocr_get_buffer_size`.
        """
        vbuffer = self.buffers[buffer_id]
        if vbuffer is None or any(vbuffer is b for b in self.buffers[:buffer_id]):
            return 0
        return vbuffer.size

    def chunks(self, buffer_id: int) -> list[Buffer]:
        """Return the chunks of a compute buffer."""
        vbuffer = self.buffers[buffer_id]
        return [] if vbuffer is None else list(vbuffer.chunks)

    def close(self) -> None:
        """Free all buffers."""
        for vbuffer in self.buffers:
            if vbuffer is not None:
                vbuffer.close()
        self.buffers = [None] * len(self.bufts)
        self.is_reserved, self._placed, self._measured = False, {}, None


def _by_node(nodes: Sequence[Tensor], places: Sequence[Place]) -> Iterator[tuple[Tensor | None, Place]]:
    """Return the tensors with their places (`places_of`) in upstream's order: each node's sources, then the node."""
    of_srcs, of_nodes = iter(places), places[len(places) - len(nodes) :]
    for node, place in zip(nodes, of_nodes, strict=True):
        yield from zip(node.src, islice(of_srcs, len(node.src)), strict=True)
        yield node, place


#: Places of what has no memory, the views, and results with the sources in whose place they are computed.
_Found = tuple[list[tuple[Tensor, Place]], list[Tensor], list[tuple[Tensor, Tensor]]]

#: Structures that the places of are kept.
_N_PLACED = 4


class _Placed:
    """Where the tensors of a graph were placed, by position among those that may get memory."""

    __slots__ = ("data", "fitting", "limits", "memory", "positions", "taken_over", "views")

    positions: list[int]
    memory: list[Buffer]
    data: list[int]
    views: list[int]  #: positions
    limits: list[tuple[int, int, int]]  #: position, buffer, most bytes
    taken_over: list[tuple[int, int]]  #: positions of a result and of the source in whose place it is computed
    fitting: list[object]  #: kinds of graphs that were looked at, and fit

    @classmethod
    def of(
        cls,
        placeable: Sequence[Tensor],
        tensors: Sequence[Tensor],
        owners: Sequence[tuple[Tensor, Place]],
        taken_over: Sequence[tuple[Tensor, Tensor]],
    ) -> _Placed | None:
        """Return where tensors of a graph are; None if one is only a source of its nodes."""
        position = dict(zip(placeable, count()))
        made = cls()
        made.fitting = []
        made.limits = [(position.get(t, -1), place.buffer_id, place.size) for t, place in owners]
        # views without op are the scheduler's dependencies
        at = [(position.get(t, -1), t) for t in tensors if t in position or t.view_src is None or t.op is not Op.NONE]
        if at and min(at, key=itemgetter(0))[0] < 0:
            return None
        made.taken_over = [(position[result], position[source]) for result, source in taken_over]
        own = [(i, t) for i, t in at if t.view_src is None]
        made.positions = [i for i, _ in own]
        made.memory = [_buffer_of(t) for _, t in own]
        made.data = [t.data or 0 for _, t in own]
        made.views = [i for i, t in at if t.view_src is not None]
        return made

    def fits(self, tensors: Sequence[Tensor], kind: object, sizes: Sequence[Callable[[Tensor], int]]) -> bool:
        """Whether each tensor of a graph of this structure has room in its place."""
        if kind not in self.fitting:
            for i, buffer_id, limit in self.limits:
                if sizes[buffer_id](tensors[i]) > limit:
                    return False
            if not all(are_same_layout(tensors[i], tensors[j]) for i, j in self.taken_over):
                return False
            self.fitting = [kind, *self.fitting[: _N_PLACED - 1]]
        return True

    def place(self, tensors: Sequence[Tensor]) -> None:
        """Place the tensors of a graph of this structure likewise."""
        for tensor, buffer, data in zip(map(tensors.__getitem__, self.positions), self.memory, self.data, strict=True):
            tensor.buffer = buffer
            tensor.data = data
        for view in map(tensors.__getitem__, self.views):
            root: Any = view.view_src  # which has memory, as that of the graph before had
            view.buffer = root.buffer
            view.data = root.data + view.view_offs
        if any(type(b).init_tensor is not Buffer.init_tensor for b in set(self.memory)):
            _init([tensors[i] for i in (*self.positions, *self.views)])


def _init(tensors: Sequence[Tensor]) -> None:
    """Let the buffers of tensors that were placed know, where they want to."""
    if any(type(b).init_tensor is not Buffer.init_tensor for b in set(map(_buffer_of, tensors))):
        for tensor in tensors:
            _buffer_of(tensor).init_tensor(tensor)


def _compute_buffer(buft: BufferType, size: int) -> Buffer:
    buffer = buft.alloc_buffer(size)
    buffer.set_usage(BufferUsage.COMPUTE)
    return buffer


_buffer_of: Callable[[Tensor], Buffer] = attrgetter("buffer")
