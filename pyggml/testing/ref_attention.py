"""Definitions for `pyggml.testing.ref`: masks, softmax, rotary positions, flash attention."""
# numpy types what it makes of arrays of any dtype as Any:
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math

import numpy as np

from ..ops import RopeType
from ..tensor import Tensor
from ..types import Op
from .ref import Array, Sources, define, spread


@define(Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO)
def _diag_mask(t: Tensor, src: Sources) -> Array:
    fill = -math.inf if t.op is Op.DIAG_MASK_INF else 0.0
    row, column = np.ogrid[: t.ne[1], : t.ne[0]]
    return np.where(column > t.param_i32(0) + row, fill, src[0])


def alibi_slopes(n_head: int, max_bias: float) -> Array:
    """Return each head's factor of the mask; 1 if ``max_bias`` is 0."""
    if max_bias <= 0:
        return np.ones(n_head)
    n_pow2 = 1 << int(math.log2(n_head))
    head = np.arange(n_head)
    first, then = 2.0 ** (-max_bias / n_pow2), 2.0 ** (-max_bias / 2 / n_pow2)
    return np.where(head < n_pow2, first ** (head + 1.0), then ** (2.0 * (head - n_pow2) + 1.0))


def _softmax(scores: Array, sinks: Array | None) -> Array:
    """Return the softmax of rows, (n3, n_head, n1, n0), each with its head's sink in the sum."""
    top = np.max(scores, axis=3, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks.reshape(1, -1, 1, 1))
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = np.sum(weights, axis=3, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.reshape(1, -1, 1, 1) - top)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def _biased(scores: Array, mask: Array | None, max_bias: float) -> Array:
    """Return scores, (n3, n_head, n_token, n_kv), with the mask added, scaled by head."""
    if mask is None:
        return scores
    n3, n_head, n_token, _ = scores.shape
    mask = mask[np.arange(n3) % mask.shape[0]][:, np.arange(n_head) % mask.shape[1], :n_token]
    biased: Array = scores + alibi_slopes(n_head, max_bias).reshape(1, -1, 1, 1) * mask
    return biased


def _optional(t: Tensor, src: Sources, i: int) -> Array | None:
    return src[i] if i < len(t.src) and t.src[i] is not None else None


@define(Op.SOFT_MAX)
def _soft_max(t: Tensor, src: Sources) -> Array:
    scale, max_bias = t.param_f32(0), t.param_f32(1)
    scores = _biased(src[0] * scale, _optional(t, src, 1), max_bias)
    return _softmax(scores, _optional(t, src, 2))


@define(Op.FLASH_ATTN_EXT)
def _flash_attn_ext(t: Tensor, src: Sources) -> Array:
    q, k, v = src[:3]
    scale, max_bias, cap = (t.param_f32(i) for i in range(3))
    scores = q @ spread(k, q).swapaxes(2, 3) * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    weights = _softmax(_biased(scores, _optional(t, src, 3), max_bias), _optional(t, src, 4))
    return (weights @ spread(v, q)).swapaxes(1, 2)


@define(Op.LIGHTNING_INDEXER)
def _lightning_indexer(t: Tensor, src: Sources) -> Array:
    q, k, weights, mask = src  # (n_stream, n_token, n_head, n), (n_stream, n_kv, 1, n), (n_stream, 1, n_token, n_head)
    products = np.einsum("sthe,ske->stkh", q, k[:, :, 0])
    scores = np.einsum("stkh,sth->stk", np.maximum(products, 0), weights[:, 0])
    return (scores + np.resize(mask[:, 0], scores.shape))[:, None]


# -- rotary positions ------------------------------------------------------------


def _pair_turns(t: Tensor, n_pair: int) -> tuple[Array, Array]:
    """Return which of a token's four positions rotates each pair, and each pair's exponent of the base frequency.

    Notes
    -----
    Mirrors `ggml_mrope_cache_init`. Pairs are counted through all sections, but in VISION from 0 in each section.
    """
    mode = t.param_i32(2)
    axes, exponents = np.zeros(n_pair, int), np.arange(n_pair)
    if not mode & RopeType.MROPE:
        return axes, exponents
    sections = [t.param_i32(11 + i) for i in range(4)]
    starts = [sum(sections[:i]) for i in range(4)]
    begun = [0, 0, 0, 0]
    for pair in range(n_pair):
        sector = pair % sum(sections)
        if mode == RopeType.VISION and sector in starts:
            begun[starts.index(sector)] = pair
        if mode == RopeType.IMROPE:
            axes[pair] = sector % 3 if sector < 3 * sections[sector % 3] else 3
        else:
            axes[pair] = sum(sector >= start for start in starts[1:])
        exponents[pair] = pair - begun[axes[pair]]
    return axes, exponents


def _yarn(t: Tensor, theta: Array, n_dims: int) -> tuple[Array, float]:
    """Return angles scaled for a longer context, and the factor of the result's length."""
    n_ctx_orig = t.param_i32(4)
    base, scale, ext, attn, fast, slow = (t.param_f32(i) for i in range(5, 11))
    if ext == 0:
        return theta * scale, attn

    def dimension(n_rotation: float) -> float:
        return n_dims * math.log(n_ctx_orig / (n_rotation * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(dimension(fast)))
    high = min(n_dims - 1.0, math.ceil(dimension(slow)))
    ramp = np.clip((np.arange(theta.shape[-1]) - low) / max(0.001, high - low), 0, 1)
    mix = (1 - ramp) * ext
    return theta * scale * (1 - mix) + theta * mix, attn * (1 + 0.1 * math.log(1 / scale))


@define(Op.ROPE, Op.ROPE_BACK)
def _rope(t: Tensor, src: Sources) -> Array:
    x, pos = src[0], src[1].reshape(-1).astype(np.float64)
    n_dims, mode, n_offs = t.param_i32(1), t.param_i32(2), t.param_i32(15)
    is_vision = mode == RopeType.VISION
    n_pair = t.ne[0] // 2 if is_vision else n_dims // 2
    axes, exponents = _pair_turns(t, n_pair)
    theta = pos.reshape(-1, t.ne[2])[axes].T * t.param_f32(5) ** (-2.0 / n_dims * exponents)
    factors = _optional(t, src, 2)
    if factors is not None:
        theta = theta / factors.reshape(-1)[:n_pair]
    theta, length = _yarn(t, theta, n_dims)
    cos = (np.cos(theta) * length)[None, :, None, :]  # over (n3, n_token, n_head, n_pair)
    sin = (np.sin(theta) * length)[None, :, None, :] * (1 if t.op is Op.ROPE else -1)
    if mode == RopeType.NORMAL:
        first = n_offs + 2 * np.arange(n_pair)
        second = first + 1
    else:
        first = n_offs + np.arange(n_pair)
        second = first + n_pair
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
