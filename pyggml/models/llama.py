"""The llama architecture: dense, or with experts as Mixtral has them."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..tensor import Tensor
from ..types import Op
from .blocks import Builder, kq_scale
from .context import ContextParams
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
    trunk_specs,
)

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `llama_model_llama::load_arch_tensors`.
    """
    n_embd, n_head_rows = hp.n_embd, hp.n_embd_head_k * hp.n_head
    specs = trunk_specs(hp, present)
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", (n_embd,), Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (n_head_rows, n_embd), Op.MUL_MAT, False),
                ("attn_output.bias", (n_embd,), Op.ADD, True),
                ("ffn_norm.weight", (n_embd,), Op.MUL, False),
            ],
        )
        specs += rope_factor_specs(hp, i)
        specs += layer_specs(i, moe_rows(hp) if hp.is_moe else dense_rows_with_biases(hp))
    return specs


def rope_factor_specs(hp: HParams, layer: int) -> list[WeightSpec]:
    """Return the frequency factors, which every layer uses and the file has once."""
    names = (
        ["rope_factors_long.weight", "rope_factors_short.weight"]
        if hp.rope_scaling == "longrope"
        else ["rope_freqs.weight"]
    )
    return [
        WeightSpec(
            name, (hp.n_rot // 2, 1, 1, 1), "repeating", layer, Op.ROPE, is_optional=True, is_duplicate=layer != 0
        )
        for name in names
    ]


def dense_rows_with_biases(hp: HParams) -> list[SpecRow]:
    """Return the rows of a dense feed-forward network that may have biases."""
    return [
        *dense_rows(hp),
        ("ffn_gate.bias", (hp.n_ff,), Op.ADD, True),
        ("ffn_down.bias", (hp.n_embd,), Op.ADD, True),
        ("ffn_up.bias", (hp.n_ff,), Op.ADD, True),
    ]


def moe_rows(hp: HParams) -> list[SpecRow]:
    """Return the rows of experts as Mixtral has them: as wide as ``n_ff``, perhaps without gates."""
    return expert_rows(hp, hp.n_ff, is_gate_optional=True)


def rope_factors(w: LayerWeights, hp: HParams, cp: ContextParams) -> Tensor | None:
    """Return the frequency factors of a layer.

    Notes
    -----
    Mirrors `llama_model::get_rope_factors`.
    """
    freqs = w.get("rope_freqs.weight")
    if freqs is not None:
        return freqs
    return w.get("rope_factors_long.weight" if cp.n_ctx_seq > hp.n_ctx_orig_yarn else "rope_factors_short.weight")


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_llama::graph`.
    """
    b = Builder(p, weights)
    hp = p.hparams
    scale = kq_scale(hp.n_embd_head_v)
    layer_in = b.input_embd()
    b.attention_inputs()
    for w in weights.layers:
        il, residual = w.layer, layer_in
        cur = b.name(b.norm(layer_in, w["attn_norm.weight"], il), "attn_norm", il)
        factors = rope_factors(w, hp, p.params)
        q, k, v = b.qkv(w, cur)
        q, k = b.rope(q, factors), b.rope(k, factors)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.name(b.attention(w, q, k, v, scale), "attn_out", il)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        ffn_in = b.name(ops.add(cur, residual), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = moe_ffn(b, w, cur) if hp.is_moe else b.name(b.ffn(w, cur), "ffn_out", il)
        layer_in = b.name(b.name(ops.add(cur, ffn_in), "ffn_out", il), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)
