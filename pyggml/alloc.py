"""Where tensors go in memory: the linear allocator for weights, the graph allocator for results.

The graph allocator first plays a graph through with sizes only (`Gallocr.reserve_n`): each result gets an offset when its
node comes, and gives it back after its last use. Then it allocates one buffer per buffer type, as large as the play
needed, and places the tensors of that graph, or of any other that fits (`Gallocr.alloc_graph`). Offsets are upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Protocol

from .buffer import Buffer, BufferType, MultiBuffer, tensor_alloc, view_init
from .dialect import DEFAULT_DIALECT, Dialect
from .errors import AllocError, OutOfMemoryError
from .tensor import Tensor
from .types import SIZE_MAX, BufferUsage, Op, TensorFlag, Type

__all__ = ["Context", "DynTallocr", "GallocGraph", "Gallocr", "Tallocr", "alloc_tensors"]

#: Most chunks of one compute buffer; the last one has no limit of size.
VBUFFER_MAX_CHUNKS = 16


def _pad(n: int, alignment: int) -> int:
    return (n + alignment - 1) & -alignment


# -- linear ------------------------------------------------------------------


class Tallocr:
    """Places tensors one after the other in a buffer.

    Notes
    -----
    Mirrors `ggml_tallocr`.
    """

    __slots__ = ("alignment", "buffer", "offset")

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.alignment = buffer.buft.alignment
        self.offset = _pad(buffer.base, self.alignment) - buffer.base

    def alloc(self, tensor: Tensor) -> None:
        """Place the next tensor.

        Raises
        ------
        AllocError
            It does not fit into what is left.
        """
        size = _pad(self.buffer.buft.alloc_size(tensor), self.alignment)
        if self.offset + size > self.buffer.size:
            raise AllocError(
                f"'{tensor.name}' needs {size:,} bytes in {self.buffer.buft.name}, "
                f"{self.buffer.size - self.offset:,} of {self.buffer.size:,} are left"
            )
        tensor_alloc(self.buffer, tensor, self.buffer.base + self.offset)
        self.offset += size


def alloc_tensors(
    tensors: Sequence[Tensor], buft: BufferType, *, usage: BufferUsage = BufferUsage.ANY
) -> Buffer | None:
    """Allocate tensors in as few buffers of a type as its maximum size allows.

    Parameters
    ----------
    tensors : sequence of Tensor
        Views among them, and tensors that have memory already, take none.

    Returns
    -------
    Buffer or None
        A `MultiBuffer` if it took several; None if nothing needed memory.

    Raises
    ------
    OutOfMemoryError
        The device has not so much; nothing stays allocated.

    Notes
    -----
    Mirrors `ggml_backend_alloc_ctx_tensors_from_buft`.
    """
    plan: list[tuple[int, list[Tensor]]] = []
    size = 0
    part: list[Tensor] = []
    for tensor in tensors:
        needs = 0
        if tensor.data is None and tensor.view_src is None:
            needs = _pad(buft.alloc_size(tensor), buft.alignment)
        if size > 0 and size + needs > buft.max_size:
            plan.append((size, part))
            size, part = 0, []
        size += needs
        part.append(tensor)
    if size > 0:
        plan.append((size, part))

    buffers: list[Buffer] = []
    try:
        for buffer_size, placed in plan:
            buffer = buft.alloc_buffer(buffer_size)
            buffers.append(buffer)
            _place(placed, Tallocr(buffer))
    except AllocError:
        for tensor in tensors:
            if tensor.buffer in buffers:
                tensor.buffer = tensor.data = None
        for b in buffers:
            b.close()
        raise
    for tensor in part if size == 0 else ():  # views behind a tensor that filled its buffer
        if tensor.buffer is None and tensor.view_src is not None and tensor.view_src.buffer is not None:
            view_init(tensor)
    if not buffers:
        return None
    whole = buffers[0] if len(buffers) == 1 else MultiBuffer(buffers)
    whole.set_usage(usage)
    return whole


def _place(tensors: Iterable[Tensor], tallocr: Tallocr) -> None:
    for tensor in tensors:
        if tensor.view_src is not None:
            if tensor.buffer is None:
                view_init(tensor)
        elif tensor.data is None:
            tallocr.alloc(tensor)


class HasBufferType(Protocol):
    """A device or a backend: something with a default kind of memory."""

    @property
    def buffer_type(self) -> BufferType:
        """The default kind of memory."""


class Context:
    """Tensors that are made and allocated together, such as the weights of a model.

    Examples
    --------
    >>> import pyggml as ggml
    >>> weights = ggml.Context()
    >>> w = weights.new_tensor("f32", (4, 3), name="w")
    >>> buffer = weights.alloc(ggml.CPU(), usage="weights")
    >>> w.set_array([[1, 2, 3, 4]] * 3)
    >>> w.numpy().sum()
    np.float32(30.0)
    """

    __slots__ = ("buffers", "tensors")

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.buffers: list[Buffer] = []

    def new_tensor(self, type: Type | str, ne: Sequence[int], *, name: str = "") -> Tensor:
        """Return a new tensor without memory; ``ne`` in ggml order."""
        tensor = Tensor(type, ne, name=name)
        self.tensors.append(tensor)
        return tensor

    def add(self, tensor: Tensor) -> Tensor:
        """Take a tensor made elsewhere (a view, say) and return it."""
        self.tensors.append(tensor)
        return tensor

    def alloc(self, where: HasBufferType | BufferType, *, usage: BufferUsage | str = BufferUsage.ANY) -> Buffer | None:
        """Allocate what has no memory yet.

        Parameters
        ----------
        where : Backend, Device or BufferType
            In whose memory.
        usage : BufferUsage or str
            ``"any"``, ``"weights"`` or ``"compute"``.

        Raises
        ------
        OutOfMemoryError
            The device has not so much; nothing stays allocated.
        """
        buft = where if isinstance(where, BufferType) else where.buffer_type
        usage = BufferUsage[usage.upper()] if isinstance(usage, str) else usage
        buffer = alloc_tensors([t for t in self.tensors if t.buffer is None], buft, usage=usage)
        if buffer is not None:
            self.buffers.append(buffer)
        return buffer

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor of that name."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def close(self) -> None:
        """Give all memory back now; the tensors have none afterwards."""
        for tensor in self.tensors:
            tensor.buffer = tensor.data = None
        for buffer in self.buffers:
            buffer.close()
        self.buffers.clear()

    def __repr__(self) -> str:
        return f"<Context of {len(self.tensors)} tensors, {sum(b.size for b in self.buffers):,} bytes>"


# -- offsets that are given back ---------------------------------------------


class _Chunk:
    """Free ranges of one future buffer, ascending and never adjacent, as ``[offset, size]``."""

    __slots__ = ("free", "max_size")

    def __init__(self, size: int) -> None:
        self.free: list[list[int]] = [[0, size]]
        self.max_size = 0  #: end of the furthest tensor so far


class DynTallocr:
    """Gives out offsets, best fit first, and takes them back.

    Notes
    -----
    Mirrors `ggml_dyn_tallocr`. Differs: any number of free blocks; upstream aborts above 256.
    """

    __slots__ = ("alignment", "chunks", "max_chunk_size")

    def __init__(self, alignment: int, max_buffer_size: int) -> None:
        self.alignment = alignment
        self.max_chunk_size = min(max_buffer_size, SIZE_MAX // 2)
        self.chunks: list[_Chunk] = []

    def reset(self) -> None:
        """Forget all that was given out."""
        self.chunks = []

    def alloc(self, size: int) -> tuple[int, int]:
        """Return chunk and offset of ``size`` bytes."""
        size = (size + self.alignment - 1) & -self.alignment
        i_chunk = i_block = -1
        # the last block of a chunk is its open end: it is taken only if no hole fits
        for c, chunk in enumerate(self.chunks):
            best_size = SIZE_MAX
            free = chunk.free
            for i in range(len(free) - 1):
                if size <= free[i][1] <= best_size:
                    i_chunk, i_block, best_size = c, i, free[i][1]
        if i_block == -1:
            i_chunk, i_block = self._best_open_end(size)
        if i_block == -1:
            i_chunk, i_block = self._new_chunk(size), 0
        chunk = self.chunks[i_chunk]
        block = chunk.free[i_block]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            del chunk.free[i_block]
        chunk.max_size = max(chunk.max_size, offset + size)
        return i_chunk, offset

    def _best_open_end(self, size: int) -> tuple[int, int]:
        """Return the chunk whose last block wastes least, or must grow least."""
        i_chunk = i_block = -1
        best: int | None = None
        for c, chunk in enumerate(self.chunks):
            if not chunk.free or chunk.free[-1][1] < size:
                continue
            unused = chunk.max_size - chunk.free[-1][0] - size  # negative: bytes that the chunk would grow by
            better = best is None or (unused > best if best < 0 else 0 <= unused < best)
            if better:
                i_chunk, i_block, best = c, len(chunk.free) - 1, unused
        return i_chunk, i_block

    def _new_chunk(self, min_size: int) -> int:
        size = max(min_size, self.max_chunk_size)
        if len(self.chunks) == VBUFFER_MAX_CHUNKS - 1:
            size = SIZE_MAX // 2
        self.chunks.append(_Chunk(size))
        return len(self.chunks) - 1

    def free_bytes(self, i_chunk: int, offset: int, size: int) -> None:
        """Take back bytes given out before.

        Notes
        -----
        Mirrors `ggml_dyn_tallocr_free_bytes`.
        """
        size = (size + self.alignment - 1) & -self.alignment
        free = self.chunks[i_chunk].free
        for i, block in enumerate(free):
            start, length = block
            if start + length == offset:
                block[1] += size
                if i + 1 < len(free) and start + block[1] == free[i + 1][0]:
                    block[1] += free[i + 1][1]
                    del free[i + 1]
                return
            if offset + size == start:
                block[0] = offset
                block[1] += size
                if i > 0 and free[i - 1][0] + free[i - 1][1] == offset:
                    free[i - 1][1] += block[1]
                    del free[i]
                return
            if start > offset:  # blocks ascend: none further on can touch
                free.insert(i, [offset, size])
                return
        free.append([offset, size])


# -- graphs ------------------------------------------------------------------


class GallocGraph(Protocol):
    """What the graph allocator reads of a graph."""

    @property
    def nodes(self) -> list[Tensor]:
        """Results, in the order of computing."""

    @property
    def leafs(self) -> list[Tensor]:
        """Inputs and weights."""


class _Life:
    """What is known of one tensor while a graph is played through."""

    __slots__ = ("allocated", "buffer_id", "chunk", "n_children", "n_views", "offset")

    def __init__(self) -> None:
        self.n_children = 0
        self.n_views = 0
        self.buffer_id = 0
        self.chunk = 0
        self.offset = 0
        self.allocated = False


@dataclass(slots=True)
class _Place:
    """Where a tensor at this position of the graph goes."""

    buffer_id: int  #: -1: it has memory, or is a view
    chunk: int
    offset: int
    size_max: int  #: bytes that a tensor here may have


_NOWHERE = _Place(-1, -1, SIZE_MAX, 0)


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
    """Graph allocator over several buffer types.

    Parameters
    ----------
    bufts : sequence of BufferType
        One for each buffer id; a type that stands twice shares its memory.
    dialect : Dialect
        Its `clamp_inplace` and `alloc_size_check` are used.

    Notes
    -----
    Mirrors `ggml_gallocr`. Differs: no limits of hash size or free blocks; after an allocation that failed, or a
    `reserve_n_size`, the next graph is reserved anew, where upstream uses a null buffer.
    """

    __slots__ = (
        "_check_size",
        "_clamp_inplace",
        "_leafs",
        "_n_srcs",
        "_nodes",
        "_places",
        "buffers",
        "bufts",
        "is_reserved",
        "tallocs",
    )

    def __init__(self, bufts: Sequence[BufferType], *, dialect: Dialect = DEFAULT_DIALECT) -> None:
        self.bufts = list(bufts)
        self.buffers: list[_VBuffer | None] = [None] * len(self.bufts)
        by_type: dict[BufferType, DynTallocr] = {}
        for buft in self.bufts:
            by_type.setdefault(buft, DynTallocr(buft.alignment, buft.max_size))
        self.tallocs = [by_type[buft] for buft in self.bufts]
        self._clamp_inplace = dialect.clamp_inplace
        self._check_size = dialect.alloc_size_check
        self._nodes: list[tuple[_Place, list[_Place]]] = []  #: of each node and its sources
        self._leafs: list[_Place] = []
        self._n_srcs: list[int] = []  #: sources of each node
        self._places: list[_Place] = []  #: of the sources of all nodes, then of the nodes
        self.is_reserved = True  #: whether the buffers fit the places; at first there are none, for an empty graph

    # -- reserving -----------------------------------------------------------

    def reserve_n(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> None:
        """Lay a graph out, and allocate buffers where those at hand are too small.

        Raises
        ------
        OutOfMemoryError
            A buffer cannot be allocated; the next graph is laid out anew.

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
        """Return the bytes that `reserve_n` would need for each buffer id; buffers that are too small are freed.

        Notes
        -----
        Mirrors `ggml_gallocr_reserve_n_size`. Differs: if a buffer was freed the next graph is laid out anew; upstream
        places it at null.
        """
        self._lay_out(graph, node_buffer_ids, leaf_buffer_ids)
        self._fit_buffers(allocate=False)
        used = {place.buffer_id for dst, srcs in self._nodes for place in (dst, *srcs)}
        used.update(place.buffer_id for place in self._leafs)
        self.is_reserved = all(i < 0 or self.buffers[i] is not None for i in used)
        return [sum(chunk.max_size for chunk in talloc.chunks) for talloc in self.tallocs]

    def _lay_out(
        self, graph: GallocGraph, node_buffer_ids: Sequence[int] | None, leaf_buffer_ids: Sequence[int] | None
    ) -> None:
        self.is_reserved = False
        nodes, leafs = graph.nodes, graph.leafs
        for talloc in self.tallocs:
            talloc.reset()
        lives = _Play(self).run(nodes, leafs, node_buffer_ids or [0] * len(nodes), leaf_buffer_ids or [0] * len(leafs))
        places: dict[Tensor, _Place] = {}

        def place(tensor: Tensor | None) -> _Place:
            if tensor is None or tensor.view_src is not None or tensor.data is not None:
                return _NOWHERE
            found = places.get(tensor)
            if found is None:
                life = lives[tensor]
                size = self.alloc_size(life.buffer_id, tensor)
                found = places[tensor] = _Place(life.buffer_id, life.chunk, life.offset, size)
            return found

        self._nodes = [(place(node), [place(src) for src in node.src]) for node in nodes]
        self._leafs = [place(leaf) for leaf in leafs]
        self._n_srcs = [len(node.src) for node in nodes]
        self._places = _places_of(self._nodes, [node.src for node in nodes])

    def _fit_buffers(self, *, allocate: bool) -> None:
        """Free and allocate buffers until each holds what the layout needs."""
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
                buffer = buft.alloc_buffer(size)
                buffer.set_usage(BufferUsage.COMPUTE)
                vbuffer.chunks.append(buffer)
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

    def alloc_graph(self, graph: GallocGraph) -> bool:
        """Place the tensors of a graph as laid out; False if it does not fit and there are several buffer types.

        Raises
        ------
        OutOfMemoryError
            With one buffer type the graph is reserved by itself, which may fail.

        Notes
        -----
        Mirrors `ggml_gallocr_alloc_graph`.
        """
        found = self._find_places(graph) if self.is_reserved else None
        if found is None:
            if len(self.bufts) > 1:
                return False
            self.reserve_n(graph, None, None)
            found = self._find_places(graph)
            assert found is not None
        for vbuffer in self.buffers:
            if vbuffer is not None:
                for b in vbuffer.chunks:
                    b.reset()
        self._place(graph.leafs, *found)
        return True

    def _find_places(self, graph: GallocGraph) -> tuple[list[tuple[Tensor, _Place]], list[Tensor]] | None:
        """Return where the layout at hand puts nodes and sources without memory, and views; None if it does not serve the graph.

        Notes
        -----
        Mirrors `ggml_gallocr_needs_realloc`: what stands at each position must fit there. In a graph like the one that
        was laid out a tensor stands at positions of one place only, and is looked at once.
        """
        nodes = graph.nodes
        if len(self._nodes) != len(nodes) or len(self._leafs) != len(graph.leafs):
            return None
        srcs = [node.src for node in nodes]
        places = self._places
        if list(map(len, srcs)) != self._n_srcs:
            places = _places_of(self._nodes, srcs)
        tensors: list[Tensor | None] = [*chain.from_iterable(srcs), *nodes]
        found = dict(zip(tensors, places, strict=True))
        pairs: Iterable[tuple[Tensor | None, _Place]] = found.items()
        if list(map(found.__getitem__, tensors)) != places:
            pairs = zip(tensors, places, strict=True)
        sizes = [
            partial(self.alloc_size, i) if self._check_size else buft.alloc_size for i, buft in enumerate(self.bufts)
        ]
        owners: list[tuple[Tensor, _Place]] = []
        views: list[Tensor] = []
        for tensor, place in pairs:
            if tensor is None or tensor.buffer is not None:
                continue
            if tensor.view_src is not None:
                views.append(tensor)
            elif tensor.data is None:
                i = place.buffer_id
                if i < 0 or sizes[i](tensor) > place.size_max:
                    return None
                owners.append((tensor, place))
        return owners, views

    def _place(self, leafs: Sequence[Tensor], owners: Iterable[tuple[Tensor, _Place]], views: Iterable[Tensor]) -> None:
        """Give tensors the memory of their places, leafs first; then views that of what they view, if it has some."""
        chunks = [() if v is None else tuple(v.chunks) for v in self.buffers]
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
        if any(type(b).init_tensor is not Buffer.init_tensor for b in set(map(_buffer_of, placed))):
            for tensor in placed:
                _buffer_of(tensor).init_tensor(tensor)

    # -- sizes ---------------------------------------------------------------

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
        size = self.bufts[buffer_id].alloc_size(tensor)
        if self._check_size and size > tensor.nbytes:
            self._check_expansion(buffer_id, tensor, size)
        return size

    def _check_expansion(self, buffer_id: int, tensor: Tensor, size: int) -> None:
        if tensor.op.is_empty or tensor.type.is_quantized or tensor.op.may_expand:
            return
        raise AllocError(
            f"{self.bufts[buffer_id].name} asks for {size:,} bytes for {tensor.op.name} '{tensor.name}' of "
            f"{tensor.nbytes:,} bytes: only quantised types and a few ops may ask for more",
            hint="the buffer type's alloc_size is wrong for this op, or use a dialect without alloc_size_check",
        )

    def can_inplace(self, op: Op) -> bool:
        """Whether a result of the op may take over a source's memory."""
        return op.can_inplace and (op is not Op.CLAMP or self._clamp_inplace)

    def buffer_size(self, buffer_id: int) -> int:
        """Bytes of a compute buffer; 0 if it is one that an earlier id has.

        Notes
        -----
        Mirrors `ggml_gallocr_get_buffer_size`.
        """
        vbuffer = self.buffers[buffer_id]
        if vbuffer is None or any(vbuffer is b for b in self.buffers[:buffer_id]):
            return 0
        return vbuffer.size

    def chunks(self, buffer_id: int) -> list[Buffer]:
        """Buffers that make up a compute buffer."""
        vbuffer = self.buffers[buffer_id]
        return [] if vbuffer is None else list(vbuffer.chunks)

    def close(self) -> None:
        """Give all buffers back."""
        for vbuffer in self.buffers:
            if vbuffer is not None:
                vbuffer.close()
        self.buffers = [None] * len(self.bufts)
        self.is_reserved = False


_buffer_of: Callable[[Tensor], Buffer] = attrgetter("buffer")


def _places_of(
    laid_out: Sequence[tuple[_Place, list[_Place]]], srcs: Sequence[Sequence[Tensor | None]]
) -> list[_Place]:
    """Return the places of sources and nodes in a row; where a node has more sources than it had, they have none."""
    places: list[_Place] = []
    for (_, known), present in zip(laid_out, srcs, strict=True):
        places += known[: len(present)]
        places += [_NOWHERE] * (len(present) - len(known))
    places += [dst for dst, _ in laid_out]
    return places


class _Play:
    """One play of a graph: who needs whom, and where everybody lies meanwhile.

    Notes
    -----
    Mirrors `ggml_gallocr_alloc_graph_impl`.
    """

    __slots__ = ("alloc_size", "bufts", "galloc", "lives", "tallocs")

    def __init__(self, galloc: Gallocr) -> None:
        self.galloc = galloc
        self.tallocs = galloc.tallocs
        self.alloc_size: Callable[[int, Tensor], int] = galloc.alloc_size
        self.lives: dict[Tensor, _Life] = {}

    def _life(self, tensor: Tensor) -> _Life:
        life = self.lives.get(tensor)
        if life is None:
            life = self.lives[tensor] = _Life()
        return life

    def run(
        self,
        nodes: Sequence[Tensor],
        leafs: Sequence[Tensor],
        node_buffer_ids: Sequence[int],
        leaf_buffer_ids: Sequence[int],
    ) -> dict[Tensor, _Life]:
        """Play a graph through and return where each tensor came to lie."""
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

    def _take_over(self, tensor: Tensor, life: _Life, parent: Tensor) -> bool:
        """Put a result where a parent lies that nobody else needs, if the layouts agree."""
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
        spare = _pad(self.alloc_size(buffer_id, parent), talloc.alignment)
        used = _pad(self.alloc_size(buffer_id, tensor), talloc.alignment)
        if used > spare:  # upstream asserts that this never is
            return False
        life.buffer_id, life.chunk, life.offset = buffer_id, parent_life.chunk, parent_life.offset
        parent_life.allocated = False  # so that the memory is not freed with the parent
        if spare > used:
            talloc.free_bytes(life.chunk, life.offset + used, spare - used)
        return True

    def _release(self, tensor: Tensor, life: _Life) -> None:
        """Give back the memory of a tensor that nobody needs any more, or of the one it views."""
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
