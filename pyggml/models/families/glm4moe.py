"""The architecture glm4moe (GLM-4.5): dense layers first, then experts chosen by sigmoids beside a shared expert."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import routed_ffn, with_shared
from ..hparams import HParams, KeyReader
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows, expert_rows, shared_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    if sum(n > 0 for n in keys.rope_sections()[:2]) == 2:
        raise keys.unsupported(
            "rope.dimension_sections", "asks for rotation by several positions, which is not supported"
        )
    return replace(
        hp,
        n_layer_dense_lead=keys.n_layer_dense_lead(hp.n_layer),
        n_expert_shared=keys.integer("expert_shared_count", least=0),
        expert_gating=keys.gating("sigmoid"),
        **keys.expert_weights(),
    )


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_glm4_moe::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, True),
        ("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, True),
        ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False),
        *(dense_rows(hp) if i < hp.n_layer_dense_lead else _moe_rows(hp)),
    ]


def _moe_rows(hp: HParams) -> list[Row]:
    return [
        *expert_rows(hp, hp.n_ff_expert, bias="required"),
        *(shared_rows(hp, hp.n_ff_expert * hp.n_expert_shared) if hp.n_expert_shared else []),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_glm4_moe::graph`."""
    il = w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    if w.get("attn_q_norm.weight") is not None:
        q = b.norm_by(w, "attn_q_norm", q, "Qcur_normed")
    if w.get("attn_k_norm.weight") is not None:
        k = b.norm_by(w, "attn_k_norm", k, "Kcur_normed")
    cur = b.attention(w, *b.name_qkv(il, b.rope(q), b.rope(k), v), b.kq_scale)
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.norm_by(w, "post_attention_norm", ffn_in, "post_attn_norm")
    cur = (
        b.ffn(w, cur)
        if il < b.hp.n_layer_dense_lead
        else with_shared(b, w, cur, routed_ffn(b, w, cur), "ffn_shexp_out")
    )
    return b.name(ops.add(b.name(cur, "ffn_out", il), ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    moe_names=("glm4moe",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_partial_rope=True,
    has_exact_sums=True,
)
