"""`CacheView`: the part of a KV cache that one graph reads, and the nodes that store into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import ops
from ..tensor import Tensor

if TYPE_CHECKING:
    from .kv_cache import KVCache

__all__ = ["CacheView", "StatesView"]


@dataclass(frozen=True, slots=True)
class StatesView:
    """The cells of recurrent states that one graph reads and writes: ``n`` cells from ``head`` on.

    Attributes
    ----------
    r, s : mapping of int to Tensor
        By layer; see `RecurrentStates`.
    zero : int
        The cell whose rows are zeroed first; -1: none.

    Notes
    -----
    Mirrors `llama_memory_recurrent_context` as graph builders read it.
    """

    r: Mapping[int, Tensor]
    s: Mapping[int, Tensor]
    n: int
    head: int
    zero: int


@dataclass(frozen=True, slots=True)
class CacheView:
    """The cells that one graph reads: the first ``n_kv`` of each of ``n_stream`` streams, from stream ``s0`` on.

    Notes
    -----
    Mirrors `llama_kv_cache_context` as graph builders read it.
    """

    cache: KVCache
    n_kv: int
    s0: int
    n_stream: int
    swa: CacheView | None = None  #: of the layers with a sliding window, if any
    states: StatesView | None = None  #: of the recurrent layers, if any

    def of_layer(self, layer: int) -> CacheView:
        """Return the view that a layer reads."""
        return self.swa if self.swa is not None and layer in self.cache.hparams.swa_layers else self

    def get_k(self, layer: int) -> Tensor:
        """Return a view of K: ne [n_embd_head, n_head_kv, n_kv, n_stream]."""
        hp = self.cache.hparams.of_layer(layer)
        k = self.cache.k[hp.kv_layer(layer)]
        row = k.type.row_size
        stream = row(k.ne[0] * self.cache.n_cells)
        return ops.view_4d(
            k, hp.n_embd_head_k, hp.n_head_kv, self.n_kv, self.n_stream,
            row(hp.n_embd_head_k), row(k.ne[0]), stream, stream * self.s0,
        )  # fmt: skip

    def get_v(self, layer: int) -> Tensor:
        """Return a view of V: as K, or ne [n_kv, n_head_kv, n_embd_head, n_stream] if V is stored transposed."""
        hp = self.cache.hparams.of_layer(layer)
        v = self.cache.v[hp.kv_layer(layer)]
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
        """Return the node that stores V of new tokens: rows, or each element as a row if V is stored transposed."""
        v = self.cache.v[layer]
        if not self.cache.v_trans:
            return ops.set_rows(self._merged(v), _rows_of(v_cur), v_idxs)
        n_embd, n_tokens = v_cur.ne[0] * v_cur.ne[1], v_cur.ne[2]
        if v_cur.type.row_size(n_embd) == v_cur.nb[2]:
            v_cur = ops.reshape_2d(v_cur, n_embd, n_tokens)
        else:
            v_cur = ops.cont_2d(v_cur, n_embd, n_tokens)
        if n_embd < v.ne[0]:  # if layers differ, each transposed V is as large as the largest
            v_cur = ops.pad(v_cur, v.ne[0] - n_embd, 0, 0, 0)
        v_view = ops.reshape_2d(v, 1, v.numel)
        return ops.set_rows(v_view, ops.reshape_2d(v_cur, 1, v_cur.numel), v_idxs)

    def _merged(self, t: Tensor) -> Tensor:
        """Return the rows of all streams as one matrix, which the indices of rows refer to."""
        return ops.reshape_2d(t, t.ne[0], t.ne[1] * t.ne[2]) if t.ne[2] > 1 else t


def _rows_of(cur: Tensor) -> Tensor:
    """Return a view of [n_embd_head, n_head, n_token] with the heads of a token in one row."""
    return ops.view_2d(cur, cur.ne[0] * cur.ne[1], cur.ne[2], cur.nb[2], 0)
