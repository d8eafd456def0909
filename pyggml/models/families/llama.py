"""The llama architecture: dense, or with experts as Mixtral has them."""

from __future__ import annotations

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import moe_ffn
from ..hparams import HParams
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows, expert_rows, rope_factor_specs

__all__ = ["ARCHITECTURE"]


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_llama::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("attn_output.bias", (hp.n_embd,), Op.ADD, True),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *rope_factor_specs(hp, i),
        *(expert_rows(hp, hp.n_ff, is_gate_optional=True) if hp.is_moe else _dense_rows(hp)),
    ]


def _dense_rows(hp: HParams) -> list[Row]:
    """Return the rows of a dense feed-forward network that may have biases."""
    return [
        *dense_rows(hp),
        ("ffn_gate.bias", (hp.n_ff,), Op.ADD, True),
        ("ffn_down.bias", (hp.n_embd,), Op.ADD, True),
        ("ffn_up.bias", (hp.n_ff,), Op.ADD, True),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_llama::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    factors = b.rope_factors(w)
    q, k, v = b.name_qkv(il, b.rope(q, factors), b.rope(k, factors), v)
    cur = b.name(b.attention(w, q, k, v, b.kq_scale), "attn_out", il)
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.norm_by(w, "ffn_norm", ffn_in)
    cur = moe_ffn(b, w, cur) if b.hp.is_moe else b.name(b.ffn(w, cur), "ffn_out", il)
    return b.name(b.name(ops.add(cur, ffn_in), "ffn_out", il), "l_out", il)


ARCHITECTURE = Architecture(
    names=("llama",),
    may_have_experts=True,
    rope=RopeType.NORMAL,
    layer_weights=_weights,
    layer=_layer,
    has_ffn_scales=True,
)
