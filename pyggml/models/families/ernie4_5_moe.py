"""The architecture ernie4_5-moe: dense layers first, then experts with a shared one; the choice may have a bias."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import moe_ffn, with_shared
from ..hparams import HParams, KeyReader
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows, expert_rows, shared_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    if (step := keys.integer("interleave_moe_layer_step")) != 1:
        raise keys.unsupported("interleave_moe_layer_step", f"is {step}; only 1 is supported")
    return replace(
        hp,
        n_layer_dense_lead=keys.n_layer_dense_lead(hp.n_layer),
        n_ff_shexp=keys.integer("expert_shared_feed_forward_length", 0, least=0),
    )


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_ernie4_5::load_arch_tensors`, as far as it has experts."""
    return [
        *attention_rows(hp, i, present),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *(dense_rows(hp) if i < hp.n_layer_dense_lead else _moe_rows(hp)),
    ]


def _moe_rows(hp: HParams) -> list[Row]:
    return [
        *expert_rows(hp, hp.n_ff_exp, is_gate_optional=True, bias="optional"),
        *(shared_rows(hp, hp.n_ff_shexp) if hp.n_ff_shexp else []),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_ernie4_5_moe::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    q, k, v = b.name_qkv(il, b.rope(q), b.rope(k), v)
    cur = b.name(b.attention(w, q, k, v, b.kq_scale), "attn_out", il)
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.norm_by(w, "ffn_norm", ffn_in)
    cur = b.ffn(w, cur) if il < b.hp.n_layer_dense_lead else with_shared(b, w, cur, moe_ffn(b, w, cur))
    return b.name(ops.add(b.name(cur, "ffn_out", il), ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    moe_names=("ernie4_5-moe",), rope=RopeType.NORMAL, hparams=_hparams, layer_weights=_weights, layer=_layer
)
