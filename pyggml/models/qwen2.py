"""The architectures qwen2 (dense) and qwen2moe: llama with experts beside a shared one behind a gate."""

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
from .weights import (
    LayerWeights,
    SpecRow,
    Weights,
    WeightSpec,
    dense_rows,
    expert_rows,
    layer_specs,
    qkv_specs,
    shared_rows,
    trunk_specs,
)

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `load_arch_tensors` of `llama_model_qwen2` and `llama_model_qwen2moe`.
    """
    specs = trunk_specs(hp, present, tied_head=not hp.is_moe)
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
                ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
                *(_moe_rows(hp) if hp.is_moe else dense_rows(hp)),
            ],
        )
    return specs


def _moe_rows(hp: HParams) -> list[SpecRow]:
    n_ff = hp.n_ff_exp or hp.n_ff // hp.n_expert_used
    return [
        *expert_rows(hp, n_ff),
        ("ffn_gate_inp_shexp.weight", (hp.n_embd,), Op.MUL_MAT, False),
        *shared_rows(hp, hp.n_ff_shexp or hp.n_ff),
    ]


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_qwen2::graph` and `llama_model_qwen2moe::graph`.
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
        q, k = b.rope(q), b.rope(k)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.attention(w, q, k, v, scale)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(cur, residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = b.name(_experts(b, w, cur, il) if hp.is_moe else b.ffn(w, cur), "ffn_out", il)
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)


def _experts(b: Builder, w: LayerWeights, cur: Tensor, il: int) -> Tensor:
    """Return what the chosen experts make of each token, and the shared one by its gate, a sigmoid as SiLU over input."""
    routed = moe_ffn(b, w, cur, norm_weights=False)
    gate_in = b.name(ops.mul_mat(w["ffn_gate_inp_shexp.weight"], cur), "ffn_shexp_gate_inp", il)
    gate = b.name(ops.div(ops.silu(gate_in), gate_in), "ffn_shexp_gate", il)
    shared = b.name(b.ffn(w, cur, suffix="_shexp"), "ffn_shexp", il)
    return ops.add(routed, b.name(ops.mul(shared, gate), "ffn_shexp_out", il))
