"""The architecture qwen3next: gated delta nets in three of four layers, gated attention in the fourth; many experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..delta_net import DeltaInputs, delta_layer
from ..experts import moe_ffn
from ..hparams import HParams, KeyReader
from ..weights import EXPERT_OP, LayerWeights, Present, Row, dense_rows, gate_up_rows, qkv_rows, shared_rows

__all__ = [
    "ARCHITECTURE",
    "decay",
    "finish_layer",
    "gate_and_project",
    "gated_experts",
    "gated_layer_rows",
    "recurrent_rows",
]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    return replace(hp, n_ff_shexp=keys.integer("expert_shared_feed_forward_length", 0, least=0), **keys.recurrent(hp))


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_qwen3next::load_arch_tensors`."""
    n_head, n_keys = hp.n_ssm_head, hp.n_ssm_group * hp.n_ssm_state
    is_joint = f"blk.{i}.ssm_in.weight" in present
    qkvz: list[Row] = [("ssm_in.weight", (hp.n_embd, 2 * n_keys + 2 * hp.n_ssm_inner), Op.MUL_MAT, True)]
    if not is_joint or f"blk.{i}.attn_qkv.weight" in present:
        qkvz.append(("attn_qkv.weight", (hp.n_embd, hp.n_conv_channels), Op.MUL_MAT, False))
        qkvz.append(("attn_gate.weight", (hp.n_embd, hp.n_ssm_inner), Op.MUL_MAT, False))
    own: list[Row] = [("ssm_ba.weight", (hp.n_embd, 2 * n_head), Op.MUL_MAT, False)]
    return gated_layer_rows(hp, i, present, recurrent_rows(hp, qkvz, own))


def gated_layer_rows(hp: HParams, i: int, present: Present, recurrent: list[Row]) -> list[Row]:
    """Return the rows of a layer with attention or, if recurrent, with the given rows."""
    norms: list[Row] = [(f"{n}.weight", (hp.n_embd,), Op.MUL, False) for n in ("attn_norm", "post_attention_norm")]
    feed_forward = moe_rows(hp, i, present) if hp.is_moe else dense_rows(hp)
    if i in hp.recurrent_layers:
        return [*norms, *recurrent, *feed_forward]
    attention: list[Row] = [
        ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
        ("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
        ("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
    ]
    return [*norms, *qkv_rows(hp, i, present, n_q_each=2), *attention, *feed_forward]


def recurrent_rows(hp: HParams, qkvz: list[Row], beta_alpha: list[Row]) -> list[Row]:
    """Return the rows of a gated delta net, with those of its projections."""
    return [
        *qkvz,
        ("ssm_conv1d.weight", (hp.n_ssm_kernel, hp.n_conv_channels), Op.SSM_CONV, False),
        ("ssm_dt.bias", (hp.n_ssm_head,), Op.ADD, False),
        ("ssm_a", (hp.n_ssm_head,), Op.MUL, False),
        *beta_alpha,
        ("ssm_norm.weight", (hp.n_ssm_head_v,), Op.MUL, False),
        ("ssm_out.weight", (hp.n_ssm_inner, hp.n_embd), Op.MUL_MAT, False),
    ]


def moe_rows(hp: HParams, i: int, present: Present) -> list[Row]:
    """Return the rows of experts and of a shared expert with a gate."""
    return [
        ("ffn_gate_inp.weight", (hp.n_embd, hp.n_expert), Op.MUL_MAT, False),
        ("ffn_down_exps.weight", (hp.n_ff_expert, hp.n_embd, hp.n_expert), EXPERT_OP, False),
        *gate_up_rows(hp, i, present),
        ("ffn_gate_inp_shexp.weight", (hp.n_embd,), Op.MUL_MAT, False),
        *shared_rows(hp, hp.n_ff_shexp or hp.n_ff),
    ]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_qwen3next::graph`."""
    il = w.layer
    cur = b.norm_by(w, "attn_norm", layer_in)
    b.graph.expand(cur)
    cur = _delta(b, w, cur) if il in b.hp.recurrent_layers else _attention(b, w, cur)
    return finish_layer(b, w, cur, layer_in, gated_experts)


def finish_layer(
    b: Builder,
    w: LayerWeights,
    cur: Tensor,
    layer_in: Tensor,
    feed_forward: Callable[[Builder, LayerWeights, Tensor], Tensor],
) -> Tensor:
    """Return the residual stream after a layer's feed-forward."""
    il = w.layer
    after = b.name(ops.add(*b.crop(cur, layer_in, il)), "attn_residual", il)
    cur = b.norm_by(w, "post_attention_norm", after, "attn_post_norm")
    cur = b.name(feed_forward(b, w, cur), "ffn_out", il)
    return b.name(b.name(ops.add(cur, after), "post_moe", il), "l_out", il)


def _attention(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return gated attention: the projection of Q also contains the gate, head by head."""
    hp, n, il = b.hp, b.n_tokens, w.layer
    head = hp.n_embd_head_v
    both, k, v = b.qkv_rows(w, cur, n_q_each=2)
    for part, name in ((both, "Qcur_full"), (k, "Kcur"), (v, "Vcur")):
        b.name(part, name, il)
    both = ops.reshape_4d(both, 2 * head, hp.n_head, n, 1)
    q, gate = (
        ops.view_4d(both, head, hp.n_head, n, 1, *both.nb[1:], start) for start in (0, head * both.type.type_size)
    )
    b.name(q, "Qcur_view", il)
    b.name(gate, "gate", il)
    k, v = (ops.reshape_3d(t, head, hp.n_head_kv, n) for t in (k, v))
    q = b.norm_by(w, "attn_q_norm", q, "Qcur_normed")
    k = b.norm_by(w, "attn_k_norm", k, "Kcur_normed")
    q, k, v = b.name_qkv(il, b.rope(q), b.rope(k), v)
    cur = b.name(b.attention(w, q, k, v, b.kq_scale, is_projected=False), "attn_pregate", il)
    gate = ops.cont_2d(gate, head * hp.n_head, n)
    return gate_and_project(b, w, cur, gate)


def gate_and_project(b: Builder, w: LayerWeights, cur: Tensor, gate: Tensor) -> Tensor:
    """Return attention times the sigmoid of its gate, multiplied with ``attn_output``."""
    gate = b.name(ops.sigmoid(gate), "gate_sigmoid", w.layer)
    cur = b.name(ops.mul(cur, gate), "attn_gated", w.layer)
    return b.name(b.project(w, "attn_output", cur), "attn_output", w.layer)


def _delta(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return the output of a gated delta net; beta and alpha are one product, group by group."""
    hp, il, n_each, n_seqs = b.hp, w.layer, b.part.n_seq_tokens, b.part.n_seqs
    qkv, z = _qkvz(b, w, cur)
    n_group, n_times = hp.n_ssm_group, hp.n_ssm_head // hp.n_ssm_group
    mixed = b.name(ops.mul_mat(w["ssm_ba.weight"], cur), "linear_attn_mixed_ba", il)
    mixed = ops.reshape_4d(mixed, 2 * n_times, n_group, n_each, n_seqs)
    beta, alpha = (
        ops.view_4d(mixed, n_times, n_group, n_each, n_seqs, *mixed.nb[1:], start)
        for start in (0, n_times * mixed.type.type_size)
    )
    b.name(beta, "b", il)
    b.name(alpha, "a", il)
    beta = ops.sigmoid(ops.cont(beta))
    alpha = ops.cont_3d(alpha, hp.n_ssm_head, n_each, n_seqs)
    gate = decay(b, w, alpha)
    beta = ops.reshape_4d(beta, 1, hp.n_ssm_head, n_each, n_seqs)
    gate = ops.reshape_4d(gate, 1, hp.n_ssm_head, n_each, n_seqs)
    return delta_layer(b, w, DeltaInputs(qkv, z, beta, gate), are_heads_interleaved=True)


def decay(b: Builder, w: LayerWeights, alpha: Tensor) -> Tensor:
    """Return the logarithm of the decay of each head's state: [n_head, n_seq_token, n_seq]."""
    cur = b.name(ops.softplus(ops.add(alpha, w["ssm_dt.bias"])), "a_softplus", w.layer)
    return b.name(ops.mul(cur, w["ssm_a"]), "gate", w.layer)


def _qkvz(b: Builder, w: LayerWeights, cur: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, K and V in one row per token, and the gate; older files have them in one product, by groups."""
    hp, il, n_each, n_seqs = b.hp, w.layer, b.part.n_seq_tokens, b.part.n_seqs
    if w.get("attn_qkv.weight") is not None:
        qkv = ops.mul_mat(w["attn_qkv.weight"], cur)
        qkv = b.name(ops.reshape_3d(qkv, qkv.ne[0], n_each, n_seqs), "linear_attn_qkv_mixed", il)
        return qkv, b.name(ops.mul_mat(w["attn_gate.weight"], cur), "z", il)
    n_k, n_v = hp.n_ssm_state, hp.n_ssm_head_v * (hp.n_ssm_head // hp.n_ssm_group)
    mixed = b.name(ops.mul_mat(w["ssm_in.weight"], cur), "linear_attn_mixed_qkvz", il)
    mixed = ops.reshape_4d(mixed, 2 * n_k + 2 * n_v, hp.n_ssm_group, n_each, n_seqs)
    parts: list[Tensor] = []
    start = 0
    for size, name in ((n_k, "q"), (n_k, "k"), (n_v, "v"), (n_v, "z")):
        at = start * mixed.type.type_size
        part = ops.view_4d(mixed, size, hp.n_ssm_group, n_each, n_seqs, *mixed.nb[1:], at)
        parts.append(b.name(ops.cont(part) if name == "z" else part, name, il))
        start += size
    q, k, v, z = parts
    flat = [
        b.name(ops.cont_3d(t, t.ne[0] * hp.n_ssm_group, n_each, n_seqs), name, il)
        for t, name in ((q, "query_flat"), (k, "key_flat"), (v, "value_flat"))
    ]
    qkv = ops.concat(ops.concat(flat[0], flat[1], 0), flat[2], 0)
    return b.name(qkv, "qkv_mixed", il), z


def gated_experts(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return the chosen experts' outputs plus the shared expert's times the sigmoid of its gate."""
    il = w.layer
    routed = moe_ffn(b, w, cur)
    shared = b.name(b.ffn(w, cur, suffix="_shexp"), "ffn_shexp", il)
    gate = b.name(ops.mul_mat(w["ffn_gate_inp_shexp.weight"], cur), "shared_expert_gate", il)
    gate = b.name(ops.sigmoid(gate), "shared_expert_gate_sigmoid", il)
    shared = b.name(ops.mul(shared, gate), "ffn_shexp_gated", il)
    return ops.add(routed, shared)


ARCHITECTURE = Architecture(
    moe_names=("qwen3next",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_partial_rope=True,
    has_ffn_scales=True,
    embedding_name="model.embed_tokens",
)
