"""The architecture phi3 (Phi-3, Phi-4): gate and up in one weight, Q scaled before attention, frequency factors by length of the context."""

from __future__ import annotations

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..hparams import HParams
from ..weights import LayerWeights, Present, Row, attention_rows, gate_up_row, rope_factor_specs

__all__ = ["ARCHITECTURE"]


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_phi3::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("ffn_down.weight", (hp.n_ff, hp.n_embd), Op.MUL_MAT, False),
        gate_up_row(hp),
        *rope_factor_specs(hp, i, is_long=True),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_phi3::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    factors = b.rope_factors(w)
    q, k, v = b.name_qkv(il, b.rope(q, factors), b.rope(k, factors), v)
    cur = b.attention(w, b.name(ops.scale(q, b.kq_scale), "Qcur", il), k, v, 1.0)
    ffn_in = ops.add(*b.crop(cur, layer_in, il))
    cur = b.name(b.ffn(w, b.norm_by(w, "ffn_norm", ffn_in)), "ffn_out", il)
    return b.name(ops.add(ffn_in, cur), "l_out", il)


ARCHITECTURE = Architecture(
    names=("phi3",), rope=RopeType.NEOX, layer_weights=_weights, layer=_layer, has_partial_rope=True
)
