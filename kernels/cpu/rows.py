"""Ops that choose rows by index: GET_ROWS, SET_ROWS, ADD_ID. One out of bounds stops the plan, touching nothing."""

from __future__ import annotations

from .convert import row_from_f32, row_to_f32
from .descriptor import address, own_scratch, share, sizes, word
from .elementwise import ADD, join_row
from .kernel import device, op_kernel
from .memory import copy_bytes, ld_i32, ld_i64
from .plan import report
from .words import DST, F32, I64, NB0, NB1, NE1, NE2, PARAM, SRC0, SRC1, SRC2, TYPE

#: Parameters: address of a kernel of `DEQUANTISE` (SET_ROWS: `quantiser`); bytes of a row copied as it is, else 0.
DEQUANTISE, RAW_BYTES = PARAM, PARAM + 1
QUANTISE = DEQUANTISE


@device
def _three_d(d, tensor, i0, i1, i2):
    """Address of an element or row by the strides of three dimensions, given as the tensor's first stride word."""
    return i0 * word(d, tensor) + i1 * word(d, tensor + 1) + i2 * word(d, tensor + 2)


@device
def _index(d, tensor, i0, i1, i2):
    """Load an index, I32 or I64."""
    at = address(d, tensor) + _three_d(d, tensor + NB0, i0, i1, i2)
    return ld_i64(at) if word(d, tensor + TYPE) == I64 else ld_i32(at)


@op_kernel
def get_rows(ith, nth, d, ctl):
    """Copy the chosen rows, as floats unless RAW_BYTES says how long they are."""
    n, n_rows, _, _ = sizes(d, SRC0)
    ne10, ne11, ne12, _ = sizes(d, SRC1)
    src, dst = address(d, SRC0), address(d, DST)
    type, raw, dequantise = word(d, SRC0 + TYPE), word(d, RAW_BYTES), word(d, DEQUANTISE)
    first, end = share(ne10 * ne11 * ne12, ith, nth)
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
    n, ne01, ne02, ne03 = sizes(d, SRC0)
    ne11, ne12, n_rows = word(d, SRC1 + NE1), word(d, SRC1 + NE2), word(d, DST + NE1)
    src, dst = address(d, SRC0), address(d, DST)
    type, src_type, raw = word(d, DST + TYPE), word(d, SRC0 + TYPE), word(d, RAW_BYTES)
    quantise, floats_at = word(d, QUANTISE), own_scratch(ctl, ith)
    nb01, nb1, nb10 = word(d, SRC0 + NB1), word(d, DST + NB1), word(d, SRC1 + NB0)
    is_long, left, at, index_at, out = word(d, SRC1 + TYPE) == I64, 0, src, 0, dst
    first, end = 0, ne01 * ne02 * ne03
    if end > 1:
        first, end = share(end, ith, nth)
    elif ith == 0:  # one token: no divisions at all
        left, index_at = 1, address(d, SRC1)
    else:
        return
    for i in range(first, end):
        if left == 0:  # a new matrix: divisions are for these only
            i1, i2, i3 = i % ne01, i // ne01 % ne02, i // (ne01 * ne02)
            left = ne01 - i1
            at = src + _three_d(d, SRC0 + NB1, i1, i2, i3)
            index_at = address(d, SRC1) + _three_d(d, SRC1 + NB0, i1, i2 % ne11, i3 % ne12)
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
    n, n_used, n_token, _ = sizes(d, DST)
    n_rows, nb11 = word(d, SRC1 + NE1), word(d, SRC1 + NB1)
    src, dst, bias = address(d, SRC0), address(d, DST), address(d, SRC1)
    first, end = share(n_used * n_token, ith, nth)
    for i in range(first, end):
        slot, token = i % n_used, i // n_used
        row = _index(d, SRC2, slot, token, 0)
        if row < 0 or row >= n_rows:
            report(ith, d, ctl, i, row, n_rows)
            return
        at, out = src + _three_d(d, SRC0 + NB1, slot, token, 0), dst + _three_d(d, DST + NB1, slot, token, 0)
        join_row(ADD, at, bias + row * nb11, out, n)
