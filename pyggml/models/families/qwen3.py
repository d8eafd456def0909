"""The architectures qwen3 (dense) and qwen3moe: llama with norms of each head of Q and K."""

from __future__ import annotations

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import moe_ffn
from ..hparams import HParams
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows, expert_rows

__all__ = ["ARCHITECTURE"]


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `load_arch_tensors` of `llama_model_qwen3` and `llama_model_qwen3moe`."""
    return [
        *attention_rows(hp, i, present),
        ("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
        ("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *(expert_rows(hp, hp.n_ff_expert) if hp.is_moe else dense_rows(hp)),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_qwen3::graph` and `llama_model_qwen3moe::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    q = b.rope(b.norm_by(w, "attn_q_norm", q, "Qcur_normed"))
    k = b.rope(b.norm_by(w, "attn_k_norm", k, "Kcur_normed"))
    cur = b.attention(w, *b.name_qkv(il, q, k, v), b.kq_scale)
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.norm_by(w, "ffn_norm", ffn_in)
    cur = moe_ffn(b, w, cur) if b.hp.is_moe else b.name(b.ffn(w, cur), "ffn_out", il)
    return b.name(ops.add(cur, ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    names=("qwen3",),
    moe_names=("qwen3moe",),
    rope=RopeType.NEOX,
    layer_weights=_weights,
    layer=_layer,
    has_ffn_scales=True,
)
