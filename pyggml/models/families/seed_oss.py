"""The architecture seed_oss: llama with biases of Q, K and V, whose norm before the feed-forward is named after attention."""

from __future__ import annotations

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..hparams import HParams
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows

__all__ = ["ARCHITECTURE"]


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_seed_oss::load_arch_tensors`."""
    norm: Row = ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False)
    return [*attention_rows(hp, i, present), norm, *dense_rows(hp)]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_seed_oss::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    cur = b.attention(w, *b.name_qkv(il, b.rope(q), b.rope(k), v), b.kq_scale)
    ffn_in = b.add_to_residual(b.name(cur, "attn_out", il), layer_in, il)
    cur = b.name(b.ffn(w, b.norm_by(w, "post_attention_norm", ffn_in, "attn_post_norm")), "ffn_out", il)
    return b.name(ops.add(cur, ffn_in), "l_out", il)


ARCHITECTURE = Architecture(names=("seed_oss",), rope=RopeType.NEOX, layer_weights=_weights, layer=_layer)
