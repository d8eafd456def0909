"""The architectures dots1 and ernie4_5-moe: dense layers first, then experts beside a shared one; dots1 norms Q and K."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..tensor import Tensor
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import moe_ffn, routed_ffn
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
    Mirrors `load_arch_tensors` of `llama_model_dots1` and of `llama_model_ernie4_5`, as far as it has experts.
    """
    is_dots = hp.arch == "dots1"
    specs = trunk_specs(hp, present, tied_head=not is_dots)
    attention: list[SpecRow] = [
        ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
    ]
    if is_dots:
        attention.append(("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, False))
        attention.append(("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, False))
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        ffn = dense_rows(hp) if i < hp.n_layer_dense_lead else _moe_rows(hp)
        specs += layer_specs(i, [*attention, ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False), *ffn])
    return specs


def _n_ff_shared(hp: HParams) -> int:
    """Return how wide the shared expert is; 0: there is none."""
    return hp.n_ff_exp * hp.n_expert_shared if hp.arch == "dots1" else hp.n_ff_shexp


def _moe_rows(hp: HParams) -> list[SpecRow]:
    n_ff, n_shared = hp.n_ff_exp, _n_ff_shared(hp)
    return [
        *expert_rows(hp, n_ff, is_gate_optional=hp.arch != "dots1", bias="optional"),
        *(shared_rows(hp, n_shared) if n_shared else []),
    ]


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_dots1::graph` and `llama_model_ernie4_5_moe::graph`.
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
        if hp.arch == "dots1":
            q = b.name(b.norm(q, w["attn_q_norm.weight"], il), "Qcur_normed", il)
            k = b.name(b.norm(k, w["attn_k_norm.weight"], il), "Kcur_normed", il)
        q, k = b.rope(q), b.rope(k)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.attention(w, q, k, v, scale)
        if hp.arch != "dots1":
            b.name(cur, "attn_out", il)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(cur, residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = b.ffn(w, cur) if il < hp.n_layer_dense_lead else _experts(b, w, cur)
        layer_in = b.name(ops.add(b.name(cur, "ffn_out", il), ffn_in), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)


def _experts(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return what the chosen experts and the shared one make of each token."""
    routed = routed_ffn(b, w, cur) if b.hp.arch == "dots1" else moe_ffn(b, w, cur)
    if not _n_ff_shared(b.hp):
        return routed
    return ops.add(routed, b.name(b.ffn(w, cur, suffix="_shexp"), "ffn_shexp", w.layer))
