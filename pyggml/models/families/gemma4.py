"""The architecture gemma4: two kinds of heads, last layers that share K and V of earlier ones; dense or with experts.

Dense models may have a second embedding of each token for each layer, which the layer adds after its feed-forward.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor, pad_ne
from ...types import Op
from ..architecture import Architecture, finish_decoder
from ..blocks import Builder
from ..experts import moe_ffn
from ..graph import GraphParams, ModelGraph
from ..hparams import HParams, KeyReader, round_f32
from ..weights import EXPERT_OP, LayerWeights, Present, Row, Weights, WeightSpec, dense_rows, gate_up_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    """Add the sizes of each layer.

    Notes
    -----
    Mirrors `llama_model_gemma4::load_arch_hparams`. Differs: contradicting sizes, and shared layers without an earlier
    layer of their kind, are refused; upstream ends the process.
    """
    head, head_v = (keys.integer(f"attention.{which}_length_swa") for which in ("key", "value"))
    n_rot = keys.integer("rope.dimension_count_swa", hp.n_rot)
    if head != head_v or n_rot > head or n_rot % 2:
        sizes = f"{head} (K), {head_v} (V), {n_rot} rotated"
        raise keys.error("attention.key_length_swa", f"does not go with the other sizes of windows: {sizes}")
    if not keys.has("attention.sliding_window_pattern"):
        raise keys.error("attention.sliding_window_pattern", "is missing")
    n_head_kv = keys.by_layer("attention.head_count_kv", hp.n_layer_all, hp.n_head)
    if any(hp.n_head % n for n in n_head_kv):
        raise keys.error("attention.head_count", f"is {hp.n_head}, no multiple of heads of K and V: {n_head_kv}")
    swa_layers = keys.swa_layers(hp.n_layer_all, 1)
    n_shared = keys.integer("attention.shared_kv_layers", 0, least=0)
    n_own = hp.n_layer_all - n_shared
    if n_own < 2 or (n_shared and (n_own - 1 in swa_layers or n_own - 2 not in swa_layers)):
        raise keys.error(
            "attention.shared_kv_layers", f"is {n_shared}: of {n_own} layers, the last two are not used again"
        )
    return replace(
        hp,
        n_swa=keys.integer("attention.sliding_window"),
        swa_layers=frozenset(i for i in swa_layers if i < hp.n_layer),
        rope_freq_base_swa=keys.freq_base("rope.freq_base_swa", 10000.0),
        n_embd_head_swa=head,
        n_rot_swa=n_rot,
        n_head_kv_by_layer=n_head_kv,
        n_ff_by_layer=keys.by_layer("feed_forward_length", hp.n_layer_all, hp.n_ff),
        n_layer_shared_kv=n_shared,
        n_embd_per_layer=keys.integer("embedding_length_per_layer_input", least=0),
        token_scale=round_f32(math.sqrt(hp.n_embd)),
        logit_softcap=round_f32(keys.number("final_logit_softcapping", 30.0)),
    )


def _more_weights(hp: HParams) -> list[WeightSpec]:
    """Return the specs of the per-layer embeddings."""
    if not hp.n_embd_per_layer:
        return []
    n_all = hp.n_embd_per_layer * hp.n_layer
    return [
        WeightSpec("per_layer_token_embd.weight", pad_ne((n_all, hp.n_vocab)), "input", -1, Op.GET_ROWS),
        WeightSpec("per_layer_model_proj.weight", pad_ne((hp.n_embd, n_all)), "repeating", 0, Op.MUL_MAT),
        WeightSpec("per_layer_proj_norm.weight", pad_ne((hp.n_embd_per_layer,)), "repeating", 0, Op.MUL),
    ]


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_gemma4::load_arch_tensors`."""
    own = hp.of_layer(i)
    n_embd, head, is_own = hp.n_embd, own.n_embd_head_k, hp.kv_layer(i) == i
    n_q, n_k, n_v = head * hp.n_head, own.n_embd_k_gqa, own.n_embd_v_gqa
    rows: list[Row] = [("attn_norm.weight", (n_embd,), Op.MUL, False)]
    if f"blk.{i}.attn_qkv.weight" in present:
        rows.append(("attn_qkv.weight", (n_embd, n_q + n_k + n_v), Op.MUL_MAT, False))
    else:
        rows.append(("attn_q.weight", (n_embd, n_q), Op.MUL_MAT, False))
        rows.append(("attn_k.weight", (n_embd, n_k), Op.MUL_MAT, not is_own))
        rows.append(("attn_v.weight", (n_embd, n_v), Op.MUL_MAT, True))
    rows += [
        ("attn_output.weight", (n_q, n_embd), Op.MUL_MAT, False),
        ("attn_q_norm.weight", (head,), Op.MUL, False),
        ("attn_k_norm.weight", (head,), Op.MUL, not is_own),
        ("post_attention_norm.weight", (n_embd,), Op.MUL, False),
        ("layer_output_scale.weight", (1,), Op.MUL, True),
    ]
    if i not in hp.swa_layers:
        rows.append(WeightSpec("rope_freqs.weight", pad_ne((head // 2,)), "repeating", i, Op.ROPE))
    return [*rows, *_feed_forward_rows(own, i, present), *_per_layer_rows(hp)]


def _feed_forward_rows(own: HParams, i: int, present: Present) -> list[Row]:
    norm = (own.n_embd,)
    rows: list[Row] = [
        ("ffn_norm.weight", norm, Op.MUL, False),
        *dense_rows(own),
        ("post_ffw_norm.weight", norm, Op.MUL, False),
    ]
    if not own.is_moe:
        return rows
    return [
        *rows,
        ("ffn_gate_inp.weight", (own.n_embd, own.n_expert), Op.MUL_MAT, False),
        ("ffn_gate_inp.scale", norm, Op.MUL_MAT, False),
        *[(f"{name}.weight", norm, Op.MUL, False) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")],
        *gate_up_rows(own, i, present),
        ("ffn_down_exps.weight", (own.n_ff_expert, own.n_embd, own.n_expert), EXPERT_OP, False),
    ]


def _per_layer_rows(hp: HParams) -> list[Row]:
    n = hp.n_embd_per_layer
    if not n:
        return []
    return [
        ("inp_gate.weight", (hp.n_embd, n), Op.MUL_MAT, False),
        ("proj.weight", (n, hp.n_embd), Op.MUL_MAT, False),
        ("post_norm.weight", (hp.n_embd,), Op.MUL, False),
    ]


def _graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch.

    Notes
    -----
    Mirrors `llama_model_gemma4::graph` as of b11549. Differs from b11434, which makes the per-layer embeddings after
    the model's own, and crops after the last norm.
    """
    b = Builder(p, weights)
    hp, by_layer = p.hparams, None
    if hp.n_embd_per_layer:
        by_layer = ops.get_rows(weights["per_layer_token_embd.weight"], b.input_layer_tokens())
        b.graph.expand(b.name(by_layer, "inp_per_layer_selected"))
    cur = b.name(b.input_embd(), "inp_scaled")
    b.make_inputs()
    if by_layer is not None:
        by_layer = _project_layers(b, weights.layers[0], cur, by_layer)
    return finish_decoder(b, b.layers(partial(_layer, b, by_layer), cur))


def _project_layers(b: Builder, w: LayerWeights, cur: Tensor, by_layer: Tensor) -> Tensor:
    """Return the per-layer embeddings: f32, [n_embd_per_layer, n_token, n_layer]."""
    hp, n = b.hp, b.hp.n_embd_per_layer
    by_layer = ops.scale(by_layer, round_f32(math.sqrt(n)))
    by_layer = ops.reshape_3d(by_layer, n, hp.n_layer, b.n_tokens)
    projected = ops.mul_mat(w["per_layer_model_proj.weight"], cur)
    projected = ops.scale(projected, round_f32(1.0 / round_f32(math.sqrt(hp.n_embd))))
    projected = ops.reshape_3d(projected, n, hp.n_layer, b.n_tokens)
    projected = b.name(b.norm(projected, w["per_layer_proj_norm.weight"], -1), "per_layer_proj")
    both = ops.scale(ops.add(projected, by_layer), round_f32(1.0 / round_f32(math.sqrt(2.0))))
    return ops.cont(ops.permute(b.name(both, "inp_per_layer"), 0, 2, 1, 3))


def _layer(b: Builder, by_layer: Tensor | None, w: LayerWeights, layer_in: Tensor) -> Tensor:
    il = w.layer
    cur = _attention(b, w, b.norm_by(w, "attn_norm", layer_in))
    cur, residual = b.crop(cur, layer_in, il)
    after = b.name(ops.add(b.norm_by(w, "post_attention_norm", cur, "attn_post_norm"), residual), "attn_out", il)
    if b.hp.is_moe:
        cur = _experts(b, w, after)
    else:
        cur = b.name(b.ffn(w, b.norm_by(w, "ffn_norm", after), activation="geglu"), "ffn_out", il)
    cur = b.name(b.norm(cur, w["post_ffw_norm.weight"], -1), "ffn_post_norm", il)
    cur = ops.add(cur, after)
    if by_layer is not None:
        cur = _add_layer_input(b, w, cur, by_layer)
    factor = w.get("layer_output_scale.weight")
    if factor is not None:
        cur = b.name(ops.mul(cur, factor), "out_scaled", il)
    return b.name(cur, "l_out", il)


def _attention(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    hp, il, n = b.hp.of_layer(w.layer), w.layer, b.n_tokens
    factors = None if il in hp.swa_layers else w["rope_freqs.weight"]
    head, fused = hp.n_embd_head_k, None
    if w.get("attn_qkv.weight") is not None:
        fused = b.name(b.project(w, "attn_qkv", cur), "wqkv", il)
        q = _part(fused, head * hp.n_head, n, 0)
    else:
        q = b.project(w, "attn_q", cur)
    q = ops.reshape_3d(b.name(q, "Qcur", il), head, hp.n_head, n)
    q = b.norm_by(w, "attn_q_norm", q, "Qcur_normed")
    q = b.name(b.rope(q, factors, layer=il), "Qcur_pos", il)
    if hp.kv_layer(il) != il:
        return b.attention(w, q, None, None, 1.0)
    if fused is not None:
        start = head * hp.n_head
        k, v = (_part(fused, hp.n_embd_k_gqa, n, at) for at in (start, start + hp.n_embd_k_gqa))
    else:
        k = b.project(w, "attn_k", cur)
        v = k if w.get("attn_v.weight") is None else b.project(w, "attn_v", cur)
    k, v = b.name(k, "Kcur", il), b.name(v, "Vcur", il)
    k, v = (ops.reshape_3d(t, head, hp.n_head_kv, n) for t in (k, v))
    k = b.norm(k, w["attn_k_norm.weight"], il)
    v = ops.rms_norm(v, hp.norm_rms_eps)
    k, v = b.name(k, "Kcur_normed", il), b.name(v, "Vcur_normed", il)
    k = b.name(b.rope(k, factors, layer=il), "Kcur_pos", il)
    return b.attention(w, q, k, v, 1.0)


def _part(fused: Tensor, size: int, n_tokens: int, start: int) -> Tensor:
    return ops.cont(ops.view_2d(fused, size, n_tokens, fused.nb[1], start * fused.type.type_size))


def _experts(b: Builder, w: LayerWeights, after: Tensor) -> Tensor:
    """Return the sum of a dense feed-forward and the chosen experts' outputs, each with its own norms."""
    hp, il = b.hp, w.layer
    dense = b.ffn(w, b.norm_by(w, "ffn_norm", after, "ffn_norm_1"), activation="geglu")
    dense = b.norm_by(w, "post_ffw_norm_1", dense, "ffn_mlp")
    routed = b.norm_by(w, "pre_ffw_norm_2", after, "ffn_norm_2")
    cur = ops.scale(ops.rms_norm(after, hp.norm_rms_eps), round_f32(1.0 / round_f32(math.sqrt(hp.n_embd))))
    logits = ops.mul_mat(w["ffn_gate_inp.weight"], ops.mul(cur, w["ffn_gate_inp.scale"]))
    routed = moe_ffn(b, w, routed, activation="geglu", logits=b.name(logits, "ffn_moe_logits", il))
    routed = b.norm_by(w, "post_ffw_norm_2", routed, "ffn_moe")
    return b.name(ops.add(dense, routed), "ffn_moe_combined", il)


def _add_layer_input(b: Builder, w: LayerWeights, cur: Tensor, by_layer: Tensor) -> Tensor:
    """Return the residual stream plus the gated per-layer embedding."""
    il, size = w.layer, by_layer.ne[0] * by_layer.ne[1] * by_layer.type.type_size
    b.name(cur, "pe_in", il)
    gate = ops.gelu(b.project(w, "inp_gate", cur))
    own = ops.view_2d(by_layer, by_layer.ne[0], by_layer.ne[1], by_layer.type.row_size(by_layer.ne[0]), il * size)
    if il == b.hp.n_layer - 1:
        (own,) = b.choose_outputs(own)
    out = b.project(w, "proj", ops.mul(gate, own))
    return ops.add(cur, b.norm_by(w, "post_norm", out, "per_layer_embd_out"))


ARCHITECTURE = Architecture(
    names=("gemma4",),
    may_have_experts=True,
    rope=RopeType.NEOX,
    hparams=_hparams,
    more_weights=_more_weights,
    layer_weights=_weights,
    graph=_graph,
    has_partial_rope=True,
    has_ffn_scales=True,
    uneven_keys=("attention.head_count_kv", "feed_forward_length"),
)
