"""`KVCache`: K and V of earlier tokens, in cells, and which cell holds which token of which sequence.

Each layer has one tensor of K and one of V. A decode first finds cells for all its tokens (`prepare`), then takes the
cells of each micro-batch (`apply`) before building its graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import AllocError
from ..tensor import Tensor
from ..types import Type
from .batch import Batch, MicroBatch, split_equal, split_simple
from .cache_view import CacheView
from .context import ContextParams
from .hparams import HParams
from .kv_cells import Cells, sequence_bit

if TYPE_CHECKING:
    from .recurrent import RecurrentStates

__all__ = ["CacheFullError", "KVCache", "Slot", "hadamard"]

#: Graphs read a multiple of this many cells, so that a graph can be used again (`llama_kv_cache::get_n_kv`).
_N_KV_STEP = 256


class CacheFullError(AllocError):
    """The KV cache has no room for a batch.

    Attributes
    ----------
    n_tokens, n_used, n_cells : int
        Tokens of the batch; used cells and all cells of its stream.
    """

    def __init__(self, n_tokens: int, n_used: int, n_cells: int) -> None:
        super().__init__(
            f"{n_tokens} tokens do not fit into the KV cache: {n_used} of {n_cells} cells are in use",
            hint="make the context larger (-c), or remove old tokens first",
        )
        self.n_tokens, self.n_used, self.n_cells = n_tokens, n_used, n_cells


@dataclass(frozen=True, slots=True)
class Slot:
    """The cells for a micro-batch: for each of its streams, ascending, one cell per token.

    Notes
    -----
    Mirrors `llama_kv_cache::slot_info`.
    """

    streams: tuple[int, ...]
    cells: npt.NDArray[np.int64]  #: (n_stream, n_token // n_stream)
    swa: Slot | None = None  #: in the cache of layers with a sliding window, if any


class KVCache:
    """The K and V of all tokens in the context.

    Parameters
    ----------
    hparams, params
        Of the model and of the context.
    v_trans : bool
        Store V transposed, as attention without FLASH_ATTN_EXT reads it.
    layers : iterable of int, optional
        The layers whose K and V it holds; by default all.
    n_cells : int, optional
        Cells of one stream; by default those of the context.
    window : int
        Positions that a token sees, including its own; 0: all earlier ones.

    Attributes
    ----------
    k, v : dict of int to Tensor
        By layer: ne [n_embd_k_gqa, n_cells, n_stream] and [n_embd_v_gqa, n_cells, n_stream], with V's elements
        transposed if ``v_trans``. With MLA there is no V: it is a part of K.
    swa : KVCache or None
        The cache of layers with a sliding window; see `SlidingKVCache`.
    states : RecurrentStates or None
        The states of recurrent layers; see `HybridCache`.
    n_rot_k, n_rot_v : int
        Size of the Hadamard rotation before quantisation, which spreads outliers; 0: none.

    Notes
    -----
    Mirrors `llama_kv_cache`.
    """

    swa: KVCache | None = None
    states: RecurrentStates | None = None

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
        own = [i for i in (range(hparams.n_layer) if layers is None else sorted(layers)) if hparams.kv_layer(i) == i]
        sizes = {i: hparams.of_layer(i) for i in own}
        self.k = {i: Tensor(params.type_k, (hp.n_embd_k_gqa, *shape), name=f"cache_k_l{i}") for i, hp in sizes.items()}
        with_v = () if hparams.is_mla else own
        n_embd_v = {i: hparams.n_embd_v_gqa_max if v_trans else sizes[i].n_embd_v_gqa for i in with_v}
        self.v = {i: Tensor(params.type_v, (n, *shape), name=f"cache_v_l{i}") for i, n in n_embd_v.items()}
        first, head = hparams.of_layer(0), sizes[own[0]] if own else hparams
        self.n_rot_k = 0 if first.n_embd_head_k % 64 else _rotation(params.type_k, head.n_embd_head_k, grow=True)
        self.n_rot_v = 0 if first.n_embd_head_v % 64 else _rotation(params.type_v, head.n_embd_head_v, grow=False)
        self.streams = [Cells(self.n_cells) for _ in range(self.n_stream)]

    def tensors(self) -> list[tuple[int, Tensor]]:
        """Return the tensors with their layers, in the order in which they are allocated."""
        pairs = ((i, own.get(i)) for i in self.k for own in (self.k, self.v))
        return [(i, tensor) for i, tensor in pairs if tensor is not None]

    def is_like(self, other: KVCache) -> bool:
        """Return whether a cache of the same model has tensors of the same types and sizes, for as many sequences."""
        own, others = ([(i, t.type, t.ne) for i, t in cache.tensors()] for cache in (self, other))
        return (
            type(self) is type(other)
            and (self.v_trans, self.n_stream, self.n_seq_max) == (other.v_trans, other.n_stream, other.n_seq_max)
            and own == others
        )

    # -- sequences -----------------------------------------------------------

    def _stream_of(self, seq: int) -> int:
        return seq if self.n_stream > 1 else 0

    def clear(self) -> None:
        """Forget all tokens; their data is not erased, but masked."""
        self.streams = [Cells(self.n_cells) for _ in range(self.n_stream)]

    def seq_rm(self, seq: int, p0: int = 0, p1: int | None = None) -> None:
        """Forget a sequence's tokens at positions ``p0 .. p1 - 1``; to the end without ``p1``.

        Notes
        -----
        Mirrors `llama_kv_cache::seq_rm`.
        """
        cells = self.streams[self._stream_of(seq)]
        chosen = (cells.pos >= max(p0, 0)) & cells.of(seq)
        if p1 is not None:
            chosen &= cells.pos < p1
        cells.remove(chosen, seq)

    def forget(self, part: MicroBatch) -> None:
        """Forget the tokens of a failed micro-batch, and later tokens of its sequences."""
        for seq in part.seqs_unq:
            self.seq_rm(seq, int(part.pos[part.seqs == seq].min()))

    def seq_cp(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> None:
        """Let a sequence share another's tokens at positions ``p0 .. p1 - 1``.

        Raises
        ------
        AllocError
            The sequences are in different streams.

        Notes
        -----
        Mirrors `llama_kv_cache::seq_cp` within one stream.
        """
        if self._stream_of(src) != self._stream_of(dst):
            raise AllocError(
                "sequences of different streams cannot share cells", hint="make the context with kv_unified"
            )
        cells = self.streams[self._stream_of(src)]
        chosen = (cells.pos >= max(p0, 0)) & cells.of(src)
        if p1 is not None:
            chosen &= cells.pos < p1
        cells.share(chosen, dst)

    def seq_pos_max(self, seq: int) -> int:
        """Last position of a sequence; -1 if it has none."""
        return self.streams[self._stream_of(seq)].last(seq)

    def seq_pos_min(self, seq: int) -> int:
        """First position of a sequence; -1 if it has none."""
        return self.streams[self._stream_of(seq)].first(seq)

    def reaches_back_to(self, seq: int) -> int:
        """Return the first position from which a sequence can continue: 0, because all its tokens are kept."""
        return 0

    def n_free(self, seq: int) -> int:
        """Return the number of free cells that a sequence could take."""
        return self.n_cells - self.streams[self._stream_of(seq)].n_used

    @property
    def n_used(self) -> int:
        """Number of used cells in all streams."""
        return sum(cells.n_used for cells in self.streams)

    # -- cells for a batch ---------------------------------------------------

    def prepare(self, batch: Batch, n_ubatch: int) -> list[tuple[MicroBatch, Slot]]:
        """Cut a batch into micro-batches and find cells for all of them; none is taken yet.

        Raises
        ------
        CacheFullError
           There are not enough free cells.

        Notes
        -----
        Mirrors `llama_kv_cache::init_batch`.
        """
        parts = split_simple(batch, n_ubatch) if self.n_stream == 1 else split_equal(batch, n_ubatch)
        return list(zip(parts, self.find_slots(parts), strict=True))

    def find_slots(self, parts: list[MicroBatch]) -> list[Slot]:
        """Return cells for all given micro-batches; none is taken yet.

        Raises
        ------
        CacheFullError
           There are not enough free cells.

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
        """Return usable cells, not necessarily adjacent, from the head on. Mirrors `llama_kv_cache::find_slot`."""
        if self.n_stream == 1:
            streams: tuple[int, ...] = (0,)
            n_each = part.n_tokens
        else:
            streams = tuple(self._stream_of(s) for s in part.seqs_unq)
            n_each = part.n_seq_tokens
        found = np.empty((len(streams), n_each), np.int64)
        for row, stream in enumerate(streams):
            cells = self.streams[stream]
            start, end = cells.head, cells.used_end
            cells.grow(max(start, end) + n_each)
            if (
                start + n_each <= cells.n
                and start <= cells.n_used + 2 * n_each
                and (start >= end or bool((cells.pos[start : start + n_each] < 0).all()))
            ):
                found[row] = np.arange(start, start + n_each)  # the common case: right after the last token
                continue
            free = np.flatnonzero(cells.reusable(self.window))
            if len(free) < n_each:
                raise CacheFullError(n_each, self.n_cells - len(free), self.n_cells)
            head = cells.head
            if head > cells.n_used + 2 * n_each:
                head = 0  # enough cells before the head are free
            first = int(np.searchsorted(free, head))
            found[row] = free[first : first + n_each] if first + n_each <= len(free) else np.roll(free, -first)[:n_each]
        return Slot(streams, found)

    def next_cell(self) -> int | None:
        """Return the cell that the next token takes if that is the one after all used cells; None: `prepare` decides."""
        cells = self.streams[0]
        head = cells.head
        is_next = len(self.streams) == 1 and cells.used_end <= head < cells.n and head <= cells.n_used + 2
        return head if is_next else None

    def apply(self, part: MicroBatch, slot: Slot) -> None:
        """Take the cells of a micro-batch.

        If a position of a sequence is overwritten, the sequence loses all positions up to it, so that no gap is left.

        Notes
        -----
        Mirrors `llama_kv_cache::apply_ubatch`.
        """
        n_each = slot.cells.shape[1]
        for row, stream in enumerate(slot.streams):
            cells, own = self.streams[stream], slice(row * n_each, (row + 1) * n_each)
            chosen = slot.cells[row]
            lost = cells.overwritten(chosen) if self.window else {}
            cells.take(chosen, part.pos[own], part.seqs[own])
            for seq, last in lost.items():
                self.seq_rm(seq, 0, last + 1)
            cells.head = int(chosen[-1]) + 1

    # -- what graphs see -----------------------------------------------------

    def view(self, slot: Slot) -> CacheView:
        """Return the part of the cache that a micro-batch's graph reads; call it after `apply`.

        Notes
        -----
        Mirrors `llama_kv_cache::get_n_kv`.
        """
        used = max(self.streams[s].used_end for s in slot.streams)
        n_kv = min(self.n_cells, max(_N_KV_STEP, -(-used // _N_KV_STEP) * _N_KV_STEP))
        return CacheView(self, n_kv, min(slot.streams), max(slot.streams) - min(slot.streams) + 1)

    def full_view(self) -> CacheView:
        """Return a view of the whole cache, for reserving memory.

        Notes
        -----
        Mirrors `llama_kv_cache::init_full`.
        """
        return CacheView(self, self.n_cells, 0, self.n_stream)

    # -- inputs --------------------------------------------------------------

    def k_idxs(self, slot: Slot) -> npt.NDArray[np.int64]:
        """Return the row of the cache that each token's K goes to: int64, (n_token,)."""
        if slot.streams == (0,):
            own: npt.NDArray[np.int64] = slot.cells[0]
            return own
        offsets = np.asarray(slot.streams, np.int64)[:, None] * self.n_cells
        return (offsets + slot.cells).reshape(-1)

    def v_idxs(self, slot: Slot) -> npt.NDArray[np.int64]:
        """Return the rows that V goes to: int64, (n_token,), or (n_token * n_embd_v_gqa,) if each element is a row."""
        if not self.v_trans:
            return self.k_idxs(slot)
        n_embd = self.hparams.n_embd_v_gqa_max
        offsets = np.asarray(slot.streams, np.int64)[:, None, None] * (self.n_cells * n_embd)
        rows = np.arange(n_embd, dtype=np.int64) * self.n_cells
        return (offsets + slot.cells[:, :, None] + rows).reshape(-1)

    def mask(self, part: MicroBatch, n_kv: int) -> npt.NDArray[np.bool_]:
        """Return which cells each token must not see: bool, (n_token, n_kv).

        Notes
        -----
        Mirrors `llama_kv_cache::set_input_kq_mask`, causal: a token sees the earlier tokens of its own sequence that
        are within the window, and itself.
        """
        if self.n_stream == 1 and len(part.seqs_unq) == 1:
            cells = self.streams[0]
            cells.grow(n_kv)
            unseen = self._hidden(cells.pos[None, :n_kv], part.pos[:, None])
            unseen |= ((cells.seqs[:n_kv] & sequence_bit(part.seqs_unq[0])) == 0)[None, :]
            return unseen
        unseen = np.ones((part.n_tokens, n_kv), np.bool_)
        for seq in part.seqs_unq:
            cells = self.streams[self._stream_of(seq)]
            cells.grow(n_kv)
            rows = np.flatnonzero(part.seqs == seq)
            own = (cells.seqs[:n_kv] & sequence_bit(seq)) != 0
            unseen[rows] = ~own[None, :] | self._hidden(cells.pos[None, :n_kv], part.pos[rows, None])
        return unseen

    def _hidden(self, cells: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Mirrors `llama_hparams::is_masked_swa` and the causal mask."""
        later: npt.NDArray[np.bool_] = cells > tokens
        return later | (tokens - cells >= self.window) if self.window else later


def _rotation(type: Type, n_embd_head: int, *, grow: bool) -> int:
    """Return the size of the rotation; 0 for caches that are not quantised. Mirrors `llama_kv_cache`'s constructor."""
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
