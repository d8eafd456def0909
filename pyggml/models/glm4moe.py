"""The architecture glm4moe (GLM-4.5): dense layers first, then experts chosen by sigmoids beside a shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..tensor import Tensor
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import routed_ffn
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .weights import (
    LayerWeights,
    SpecRow,
    Weights,
    WeightSpec,
    dense_rows,
    expert_rows,
    layer_specs,
    nextn_rows,
    qkv_specs,
    shared_rows,
    skipped,
    trunk_specs,
)

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order; those of layers that predict further are left out.

    Notes
    -----
    Mirrors `llama_model_glm4_moe::load_arch_tensors`.
    """
    specs = trunk_specs(hp, present)
    for i in range(hp.n_layer):
        specs += _layer(hp, i, present)
    for i in range(hp.n_layer, hp.n_layer_all):
        specs += skipped(_layer(hp, i, present) + layer_specs(i, nextn_rows(hp)))
    return specs


def _layer(hp: HParams, i: int, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    return [
        *layer_specs(i, [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)]),
        *qkv_specs(hp, i, present),
        *layer_specs(
            i,
            [
                ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
                ("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, True),
                ("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, True),
                ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False),
                *(dense_rows(hp) if i < hp.n_layer_dense_lead else _moe_rows(hp)),
            ],
        ),
    ]


def _moe_rows(hp: HParams) -> list[SpecRow]:
    n_ff = hp.n_ff_exp or hp.n_ff // hp.n_expert_used
    return [
        *expert_rows(hp, n_ff, bias="required"),
        *(shared_rows(hp, n_ff * hp.n_expert_shared) if hp.n_expert_shared else []),
    ]


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_glm4_moe::graph`.
    """
    b = Builder(p, weights)
    hp = p.hparams
    scale = kq_scale(hp.n_embd_head_v)
    layer_in = b.input_embd()
    b.attention_inputs()
    for w in weights.layers:
        il, residual = w.layer, layer_in
        cur = b.name(b.norm(layer_in, w["attn_norm.weight"], il), "attn_norm", il)
        q, k, v = b.qkv(w, cur)
        q_norm, k_norm = w.get("attn_q_norm.weight"), w.get("attn_k_norm.weight")
        if q_norm is not None:
            q = b.name(b.norm(q, q_norm, il), "Qcur_normed", il)
        if k_norm is not None:
            k = b.name(b.norm(k, k_norm, il), "Kcur_normed", il)
        q, k = b.rope(q), b.rope(k)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.attention(w, q, k, v, scale)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(cur, residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["post_attention_norm.weight"], il), "post_attn_norm", il)
        cur = b.name(b.ffn(w, cur), "ffn_out", il) if il < hp.n_layer_dense_lead else _experts(b, w, cur, il)
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)


def _experts(b: Builder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
    """Return what the chosen experts and the shared one make of each token."""
    routed = routed_ffn(b, w, cur)
    shared = b.name(b.ffn(w, cur, suffix="_shexp"), "ffn_shexp_out", il)
    return b.name(ops.add(routed, shared), "ffn_out", il)
