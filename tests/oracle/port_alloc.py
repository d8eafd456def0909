"""Upstream's allocators written out as upstream has them: plain tensors, offsets, and what is given back.

Slow and obvious on purpose, and sharing no code with `pyggml.alloc`: property tests compare the two. First come the plain
tensors and the abilities of a case's backends, as ``FORMAT.md`` defines them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyggml.dialect import Dialect
from pyggml.types import Op, Type

__all__ = [
    "Place",
    "PlainTensor",
    "PortAbort",
    "PortDynTallocr",
    "PortGallocr",
    "Spec",
    "aligned",
    "alloc_size",
    "batch_of",
    "is_view_op",
    "nbytes",
]

SIZE_MAX = 2**64 - 1
MAX_CHUNKS = 16
VIEW_OPS = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")
INPLACE_OPS = [
    "FILL",
    "SCALE",
    "DIAG_MASK_ZERO",
    "DIAG_MASK_INF",
    "ADD",
    "ADD_ID",
    "ADD1",
    "SUB",
    "MUL",
    "DIV",
    "SQR",
    "SQRT",
    "LOG",
    "UNARY",
    "ROPE",
    "ROPE_BACK",
    "SILU_BACK",
    "RMS_NORM",
    "RMS_NORM_BACK",
    "SOFT_MAX",
    "SOFT_MAX_BACK",
]
EXPANDING_OPS = ("FLASH_ATTN_EXT", "MUL_MAT", "MUL_MAT_ID", "CUMSUM", "ARGSORT", "TOP_K")

#: A compute buffer (int) or a static buffer (str), chunk, offset in bytes.
Place = tuple[int | str, int, int]
#: What a case says of a buffer type or backend, as read from JSON.
Spec = Mapping[str, Any]


class PortAbort(Exception):
    """Upstream would abort here."""


@dataclass(eq=False)
class PlainTensor:
    """What the rules look at."""

    name: str
    type: str
    ne: Sequence[int]
    nb: Sequence[int]
    op: str = "NONE"
    src: list[PlainTensor | None] = field(default_factory=list)
    view_src: PlainTensor | None = None
    view_offs: int = 0
    flags: set[str] = field(default_factory=set)
    data: Place | None = None
    buffer: str | None = None  #: id of a static buffer, or ``@`` and the buffer type
    buft: str = ""  #: of the buffer
    usage: str = ""  #: of the buffer


def nbytes(tensor: PlainTensor) -> int:
    """Mirrors `ggml_nbytes`."""
    block, size = Type.of(tensor.type).block_size, Type.of(tensor.type).type_size
    if any(n <= 0 for n in tensor.ne):
        return 0
    if block == 1:
        total = size
        for n, b in zip(tensor.ne, tensor.nb, strict=True):
            total += (n - 1) * b
        return total
    total = tensor.ne[0] * tensor.nb[0] // block
    for i in range(1, 4):
        total += (tensor.ne[i] - 1) * tensor.nb[i]
    return total


def alloc_size(buft: Spec, tensor: PlainTensor) -> int:
    """Bytes that a case's buffer type asks for."""
    pad = buft.get("alloc_pad") or {}
    size = nbytes(tensor)
    kind = Type.of(tensor.type)
    row: int = pad.get("quant_row", 0)
    if row and kind.is_quantized and tensor.ne[0] % row != 0:
        size += kind.type_size * (row - tensor.ne[0] % row) // kind.block_size
    size += int(pad.get("extra", 0))
    multiple: int = pad.get("round_to", 1) or 1
    return (size + multiple - 1) // multiple * multiple


def batch_of(tensor: PlainTensor) -> int:
    """Batch size that a case's backends ask about."""
    if tensor.op == "GET_ROWS":
        return 0
    if tensor.op == "MUL_MAT":
        return tensor.ne[1]
    if tensor.op in ("MUL_MAT_ID", "ROPE", "ROPE_BACK"):
        return tensor.ne[2]
    return tensor.ne[1] * tensor.ne[2] * tensor.ne[3]


def same_layout(a: PlainTensor, b: PlainTensor) -> bool:
    """Mirrors `ggml_are_same_layout`."""
    return a.type == b.type and list(a.ne) == list(b.ne) and list(a.nb) == list(b.nb)


def aligned(n: int, alignment: int) -> int:
    """Round up."""
    return (n + alignment - 1) // alignment * alignment


class PortDynTallocr:
    """Mirrors `ggml_dyn_tallocr`: each chunk is ``[free blocks, max_size]``, each block ``[offset, size]``."""

    def __init__(self, alignment: int, max_size: int) -> None:
        self.alignment = alignment
        self.max_chunk_size = min(max_size, SIZE_MAX // 2)
        self.free: list[list[list[int]]] = []
        self.max_size: list[int] = []

    def reset(self) -> None:
        """Forget all."""
        self.free, self.max_size = [], []

    def alloc(self, size: int) -> tuple[int, int]:
        """Return chunk and offset."""
        size = aligned(size, self.alignment)
        best_chunk, best_block = -1, -1
        for c in range(len(self.free)):
            best_size = SIZE_MAX
            for i in range(len(self.free[c]) - 1):
                block_size = self.free[c][i][1]
                if block_size >= size and block_size <= best_size:
                    best_chunk, best_block, best_size = c, i, block_size
        if best_block == -1:
            best_reuse = -(2**63)
            for c in range(len(self.free)):
                if len(self.free[c]) > 0:
                    offset, block_size = self.free[c][-1]
                    reuse = self.max_size[c] - offset - size
                    better_reuse = best_reuse < 0 and reuse > best_reuse
                    better_fit = reuse >= 0 and reuse < best_reuse
                    if block_size >= size and (better_reuse or better_fit):
                        best_chunk, best_block, best_reuse = c, len(self.free[c]) - 1, reuse
        if best_block == -1:
            room = max(size, self.max_chunk_size)
            if len(self.free) == MAX_CHUNKS - 1:
                room = SIZE_MAX // 2
            self.free.append([[0, room]])
            self.max_size.append(0)
            best_chunk, best_block = len(self.free) - 1, 0
        block = self.free[best_chunk][best_block]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            self.free[best_chunk].pop(best_block)
        self.max_size[best_chunk] = max(self.max_size[best_chunk], offset + size)
        return best_chunk, offset

    def free_bytes(self, chunk: int, offset: int, size: int) -> None:
        """Take bytes back: joined with a neighbour before, else with one behind, else a new block."""
        size = aligned(size, self.alignment)
        blocks = self.free[chunk]
        for i in range(len(blocks)):
            if blocks[i][0] + blocks[i][1] == offset:
                blocks[i][1] += size
                if i < len(blocks) - 1 and blocks[i][0] + blocks[i][1] == blocks[i + 1][0]:
                    blocks[i][1] += blocks[i + 1][1]
                    blocks.pop(i + 1)
                return
            if offset + size == blocks[i][0]:
                blocks[i][0] = offset
                blocks[i][1] += size
                if i > 0 and blocks[i - 1][0] + blocks[i - 1][1] == blocks[i][0]:
                    blocks[i - 1][1] += blocks[i][1]
                    blocks.pop(i)
                return
        at = 0
        while at < len(blocks) and blocks[at][0] < offset:
            at += 1
        blocks.insert(at, [offset, size])


@dataclass
class HashNode:
    """Mirrors `struct hash_node`."""

    n_children: int = 0
    n_views: int = 0
    buffer_id: int = 0
    chunk: int = 0
    offset: int = 0
    allocated: bool = False


#: buffer id (-1: nowhere), chunk, offset, most bytes
TensorAlloc = tuple[int, int, int, int]
NOWHERE: TensorAlloc = (-1, -1, SIZE_MAX, 0)


class PortGallocr:
    """Mirrors `ggml_gallocr`.

    Attributes
    ----------
    chunk_sizes : list of list of int, or None
        For each buffer id the sizes of its allocated chunks; None before any.
    """

    def __init__(self, bufts: Sequence[Spec], dialect: Dialect) -> None:
        self.bufts = list(bufts)
        self.dialect = dialect
        self.tallocs: list[PortDynTallocr] = []
        for i, buft in enumerate(bufts):
            same = [j for j in range(i) if bufts[j] is buft]
            fresh = PortDynTallocr(buft.get("alignment", 64), buft.get("max_size") or SIZE_MAX)
            self.tallocs.append(self.tallocs[same[0]] if same else fresh)
        self.chunk_sizes: list[list[int] | None] = [None] * len(bufts)
        self.node_allocs: list[tuple[TensorAlloc, list[TensorAlloc]]] = []
        self.leaf_allocs: list[TensorAlloc] = []
        self.hash: dict[PlainTensor, HashNode] = {}

    def get(self, tensor: PlainTensor) -> HashNode:
        """Mirrors `ggml_gallocr_hash_get`."""
        return self.hash.setdefault(tensor, HashNode())

    def alloc_size(self, buffer_id: int, tensor: PlainTensor) -> int:
        """Mirrors `ggml_backend_buft_get_alloc_size`."""
        size = alloc_size(self.bufts[buffer_id], tensor)
        may_expand = (
            tensor.op == "NONE"
            or tensor.op in VIEW_OPS
            or tensor.op in EXPANDING_OPS
            or Type.of(tensor.type).is_quantized
        )
        if self.dialect.alloc_size_check and size > nbytes(tensor) and not may_expand:
            raise PortAbort(f"alloc_size of {tensor.name}")
        return size

    def can_inplace(self, op: str) -> bool:
        """Mirrors `ggml_op_can_inplace`."""
        return op in INPLACE_OPS or (op == "CLAMP" and self.dialect.clamp_inplace)

    # -- one play of the graph -------------------------------------------------

    def allocate_node(self, node: PlainTensor, buffer_id: int) -> None:
        """Mirrors `ggml_gallocr_allocate_node`."""
        hn = self.get(node)
        is_allocated = node.data is not None or node.buffer is not None or hn.allocated
        if is_allocated or node.view_src is not None:
            return
        hn.allocated = True
        if self.can_inplace(node.op):
            for parent in node.src:
                if parent is None:
                    continue
                if not self.get(parent).allocated:
                    continue
                if "output" in parent.flags or (parent.view_src is not None and "output" in parent.view_src.flags):
                    continue
                if not same_layout(node, parent):
                    continue
                p_hn = self.get(parent)
                if p_hn.n_children == 1 and p_hn.n_views == 0:
                    if parent.view_src is not None:
                        view_src = parent.view_src
                        v_hn = self.get(view_src)
                        if v_hn.n_views == 1 and v_hn.n_children == 0 and view_src.data == parent.data:
                            hn.buffer_id, hn.chunk, hn.offset = p_hn.buffer_id, p_hn.chunk, p_hn.offset
                            p_hn.allocated = False
                            v_hn.allocated = False
                            self.free_extra_space(node, view_src)
                            return
                    else:
                        hn.buffer_id, hn.chunk, hn.offset = p_hn.buffer_id, p_hn.chunk, p_hn.offset
                        p_hn.allocated = False
                        self.free_extra_space(node, parent)
                        return
        hn.buffer_id = buffer_id
        hn.chunk, hn.offset = self.tallocs[buffer_id].alloc(self.alloc_size(buffer_id, node))

    def free_extra_space(self, node: PlainTensor, parent: PlainTensor) -> None:
        """Mirrors `ggml_gallocr_free_extra_space`."""
        hn, p_hn = self.get(node), self.get(parent)
        parent_size = self.alloc_size(p_hn.buffer_id, parent)
        node_size = self.alloc_size(hn.buffer_id, node)
        if parent_size < node_size:
            raise PortAbort("parent_size >= node_size")
        talloc = self.tallocs[p_hn.buffer_id]
        parent_size = aligned(parent_size, talloc.alignment)
        node_size = aligned(node_size, talloc.alignment)
        if parent_size > node_size:
            talloc.free_bytes(p_hn.chunk, p_hn.offset + node_size, parent_size - node_size)

    def free_node(self, node: PlainTensor) -> None:
        """Mirrors `ggml_gallocr_free_node`."""
        if "output" in node.flags:
            return
        hn = self.get(node)
        self.tallocs[hn.buffer_id].free_bytes(hn.chunk, hn.offset, self.alloc_size(hn.buffer_id, node))
        hn.allocated = False

    def play(
        self,
        nodes: Sequence[PlainTensor],
        leafs: Sequence[PlainTensor],
        node_ids: Sequence[int],
        leaf_ids: Sequence[int],
    ) -> None:
        """Mirrors `ggml_gallocr_alloc_graph_impl`."""
        self.hash = {}
        for i, leaf in enumerate(leafs):
            self.allocate_node(leaf, leaf_ids[i])
        for i, node in enumerate(nodes):
            if node.view_src is not None and node.op != "NONE":
                self.get(node.view_src).n_views += 1
            if "input" in node.flags:
                self.allocate_node(node, node_ids[i])
            for src in node.src:
                if src is None:
                    continue
                self.get(src).n_children += 1
                if "input" in src.flags:
                    self.allocate_node(src, node_ids[i])
        for i, node in enumerate(nodes):
            for parent in node.src:
                if parent is not None:
                    self.allocate_node(parent, node_ids[i])
            self.allocate_node(node, node_ids[i])
            for parent in node.src:
                if parent is None:
                    continue
                p_hn = self.get(parent)
                p_hn.n_children -= 1
                if p_hn.n_children == 0 and p_hn.n_views == 0:
                    if parent.view_src is not None:
                        v_hn = self.get(parent.view_src)
                        v_hn.n_views -= 1
                        if v_hn.n_views == 0 and v_hn.n_children == 0 and v_hn.allocated:
                            self.free_node(parent.view_src)
                    elif p_hn.allocated:
                        self.free_node(parent)

    # -- reserve and place -----------------------------------------------------

    def tensor_alloc(self, tensor: PlainTensor | None) -> TensorAlloc:
        """Return where the play put a tensor."""
        if tensor is None or tensor.view_src is not None or tensor.data is not None:
            return NOWHERE
        hn = self.get(tensor)
        return hn.buffer_id, hn.chunk, hn.offset, self.alloc_size(hn.buffer_id, tensor)

    def reserve_n(
        self,
        nodes: Sequence[PlainTensor],
        leafs: Sequence[PlainTensor],
        node_ids: Sequence[int],
        leaf_ids: Sequence[int],
        *,
        no_alloc: bool = False,
    ) -> bool:
        """Mirrors `ggml_gallocr_reserve_n_impl`; False if a buffer cannot be allocated."""
        for talloc in self.tallocs:
            talloc.reset()
        self.play(nodes, leafs, node_ids, leaf_ids)
        self.node_allocs = [(self.tensor_alloc(node), [self.tensor_alloc(src) for src in node.src]) for node in nodes]
        self.leaf_allocs = [self.tensor_alloc(leaf) for leaf in leafs]
        for i, talloc in enumerate(self.tallocs):
            for j in range(i):
                if self.tallocs[j] is talloc:
                    self.chunk_sizes[i] = self.chunk_sizes[j]
                    break
            have = self.chunk_sizes[i]
            too_small = have is None
            for c, needed in enumerate(talloc.max_size):
                if needed > (have[c] if have is not None and c < len(have) else 0):
                    too_small = True
            if too_small:
                self.chunk_sizes[i] = None
                if not no_alloc:
                    limit = self.bufts[i].get("alloc_limit") or SIZE_MAX
                    if any(needed > limit for needed in talloc.max_size):
                        return False
                    self.chunk_sizes[i] = list(talloc.max_size)
        return True

    def needs_realloc(self, nodes: Sequence[PlainTensor], leafs: Sequence[PlainTensor]) -> bool:
        """Mirrors `ggml_gallocr_needs_realloc`."""
        if len(self.node_allocs) != len(nodes) or len(self.leaf_allocs) != len(leafs):
            return True
        for node, (dst, srcs) in zip(nodes, self.node_allocs, strict=True):
            if not self.fits(node, dst):
                return True
            for j, src in enumerate(node.src):
                if src is not None and not self.fits(src, srcs[j] if j < len(srcs) else NOWHERE):
                    return True
        return False

    def fits(self, tensor: PlainTensor, at: TensorAlloc) -> bool:
        """Mirrors `ggml_gallocr_node_needs_realloc`, which says the opposite of its name."""
        size = 0
        if tensor.data is None and tensor.view_src is None:
            if at[0] < 0:
                return False
            size = self.alloc_size(at[0], tensor)
        return at[3] >= size

    def init_tensor(self, tensor: PlainTensor, at: TensorAlloc) -> None:
        """Mirrors `ggml_gallocr_init_tensor`."""
        root = tensor.view_src
        if root is not None:
            if tensor.buffer is None and root.buffer is not None:
                assert root.data is not None
                tensor.buffer, tensor.buft, tensor.usage = root.buffer, root.buft, root.usage
                tensor.data = (root.data[0], root.data[1], root.data[2] + tensor.view_offs)
        elif tensor.data is None:
            buffer_id, chunk, offset, _ = at
            if self.chunk_sizes[buffer_id] is None:
                raise PortAbort(f"{tensor.name} in a null buffer")
            name = self.bufts[buffer_id]["name"]
            tensor.buffer, tensor.buft, tensor.usage = f"@{name}", name, "compute"
            first = next(i for i, talloc in enumerate(self.tallocs) if talloc is self.tallocs[buffer_id])
            tensor.data = (first, chunk, offset)

    def alloc_graph(self, nodes: Sequence[PlainTensor], leafs: Sequence[PlainTensor]) -> bool:
        """Mirrors `ggml_gallocr_alloc_graph`."""
        if self.needs_realloc(nodes, leafs):
            if len(self.bufts) > 1:
                return False
            if not self.reserve_n(nodes, leafs, [0] * len(nodes), [0] * len(leafs)):
                return False
        for leaf, at in zip(leafs, self.leaf_allocs, strict=True):
            self.init_tensor(leaf, at)
        for node, (dst, srcs) in zip(nodes, self.node_allocs, strict=True):
            for j, src in enumerate(node.src):
                if src is not None:
                    self.init_tensor(src, srcs[j] if j < len(srcs) else NOWHERE)
            self.init_tensor(node, dst)
        return True

    def buffer_size(self, i: int) -> int:
        """Mirrors `ggml_gallocr_get_buffer_size`."""
        if any(self.tallocs[j] is self.tallocs[i] for j in range(i)):
            return 0
        return sum(self.chunk_sizes[i] or ())


def is_view_op(op: str) -> bool:
    """Mirrors `ggml_is_view_op`."""
    return Op[op].is_view
