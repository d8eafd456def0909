"""Ops that choose rows by index: GET_ROWS, SET_ROWS, ADD_ID. One out of bounds stops the plan, touching nothing."""

from __future__ import annotations

from .convert import row_from_f32, row_to_f32
from .elementwise import ADD, join_row, share
from .kernel import device, op_kernel
from .memory import copy_bytes, ld_i32, ld_i64
from .plan import report
from .words import (
    ADDRESS,
    DST,
    F32,
    I64,
    NB0,
    NB1,
    NE0,
    NE1,
    NE2,
    NE3,
    PARAM,
    SRC0,
    SRC1,
    SRC2,
    THREAD_BYTES,
    THREADS,
    TYPE,
)

#: Parameters: address of a kernel of `DEQUANTISE` (SET_ROWS: `quantiser`); bytes of a row copied as it is, else 0.
DEQUANTISE, RAW_BYTES = PARAM, PARAM + 1
QUANTISE = DEQUANTISE


@device
def _three_d(d, tensor, i0, i1, i2):
    """Address of an element or row by the strides of three dimensions, given as the tensor's first stride word."""
    return i0 * ld_i64(d + 8 * tensor) + i1 * ld_i64(d + 8 * (tensor + 1)) + i2 * ld_i64(d + 8 * (tensor + 2))


@device
def _index(d, tensor, i0, i1, i2):
    """Load an index, I32 or I64."""
    at = ld_i64(d + 8 * (tensor + ADDRESS)) + _three_d(d, tensor + NB0, i0, i1, i2)
    return ld_i64(at) if ld_i64(d + 8 * (tensor + TYPE)) == I64 else ld_i32(at)


@op_kernel
def get_rows(ith, nth, d, ctl):
    """Copy the chosen rows, as floats unless RAW_BYTES says how long they are."""
    n, n_rows = ld_i64(d + 8 * (SRC0 + NE0)), ld_i64(d + 8 * (SRC0 + NE1))
    ne10, ne11 = ld_i64(d + 8 * (SRC1 + NE0)), ld_i64(d + 8 * (SRC1 + NE1))
    src, dst = ld_i64(d + 8 * (SRC0 + ADDRESS)), ld_i64(d + 8 * (DST + ADDRESS))
    type, raw, dequantise = ld_i64(d + 8 * (SRC0 + TYPE)), ld_i64(d + 8 * RAW_BYTES), ld_i64(d + 8 * DEQUANTISE)
    first, end = share(ne10 * ne11 * ld_i64(d + 8 * (SRC1 + NE2)), ith, nth)
    for i in range(first, end):
        i0, i1, i2 = i % ne10, i // ne10 % ne11, i // (ne10 * ne11)
        row = _index(d, SRC1, i0, i1, i2)
        if row < 0 or row >= n_rows:
            report(ith, d, ctl, i, row, n_rows)
            return
        at, out = src + _three_d(d, SRC0 + NB1, row, i1, i2), dst + _three_d(d, DST + NB1, i0, i1, i2)
        if raw != 0:
            copy_bytes(out, at, raw)
        else:
            row_to_f32(type, at, out, n, dequantise)


@op_kernel
def set_rows(ith, nth, d, ctl):
    """Write rows of src0, converted, to the rows of dst that src1 names; the last of equal indices need not win."""
    n, ne01, ne02 = ld_i64(d + 8 * (SRC0 + NE0)), ld_i64(d + 8 * (SRC0 + NE1)), ld_i64(d + 8 * (SRC0 + NE2))
    ne11, ne12, n_rows = ld_i64(d + 8 * (SRC1 + NE1)), ld_i64(d + 8 * (SRC1 + NE2)), ld_i64(d + 8 * (DST + NE1))
    src, dst = ld_i64(d + 8 * (SRC0 + ADDRESS)), ld_i64(d + 8 * (DST + ADDRESS))
    type, src_type, raw = ld_i64(d + 8 * (DST + TYPE)), ld_i64(d + 8 * (SRC0 + TYPE)), ld_i64(d + 8 * RAW_BYTES)
    quantise, floats_at = ld_i64(d + 8 * QUANTISE), ld_i64(ctl + 8 * THREADS) + ith * ld_i64(ctl + 8 * THREAD_BYTES)
    nb01, nb1, nb10 = ld_i64(d + 8 * (SRC0 + NB1)), ld_i64(d + 8 * (DST + NB1)), ld_i64(d + 8 * (SRC1 + NB0))
    is_long, left, at, index_at, out = ld_i64(d + 8 * (SRC1 + TYPE)) == I64, 0, src, 0, dst
    first, end = 0, ne01 * ne02 * ld_i64(d + 8 * (SRC0 + NE3))
    if end > 1:
        first, end = share(end, ith, nth)
    elif ith == 0:  # one token: no divisions at all
        left, index_at = 1, ld_i64(d + 8 * (SRC1 + ADDRESS))
    else:
        return
    for i in range(first, end):
        if left == 0:  # a new matrix: divisions are for these only
            i1, i2, i3 = i % ne01, i // ne01 % ne02, i // (ne01 * ne02)
            left = ne01 - i1
            at = src + _three_d(d, SRC0 + NB1, i1, i2, i3)
            index_at = ld_i64(d + 8 * (SRC1 + ADDRESS)) + _three_d(d, SRC1 + NB0, i1, i2 % ne11, i3 % ne12)
            out = dst + _three_d(d, DST + NB1, 0, i2, i3)
        row = ld_i64(index_at) if is_long else ld_i32(index_at)
        if row < 0 or row >= n_rows:
            report(ith, d, ctl, i, row, n_rows)
            return
        to = out + row * nb1
        if raw != 0:
            copy_bytes(to, at, raw)
        elif src_type == F32:
            row_from_f32(type, at, to, n, quantise)
        else:
            row_to_f32(src_type, at, floats_at, n, 0)
            row_from_f32(type, floats_at, to, n, quantise)
        left -= 1
        at += nb01
        index_at += nb10


@op_kernel
def add_id_rows(ith, nth, d, ctl):
    """Add to each row of src0 the row of src1 that src2 names for it."""
    n, n_used = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1))
    n_rows, nb11 = ld_i64(d + 8 * (SRC1 + NE1)), ld_i64(d + 8 * (SRC1 + NB1))
    src, dst, bias = (
        ld_i64(d + 8 * (SRC0 + ADDRESS)),
        ld_i64(d + 8 * (DST + ADDRESS)),
        ld_i64(d + 8 * (SRC1 + ADDRESS)),
    )
    first, end = share(n_used * ld_i64(d + 8 * (DST + NE2)), ith, nth)
    for i in range(first, end):
        slot, token = i % n_used, i // n_used
        row = _index(d, SRC2, slot, token, 0)
        if row < 0 or row >= n_rows:
            report(ith, d, ctl, i, row, n_rows)
            return
        at, out = src + _three_d(d, SRC0 + NB1, slot, token, 0), dst + _three_d(d, DST + NB1, slot, token, 0)
        join_row(ADD, at, bias + row * nb11, out, n)
