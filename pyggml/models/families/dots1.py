"""The architecture dots1: norms of each head of Q and K, dense layers first, then experts beside a shared one."""

from __future__ import annotations

from dataclasses import replace

from ... import ops
from ...ops import RopeType
from ...tensor import Tensor
from ...types import Op
from ..architecture import Architecture
from ..blocks import Builder
from ..experts import routed_ffn, with_shared
from ..hparams import HParams, KeyReader
from ..weights import LayerWeights, Present, Row, attention_rows, dense_rows, expert_rows, shared_rows

__all__ = ["ARCHITECTURE"]


def _hparams(keys: KeyReader, hp: HParams) -> HParams:
    return replace(
        hp,
        n_layer_dense_lead=keys.n_layer_dense_lead(hp.n_layer),
        n_expert_shared=keys.integer("expert_shared_count", least=0),
        expert_gating=keys.gating(),
        **keys.expert_weights(),
    )


def _weights(hp: HParams, i: int, present: Present) -> list[Row]:
    """Mirrors `llama_model_dots1::load_arch_tensors`."""
    return [
        *attention_rows(hp, i, present),
        ("attn_k_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
        ("attn_q_norm.weight", (hp.n_embd_head_k,), Op.MUL, False),
        ("ffn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *(dense_rows(hp) if i < hp.n_layer_dense_lead else _moe_rows(hp)),
    ]


def _moe_rows(hp: HParams) -> list[Row]:
    n_shared = hp.n_ff_exp * hp.n_expert_shared
    return [*expert_rows(hp, hp.n_ff_exp, bias="optional"), *(shared_rows(hp, n_shared) if n_shared else [])]


def _layer(b: Builder, w: LayerWeights, layer_in: Tensor) -> Tensor:
    """Mirrors `llama_model_dots1::graph`."""
    hp, il = b.hp, w.layer
    q, k, v = b.qkv(w, b.norm_by(w, "attn_norm", layer_in))
    q, k = b.norm_by(w, "attn_q_norm", q, "Qcur_normed"), b.norm_by(w, "attn_k_norm", k, "Kcur_normed")
    cur = b.attention(w, *b.name_qkv(il, b.rope(q), b.rope(k), v), b.kq_scale)
    ffn_in = b.add_to_residual(cur, layer_in, il)
    cur = b.norm_by(w, "ffn_norm", ffn_in)
    cur = b.ffn(w, cur) if il < hp.n_layer_dense_lead else with_shared(b, w, cur, routed_ffn(b, w, cur))
    return b.name(ops.add(b.name(cur, "ffn_out", il), ffn_in), "l_out", il)


ARCHITECTURE = Architecture(
    moe_names=("dots1",),
    rope=RopeType.NEOX,
    hparams=_hparams,
    layer_weights=_weights,
    layer=_layer,
    has_tied_head=False,
)
