"""The architecture gemma3: norms before and after each part of a layer, and a sliding window in five layers of six."""

from __future__ import annotations

import math
from dataclasses import replace

from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..hparams import HParams, KeyReader, round_f32
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows
from .gemma2 import sandwiched_layer, scales

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    """Mirrors `llama_model_gemma3::load_arch_hparams`, which recognises the largest model by its number of layers."""
    hp = replace(scales(keys, hp, n_layer_largest=62, softcap=0.0), token_scale=round_f32(math.sqrt(hp.n_embd)))
    has_window = keys.integer("attention.sliding_window", 0, least=0) > 0
    return replace(hp, **keys.sliding_window(hp, period=6, is_own=True)) if has_window else hp


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Return the weights of a layer.

    Notes
    -----
    Mirrors `llama_model_gemma3::load_arch_tensors`. Differs: the dense layers of embedding models are not supported.
    """
    n_embd, head = (hp.n_embd,), (hp.n_embd_head_k,)
    return [
        *attention_rows(hp, i, present),
        ("post_attention_norm.weight", n_embd, Op.MUL, False),
        ("attn_k_norm.weight", head, Op.MUL, False),
        ("attn_q_norm.weight", head, Op.MUL, False),
        ("ffn_norm.weight", n_embd, Op.MUL, False),
        *dense_rows(hp),
        ("post_ffw_norm.weight", n_embd, Op.MUL, False),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_gemma3::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    q = b.rope(b.norm_by(w, "attn_q_norm", q, "Qcur_normed"), layer=il)
    k = b.rope(b.norm_by(w, "attn_k_norm", k, "Kcur_normed"), layer=il)
    return sandwiched_layer(b, w, layer_in, q, k, v, post_norm=f"ffn_post_norm-{il}")


ARCHITECTURE = Architecture(
    names=("gemma3",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    embedding_name="inp_scaled",
)
