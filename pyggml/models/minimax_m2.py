"""The architecture minimax-m2: norms over all heads of Q and of K, a part of each head rotates, sigmoid routing with a bias."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import moe_ffn
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .olmoe import normed_qkv
from .weights import Weights, WeightSpec, expert_rows, layer_specs, qkv_specs, trunk_specs

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `llama_model_minimax_m2::load_arch_tensors`.
    """
    specs = trunk_specs(hp, present, tied_head=False)
    n_q = hp.n_embd_head_k * hp.n_head
    for i in range(hp.n_layer):
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (n_q, hp.n_embd), Op.MUL_MAT, False),
                ("attn_norm.weight", (hp.n_embd,), Op.MUL, False),
                ("attn_q_norm.weight", (n_q,), Op.MUL, False),
                ("attn_k_norm.weight", (hp.n_embd_k_gqa,), Op.MUL, False),
                ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
                *expert_rows(hp, hp.n_ff),
                ("exp_probs_b.bias", (hp.n_expert,), Op.ADD, False),
            ],
        )
    return specs


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_minimax_m2::graph`.
    """
    b = Builder(p, weights)
    hp = p.hparams
    scale = kq_scale(hp.n_embd_head_v)
    layer_in = b.input_embd()
    b.attention_inputs()
    for w in weights.layers:
        il, residual = w.layer, layer_in
        cur = b.name(b.norm(layer_in, w["attn_norm.weight"], il), "attn_norm", il)
        cur = b.attention(w, *normed_qkv(b, w, cur), scale)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(cur, residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = moe_ffn(b, w, cur, gating=hp.expert_gating)
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)
