"""`make_cache`: the cache that a model needs."""

from __future__ import annotations

from .context import ContextParams
from .hparams import HParams
from .kv_cache import KVCache
from .kv_cache_iswa import SlidingKVCache
from .recurrent import HybridCache

__all__ = ["make_cache"]


def make_cache(hparams: HParams, params: ContextParams, *, v_trans: bool) -> KVCache:
    """Return the cache that a model needs: with a smaller one for sliding windows, with recurrent states, or neither.

    Notes
    -----
    Mirrors `llama_model::create_memory`.
    """
    kind = HybridCache if hparams.n_ssm_state else SlidingKVCache if hparams.n_swa else KVCache
    return kind(hparams, params, v_trans=v_trans)
