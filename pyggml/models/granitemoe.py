"""The architecture granitemoe: llama with experts, whose embeddings, residuals, attention and logits are scaled."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..tensor import Tensor
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import moe_ffn
from .graph import GraphParams, ModelGraph
from .hparams import HParams, round_f32
from .llama import moe_rows, rope_factor_specs, rope_factors
from .weights import LayerWeights, Weights, WeightSpec, layer_specs, qkv_specs, shared_rows, trunk_specs

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `llama_model_granite_moe::load_arch_tensors`.
    """
    specs = trunk_specs(hp, present)
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
                ("attn_output.bias", (hp.n_embd,), Op.ADD, True),
                ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
            ],
        )
        specs += rope_factor_specs(hp, i)
        specs += layer_specs(i, [*moe_rows(hp), *(shared_rows(hp, hp.n_ff_shexp) if hp.n_ff_shexp else [])])
    return specs


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_granite::graph` for experts.
    """
    b = Builder(p, weights)
    hp = p.hparams
    scale = hp.attention_scale or kq_scale(hp.n_embd_head_v)
    layer_in = b.input_embd()
    b.attention_inputs()
    for w in weights.layers:
        il, residual = w.layer, layer_in
        cur = b.name(b.norm(layer_in, w["attn_norm.weight"], il), "attn_norm", il)
        q, k, v = b.qkv(w, cur)
        factors = rope_factors(w, hp, p.params)
        q, k = b.rope(q, factors), b.rope(k, factors)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.name(b.attention(w, q, k, v, scale), "attn_out", il)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(_scaled(hp, cur), residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = _scaled(hp, _experts(b, w, cur, il))
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    logits = ops.scale(b.head(embd), round_f32(1.0 / hp.logit_scale))
    return b.finish(b.name(logits, "result_output"), embd)


def _scaled(hp: HParams, cur: Tensor) -> Tensor:
    """Return what is added to the residual stream, scaled if the model says so."""
    return ops.scale(cur, hp.residual_scale) if hp.residual_scale else cur


def _experts(b: Builder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
    """Return what the chosen experts, and the shared one if there is one, make of each token."""
    routed = moe_ffn(b, w, cur)
    if not b.hp.n_ff_shexp:
        return routed
    shared = b.name(b.ffn(w, cur, suffix="_shexp"), "ffn_shexp", il)
    return b.name(ops.add(routed, shared), "ffn_out", il)
