"""The architecture minimax-m2: norms over all heads of Q and of K, a part of each head rotates, sigmoid routing with a bias."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import moe_ffn
from ..hparams import HParams, KeyReader
from ..weights import LayerWeights, Present, Row, expert_rows, qkv_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    return replace(hp, expert_gating=keys.gating())


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_minimax_m2::load_arch_tensors`."""
    n_q = hp.n_embd_head_k * hp.n_head
    return [
        *qkv_rows(hp, i, present),
        ("attn_output.weight", (n_q, hp.n_embd), Op.MUL_MAT, False),
        ("attn_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("attn_q_norm.weight", (n_q,), Op.MUL, False),
        ("attn_k_norm.weight", (hp.n_embd_k_gqa,), Op.MUL, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *expert_rows(hp, hp.n_ff),
        ("exp_probs_b.bias", (hp.n_expert,), Op.ADD, False),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_minimax_m2::graph`."""
    il = w.layer
    q, k, v = b.qkv_normed_whole(w, b.norm_by(w, "attn_norm", layer_in))
    ffn_in = b.add_to_residual(b.attention(w, q, k, v, b.kq_scale), layer_in, il)
    cur = moe_ffn(b, w, b.norm_by(w, "ffn_norm", ffn_in), gating=b.hp.expert_gating)
    return b.name(ops.add(cur, ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    moe_names=("minimax-m2",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_tied_head=False,
    has_partial_rope=True,
)
