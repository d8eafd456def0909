"""Definitions for `pyggml.testing.ref`: recurrent layers, hyper-connections, and triangular systems."""
# numpy types what it makes of arrays of any dtype as Any:
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np

from ..tensor import Tensor
from ..types import Op
from .ref import Array, Sources, define


@define(Op.SSM_CONV)
def _ssm_conv(t: Tensor, src: Sources) -> Array:
    x, taps = src[0][0], src[1][0, 0]  # (n_seq, n_channel, n_tap - 1 + n_token), (n_channel, n_tap)
    windows = np.lib.stride_tricks.sliding_window_view(x, taps.shape[1], axis=2)
    return np.einsum("sctk,ck->stc", windows, taps)


def _concatenated(outputs: Array, states: list[Array], n_kept: int) -> Array:
    """Return outputs, then the last states, the latest first."""
    return np.concatenate([outputs.reshape(-1), *[state.reshape(-1) for state in states[::-1][:n_kept]]])


@define(Op.SSM_SCAN)
def _ssm_scan(t: Tensor, src: Sources) -> Array:
    s, x, dt, rates, b, c, ids = src  # x: (n_seq, n_token, n_head, dim)
    dt, rates = np.logaddexp(0, dt[0]), rates[0, 0]
    per_group = x.shape[2] // b.shape[2]
    b, c = b.repeat(per_group, axis=2), c.repeat(per_group, axis=2)  # (n_seq, n_token, n_head, n_state)
    state, states, outputs = s[ids.reshape(-1)], [], np.empty_like(x)  # state: (n_seq, n_head, dim, n_state)
    for i in range(x.shape[1]):
        step = dt[:, i, :, None]
        grown = (x[:, i] * step)[..., None] * b[:, i, :, None, :]
        state = state * np.exp(step * rates)[:, :, None, :] + grown
        outputs[:, i] = np.einsum("shdn,shn->shd", state, c[:, i])
        states.append(state)
    return _concatenated(outputs, states, t.param_i32(0))


@define(Op.GATED_DELTA_NET)
def _gated_delta_net(t: Tensor, src: Sources) -> Array:
    q, k, v, g, beta, state = src  # (n_seq, n_token, n_head, n); state: (n_seq, n_head, column, row)
    n_seq, n_token, n_head, n = v.shape

    def spread(x: Array) -> Array:
        return np.tile(x, (1, 1, n_head // x.shape[2], 1)).repeat(n_seq // x.shape[0], axis=0)

    q, k, states, outputs = spread(q), spread(k), [], np.empty_like(v)
    for i in range(n_token):
        state = state * np.exp(g[:, i])[:, :, None, :]
        delta = (v[:, i] - np.einsum("shji,shi->shj", state, k[:, i])) * beta[:, i]
        state = state + delta[..., None] * k[:, i, :, None, :]
        outputs[:, i] = np.einsum("shji,shi->shj", state, q[:, i]) / np.sqrt(n)
        states.append(state)
    return _concatenated(outputs, states, t.param_i32(0))


@define(Op.RWKV_WKV6, Op.RWKV_WKV7, Op.GATED_LINEAR_ATTN)
def _linear_attention(t: Tensor, src: Sources) -> Array:
    *tokens, state = src
    n_token, n_head, n = tokens[1][0].shape
    last = t.src[len(src) - 1]
    assert last is not None
    n_seq = last.ne[1]
    state, outputs = state.reshape(n_seq, n_head, n, n), np.empty((n_seq, n_token // n_seq, n_head, n))
    bonus = tokens.pop(3).reshape(-1)[: n_head * n].reshape(n_head, n, 1) if t.op is Op.RWKV_WKV6 else None
    rows = [x[0].reshape(n_seq, n_token // n_seq, n_head, n) for x in tokens]
    for i in range(n_token // n_seq):
        if t.op is Op.RWKV_WKV7:
            r, w, k, v, a, b = (x[:, i] for x in rows)
            removed = np.einsum("shij,shj->shi", state, a)
            state = state * w[:, :, None] + v[..., None] * k[:, :, None] + removed[..., None] * b[:, :, None]
            outputs[:, i] = np.einsum("shij,shj->shi", state, r)
            continue
        k, v, read, forget = (x[:, i] for x in rows)
        kv, kept = k[..., None] * v[:, :, None], state * forget[..., None]
        seen = state + bonus * kv if bonus is not None else (kept + kv) * t.param_f32(0)
        outputs[:, i] = np.einsum("shij,shi->shj", seen, read)
        state = kept + kv
    return np.concatenate([outputs.reshape(-1), state.reshape(-1)])


@define(Op.DSV4_HC_COMB)
def _dsv4_hc_comb(t: Tensor, src: Sources) -> Array:
    mixes, scale, base = (x[0, 0] for x in src)
    eps = t.param_f32(0)
    logits = (mixes[:, 8:] * scale[0, 2] + base[0, 8:]).reshape(-1, 4, 4)  # token, from, to
    comb = np.exp(logits - logits.max(axis=2, keepdims=True))
    comb = comb / comb.sum(axis=2, keepdims=True) + eps
    for turn in range(t.param_i32(1)):
        if turn:
            comb = comb / (comb.sum(axis=2, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
    return comb


@define(Op.DSV4_HC_PRE)
def _dsv4_hc_pre(t: Tensor, src: Sources) -> Array:
    x, weights = src[0][0], src[1]
    if t.param_i32(1):
        return t.param_f32(0) * (x / (1 + np.exp(-weights[0]))).sum(axis=1)
    return (x * weights[0, 0][..., None]).sum(axis=1)


@define(Op.DSV4_HC_POST)
def _dsv4_hc_post(t: Tensor, src: Sources) -> Array:
    x, residual, post = src[0][0, 0], src[1][0], src[2][0, 0]
    mixed = residual if len(t.src) < 4 or t.src[3] is None else np.einsum("tfn,tfs->tsn", residual, src[3][0])
    return mixed + x[:, None] * post[..., None]


@define(Op.SOLVE_TRI)
def _solve_tri(t: Tensor, src: Sources) -> Array:
    return np.linalg.solve(np.tril(src[0]), src[1])
