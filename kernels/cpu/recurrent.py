"""Recurrent layers: SSM_CONV, SSM_SCAN, GATED_DELTA_NET, and SOLVE_TRI, which some of them use.

A state and what reads it belong to one head of one sequence, which one thread takes from the first token to the last.
"""

from __future__ import annotations

import math

from .descriptor import address, own_scratch, row_at, share, sizes, word
from .emit import Emit, F32x16, ir, micro, types
from .functions import V, exp
from .kernel import rare_op_kernel
from .memory import bits_of, copy_bytes, floats, ld_f32, ld_i32, st_f32
from .norms import fold_row, scale_row
from .plan import report
from .shape import add_scaled
from .words import DST, NB1, NE0, NE1, NE3, PARAM, SRC0, SRC1, SRC2, SRC3, SRC4, SRC5, SRC6

import numpy as np  # isort: skip

#: Parameter of SSM_SCAN and GATED_DELTA_NET: number of last tokens whose states are kept.
N_KEPT = PARAM


@micro(types.float32, 3)
def dot_of(e, x, y, n):
    """Sum of the products of n floats."""

    def load(i: ir.Value, mask: ir.Value | None) -> ir.Value:
        at = e.mul(i, 4)
        return e.b.fmul(e.load_lanes(F32x16, e.add(x, at), mask), e.load_lanes(F32x16, e.add(y, at), mask))

    return fold_row(e, n, 0.0, load, e.b.fadd, e.b.fadd)


# -- SSM_CONV -------------------------------------------------------------------------------


@rare_op_kernel
def ssm_conv(ith, nth, d, ctl):
    """Slide each channel's few weights (src1) over its row of src0."""
    n_tap, n_channel, _, _ = sizes(d, SRC1)
    _, n_token, n_seq, _ = sizes(d, DST)
    nb_token = word(d, DST + NB1)
    first, end = share(n_channel * n_seq, ith, nth)
    for unit in range(first, end):
        channel, seq = unit % n_channel, unit // n_channel
        x, w = floats(row_at(d, SRC0, channel, seq, 0)), floats(row_at(d, SRC1, channel, 0, 0))
        out = row_at(d, DST, 0, seq, 0)
        for t in range(n_token):
            total = np.float32(0.0)
            for i in range(n_tap):
                total += x[t + i] * w[i]
            st_f32(out + t * nb_token + 4 * channel, total)


# -- SSM_SCAN -------------------------------------------------------------------------------


def _scan(
    e: Emit, n: ir.Value, state: ir.Value, to: ir.Value, b: ir.Value, c: ir.Value, x: ir.Value, decay
) -> ir.Value:
    """Write ``state * decay + b * x`` and return its product with c; ``decay(i, mask)`` gives lanes."""
    x = e.splat(e.float_of(x))
    acc = e.zeros(F32x16)

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        old, grown = e.load_lanes(F32x16, e.add(state, at), mask), e.load_lanes(F32x16, e.add(b, at), mask)
        new = e.fma(old, decay(i, mask), e.b.fmul(grown, x))
        e.store_lanes(new, e.add(to, at), mask)
        e.b.store(e.fma(new, e.load_lanes(F32x16, e.add(c, at), mask), e.b.load(acc)), acc)

    e.vectors(n, body)
    return e.sum(e.b.load(acc))


@micro(types.float32, 7)
def _scan_by_head(e, n, state, to, b, c, x, decay):
    """Mamba-2: one decay for all of a head's state."""
    lanes = e.splat(e.float_of(decay))
    return _scan(e, n, state, to, b, c, x, lambda i, mask: lanes)


@micro(types.float32, 8)
def _scan_by_element(e, n, state, to, b, c, x, rates, step):
    """Mamba-1: the decay of each element is e to its rate times the step."""
    step = V(e, e.splat(e.float_of(step)))

    def decay(i: ir.Value, mask: ir.Value | None) -> ir.Value:
        return exp(V(e, e.load_lanes(F32x16, e.add(rates, e.mul(i, 4)), mask)) * step).v

    return _scan(e, n, state, to, b, c, x, decay)


@rare_op_kernel
def ssm_scan(ith, nth, d, ctl):
    """Scan each head of each sequence; dst: outputs of all tokens, then the states after the last N_KEPT."""
    n_state, _, _, n_slot = sizes(d, SRC0)
    dim, n_head, n_token, n_seq = sizes(d, SRC1)
    n_kept, n_rate, per_group = word(d, N_KEPT), word(d, SRC3 + NE0), n_head // word(d, SRC4 + NE1)
    y, ids = address(d, DST), address(d, SRC6)
    states, head_bytes = y + 4 * dim * n_head * n_token * n_seq, 4 * n_state * dim
    first, end = share(n_head * n_seq, ith, nth)
    for unit in range(first, end):
        head, seq = unit % n_head, unit // n_head
        slot = ld_i32(ids + 4 * seq)
        if slot < 0 or slot >= n_slot:
            report(ith, d, ctl, seq, slot, n_slot)
            return
        to = states + (seq * n_head + head) * head_bytes
        state, rates = row_at(d, SRC0, 0, head, slot), row_at(d, SRC3, head, 0, 0)
        for t in range(n_token):
            x, step = row_at(d, SRC1, head, t, seq), ld_f32(row_at(d, SRC2, t, seq, 0) + 4 * head)
            if step <= np.float32(20.0):
                step = np.float32(math.log(np.float32(1.0) + np.float32(math.exp(step))))
            b, c = row_at(d, SRC4, head // per_group, t, seq), row_at(d, SRC5, head // per_group, t, seq)
            out = floats(y + 4 * dim * (head + n_head * (t + n_token * seq)))
            decay = np.float32(math.exp(step * ld_f32(rates))) if n_rate == 1 else np.float32(0.0)
            for i in range(dim):
                grown, at = bits_of(ld_f32(x + 4 * i) * step), 4 * n_state * i
                if n_rate == 1:
                    out[i] = _scan_by_head(n_state, state + at, to + at, b, c, grown, bits_of(decay))
                else:
                    out[i] = _scan_by_element(n_state, state + at, to + at, b, c, grown, rates, bits_of(step))
            state = to
            back = n_token - 1 - t
            if 0 < back < n_kept:
                copy_bytes(states + ((back * n_seq + seq) * n_head + head) * head_bytes, to, head_bytes)


# -- GATED_DELTA_NET ----------------------------------------------------------------------------


@rare_op_kernel
def gated_delta_net(ith, nth, d, ctl):
    """Update each head's state, kept transposed, by the delta rule; dst: outputs, then the last N_KEPT states."""
    n, n_head, n_token, n_seq = sizes(d, SRC2)
    n_kept, n_q, n_k = word(d, N_KEPT), word(d, SRC0 + NE1), word(d, SRC1 + NE1)
    seqs_a_q, seqs_a_k = n_seq // word(d, SRC0 + NE3), n_seq // word(d, SRC1 + NE3)
    one_gate, y = word(d, SRC3 + NE0) == 1, address(d, DST)
    states, head_bytes = y + 4 * n * n_head * n_token * n_seq, 4 * n * n
    decays = own_scratch(ctl, ith)
    state, scale = decays + 4 * n, np.float32(1.0) / np.float32(math.sqrt(np.float32(n)))
    first, end = share(n_head * n_seq, ith, nth)
    for unit in range(first, end):
        head, seq = unit % n_head, unit // n_head
        copy_bytes(state, row_at(d, SRC5, 0, head, seq), head_bytes)
        for t in range(n_token):
            q, k = row_at(d, SRC0, head % n_q, t, seq // seqs_a_q), row_at(d, SRC1, head % n_k, t, seq // seqs_a_k)
            v, gate = row_at(d, SRC2, head, t, seq), row_at(d, SRC3, head, t, seq)
            beta = ld_f32(row_at(d, SRC4, head, t, seq))
            decay = np.float32(math.exp(ld_f32(gate)))
            if not one_gate:
                _exponentials(gate, decays, n)
            out = floats(y + 4 * n * (head + n_head * (t + n_token * seq)))
            for j in range(n):
                row = state + 4 * n * j
                if one_gate:
                    scale_row(row, row, n, bits_of(np.float32(0.0)), bits_of(decay))
                else:
                    _multiply(row, decays, n)
                delta = (ld_f32(v + 4 * j) - dot_of(row, k, n)) * beta
                add_scaled(k, row, n, bits_of(delta))
                out[j] = dot_of(row, q, n) * scale
            back = n_token - 1 - t
            if back < n_kept:
                copy_bytes(states + ((back * n_seq + seq) * n_head + head) * head_bytes, state, head_bytes)
        if n_token == 0:
            copy_bytes(states + (seq * n_head + head) * head_bytes, state, head_bytes)


@micro(types.void, 3)
def _exponentials(e, x, y, n):
    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        e.store_lanes(exp(V(e, e.load_lanes(F32x16, e.add(x, at), mask))).v, e.add(y, at), mask)

    e.vectors(n, body)


@micro(types.void, 3)
def _multiply(e, y, x, n):
    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        left, right = e.load_lanes(F32x16, e.add(y, at), mask), e.load_lanes(F32x16, e.add(x, at), mask)
        e.store_lanes(e.b.fmul(left, right), e.add(y, at), mask)

    e.vectors(n, body)


# -- SOLVE_TRI --------------------------------------------------------------------------------------

#: Columns that are solved together.
N_TOGETHER = 64


@rare_op_kernel
def solve_tri(ith, nth, d, ctl):
    """Solve ``a x = b`` for lower triangles a (src0), row by row, for some columns of b (src1) at a time."""
    n_column, n, ne2, ne3 = sizes(d, DST)
    pieces = (n_column + N_TOGETHER - 1) // N_TOGETHER
    first, end = share(pieces * ne2 * ne3, ith, nth)
    for unit in range(first, end):
        start, i2, i3 = unit % pieces * N_TOGETHER, unit // pieces % ne2, unit // (pieces * ne2)
        count = min(N_TOGETHER, n_column - start)
        for i in range(n):
            a, out = row_at(d, SRC0, i, i2, i3), row_at(d, DST, i, i2, i3) + 4 * start
            copy_bytes(out, row_at(d, SRC1, i, i2, i3) + 4 * start, 4 * count)
            for k in range(i):
                factor = -ld_f32(a + 4 * k)
                add_scaled(row_at(d, DST, k, i2, i3) + 4 * start, out, count, bits_of(factor))
            inverse = np.float32(1.0) / ld_f32(a + 4 * i)
            scale_row(out, out, count, bits_of(np.float32(0.0)), bits_of(inverse))
