"""Hyper-connections of DeepSeek V4: several residual streams, mixed before a block (DSV4_HC_PRE) and after it (DSV4_HC_POST, by DSV4_HC_COMB)."""

from __future__ import annotations

import math

from .descriptor import number, row_at, share, sizes, word
from .emit import F32x16, ir, micro, types
from .functions import V, sigmoid
from .kernel import device, rare_op_kernel
from .memory import bits_of, floats, ld_f32
from .norms import scale_row
from .shape import add_scaled, clear
from .words import DST, NB0, NE2, PARAM, SRC0, SRC1, SRC2, SRC3

import numpy as np  # isort: skip

#: Parameters of `dsv4_hc_comb`: what is added before each division (bits), and how often rows and columns are normed.
EPS, N_ITER = PARAM, PARAM + 1
#: Parameters of `dsv4_hc_pre`: what the sum is scaled by (bits); whether the weights are gates, one for each element.
SCALE, IS_GATED = PARAM, PARAM + 1
#: Parameter of `dsv4_hc_post`: whether streams are mixed (src3), or each keeps its own.
IS_MIXED = PARAM

#: Streams of DSV4_HC_COMB.
N_STREAM = 4
#: Elements that a thread takes at once.
CHUNK = 512


@device
def _weight(d, tensor, i0, i1, i2):
    """One element of a tensor in a descriptor."""
    return ld_f32(row_at(d, tensor, i1, i2, 0) + i0 * word(d, tensor + NB0))


@device
def _divide_by_sums(comb, first, step, eps):
    """Divide 4 elements, ``step`` apart, by their sum."""
    total = eps
    for i in range(N_STREAM):
        total += comb[first + step * i]
    inverse = np.float32(1.0) / total
    for i in range(N_STREAM):
        comb[first + step * i] *= inverse


@rare_op_kernel
def dsv4_hc_comb(ith, nth, d, ctl):
    """Make the matrix that mixes streams: a softmax of each row, then columns and rows divided by their sums in turn."""
    eps, n_iter = number(d, EPS), word(d, N_ITER)
    scale = _weight(d, SRC1, 2, 0, 0)
    first, end = share(word(d, DST + NE2), ith, nth)
    for t in range(first, end):
        comb = floats(row_at(d, DST, 0, t, 0))
        for row in range(N_STREAM):
            start, most, total = N_STREAM * row, np.float32(-np.inf), np.float32(0.0)
            for i in range(start, start + N_STREAM):
                at = 2 * N_STREAM + i
                comb[i] = _weight(d, SRC0, at, t, 0) * scale + _weight(d, SRC2, at, 0, 0)
                most = max(most, comb[i])
            for i in range(start, start + N_STREAM):
                comb[i] = np.float32(math.exp(comb[i] - most))
                total += comb[i]
            inverse = np.float32(1.0) / total
            for i in range(start, start + N_STREAM):
                comb[i] = comb[i] * inverse + eps
        for turn in range(n_iter):
            if turn:
                for row in range(N_STREAM):
                    _divide_by_sums(comb, N_STREAM * row, 1, eps)
            for column in range(N_STREAM):
                _divide_by_sums(comb, column, N_STREAM, eps)


@micro(types.void, 4)
def _add_gated(e, x, gate, y, n):
    """``y += x * sigmoid(gate)`` for n floats."""

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        share_ = sigmoid(V(e, e.load_lanes(F32x16, e.add(gate, at), mask))).v
        v = e.fma(e.load_lanes(F32x16, e.add(x, at), mask), share_, e.load_lanes(F32x16, e.add(y, at), mask))
        e.store_lanes(v, e.add(y, at), mask)

    e.vectors(n, body)


@rare_op_kernel
def dsv4_hc_pre(ith, nth, d, ctl):
    """Add up the streams of src0, each weighted by src1."""
    n, n_stream, n_token, _ = sizes(d, SRC0)
    scale, is_gated, zero = word(d, SCALE), word(d, IS_GATED), bits_of(np.float32(0.0))
    pieces = (n + CHUNK - 1) // CHUNK
    first, end = share(pieces * n_token, ith, nth)
    for unit in range(first, end):
        start, t = unit % pieces * CHUNK, unit // pieces
        count, out = min(CHUNK, n - start), row_at(d, DST, t, 0, 0) + 4 * start
        clear(out, 0, count)
        for stream in range(n_stream):
            x = row_at(d, SRC0, stream, t, 0) + 4 * start
            if is_gated:
                _add_gated(x, row_at(d, SRC1, stream, t, 0) + 4 * start, out, count)
            else:
                add_scaled(x, out, count, bits_of(_weight(d, SRC1, stream, t, 0)))
        scale_row(out, out, count, zero, scale)


@rare_op_kernel
def dsv4_hc_post(ith, nth, d, ctl):
    """Add the block's result (src0), weighted by src2, to each stream of src1, mixed by src3."""
    n, n_stream, n_token, _ = sizes(d, DST)
    is_mixed, zero, one = word(d, IS_MIXED), bits_of(np.float32(0.0)), bits_of(np.float32(1.0))
    pieces = (n + CHUNK - 1) // CHUNK
    first, end = share(pieces * n_stream * n_token, ith, nth)
    for unit in range(first, end):
        start, to, t = unit % pieces * CHUNK, unit // pieces % n_stream, unit // (pieces * n_stream)
        count, out = min(CHUNK, n - start), row_at(d, DST, to, t, 0) + 4 * start
        scale_row(row_at(d, SRC0, t, 0, 0) + 4 * start, out, count, zero, bits_of(_weight(d, SRC2, to, t, 0)))
        if is_mixed:
            for stream in range(n_stream):
                weight = bits_of(_weight(d, SRC3, to, stream, t))
                add_scaled(row_at(d, SRC1, stream, t, 0) + 4 * start, out, count, weight)
        else:
            add_scaled(row_at(d, SRC1, to, t, 0) + 4 * start, out, count, one)
