"""The architecture olmoe: llama with experts, and norms over all heads of Q and of K."""

from __future__ import annotations

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import moe_ffn
from ..hparams import HParams
from ..weights import LayerWeights, Present, Row, expert_rows, qkv_rows

__all__ = ["ARCHITECTURE"]


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_olmoe::load_arch_tensors`."""
    return [
        ("attn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *qkv_rows(hp, i, present),
        ("attn_output.weight", (hp.n_embd, hp.n_embd), Op.MUL_MAT, False),
        ("attn_q_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("attn_k_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *expert_rows(hp, hp.n_ff),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_olmoe::graph`."""
    il = w.layer
    q, k, v = b.qkv_normed_whole(w, b.norm_by(w, "attn_norm", layer_in))
    ffn_in = b.add_to_residual(b.attention(w, q, k, v, b.kq_scale), layer_in, il)
    cur = moe_ffn(b, w, b.norm_by(w, "ffn_norm", ffn_in), norm_weights=False)
    return b.name(ops.add(cur, ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    moe_names=("olmoe",), rope=RopeType.NEOX, layer_weights=_weights, layer=_layer, has_tied_head=False
)
