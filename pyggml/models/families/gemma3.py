"""The architecture gemma3: norms before and after each part of a layer, and a sliding window in five layers of six."""

from __future__ import annotations

import math
from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..hparams import HParams, KeyReader, round_f32
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    """Mirrors `llama_model_gemma3::load_arch_hparams`, which recognises the largest model by its number of layers."""
    head = hp.n_embd // hp.n_head if hp.n_layer == 62 else hp.n_embd_head_k
    has_window = keys.integer("attention.sliding_window", 0, least=0) > 0
    return replace(
        hp,
        token_scale=round_f32(math.sqrt(hp.n_embd)),
        attention_scale=round_f32(1.0 / round_f32(math.sqrt(head))),
        logit_softcap=round_f32(keys.number("final_logit_softcapping", 0.0)),
        **(keys.sliding_window(hp, period=6, is_own=True) if has_window else {}),
    )


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
    q, k, v = b.name_qkv(il, q, k, v)
    cur = b.attention(w, ops.scale(q, b.hp.attention_scale), k, v, 1.0)
    cur, residual = b.crop(cur, layer_in, il)
    after = b.name(ops.add(b.norm_by(w, "post_attention_norm", cur, "attn_post_norm"), residual), "sa_out", il)
    cur = b.name(b.ffn(w, b.norm_by(w, "ffn_norm", after), activation="geglu"), "ffn_out", il)
    cur = b.name(b.norm(cur, w["post_ffw_norm.weight"], -1), "ffn_post_norm", il)
    return b.name(ops.add(cur, after), "l_out", il)


ARCHITECTURE = Architecture(
    names=("gemma3",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    embedding_name="inp_scaled",
)
