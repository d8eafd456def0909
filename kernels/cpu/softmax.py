"""SOFT_MAX with mask, ALiBi slopes and sinks; attention uses parts of it."""

from __future__ import annotations

import math

import numpy as np

from .descriptor import address, number, repeated_row_address, row_address, rows_of, word
from .emit import F16x16, F32x16, I16x16, ir, micro, types
from .functions import V, exp
from .kernel import device, op_kernel
from .memory import bits_of, ld_f32
from .norms import fold_row, largest_of, scale_row
from .words import DST, F16, PARAM, SRC0, SRC1, SRC2, TYPE

#: Parameters: scale, largest ALiBi bias, and its two bases (`slope`), heads of the first base.
SCALE, MAX_BIAS, M0, M1, N_HEAD_LOG2 = (PARAM + i for i in range(5))


@device
def slope(max_bias, m0, m1, n_head_log2, head):
    """ALiBi's factor of the mask for a head; 1 without a bias."""
    if max_bias <= np.float32(0.0):
        return np.float32(1.0)
    if head < n_head_log2:
        return np.float32(math.pow(m0, head + 1))
    return np.float32(math.pow(m1, 2 * (head - n_head_log2) + 1))


@micro(types.void, 7)
def scale_and_mask(e, x, y, n, factor, mask_at, is_f16, mask_slope):
    """``y = x * factor + slope * mask``; no mask if its address is 0."""
    b = e.b
    factor, mask_slope = V(e, e.splat(e.float_of(factor))), V(e, e.splat(e.float_of(mask_slope)))
    kind = b.select(b.icmp_signed("==", mask_at, mask_at.type(0)), mask_at.type(0), e.add(is_f16, 1))

    def write(case: int) -> None:
        def body(i: ir.Value, lanes: ir.Value | None) -> None:
            at = e.mul(i, 4)
            v = V(e, e.load_lanes(F32x16, e.add(x, at), lanes)) * factor
            if case == 1:
                v = v + mask_slope * V(e, e.load_lanes(F32x16, e.add(mask_at, at), lanes))
            elif case == 2:
                half = e.load_lanes(I16x16, e.add(mask_at, e.mul(i, 2)), lanes)
                v = v + mask_slope * V(e, e.to_f32(e.cast(half, F16x16)))
            e.store_lanes(v.v, e.add(y, at), lanes)

        e.vectors(n, body)

    e.switch(kind, range(3), write)


@micro(types.float32, 3)
def exp_row(e, x, n, less):
    """``x = exp(x - less)`` in place; the sum is returned."""
    less = V(e, e.splat(e.float_of(less)))

    def load(i: ir.Value, lanes: ir.Value | None) -> ir.Value:
        at = e.add(x, e.mul(i, 4))
        v = exp(V(e, e.load_lanes(F32x16, at, lanes)) - less).v
        e.store_lanes(v, at, lanes)
        return v

    return fold_row(e, n, 0.0, load, e.b.fadd, e.b.fadd)


@op_kernel
def soft_max_rows(ith, nth, d, ctl):
    """Turn each row into probabilities."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    factor, max_bias = number(d, SCALE), number(d, MAX_BIAS)
    m0, m1, n_head_log2 = number(d, M0), number(d, M1), word(d, N_HEAD_LOG2)
    mask, sinks = address(d, SRC1), address(d, SRC2)
    is_f16 = 1 if word(d, SRC1 + TYPE) == F16 else 0
    for row in range(first, end):
        i1, i2, i3 = row % ne1, row // ne1 % ne2, row // (ne1 * ne2)
        x, y = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        mask_at = repeated_row_address(d, SRC1, i1, i2, i3) if mask != 0 else 0
        head_slope = slope(max_bias, m0, m1, n_head_log2, i2)
        scale_and_mask(x, y, n, bits_of(factor), mask_at, is_f16, bits_of(head_slope))
        top = largest_of(y, n)
        if sinks != 0:
            top = max(top, ld_f32(sinks + 4 * i2))
        total = exp_row(y, n, bits_of(top))
        if sinks != 0:
            total += np.float32(math.exp(ld_f32(sinks + 4 * i2) - top))
        scale_row(y, y, n, bits_of(np.float32(0.0)), bits_of(np.float32(1.0) / total))
