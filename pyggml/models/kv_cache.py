"""`KVCache`: the K and V of tokens seen, in cells, and which cell holds which token of which sequence.

Data lies in one tensor of K and one of V for each layer; here is only the book of cells. A decode asks first where its
tokens fit (`prepare`), then takes the cells of each micro-batch (`apply`) before its graph is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import ops
from ..errors import AllocError
from ..tensor import Tensor
from ..types import Type
from .batch import Batch, MicroBatch, split_equal, split_simple
from .context import ContextParams
from .hparams import HParams

__all__ = ["CacheFullError", "CacheView", "KVCache", "Slot", "hadamard"]

#: Cells are offered to graphs in steps of so many, so that a graph can be used again (`llama_kv_cache::get_n_kv`).
_N_KV_STEP = 256


class CacheFullError(AllocError):
    """The KV cache has no room for a batch.

    Attributes
    ----------
    n_tokens, n_used, n_cells : int
        Of the batch; cells in use and in all, of the stream in question.
    """

    def __init__(self, n_tokens: int, n_used: int, n_cells: int) -> None:
        super().__init__(
            f"{n_tokens} tokens do not fit into the KV cache: {n_used} of {n_cells} cells are in use",
            hint="make the context larger (-c), or remove old tokens first",
        )
        self.n_tokens, self.n_used, self.n_cells = n_tokens, n_used, n_cells


@dataclass(frozen=True, slots=True)
class Slot:
    """The cells for a micro-batch: for each of its streams, ascending, one cell a token.

    Notes
    -----
    Mirrors `llama_kv_cache::slot_info`.
    """

    streams: tuple[int, ...]
    cells: npt.NDArray[np.int64]  #: (n_stream, n_token // n_stream)
    swa: Slot | None = None  #: in the cache of layers with a sliding window, where there is one


class _Cells:
    """The book of one stream.

    Notes
    -----
    Mirrors `llama_kv_cells`.
    """

    __slots__ = ("head", "pos", "seqs")

    def __init__(self, n: int) -> None:
        self.pos = np.full(n, -1, np.int32)  #: -1: empty
        self.seqs = np.zeros(n, np.uint64)  #: bit s: the cell belongs to sequence s
        self.head = 0  #: where the search for cells starts

    @property
    def n_used(self) -> int:
        return int(np.count_nonzero(self.pos >= 0))

    @property
    def used_end(self) -> int:
        """One past the last cell in use."""
        used = np.flatnonzero(self.pos >= 0)
        return int(used[-1]) + 1 if len(used) else 0

    def reusable(self, window: int) -> npt.NDArray[np.bool_]:
        """Return which cells may be written: empty ones, and those that the next token of their sequence cannot see.

        A cell that several sequences share is kept.
        """
        usable = self.pos < 0
        if window:
            seqs = np.unique(self.seqs[~usable])
            for seq in (int(s).bit_length() - 1 for s in seqs if int(s).bit_count() == 1):
                last = int(self.pos[(self.seqs & _bit(seq)) != 0].max())
                usable |= (self.seqs == _bit(seq)) & (last + 1 - self.pos >= window)
        return usable

    def overwritten(self, chosen: npt.NDArray[np.int64]) -> dict[int, int]:
        """Return the last position that each sequence has in some cells, of one sequence each."""
        lost: dict[int, int] = {}
        for i in chosen[self.pos[chosen] >= 0]:
            seq = int(self.seqs[i]).bit_length() - 1
            lost[seq] = max(lost.get(seq, -1), int(self.pos[i]))
        return lost

    def copy(self) -> _Cells:
        other = _Cells(0)
        other.pos, other.seqs, other.head = self.pos.copy(), self.seqs.copy(), self.head
        return other


def _bit(seq: int) -> np.uint64:
    return np.uint64(1 << seq)


class KVCache:
    """The K and V of all tokens in the context.

    Parameters
    ----------
    hparams, params
        Of the model and its context.
    v_trans : bool
        V is stored transposed, as attention without FLASH_ATTN_EXT reads it.
    layers : iterable of int, optional
        Whose K and V it holds; all by default.
    n_cells : int, optional
        Cells of one stream; as many as the context has by default.
    window : int
        Positions that a token sees, itself included; 0: all before it.

    Attributes
    ----------
    k, v : dict of int to Tensor
        By layer: K of ne [n_embd_k_gqa, n_cells, n_stream]; V likewise, whose elements lie transposed if ``v_trans``;
        no V where it is a part of K (MLA).
    swa : KVCache or None
        The cache of layers with a sliding window; see `SlidingKVCache`.
    n_rot_k, n_rot_v : int
        Size of the rotation that spreads outliers before quantisation; 0 without.

    Notes
    -----
    Mirrors `llama_kv_cache` with one kind of layer.
    """

    swa: KVCache | None = None

    def __init__(
        self,
        hparams: HParams,
        params: ContextParams,
        *,
        v_trans: bool,
        layers: Iterable[int] | None = None,
        n_cells: int | None = None,
        window: int = 0,
    ) -> None:
        self.hparams = hparams
        self.v_trans = v_trans
        self.window = window
        self.n_stream = params.n_stream
        self.n_cells = params.n_ctx_seq if n_cells is None else n_cells
        self.n_seq_max = params.n_seq_max
        shape = (self.n_cells, self.n_stream)
        own = range(hparams.n_layer) if layers is None else sorted(layers)
        self.k = {i: Tensor(params.type_k, (hparams.n_embd_k_gqa, *shape), name=f"cache_k_l{i}") for i in own}
        with_v = () if hparams.is_mla else own
        self.v = {i: Tensor(params.type_v, (hparams.n_embd_v_gqa, *shape), name=f"cache_v_l{i}") for i in with_v}
        self.n_rot_k = _rotation(params.type_k, hparams.n_embd_head_k, grow=True)
        self.n_rot_v = _rotation(params.type_v, hparams.n_embd_head_v, grow=False)
        self.streams = [_Cells(self.n_cells) for _ in range(self.n_stream)]

    def tensors(self) -> list[tuple[int, Tensor]]:
        """Return the tensors with their layers, in the order in which they are allocated."""
        pairs = ((i, own.get(i)) for i in self.k for own in (self.k, self.v))
        return [(i, tensor) for i, tensor in pairs if tensor is not None]

    # -- sequences -----------------------------------------------------------

    def _stream_of(self, seq: int) -> int:
        return seq if self.n_stream > 1 else 0

    def clear(self) -> None:
        """Forget all tokens; the data stays and is never read."""
        self.streams = [_Cells(self.n_cells) for _ in range(self.n_stream)]

    def seq_rm(self, seq: int, p0: int = 0, p1: int | None = None) -> None:
        """Forget a sequence's tokens at positions ``p0 .. p1 - 1``; to the end without ``p1``.

        Notes
        -----
        Mirrors `llama_kv_cache::seq_rm`.
        """
        cells = self.streams[self._stream_of(seq)]
        chosen = (cells.pos >= max(p0, 0)) & ((cells.seqs & _bit(seq)) != 0)
        if p1 is not None:
            chosen &= cells.pos < p1
        cells.seqs[chosen] &= ~_bit(seq)
        freed = np.flatnonzero(chosen & (cells.seqs == 0))
        if len(freed):
            cells.pos[freed] = -1
            cells.head = min(cells.head, int(freed[0]))

    def seq_cp(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> None:
        """Let a sequence share another's tokens at positions ``p0 .. p1 - 1``.

        Raises
        ------
        AllocError
            They lie in different streams.

        Notes
        -----
        Mirrors `llama_kv_cache::seq_cp` within one stream.
        """
        if self._stream_of(src) != self._stream_of(dst):
            raise AllocError(
                "sequences of different streams cannot share cells", hint="make the context with kv_unified"
            )
        cells = self.streams[self._stream_of(src)]
        chosen = (cells.pos >= max(p0, 0)) & ((cells.seqs & _bit(src)) != 0)
        if p1 is not None:
            chosen &= cells.pos < p1
        cells.seqs[chosen] |= _bit(dst)

    def seq_pos_max(self, seq: int) -> int:
        """Last position of a sequence; -1 if it has none."""
        cells = self.streams[self._stream_of(seq)]
        own = cells.pos[(cells.seqs & _bit(seq)) != 0]
        return int(own.max()) if len(own) else -1

    def seq_pos_min(self, seq: int) -> int:
        """First position of a sequence; -1 if it has none."""
        cells = self.streams[self._stream_of(seq)]
        own = cells.pos[(cells.seqs & _bit(seq)) != 0]
        return int(own.min()) if len(own) else -1

    def reaches_back_to(self, seq: int) -> int:
        """Return the first position from which a sequence can go on: 0, as nothing it would see has been given up."""
        return 0

    def n_free(self, seq: int) -> int:
        """Free cells that a sequence could take."""
        return self.n_cells - self.streams[self._stream_of(seq)].n_used

    @property
    def n_used(self) -> int:
        """Cells in use, of all streams."""
        return sum(cells.n_used for cells in self.streams)

    # -- places for a batch --------------------------------------------------

    def prepare(self, batch: Batch, n_ubatch: int) -> list[tuple[MicroBatch, Slot]]:
        """Cut a batch and find cells for all of it; nothing is taken yet.

        Raises
        ------
        CacheFullError
            There are not so many free cells.

        Notes
        -----
        Mirrors `llama_kv_cache::init_batch`.
        """
        parts = split_simple(batch, n_ubatch) if self.n_stream == 1 else split_equal(batch, n_ubatch)
        return list(zip(parts, self.find_slots(parts), strict=True))

    def find_slots(self, parts: list[MicroBatch]) -> list[Slot]:
        """Return cells for all of some micro-batches; nothing is taken yet.

        Raises
        ------
        CacheFullError
            There are not so many free cells.

        Notes
        -----
        Mirrors `llama_kv_cache::prepare`.
        """
        kept = self.streams
        if len(parts) > 1:
            self.streams = [cells.copy() for cells in kept]
        out: list[Slot] = []
        try:
            for part in parts:
                slot = self._find_slot(part)
                out.append(slot)
                if len(parts) > 1:
                    self.apply(part, slot)
        finally:
            self.streams = kept
        return out

    def _find_slot(self, part: MicroBatch) -> Slot:
        """Mirrors `llama_kv_cache::find_slot`: any usable cells do, from the head on."""
        if self.n_stream == 1:
            streams: tuple[int, ...] = (0,)
            n_each = part.n_tokens
        else:
            streams = tuple(self._stream_of(s) for s in part.seqs_unq)
            n_each = part.n_seq_tokens
        found = np.empty((len(streams), n_each), np.int64)
        for row, stream in enumerate(streams):
            cells = self.streams[stream]
            ahead = cells.pos[cells.head : cells.head + n_each]
            if len(ahead) == n_each and bool((ahead < 0).all()) and cells.head <= cells.n_used + 2 * n_each:
                found[row] = np.arange(cells.head, cells.head + n_each)  # the common case: right after the last token
                continue
            free = np.flatnonzero(cells.reusable(self.window))
            if len(free) < n_each:
                raise CacheFullError(n_each, self.n_cells - len(free), self.n_cells)
            head = cells.head
            if head > cells.n_used + 2 * n_each:
                head = 0  # enough room was freed before the head
            first = int(np.searchsorted(free, head))
            found[row] = free[first : first + n_each] if first + n_each <= len(free) else np.roll(free, -first)[:n_each]
        return Slot(streams, found)

    def apply(self, part: MicroBatch, slot: Slot) -> None:
        """Take the cells of a micro-batch.

        A sequence of which a position is overwritten loses all up to that: what is left has no holes.

        Notes
        -----
        Mirrors `llama_kv_cache::apply_ubatch`.
        """
        n_each = slot.cells.shape[1]
        for row, stream in enumerate(slot.streams):
            cells, own = self.streams[stream], slice(row * n_each, (row + 1) * n_each)
            lost = cells.overwritten(slot.cells[row]) if self.window else {}
            cells.pos[slot.cells[row]] = part.pos[own]
            cells.seqs[slot.cells[row]] = np.uint64(1) << part.seqs[own].astype(np.uint64)
            for seq, last in lost.items():
                self.seq_rm(seq, 0, last + 1)
            cells.head = int(slot.cells[row, -1]) + 1

    # -- what graphs see -----------------------------------------------------

    def view(self, slot: Slot) -> CacheView:
        """Return the part of the cache that a micro-batch's graph reads, after `apply`.

        Notes
        -----
        Mirrors `llama_kv_cache::get_n_kv`.
        """
        used = max(self.streams[s].used_end for s in slot.streams)
        n_kv = min(self.n_cells, max(_N_KV_STEP, -(-used // _N_KV_STEP) * _N_KV_STEP))
        return CacheView(self, n_kv, min(slot.streams), max(slot.streams) - min(slot.streams) + 1)

    def full_view(self) -> CacheView:
        """Return the view of the whole cache, with which memory is reserved.

        Notes
        -----
        Mirrors `llama_kv_cache::init_full`.
        """
        return CacheView(self, self.n_cells, 0, self.n_stream)

    # -- inputs --------------------------------------------------------------

    def k_idxs(self, slot: Slot) -> npt.NDArray[np.int64]:
        """Return the row of the cache that each token's K goes to: int64, (n_token,)."""
        offsets = np.asarray(slot.streams, np.int64)[:, None] * self.n_cells
        return (offsets + slot.cells).reshape(-1)

    def v_idxs(self, slot: Slot) -> npt.NDArray[np.int64]:
        """Return where V goes: int64, (n_token,), or (n_token * n_embd_v_gqa,) where each element is a row."""
        if not self.v_trans:
            return self.k_idxs(slot)
        n_embd = self.hparams.n_embd_v_gqa
        offsets = np.asarray(slot.streams, np.int64)[:, None, None] * (self.n_cells * n_embd)
        rows = np.arange(n_embd, dtype=np.int64) * self.n_cells
        return (offsets + slot.cells[:, :, None] + rows).reshape(-1)

    def mask(self, part: MicroBatch, n_kv: int) -> npt.NDArray[np.bool_]:
        """Return which cells each token must not see: bool, (n_token, n_kv).

        Notes
        -----
        Mirrors `llama_kv_cache::set_input_kq_mask`, causal: a token sees its own sequence up to its own position, as far
        back as the window reaches.
        """
        if self.n_stream == 1 and len(part.seqs_unq) == 1:
            cells = self.streams[0]
            unseen = self._hidden(cells.pos[None, :n_kv], part.pos[:, None])
            unseen |= ((cells.seqs[:n_kv] & _bit(part.seqs_unq[0])) == 0)[None, :]
            return unseen
        unseen = np.ones((part.n_tokens, n_kv), np.bool_)
        for seq in part.seqs_unq:
            cells = self.streams[self._stream_of(seq)]
            rows = np.flatnonzero(part.seqs == seq)
            own = (cells.seqs[:n_kv] & _bit(seq)) != 0
            unseen[rows] = ~own[None, :] | self._hidden(cells.pos[None, :n_kv], part.pos[rows, None])
        return unseen

    def _hidden(self, cells: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Mirrors `llama_hparams::is_masked_swa` and the causal mask."""
        later: npt.NDArray[np.bool_] = cells > tokens
        return later | (tokens - cells >= self.window) if self.window else later


@dataclass(frozen=True, slots=True)
class CacheView:
    """The cells that one graph reads: the first ``n_kv`` of ``n_stream`` streams from stream ``s0`` on.

    Notes
    -----
    Mirrors what `llama_kv_cache_context` hands to graph builders.
    """

    cache: KVCache
    n_kv: int
    s0: int
    n_stream: int
    swa: CacheView | None = None  #: of the cache of layers with a sliding window, where there is one

    def of_layer(self, layer: int) -> CacheView:
        """Return the view that a layer reads."""
        return self.swa if self.swa is not None and layer in self.swa.cache.k else self

    def get_k(self, layer: int) -> Tensor:
        """Return a view of K: ne [n_embd_head, n_head_kv, n_kv, n_stream]."""
        k, hp = self.cache.k[layer], self.cache.hparams
        row = k.type.row_size
        stream = row(k.ne[0] * self.cache.n_cells)
        return ops.view_4d(
            k, hp.n_embd_head_k, hp.n_head_kv, self.n_kv, self.n_stream,
            row(hp.n_embd_head_k), row(k.ne[0]), stream, stream * self.s0,
        )  # fmt: skip

    def get_v(self, layer: int) -> Tensor:
        """Return a view of V: as K, or ne [n_kv, n_head_kv, n_embd_head, n_stream] if it lies transposed."""
        v, hp = self.cache.v[layer], self.cache.hparams
        row, n_cells = v.type.row_size, self.cache.n_cells
        stream = row(v.ne[0] * n_cells)
        if not self.cache.v_trans:
            return ops.view_4d(
                v, hp.n_embd_head_v, hp.n_head_kv, self.n_kv, self.n_stream,
                row(hp.n_embd_head_v), row(v.ne[0]), stream, stream * self.s0,
            )  # fmt: skip
        return ops.view_4d(
            v, self.n_kv, hp.n_head_kv, hp.n_embd_head_v, self.n_stream,
            row(n_cells * hp.n_embd_head_v), row(n_cells), stream, stream * self.s0,
        )  # fmt: skip

    def cpy_k(self, k_cur: Tensor, k_idxs: Tensor, layer: int) -> Tensor:
        """Return the node that stores K of new tokens."""
        return ops.set_rows(self._merged(self.cache.k[layer]), _rows_of(k_cur), k_idxs)

    def cpy_v(self, v_cur: Tensor, v_idxs: Tensor, layer: int) -> Tensor:
        """Return the node that stores V of new tokens: rows, or each element as a row where V lies transposed."""
        v = self.cache.v[layer]
        if not self.cache.v_trans:
            return ops.set_rows(self._merged(v), _rows_of(v_cur), v_idxs)
        n_embd, n_tokens = v_cur.ne[0] * v_cur.ne[1], v_cur.ne[2]
        if v_cur.type.row_size(n_embd) == v_cur.nb[2]:
            v_cur = ops.reshape_2d(v_cur, n_embd, n_tokens)
        else:
            v_cur = ops.cont_2d(v_cur, n_embd, n_tokens)
        v_view = ops.reshape_2d(v, 1, v.numel)
        return ops.set_rows(v_view, ops.reshape_2d(v_cur, 1, v_cur.numel), v_idxs)

    def _merged(self, t: Tensor) -> Tensor:
        """Return the rows of all streams as one matrix: indices count through them."""
        return ops.reshape_2d(t, t.ne[0], t.ne[1] * t.ne[2]) if t.ne[2] > 1 else t


def _rows_of(cur: Tensor) -> Tensor:
    """Return a view of [n_embd_head, n_head, n_token] with the heads of a token in one row."""
    return ops.view_2d(cur, cur.ne[0] * cur.ne[1], cur.ne[2], cur.nb[2], 0)


def _rotation(type: Type, n_embd_head: int, *, grow: bool) -> int:
    """Mirrors the constructor of `llama_kv_cache`: quantised caches of whole 64s are rotated."""
    if not type.is_quantized or n_embd_head % 64:
        return 0
    n = 64
    while grow and n_embd_head % (2 * n) == 0:
        n *= 2
    return n


def hadamard(n: int) -> npt.NDArray[np.float32]:
    """Return the orthonormal Walsh-Hadamard matrix of size n, a power of 2.

    Notes
    -----
    Mirrors `ggml_gen_hadamard`.
    """
    h = np.full((1, 1), 1.0 / np.sqrt(np.float32(n)), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h
