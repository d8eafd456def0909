"""The architecture gpt-oss: attention sinks, a sliding window in every other layer, experts with biases."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ops
from ..gguf import TensorInfo
from ..types import Op
from .blocks import Builder, kq_scale
from .experts import moe_ffn
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .weights import Weights, WeightSpec, expert_rows, layer_specs, qkv_specs, trunk_specs

__all__ = ["build_graph", "weight_specs"]


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors of the architecture, in upstream's order.

    Notes
    -----
    Mirrors `llama_model_openai_moe::load_arch_tensors`.
    """
    specs = trunk_specs(hp, present, tied_head=False)
    n_heads, n_ff, n_expert = hp.n_rot * hp.n_head, hp.n_ff_exp, hp.n_expert
    for i in range(hp.n_layer):
        specs += layer_specs(
            i,
            [
                ("attn_norm.weight", (hp.n_embd,), Op.MUL, False),
                ("post_attention_norm.weight", (hp.n_embd,), Op.MUL, False),
            ],
        )
        specs += qkv_specs(hp, i, present)
        specs += layer_specs(
            i,
            [
                ("attn_output.weight", (n_heads, hp.n_embd), Op.MUL_MAT, False),
                ("attn_sinks.weight", (hp.n_head,), Op.SCALE, False),
                *expert_rows(hp, n_ff),
                ("attn_output.bias", (hp.n_embd,), Op.MUL_MAT, False),
                ("ffn_gate_inp.bias", (n_expert,), Op.MUL_MAT, False),
                ("ffn_gate_exps.bias", (n_ff, n_expert), Op.MUL_MAT_ID, False),
                ("ffn_down_exps.bias", (hp.n_embd, n_expert), Op.MUL_MAT_ID, False),
                ("ffn_up_exps.bias", (n_ff, n_expert), Op.MUL_MAT_ID, False),
            ],
        )
    return specs


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Its last layer runs for all tokens: the rows whose logits are wanted are chosen after it.

    Notes
    -----
    Mirrors `llama_model_openai_moe::graph`.
    """
    b = Builder(p, weights)
    hp = p.hparams
    scale = kq_scale(hp.n_rot)
    layer_in = b.input_embd()
    b.attention_inputs()
    for w in weights.layers:
        il = w.layer
        cur = b.name(b.norm(layer_in, w["attn_norm.weight"], il), "attn_norm", il)
        q, k, v = b.qkv(w, cur)
        q, k = b.rope(q, layer=il), b.rope(k, layer=il)
        for part, name in ((q, "Qcur"), (k, "Kcur"), (v, "Vcur")):
            b.name(part, name, il)
        cur = b.name(b.attention(w, q, k, v, scale, sinks=w["attn_sinks.weight"]), "attn_out", il)
        ffn_in = b.name(ops.add(cur, layer_in), "ffn_inp", il)
        cur = b.name(b.norm(ffn_in, w["post_attention_norm.weight"], il), "attn_post_norm", il)
        cur = moe_ffn(
            b,
            w,
            cur,
            gating="softmax_weight",
            activation="swiglu_oai",
            norm_weights=False,
            weights_scale=hp.expert_weights_scale,
        )
        layer_in = b.name(ops.add(cur, ffn_in), "l_out", il)
    (cur,) = b.choose_outputs(layer_in)
    embd = b.name(b.norm(cur, weights["output_norm.weight"], -1), "result_norm")
    return b.finish(b.name(b.head(embd), "result_output"), embd)
