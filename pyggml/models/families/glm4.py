"""The architecture glm4: norms before and after each part of a layer, half of each head rotates, gate and up in one weight."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..hparams import HParams, KeyReader
from ..weights import LayerWeights, Present, Row, attention_rows, gate_up_row

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    """Mirrors `llama_hparams::use_mrope`: files of models that also see have sections of each head."""
    if min(keys.rope_sections()[:2], default=0) <= 0:
        return hp
    return replace(hp, rope_type=RopeType.MROPE, rope_sections=keys.mrope_sections())


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_glm4::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        ("ffn_down.weight", (hp.n_ff, hp.n_embd), Op.MUL_MAT, False),
        gate_up_row(hp),
        ("post_ffw_norm.weight", (hp.n_embd,), Op.MUL, False),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_glm4::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    cur = b.attention(w, *b.name_qkv(il, b.rope(q), b.rope(k), v), b.kq_scale)
    cur, residual = b.crop(cur, layer_in, il)
    ffn_in = b.name(ops.add(b.norm_by(w, "post_attention_norm", cur, "post_attn_norm"), residual), "ffn_inp", il)
    cur = b.name(b.ffn(w, b.norm_by(w, "ffn_norm", ffn_in)), "ffn_out", il)
    cur = b.norm_by(w, "post_ffw_norm", cur, "post_mlp_norm")
    return b.name(ops.add(cur, ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    names=("glm4",),
    rope=RopeType.NORMAL,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_partial_rope=True,
    has_exact_sums=True,
)
