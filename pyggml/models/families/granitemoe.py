"""The architecture granitemoe: llama with experts, whose embeddings, residuals, attention and logits are scaled."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import moe_ffn, with_shared
from ..hparams import HParams, KeyReader, round_f32
from ..weights import LayerWeights, Present, Row, attention_rows, expert_rows, rope_factor_specs, shared_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    logit_scale = round_f32(keys.number("logit_scale"))
    if not logit_scale:
        raise keys.error("logit_scale", "is 0, and logits are divided by it")
    return replace(
        hp,
        n_ff_shexp=keys.integer("expert_shared_feed_forward_length", 0, least=0),
        embedding_scale=round_f32(keys.number("embedding_scale", 0.0)),
        residual_scale=round_f32(keys.number("residual_scale", 0.0)),
        attention_scale=round_f32(keys.number("attention.scale", 0.0)),
        logit_scale=logit_scale,
    )


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_granite_moe::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("attn_output.bias", (hp.n_embd,), Op.ADD, True),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *rope_factor_specs(hp, i),
        *expert_rows(hp, hp.n_ff, is_gate_optional=True),
        *(shared_rows(hp, hp.n_ff_shexp) if hp.n_ff_shexp else []),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_granite::graph` for experts."""
    hp, il = b.hp, w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    factors = b.rope_factors(w)
    q, k, v = b.name_qkv(il, b.rope(q, factors), b.rope(k, factors), v)
    cur = b.name(b.attention(w, q, k, v, hp.attention_scale or b.kq_scale), "attn_out", il)
    cur, residual = b.crop(cur, layer_in, il)
    ffn_in = b.name(ops.add(_scaled(hp, cur), residual), "ffn_inp", il)
    cur = _scaled(hp, _experts(b, w, b.norm_by(w, "ffn_norm", ffn_in)))
    return b.name(ops.add(cur, ffn_in), "l_out", il)


def _scaled(hp: HParams, cur: Tensor) -> Tensor:
    """Return a layer's output times `residual_scale`, if the model has one."""
    return ops.scale(cur, hp.residual_scale) if hp.residual_scale else cur


def _experts(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return the experts' outputs, named only if a shared expert's are among them."""
    out = with_shared(b, w, cur, moe_ffn(b, w, cur))
    return b.name(out, "ffn_out", w.layer) if b.hp.n_ff_shexp else out


ARCHITECTURE = Architecture(
    moe_names=("granitemoe",), rope=RopeType.NORMAL, hparams=_hparams, layer_weights=_weights, layer=_layer
)
