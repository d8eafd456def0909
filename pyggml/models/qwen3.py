"""The architectures qwen3 (dense) and qwen3moe: llama with norms of each head of Q and K."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import moe_ffn
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .weights import SpecRow, Weights, WeightSpec, dense_rows, expert_rows, layer_specs, qkv_specs, trunk_specs

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `load_arch_tensors` of `llama_model_qwen3` and `llama_model_qwen3moe`.
    """
    specs = trunk_specs(hp, present)
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
                ("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
                ("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
                ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
                *(_moe_rows(hp) if hp.is_moe else dense_rows(hp)),
            ],
        )
    return specs


def _moe_rows(hp: HParams) -> list[SpecRow]:
    n_ff = hp.n_ff_exp or hp.n_ff // hp.n_expert_used
    return expert_rows(hp, n_ff)


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_qwen3::graph` and `llama_model_qwen3moe::graph`.
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
        q = b.rope(b.name(b.norm(q, w["attn_q_norm.weight"], il), "Qcur_normed", il))
        k = b.rope(b.name(b.norm(k, w["attn_k_norm.weight"], il), "Kcur_normed", il))
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.attention(w, q, k, v, scale)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(cur, residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = moe_ffn(b, w, cur) if hp.is_moe else b.name(b.ffn(w, cur), "ffn_out", il)
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)
