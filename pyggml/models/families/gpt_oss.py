"""The architecture gpt-oss: attention sinks, a sliding window in every other layer, experts with biases."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder, kq_scale
from ..experts import moe_ffn
from ..hparams import HParams, KeyReader
from ..weights import EXPERT_OP, LayerWeights, Present, Row, expert_rows, qkv_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    return replace(hp, **keys.sliding_window(hp, period=2))


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_openai_moe::load_arch_tensors`."""
    n_heads, n_ff, n_expert = hp.n_rot * hp.n_head, hp.n_ff_exp, hp.n_expert
    return [
        ("attn_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False),
        *qkv_rows(hp, i, present),
        ("attn_output.weight", (n_heads, hp.n_embd), Op.MUL_MAT, False),
        ("attn_sinks.weight", (hp.n_head,), Op.SCALE, False),
        *expert_rows(hp, n_ff),
        ("attn_output.bias", (hp.n_embd,), Op.MUL_MAT, False),
        ("ffn_gate_inp.bias", (n_expert,), Op.MUL_MAT, False),
        ("ffn_gate_exps.bias", (n_ff, n_expert), EXPERT_OP, False),
        ("ffn_down_exps.bias", (hp.n_embd, n_expert), EXPERT_OP, False),
        ("ffn_up_exps.bias", (n_ff, n_expert), EXPERT_OP, False),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Add a layer. The last layer also runs for all tokens; the rows of wanted logits are chosen after it.

    Notes
    -----
    Mirrors `llama_model_openai_moe::graph`.
    """
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    q, k, v = b.name_qkv(il, b.rope(q, layer=il), b.rope(k, layer=il), v)
    scale = kq_scale(b.hp.n_rot)
    cur = b.name(b.attention(w, q, k, v, scale, sinks=w["attn_sinks.weight"]), "attn_out", il)
    ffn_in = b.name(ops.add(cur, layer_in), "ffn_inp", il)
    cur = moe_ffn(
        b,
        w,
        b.norm_by(w, "post_attention_norm", ffn_in, "attn_post_norm"),
        gating="softmax_weight",
        activation="swiglu_oai",
        norm_weights=False,
        weights_scale=b.hp.expert_weights_scale,
    )
    return b.name(ops.add(cur, ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    moe_names=("gpt-oss",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_tied_head=False,
)
