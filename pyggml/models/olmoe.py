"""The architecture olmoe: llama with experts, and norms over all heads of Q and of K."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..tensor import Tensor
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import moe_ffn
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .weights import LayerWeights, Weights, WeightSpec, expert_rows, layer_specs, qkv_specs, trunk_specs

__all__ = ["build_graph", "normed_qkv", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `llama_model_olmoe::load_arch_tensors`.
    """
    specs = trunk_specs(hp, present, tied_head=False)
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (hp.n_embd, hp.n_embd), Op.MUL_MAT, False),
                ("attn_q_norm.weight", (hp.n_embd,), Op.MUL, False),
                ("attn_k_norm.weight", (hp.n_embd,), Op.MUL, False),
                ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
                *expert_rows(hp, hp.n_ff),
            ],
        )
    return specs


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_olmoe::graph`.
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
        cur = moe_ffn(b, w, cur, norm_weights=False)
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)


def normed_qkv(b: Builder, w: LayerWeights, cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K and V as attention takes them; Q and K are normed over all their heads before these are told apart."""
    hp, il = b.hp, w.layer
    rows = zip(b.qkv_rows(w, cur), ("Qcur", "Kcur", "Vcur"), strict=True)
    q, k, v = (b.name(part, name, il) for part, name in rows)
    q = b.name(b.norm(q, w["attn_q_norm.weight"], il), "Qcur_normed", il)
    k = b.name(b.norm(k, w["attn_k_norm.weight"], il), "Kcur_normed", il)
    q = b.rope(ops.reshape_3d(q, hp.n_embd_head_k, hp.n_head, b.n_tokens))
    k = b.rope(ops.reshape_3d(k, hp.n_embd_head_k, hp.n_head_kv, b.n_tokens))
    v = ops.reshape_3d(v, hp.n_embd_head_v, hp.n_head_kv, b.n_tokens)
    return b.name(q, "Qcur", il), b.name(k, "Kcur", il), b.name(v, "Vcur", il)
