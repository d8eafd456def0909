"""The architecture deepseek2 (DeepSeek V2, V3, R1): attention over a latent space, experts in groups beside a shared one.

The cache holds one short vector per token instead of K and V. The weight that would expand K is applied to Q, the one
that would expand V to the result.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..context import ContextParams
from ..experts import routed_ffn, with_shared
from ..hparams import HParams, KeyReader, round_f32
from ..weights import EXPERT_OP, LayerWeights, Present, Row, dense_rows, gate_up_rows, shared_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    """Add the sizes of the latent space and the routing.

    Notes
    -----
    Mirrors `llama_model_deepseek2::load_arch_hparams`. Differs: files without separate weights for K and V, and scaling
    by position, are refused.
    """
    if keys.number("attention.temperature_scale", 0.0):
        raise keys.unsupported("attention.temperature_scale", "is set, which is not supported")
    k_mla, v_mla = (keys.integer(f"attention.{which}_length_mla", 0, least=0) for which in ("key", "value"))
    rank, head_k, n_rot = keys.integer("attention.kv_lora_rank"), hp.n_embd_head_k, hp.n_rot
    if not k_mla or not v_mla:
        raise keys.error("attention.key_length_mla", "is missing: the model was converted before MLA was kept so")
    if (head_k, hp.n_head_kv) != (rank + n_rot, 1) or k_mla <= n_rot or n_rot % 2:
        sizes = f"{head_k} (K), {rank} (V), {k_mla} (K unfolded), {n_rot} rotated, {hp.n_head_kv} heads"
        raise keys.error("attention.kv_lora_rank", f"is {rank}, which does not go with {sizes}")
    # models without a latent space for Q, and with sigmoid routing but no key, are recognised by their size
    is_lite = hp.n_layer in (26, 27) or (hp.n_layer == 48 and keys.size_vocab() == 128256)
    is_flash = hp.n_layer in (47, 48) and keys.size_vocab() == 154880
    log_mul = round_f32(keys.number("rope.scaling.yarn_log_multiplier", 0.0))
    return replace(
        hp,
        n_embd_head_v=rank,  # whatever the file says: V is a part of K
        n_lora_q=0 if is_lite else keys.integer("attention.q_lora_rank", least=0),
        n_lora_kv=rank,
        n_embd_head_k_mla=k_mla,
        n_embd_head_v_mla=v_mla,
        rope_yarn_log_mul=round_f32(log_mul / round_f32(0.1)),
        n_layer_dense_lead=keys.n_layer_dense_lead(hp.n_layer),
        n_expert_shared=keys.integer("expert_shared_count", least=0),
        expert_gating=keys.gating("sigmoid" if is_flash else "softmax"),
        **keys.expert_weights(),
    )


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_deepseek2::load_arch_tensors`."""
    k_mla, v_mla, rank = hp.n_embd_head_k_mla, hp.n_embd_head_v_mla, hp.n_lora_kv
    n_q = hp.n_head * k_mla
    rows: list[Row] = [("attn_norm.weight", (hp.n_embd,), Op.MUL, False)]
    if hp.n_lora_q:
        rows.append(("attn_q_a_norm.weight", (hp.n_lora_q,), Op.MUL, False))
    rows.append(("attn_kv_a_norm.weight", (rank,), Op.MUL, False))
    if hp.n_lora_q:
        rows.append(("attn_q_a.weight", (hp.n_embd, hp.n_lora_q), Op.MUL_MAT, False))
        rows.append(("attn_q_b.weight", (hp.n_lora_q, n_q), Op.MUL_MAT, False))
    else:
        rows.append(("attn_q.weight", (hp.n_embd, n_q), Op.MUL_MAT, False))
    return [
        *rows,
        ("attn_kv_a_mqa.weight", (hp.n_embd, rank + hp.n_rot), Op.MUL_MAT, False),
        ("attn_k_b.weight", (k_mla - hp.n_rot, rank, hp.n_head), Op.MUL_MAT, False),
        ("attn_v_b.weight", (rank, v_mla, hp.n_head), Op.MUL_MAT, False),
        ("attn_output.weight", (hp.n_head * v_mla, hp.n_embd), Op.MUL_MAT, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *(dense_rows(hp) if i < hp.n_layer_dense_lead else _moe_rows(hp, i, present)),
    ]


def _moe_rows(hp: HParams, i: int, present: Present) -> list[Row]:
    n_ff, n_expert = hp.n_ff_exp, hp.n_expert
    return [
        ("ffn_gate_inp.weight", (hp.n_embd, n_expert), Op.MUL_MAT, False),
        ("exp_probs_b.bias", (n_expert,), Op.ADD, True),
        ("ffn_down_exps.weight", (n_ff, hp.n_embd, n_expert), EXPERT_OP, False),
        *gate_up_rows(hp, i, present),
        *shared_rows(hp, n_ff * hp.n_expert_shared),
    ]


def _mla_scale(hp: HParams, cp: ContextParams) -> float:
    """Return the factor of Q times K, with YaRN's part, computed in float32."""
    log = round_f32(math.log(round_f32(1.0 / cp.freq_scale)))
    tenth = round_f32(0.1)
    attn_factor = round_f32(cp.attn_factor * round_f32(1.0 + round_f32(tenth * log)))
    stretch = round_f32(round_f32(tenth * hp.rope_yarn_log_mul) * log)
    mscale = round_f32(attn_factor * round_f32(1.0 + stretch))
    return round_f32(round_f32(mscale * mscale) / round_f32(math.sqrt(hp.n_embd_head_k_mla)))


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_deepseek2::graph` with MLA."""
    il = w.layer
    q, k, v = _latent_qkv(b, w, b.norm_by(w, "attn_norm", layer_in))
    cur = b.mla_attention(w, q, k, v, _mla_scale(b.hp, b.cp))
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.norm_by(w, "ffn_norm", ffn_in)
    cur = b.ffn(w, cur) if il < b.hp.n_layer_dense_lead else with_shared(b, w, cur, routed_ffn(b, w, cur))
    return b.name(ops.add(b.name(cur, "ffn_out", il), ffn_in), "l_out", il)


def _latent_qkv(b: Builder, w: LayerWeights, cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K and V in the latent space: [rank + n_rot, n_head or 1, n_token], V without the rotated part."""
    hp, n, il = b.hp, b.n_tokens, w.layer
    rank, n_nope = hp.n_lora_kv, hp.n_embd_head_k_mla - hp.n_rot
    q = _project_q(b, w, cur)
    both = b.name(ops.mul_mat(w["attn_kv_a_mqa.weight"], cur), "kv_cmpr_pe", il)
    row = both.type.row_size
    kv = b.name(ops.view_2d(both, rank, n, row(rank + hp.n_rot), 0), "kv_cmpr", il)
    k_pe = ops.view_3d(both, hp.n_rot, 1, n, row(rank + hp.n_rot), row(rank + hp.n_rot), row(rank))
    k_pe = b.name(b.rope(b.name(k_pe, "k_pe", il)), "k_pe", il)
    kv = b.name(b.norm(kv, w["attn_kv_a_norm.weight"], il), "kv_cmpr", il)
    q_nope = b.name(ops.view_3d(q, n_nope, hp.n_head, n, q.nb[1], q.nb[2], 0), "q_nope", il)
    q_pe = ops.view_3d(q, hp.n_rot, hp.n_head, n, q.nb[1], q.nb[2], q.type.row_size(n_nope))
    q_pe = b.name(b.rope(b.name(q_pe, "q_pe", il)), "q_pe", il)
    q_nope = b.name(ops.permute(q_nope, 0, 2, 1, 3), "q_nope_perm", il)
    absorbed = b.name(ops.mul_mat(w["attn_k_b.weight"], q_nope), "q_nope_absorbed", il)
    absorbed = b.name(ops.permute(absorbed, 0, 2, 1, 3), "q_nope_absorbed_perm", il)
    q = b.name(ops.concat(absorbed, q_pe, 0), "Qcur", il)
    kv = b.name(ops.reshape_3d(kv, rank, 1, n), "kv_cmpr_reshape", il)
    k = b.name(ops.concat(kv, k_pe, 0), "Kcur", il)
    return q, k, b.name(kv, "Vcur", il)


def _project_q(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return Q: [n_embd_head_k_mla, n_head, n_token], through its latent space if the model has one."""
    hp, il = b.hp, w.layer
    if hp.n_lora_q:
        q = b.name(ops.mul_mat(w["attn_q_a.weight"], cur), "q", il)
        q = b.name(b.norm(q, w["attn_q_a_norm.weight"], il), "q", il)
        q = b.name(ops.mul_mat(w["attn_q_b.weight"], q), "q", il)
    else:
        q = b.name(ops.mul_mat(w["attn_q.weight"], cur), "q", il)
    return b.name(ops.reshape_3d(q, hp.n_embd_head_k_mla, hp.n_head, b.n_tokens), "q", il)


ARCHITECTURE = Architecture(
    moe_names=("deepseek2",), rope=RopeType.NORMAL, hparams=_hparams, layer_weights=_weights, layer=_layer
)
