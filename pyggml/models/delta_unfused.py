"""The gated delta net in plain ops, for devices that cannot run GATED_DELTA_NET.

Letters are those of `delta_net.py`. Shapes in comments are ``ne``: n is the head size, c the tokens of a chunk.
"""

from __future__ import annotations

import math

from .. import ops
from ..ops import TriType
from ..tensor import Tensor
from .blocks import Builder
from .hparams import round_f32

__all__ = ["in_chunks", "one_token"]

#: Tokens of a chunk.
_CHUNK = 64


def _name_inputs(b: Builder, il: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    for tensor, name in ((q, "q_in"), (k, "k_in"), (v, "v_in"), (beta, "b_in"), (g, "g_in")):
        b.name(tensor, name, il)


def one_token(
    b: Builder, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, il: int
) -> tuple[Tensor, Tensor]:
    """Return the output for one token of each sequence, [n, n_head, 1, n_seq], and the new state.

    Notes
    -----
    Mirrors `llm_build_delta_net_base::build_delta_net_autoregressive`.
    """
    n_head, n_seqs = v.ne[1], v.ne[3]
    q = ops.scale(q, round_f32(1.0 / round_f32(math.sqrt(q.ne[0]))))
    q, k, v = (ops.permute(t, 0, 2, 1, 3) for t in (q, k, v))
    _name_inputs(b, il, q, k, v, g, beta)
    g = ops.reshape_4d(g, 1, g.ne[0], n_head, n_seqs)
    beta = ops.reshape_4d(beta, 1, 1, n_head, n_seqs)
    state = ops.mul(state, ops.exp(g))
    read = ops.sum_rows(ops.mul(state, k))
    missing = ops.mul(ops.sub(v, ops.transpose(read)), beta)
    by_row = ops.transpose(missing)
    state = b.name(ops.add(state, ops.mul(ops.repeat(k, state), by_row)), "dnet_add_ar_state", il)
    out = ops.sum_rows(ops.mul(state, q))
    return ops.permute(out, 2, 0, 1, 3), state


def in_chunks(
    b: Builder, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, il: int
) -> tuple[Tensor, Tensor]:
    """Return the output for several tokens of each sequence, [n, n_head, n_token, n_seq], and the new state.

    Notes
    -----
    Mirrors `llm_build_delta_net_base::build_delta_net_chunking` for one gate per head.
    """
    n, n_head, n_tokens, n_seqs = v.ne
    q = ops.scale(q, round_f32(1.0 / round_f32(math.sqrt(q.ne[0]))))
    _name_inputs(b, il, q, k, v, g, beta)
    q, k, v, g, beta = (ops.permute(t, 0, 2, 1, 3) for t in (q, k, v, g, beta))
    n_padded = -n_tokens % _CHUNK
    n_chunks = (n_tokens + n_padded) // _CHUNK
    q, k, v, g, beta = (ops.pad(t, 0, n_padded, 0, 0) for t in (q, k, v, g, beta))
    v_b, k_b = b.name(ops.mul(v, beta), "v_b", il), b.name(ops.mul(k, beta), "k_b", il)
    q, k = (ops.reshape_4d(t, t.ne[0], _CHUNK, n_chunks, t.ne[2] * n_seqs) for t in (q, k))
    k_b, v_b, g = (ops.reshape_4d(t, t.ne[0], _CHUNK, n_chunks, n_head * n_seqs) for t in (k_b, v_b, g))
    g_sum = b.name(ops.cumsum(ops.cont(ops.transpose(g))), "g_cs", il)  # [c, 1, n_chunk, n_head * n_seq]
    kq, attn = _within_chunks(b, q, k, k_b, g_sum, il)
    v = ops.mul_mat(ops.cont(ops.transpose(v_b)), attn)
    g_exp = ops.exp(g_sum)
    k_b = ops.cont(ops.transpose(k_b))
    k_decayed = b.name(ops.mul(k_b, g_exp), "k_beta_g_exp", il)
    k_decayed = b.name(ops.mul_mat(k_decayed, attn), "k_cumdecay", il)
    q = ops.mul(q, ops.cont(ops.transpose(g_exp)))
    out, state = _across_chunks(b, (k_decayed, kq, q, k), v, g_sum, state, il)
    row = out.type.row_size
    whole = n * _CHUNK * n_chunks
    out = ops.view_4d(out, n, n_tokens, n_head, n_seqs, row(n), row(whole), row(whole * n_head), 0)
    out = ops.permute(out, 0, 2, 1, 3)
    return out, b.name(ops.reshape_4d(state, n, n, n_head, n_seqs), "output_state", il)


def _within_chunks(b: Builder, q: Tensor, k: Tensor, k_b: Tensor, g_sum: Tensor, il: int) -> tuple[Tensor, Tensor]:
    """Return Q times K with decay, and the inverse of the update matrix, for each chunk: [c, c, n_chunk, n_row]."""
    _, _, n_chunks, n_rows = g_sum.ne
    later = ops.reshape_4d(g_sum, 1, _CHUNK, n_chunks, n_rows)
    later = ops.repeat_4d(later, _CHUNK, _CHUNK, n_chunks, n_rows)
    decay = ops.exp(ops.tri(ops.sub(later, g_sum), TriType.LOWER_DIAG))
    b.name(decay, "decay_mask", il)
    kb = ops.mul(ops.mul_mat(k, k_b), decay)
    kq = ops.mul(ops.mul_mat(k, q), decay)
    kq = b.name(ops.tri(kq, TriType.LOWER_DIAG), "kq", il)
    attn = b.name(ops.tri(kb, TriType.LOWER), "attn", il)
    identity = ops.diag(ops.fill(ops.view_1d(attn, _CHUNK, 0), 1.0))
    left = b.name(ops.add(attn, identity), "dnet_add_ch_lhs", il)
    attn = b.name(ops.neg(attn), "attn_pre_solve", il)
    attn = ops.add(ops.solve_tri(left, attn, True, True, False), identity)
    return kq, b.name(attn, "dnet_add_ch_attn_solved", il)


def _chunk(t: Tensor, i: int) -> Tensor:
    """Return chunk i. Mirrors `get_slice_2d`."""
    return ops.view_4d(t, t.ne[0], t.ne[1], 1, t.ne[3], *t.nb[1:], t.nb[2] * i)


def _across_chunks(
    b: Builder, x: tuple[Tensor, Tensor, Tensor, Tensor], v: Tensor, g_sum: Tensor, state: Tensor, il: int
) -> tuple[Tensor, Tensor]:
    """Return the results of all chunks, [n, c, n_chunk, n_head * n_seq], and the state after the last."""
    k_decayed, kq, q, k = x
    n, n_rows = state.ne[0], g_sum.ne[3]
    last = ops.view_4d(g_sum, 1, *g_sum.ne[1:], *g_sum.nb[1:], g_sum.type.row_size(g_sum.ne[0] - 1))
    last = ops.cont(b.name(last, "g_last", il))
    last_exp = b.name(ops.transpose(ops.exp(last)), "g_last_exp_t", il)
    left = b.name(ops.neg(ops.sub(g_sum, last)), "g_diff", il)
    left = ops.cont(ops.transpose(ops.exp(left)))
    kg = b.name(ops.mul(k, left), "key_gdiff", il)
    kg = b.name(ops.cont(ops.transpose(kg)), "key_gdiff_t", il)
    state = b.name(ops.reshape_4d(state, n, n, 1, n_rows), "dnet_add_ch_state", il)
    v_t = ops.cont(ops.transpose(v))
    for i in range(g_sum.ne[2]):
        own_k, own_v, own_kq, own_q, own_kg = (_chunk(t, i) for t in (k_decayed, v_t, kq, q, kg))
        known = b.name(ops.mul_mat(own_k, state), "v_prime", il)
        fresh = b.name(ops.sub(own_v, known), "v_t_new", il)
        within = b.name(ops.mul_mat(fresh, own_kq), "v_attn", il)
        before = b.name(ops.mul_mat(state, own_q), "attn_inter", il)
        out = b.name(ops.add(before, within), "dnet_add_ch_attn_out", il)
        v = ops.set_inplace(v, out, v.nb[1], v.nb[2], v.nb[3], i * v.nb[2])
        learnt = ops.mul_mat(own_kg, fresh)
        state = b.name(ops.add(ops.mul(state, _chunk(last_exp, i)), learnt), "dnet_add_ch_state", il)
    return v, state
