"""Ops that place elements: PAD, ROLL, TRI, DIAG, ARANGE; also COUNT_EQUAL and OUT_PROD."""

from __future__ import annotations

import numpy as np

from .convert import row_to_f32
from .elementwise import row_address, share
from .emit import F32x16, ir, micro, types
from .kernel import device, op_kernel
from .memory import bits_of, copy_bytes, floats, ld_f32, ld_i32, ld_i64, st_i64
from .words import (
    ADDRESS,
    DST,
    F32,
    NB0,
    NB1,
    NB2,
    NB3,
    NE0,
    NE1,
    NE2,
    NE3,
    PARAM,
    SRC0,
    SRC1,
    THREAD_BYTES,
    THREADS,
    TYPE,
)

#: Parameters of `pad_rows`: elements before each dimension; whether what is outside comes from the other end.
BEFORE, CIRCULAR = PARAM, PARAM + 4
#: Parameters of `triangle_rows`: the first and the end of what a row keeps, less its number; far off if there is none.
KEEP_FROM, KEEP_TO = PARAM, PARAM + 1
#: Parameters of `arange_row`: start and step (bits).
START, STEP = PARAM, PARAM + 1


@device
def _source_row(d, i1, i2, i3):
    nb1, nb2, nb3 = ld_i64(d + 8 * (SRC0 + NB1)), ld_i64(d + 8 * (SRC0 + NB2)), ld_i64(d + 8 * (SRC0 + NB3))
    return ld_i64(d + 8 * (SRC0 + ADDRESS)) + i1 * nb1 + i2 * nb2 + i3 * nb3


@device
def _clear(out, first, end):
    y = floats(out)
    for i in range(first, end):
        y[i] = np.float32(0.0)


@op_kernel
def pad_rows(ith, nth, d, ctl):
    """Put src0 into dst with zeros around it, or with itself."""
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    n0, n1 = ld_i64(d + 8 * (SRC0 + NE0)), ld_i64(d + 8 * (SRC0 + NE1))
    n2, n3 = ld_i64(d + 8 * (SRC0 + NE2)), ld_i64(d + 8 * (SRC0 + NE3))
    before, circular = ld_i64(d + 8 * BEFORE), ld_i64(d + 8 * CIRCULAR)
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        out = row_address(d, DST, row, ne1, ne2)
        i1, i2, i3 = (
            row % ne1 - ld_i64(d + 8 * (BEFORE + 1)),
            row // ne1 % ne2 - ld_i64(d + 8 * (BEFORE + 2)),
            row // (ne1 * ne2) - ld_i64(d + 8 * (BEFORE + 3)),
        )
        if circular != 0:
            x, y = floats(_source_row(d, i1 % n1, i2 % n2, i3 % n3)), floats(out)
            for i in range(n):
                y[i] = x[(i - before) % n0]
        elif i1 < 0 or i1 >= n1 or i2 < 0 or i2 >= n2 or i3 < 0 or i3 >= n3:
            _clear(out, 0, n)
        else:
            # a negative pad cuts
            start, stop = max(0, before), min(n, before + n0)
            _clear(out, 0, min(n, start))
            if stop > start:
                copy_bytes(out + 4 * start, _source_row(d, i1, i2, i3) + 4 * (start - before), 4 * (stop - start))
            _clear(out, max(start, stop), n)


@op_kernel
def roll_rows(ith, nth, d, ctl):
    """Rotate each dimension by a parameter."""
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    ne3 = ld_i64(d + 8 * (DST + NE3))
    shift = ld_i64(d + 8 * PARAM) % n
    first, end = share(ne1 * ne2 * ne3, ith, nth)
    for row in range(first, end):
        x = _source_row(
            d,
            (row % ne1 - ld_i64(d + 8 * (PARAM + 1))) % ne1,
            (row // ne1 % ne2 - ld_i64(d + 8 * (PARAM + 2))) % ne2,
            (row // (ne1 * ne2) - ld_i64(d + 8 * (PARAM + 3))) % ne3,
        )
        out = row_address(d, DST, row, ne1, ne2)
        copy_bytes(out + 4 * shift, x, 4 * (n - shift))
        copy_bytes(out, x + 4 * (n - shift), 4 * shift)


@op_kernel
def triangle_rows(ith, nth, d, ctl):
    """Keep a part of each row that moves by one from row to row; the rest is 0."""
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    keep_from, keep_to = ld_i64(d + 8 * KEEP_FROM), ld_i64(d + 8 * KEEP_TO)
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        x, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        start, stop = max(0, min(n, row % ne1 + keep_from)), max(0, min(n, row % ne1 + keep_to))
        _clear(out, 0, start)
        copy_bytes(out + 4 * start, x + 4 * start, 4 * max(0, stop - start))
        _clear(out, max(start, stop), n)


@op_kernel
def diagonal_rows(ith, nth, d, ctl):
    """Put src0's rows on the diagonals of matrices of zeros."""
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        out, i = row_address(d, DST, row, ne1, ne2), row % ne1
        _clear(out, 0, n)
        floats(out)[i] = ld_f32(_source_row(d, 0, row // ne1 % ne2, row // (ne1 * ne2)) + 4 * i)


@op_kernel
def arange_row(ith, nth, d, ctl):
    """Write ``start + step * i``."""
    y, start, step = floats(ld_i64(d + 8 * (DST + ADDRESS))), ld_f32(d + 8 * START), ld_f32(d + 8 * STEP)
    for i in range(ld_i64(d + 8 * (DST + NE0))):
        y[i] = start + step * np.float32(i)


@op_kernel
def count_equal(ith, nth, d, ctl):
    """Count equal I32 elements; one thread."""
    n, ne1, ne2 = ld_i64(d + 8 * (SRC0 + NE0)), ld_i64(d + 8 * (SRC0 + NE1)), ld_i64(d + 8 * (SRC0 + NE2))
    nb00, nb10 = ld_i64(d + 8 * (SRC0 + NB0)), ld_i64(d + 8 * (SRC1 + NB0))
    total = 0
    for row in range(ne1 * ne2 * ld_i64(d + 8 * (SRC0 + NE3))):
        a, b = row_address(d, SRC0, row, ne1, ne2), row_address(d, SRC1, row, ne1, ne2)
        for i in range(n):
            total += ld_i32(a + i * nb00) == ld_i32(b + i * nb10)
    st_i64(ld_i64(d + 8 * (DST + ADDRESS)), total)


@micro(types.void, 4)
def add_scaled(e, x, y, n, factor):
    """``y += x * factor`` for n floats; the factor as bits."""
    factor = e.splat(e.float_of(factor))

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        v = e.fma(e.load_lanes(F32x16, e.add(x, at), mask), factor, e.load_lanes(F32x16, e.add(y, at), mask))
        e.store_lanes(v, e.add(y, at), mask)

    e.vectors(n, body)


@op_kernel
def out_prod_rows(ith, nth, d, ctl):
    """Add up the outer products of the rows of src0, of any type that rows of floats can be made of, and src1.

    PARAM: address of a kernel of `DEQUANTISE`.
    """
    n, ne1 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1))
    ne2, ne3 = ld_i64(d + 8 * (DST + NE2)), ld_i64(d + 8 * (DST + NE3))
    type, src1 = ld_i64(d + 8 * (SRC0 + TYPE)), ld_i64(d + 8 * (SRC1 + ADDRESS))
    nb10, nb11 = ld_i64(d + 8 * (SRC1 + NB0)), ld_i64(d + 8 * (SRC1 + NB1))
    nb12, nb13 = ld_i64(d + 8 * (SRC1 + NB2)), ld_i64(d + 8 * (SRC1 + NB3))
    floats_at = ld_i64(ctl + 8 * THREADS) + ith * ld_i64(ctl + 8 * THREAD_BYTES)
    more2, more3 = ne2 // ld_i64(d + 8 * (SRC0 + NE2)), ne3 // ld_i64(d + 8 * (SRC0 + NE3))
    first, end = share(ne1 * ne2 * ne3, ith, nth)
    for row in range(first, end):
        i1, i2, i3 = row % ne1, row // ne1 % ne2, row // (ne1 * ne2)
        out = row_address(d, DST, row, ne1, ne2)
        _clear(out, 0, n)
        for k in range(ld_i64(d + 8 * (SRC0 + NE1))):
            x = _source_row(d, k, i2 // more2, i3 // more3)
            if type != F32:
                row_to_f32(type, x, floats_at, n, ld_i64(d + 8 * PARAM))
                x = floats_at
            factor = ld_f32(src1 + i1 * nb10 + k * nb11 + i2 * nb12 + i3 * nb13)
            add_scaled(x, out, n, bits_of(factor))
