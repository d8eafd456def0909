"""`SlidingKVCache`: two KV caches, for models with sliding windows in some layers."""

from __future__ import annotations

from dataclasses import replace

from ..tensor import Tensor
from .batch import Batch, MicroBatch, split_equal, split_simple
from .cache_view import CacheView
from .context import ContextParams
from .hparams import HParams
from .kv_cache import KVCache, Slot

__all__ = ["SlidingKVCache"]

#: The cells of layers with a window are a multiple of this.
_STEP = 256


class SlidingKVCache(KVCache):
    """The cache of layers without a window; `swa` is the smaller cache of the layers with a sliding window.

    A cell of `swa` is reused once later tokens cannot see it. A sequence can therefore only go back to
    `reaches_back_to`.

    Notes
    -----
    Mirrors `llama_kv_cache_iswa`.
    """

    swa: KVCache

    def __init__(self, hparams: HParams, params: ContextParams, *, v_trans: bool) -> None:
        wide = (i for i in range(hparams.n_layer) if i not in hparams.swa_layers)
        super().__init__(hparams, params, v_trans=v_trans, layers=wide)
        n_cells = hparams.n_swa * (params.n_seq_max if params.kv_unified else 1) + params.n_ubatch
        n_cells = -(-min(self.n_cells, n_cells) // _STEP) * _STEP
        self.swa = KVCache(
            hparams,
            params,
            v_trans=v_trans,
            layers=hparams.swa_layers,
            n_cells=self.n_cells if params.swa_full else n_cells,
            window=hparams.n_swa,
        )
        self._is_unified = params.kv_unified

    def tensors(self) -> list[tuple[int, Tensor]]:
        """Return the tensors of both caches, with their layers."""
        return super().tensors() + self.swa.tensors()

    def is_like(self, other: KVCache) -> bool:
        """Return whether a cache of the same model has tensors of the same types and sizes, for as many sequences."""
        return isinstance(other, SlidingKVCache) and self._is_unified == other._is_unified and super().is_like(other)

    def clear(self) -> None:
        """Forget all tokens."""
        super().clear()
        self.swa.clear()

    def seq_rm(self, seq: int, p0: int = 0, p1: int | None = None) -> None:
        """Forget a sequence's tokens at positions ``p0 .. p1 - 1``; to the end without ``p1``."""
        super().seq_rm(seq, p0, p1)
        self.swa.seq_rm(seq, p0, p1)

    def seq_cp(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> None:
        """Let a sequence share another's tokens at positions ``p0 .. p1 - 1``."""
        super().seq_cp(src, dst, p0, p1)
        self.swa.seq_cp(src, dst, p0, p1)

    def reaches_back_to(self, seq: int) -> int:
        """Return the first position from which a sequence can continue: all that it sees is still in `swa`."""
        first = self.swa.seq_pos_min(seq)
        return 0 if first <= 0 else first + self.swa.window - 1

    def prepare(self, batch: Batch, n_ubatch: int) -> list[tuple[MicroBatch, Slot]]:
        """Cut a batch into micro-batches and find cells in both caches; none is taken yet.

        Notes
        -----
        Mirrors `llama_kv_cache_iswa::init_batch`. Differs: if `split_simple` does not fit into a unified cache,
        `split_equal` is not tried, which needs as many cells.
        """
        parts = split_simple(batch, n_ubatch) if self._is_unified else split_equal(batch, n_ubatch)
        slots = zip(parts, self.find_slots(parts), self.swa.find_slots(parts), strict=True)
        return [(part, replace(slot, swa=swa)) for part, slot, swa in slots]

    def next_cell(self) -> int | None:
        """Return None: a token takes more than one cell."""
        return None

    def apply(self, part: MicroBatch, slot: Slot) -> None:
        """Take the cells of a micro-batch."""
        super().apply(part, slot)
        if slot.swa is not None:  # None while `find_slots` tries the other cache alone
            self.swa.apply(part, slot.swa)

    def view(self, slot: Slot) -> CacheView:
        """Return the parts of both caches that a micro-batch's graph reads; call it after `apply`."""
        assert slot.swa is not None
        return replace(super().view(slot), swa=self.swa.view(slot.swa))

    def full_view(self) -> CacheView:
        """Return a view of both whole caches, for reserving memory."""
        return replace(super().full_view(), swa=self.swa.full_view())
