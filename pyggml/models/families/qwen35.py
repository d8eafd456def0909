"""The architectures qwen35 (dense) and qwen35moe (Qwen3.5, Qwen3.6): qwen3next with M-RoPE and separate projection weights."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..delta_net import DeltaInputs, delta_layer
from ..hparams import HParams, KeyReader
from ..weights import LayerWeights, Present, Row
from .qwen3next import decay, finish_layer, gate_and_project, gated_experts, gated_layer_rows, recurrent_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    n_ff_shexp = keys.integer("expert_shared_feed_forward_length", 0, least=0) if hp.is_moe else 0
    return replace(hp, rope_sections=keys.mrope_sections(), n_ff_shexp=n_ff_shexp, **keys.recurrent(hp))


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `load_arch_tensors` of `llama_model_qwen35` and `llama_model_qwen35moe`."""
    rows = recurrent_rows(
        hp,
        [
            ("attn_qkv.weight", (hp.n_embd, hp.n_conv_channels), Op.MUL_MAT, False),
            ("attn_gate.weight", (hp.n_embd, hp.n_ssm_inner), Op.MUL_MAT, False),
        ],
        [(f"ssm_{name}.weight", (hp.n_embd, hp.n_ssm_head), Op.MUL_MAT, False) for name in ("beta", "alpha")],
    )
    return gated_layer_rows(hp, i, present, rows)


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_qwen35::graph` and `llama_model_qwen35moe::graph`."""
    cur = b.norm_by(w, "attn_norm", layer_in)
    b.graph.expand(cur)
    cur = _delta(b, w, cur) if w.layer in b.hp.recurrent_layers else _attention(b, w, cur)
    return finish_layer(b, w, cur, layer_in, gated_experts if b.hp.is_moe else Builder.ffn)


def _attention(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return gated attention: the projection of Q also contains the gate, head by head."""
    hp, n, il = b.hp, b.n_tokens, w.layer
    head = hp.n_embd_head_v
    both, k, v = b.qkv_rows(w, cur, n_q_each=2)
    for part, name in ((both, "Qcur_full"), (k, "Kcur"), (v, "Vcur")):
        b.name(part, name, il)
    step = 2 * head * both.type.type_size
    q = ops.view_3d(both, head, hp.n_head, n, step, step * hp.n_head, 0)
    q = b.norm_by(w, "attn_q_norm", b.name(q, "Qcur_reshaped", il), "Qcur_normed")
    k = b.norm_by(w, "attn_k_norm", ops.reshape_3d(k, head, hp.n_head_kv, n), "Kcur_normed")
    gate = ops.view_3d(both, head, hp.n_head, n, step, step * hp.n_head, step // 2)
    gate = b.name(ops.cont_2d(gate, head * hp.n_head, n), "gate_reshaped", il)
    v = ops.reshape_3d(v, head, hp.n_head_kv, n)
    q, k, v = b.name_qkv(il, b.rope(q), b.rope(k), v)
    cur = b.name(b.attention(w, q, k, v, b.kq_scale, is_projected=False), "attn_pregate", il)
    return gate_and_project(b, w, cur, gate)


def _delta(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return the output of a gated delta net."""
    hp, il, n_each, n_seqs = b.hp, w.layer, b.part.n_seq_tokens, b.part.n_seqs
    qkv = b.project(w, "attn_qkv", cur)
    qkv = b.name(ops.reshape_3d(qkv, qkv.ne[0], n_each, n_seqs), "linear_attn_qkv_mixed", il)
    z = b.name(b.project(w, "attn_gate", cur), "z", il)
    beta = ops.reshape_4d(b.project(w, "ssm_beta", cur), 1, hp.n_ssm_head, n_each, n_seqs)
    beta = b.name(ops.sigmoid(b.name(beta, "beta", il)), "beta_sigmoid", il)
    alpha = ops.reshape_3d(b.project(w, "ssm_alpha", cur), hp.n_ssm_head, n_each, n_seqs)
    gate = decay(b, w, b.name(alpha, "alpha", il))
    gate = ops.reshape_4d(gate, 1, hp.n_ssm_head, n_each, n_seqs)
    return delta_layer(b, w, DeltaInputs(qkv, z, beta, gate), are_heads_interleaved=False)


ARCHITECTURE = Architecture(
    names=("qwen35",),
    moe_names=("qwen35moe",),
    rope=RopeType.IMROPE,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_partial_rope=True,
    has_ffn_scales=True,
    has_recurrent_scales=True,
    embedding_name="model.input_embed",
)
