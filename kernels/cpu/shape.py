"""Ops that place elements: PAD, ROLL, TRI, DIAG, ARANGE; also COUNT_EQUAL and OUT_PROD."""

from __future__ import annotations

import numpy as np

from .convert import row_to_f32
from .descriptor import address, number, own_scratch, row_address, row_at, rows_of, share, sizes, strides, word
from .emit import F32x16, ir, micro, types
from .kernel import device, op_kernel
from .memory import bits_of, copy_bytes, floats, ld_f32, ld_i32, st_i64
from .words import DST, F32, NB0, NE0, PARAM, SRC0, SRC1, TYPE

#: Parameters of `pad_rows`: elements before each dimension; whether what is outside comes from the other end.
BEFORE, CIRCULAR = PARAM, PARAM + 4
#: Parameters of `triangle_rows`: the first and the end of what a row keeps, less its number; far off if there is none.
KEEP_FROM, KEEP_TO = PARAM, PARAM + 1
#: Parameters of `arange_row`: start and step (bits).
START, STEP = PARAM, PARAM + 1


@device
def clear(out, first, end):
    """Set elements first .. end - 1 of a row of floats to 0."""
    y = floats(out)
    for i in range(first, end):
        y[i] = np.float32(0.0)


@op_kernel
def pad_rows(ith, nth, d, ctl):
    """Put src0 into dst with zeros around it, or with itself."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    n0, n1, n2, n3 = sizes(d, SRC0)
    before, circular = word(d, BEFORE), word(d, CIRCULAR)
    for row in range(first, end):
        out = row_address(d, DST, row, ne1, ne2)
        i1, i2 = row % ne1 - word(d, BEFORE + 1), row // ne1 % ne2 - word(d, BEFORE + 2)
        i3 = row // (ne1 * ne2) - word(d, BEFORE + 3)
        if circular != 0:
            x, y = floats(row_at(d, SRC0, i1 % n1, i2 % n2, i3 % n3)), floats(out)
            for i in range(n):
                y[i] = x[(i - before) % n0]
        elif i1 < 0 or i1 >= n1 or i2 < 0 or i2 >= n2 or i3 < 0 or i3 >= n3:
            clear(out, 0, n)
        else:
            # a negative pad cuts
            start, stop = max(0, before), min(n, before + n0)
            clear(out, 0, min(n, start))
            if stop > start:
                copy_bytes(out + 4 * start, row_at(d, SRC0, i1, i2, i3) + 4 * (start - before), 4 * (stop - start))
            clear(out, max(start, stop), n)


@op_kernel
def roll_rows(ith, nth, d, ctl):
    """Rotate each dimension by a parameter."""
    n, ne1, ne2, ne3 = sizes(d, DST)
    shift = word(d, PARAM) % n
    first, end = share(ne1 * ne2 * ne3, ith, nth)
    for row in range(first, end):
        x = row_at(
            d,
            SRC0,
            (row % ne1 - word(d, PARAM + 1)) % ne1,
            (row // ne1 % ne2 - word(d, PARAM + 2)) % ne2,
            (row // (ne1 * ne2) - word(d, PARAM + 3)) % ne3,
        )
        out = row_address(d, DST, row, ne1, ne2)
        copy_bytes(out + 4 * shift, x, 4 * (n - shift))
        copy_bytes(out, x + 4 * (n - shift), 4 * shift)


@op_kernel
def triangle_rows(ith, nth, d, ctl):
    """Keep a part of each row that moves by one from row to row; the rest is 0."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    keep_from, keep_to = word(d, KEEP_FROM), word(d, KEEP_TO)
    for row in range(first, end):
        x, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        start, stop = max(0, min(n, row % ne1 + keep_from)), max(0, min(n, row % ne1 + keep_to))
        clear(out, 0, start)
        copy_bytes(out + 4 * start, x + 4 * start, 4 * max(0, stop - start))
        clear(out, max(start, stop), n)


@op_kernel
def diagonal_rows(ith, nth, d, ctl):
    """Put src0's rows on the diagonals of matrices of zeros."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    for row in range(first, end):
        out, i = row_address(d, DST, row, ne1, ne2), row % ne1
        clear(out, 0, n)
        floats(out)[i] = ld_f32(row_at(d, SRC0, 0, row // ne1 % ne2, row // (ne1 * ne2)) + 4 * i)


@op_kernel
def arange_row(ith, nth, d, ctl):
    """Write ``start + step * i``."""
    y, start, step = floats(address(d, DST)), number(d, START), number(d, STEP)
    for i in range(word(d, DST + NE0)):
        y[i] = start + step * np.float32(i)


@op_kernel
def count_equal(ith, nth, d, ctl):
    """Count equal I32 elements; one thread."""
    n, ne1, ne2, ne3 = sizes(d, SRC0)
    nb00, nb10 = word(d, SRC0 + NB0), word(d, SRC1 + NB0)
    total = 0
    for row in range(ne1 * ne2 * ne3):
        a, b = row_address(d, SRC0, row, ne1, ne2), row_address(d, SRC1, row, ne1, ne2)
        for i in range(n):
            total += ld_i32(a + i * nb00) == ld_i32(b + i * nb10)
    st_i64(address(d, DST), total)


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
    n, ne1, ne2, ne3 = sizes(d, DST)
    type, src1 = word(d, SRC0 + TYPE), address(d, SRC1)
    nb10, nb11, nb12, nb13 = strides(d, SRC1)
    floats_at = own_scratch(ctl, ith)
    _, n_row, ne02, ne03 = sizes(d, SRC0)
    more2, more3 = ne2 // ne02, ne3 // ne03
    first, end = share(ne1 * ne2 * ne3, ith, nth)
    for row in range(first, end):
        i1, i2, i3 = row % ne1, row // ne1 % ne2, row // (ne1 * ne2)
        out = row_address(d, DST, row, ne1, ne2)
        clear(out, 0, n)
        for k in range(n_row):
            x = row_at(d, SRC0, k, i2 // more2, i3 // more3)
            if type != F32:
                row_to_f32(type, x, floats_at, n, word(d, PARAM))
                x = floats_at
            factor = ld_f32(src1 + i1 * nb10 + k * nb11 + i2 * nb12 + i3 * nb13)
            add_scaled(x, out, n, bits_of(factor))
