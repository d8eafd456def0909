"""The architecture gemma3: norms before and after each part of a layer, and a sliding window in five layers of six."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..types import Op
from .blocks import Builder
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .weights import Weights, WeightSpec, dense_rows, layer_specs, qkv_specs, trunk_specs

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `llama_model_gemma3::load_arch_tensors`. Differs: layers behind the head of models of embeddings are not known.
    """
    specs = trunk_specs(hp, present)
    n_embd, head = (hp.n_embd,), (hp.n_embd_head_k,)
    for i in range(hp.n_layer):
        specs += layer_specs(i, [("attn_norm.weight", n_embd, Op.MUL, False)])
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
                ("post_attention_norm.weight", n_embd, Op.MUL, False),
                ("attn_k_norm.weight", head, Op.MUL, False),
                ("attn_q_norm.weight", head, Op.MUL, False),
                ("ffn_norm.weight", n_embd, Op.MUL, False),
                *dense_rows(hp),
                ("post_ffw_norm.weight", n_embd, Op.MUL, False),
            ],
        )
    return specs


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_gemma3::graph`.
    """
    b = Builder(p, weights)
    hp = p.hparams
    layer_in = b.name(b.input_embd(), "inp_scaled")
    b.attention_inputs()
    for w in weights.layers:
        il, residual = w.layer, layer_in
        cur = b.name(b.norm(layer_in, w["attn_norm.weight"], il), "attn_norm", il)
        q, k, v = b.qkv(w, cur)
        q = b.rope(b.name(b.norm(q, w["attn_q_norm.weight"], il), "Qcur_normed", il), layer=il)
        k = b.rope(b.name(b.norm(k, w["attn_k_norm.weight"], il), "Kcur_normed", il), layer=il)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.attention(w, ops.scale(q, hp.attention_scale), k, v, 1.0)
        if il == hp.n_layer - 1:
            cur, residual = b.choose_outputs(cur, residual)
        cur = b.name(b.norm(cur, w["post_attention_norm.weight"], il), "attn_post_norm", il)
        after = b.name(ops.add(cur, residual), "sa_out", il)
        cur = b.name(b.norm(after, w["ffn_norm.weight"], il), "ffn_norm", il)
        cur = b.name(b.ffn(w, cur, activation="geglu"), "ffn_out", il)
        cur = b.name(b.norm(cur, w["post_ffw_norm.weight"], -1), "ffn_post_norm", il)
        layer_in = b.name(ops.add(cur, after), "l_out", il)
    embd = b.name(b.norm(layer_in, weights["output_norm.weight"], -1), "result_norm")
    logits = b.head(embd)
    if hp.logit_softcap:
        logits = ops.scale(ops.tanh(ops.scale(logits, 1.0 / hp.logit_softcap)), hp.logit_softcap)
    return b.finish(b.name(logits, "result_output"), embd)
