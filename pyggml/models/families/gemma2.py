"""The architecture gemma2: norms before and after each part of a layer, every second layer with a window, attention bent by tanh."""

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

__all__ = ["ARCHITECTURE", "sandwiched_layer", "scales"]


def scales(keys: KeyReader, hp: HParams, *, n_layer_largest: int, softcap: float) -> HParams:
    """Return hyper-parameters with the factor of attention, another one in the largest model by its layers, and the logits' bound."""
    head = hp.n_embd // hp.n_head if hp.n_layer == n_layer_largest else hp.n_embd_head_k
    return replace(
        hp,
        attention_scale=round_f32(1.0 / round_f32(math.sqrt(head))),
        logit_softcap=round_f32(keys.number("final_logit_softcapping", softcap)),
    )


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    """Return the family's hyper-parameters.

    Notes
    -----
    Mirrors `llama_model_gemma2::load_arch_hparams`. Differs: a bound of 0 is refused; upstream divides by it.
    """
    hp = scales(keys, hp, n_layer_largest=46, softcap=30.0)
    softcap = round_f32(keys.number("attn_logit_softcapping", 50.0))
    for key, bound in (("final_logit_softcapping", hp.logit_softcap), ("attn_logit_softcapping", softcap)):
        if not bound:
            raise keys.error(key, "is 0, and what it bounds is divided by it")
    scale = round_f32(math.sqrt(hp.n_embd))
    windows = keys.sliding_window(hp, period=2, default=4096)
    return replace(hp, stream_scale=scale, attention_softcap=softcap, **windows)


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_gemma2::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *dense_rows(hp),
        ("post_ffw_norm.weight", (hp.n_embd,), Op.MUL, False),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_gemma2::graph`."""
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    q, k = b.rope(q, layer=w.layer), b.rope(k, layer=w.layer)
    return sandwiched_layer(b, w, layer_in, q, k, v, post_norm="ffn_post_norm")


def sandwiched_layer(
    b: Builder, w: LayerWeights, layer_in: Tensor, q: Tensor, k: Tensor, v: Tensor, *, post_norm: str
) -> Tensor:
    """Return a layer's output from Q, K and V, with a norm after attention and one after the feed-forward, named ``post_norm``."""
    il = w.layer
    q, k, v = b.name_qkv(il, q, k, v)
    cur = b.attention(w, ops.scale(q, b.hp.attention_scale), k, v, 1.0)
    cur, residual = b.crop(cur, layer_in, il)
    after = b.name(ops.add(b.norm_by(w, "post_attention_norm", cur, "attn_post_norm"), residual), "sa_out", il)
    cur = b.name(b.ffn(w, b.norm_by(w, "ffn_norm", after), activation="geglu"), "ffn_out", il)
    cur = b.name(b.norm(cur, w["post_ffw_norm.weight"], -1), post_norm)
    return b.name(ops.add(cur, after), "l_out", il)


ARCHITECTURE = Architecture(
    names=("gemma2",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    embedding_name="inp_scaled",
)
