"""The architecture qwen2moe: qwen2 with experts, and a shared expert with a gate."""

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
from ..weights import LayerWeights, Present, Row, attention_rows, expert_rows, shared_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    return replace(hp, n_ff_shexp=keys.integer("expert_shared_feed_forward_length", 0, least=0))


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_qwen2moe::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *expert_rows(hp, hp.n_ff_expert),
        ("ffn_gate_inp_shexp.weight", (hp.n_embd,), Op.MUL_MAT, False),
        *shared_rows(hp, hp.n_ff_shexp or hp.n_ff),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_qwen2moe::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    cur = b.attention(w, *b.name_qkv(il, b.rope(q), b.rope(k), v), b.kq_scale)
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.name(_experts(b, w, b.norm_by(w, "ffn_norm", ffn_in)), "ffn_out", il)
    return b.name(ops.add(cur, ffn_in), "l_out", il)


def _experts(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return the chosen experts' outputs plus the gated shared expert's; the sigmoid is SiLU divided by its input."""
    il = w.layer
    routed = moe_ffn(b, w, cur, norm_weights=False)
    gate_in = b.name(ops.mul_mat(w["ffn_gate_inp_shexp.weight"], cur), "ffn_shexp_gate_inp", il)
    gate = b.name(ops.div(ops.silu(gate_in), gate_in), "ffn_shexp_gate", il)
    shared = b.name(b.ffn(w, cur, suffix="_shexp"), "ffn_shexp", il)
    return ops.add(routed, b.name(ops.mul(shared, gate), "ffn_shexp_out", il))


ARCHITECTURE = Architecture(
    moe_names=("qwen2moe",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_tied_head=False,
)
