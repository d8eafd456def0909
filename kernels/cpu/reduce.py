"""Ops over whole rows: SUM_ROWS, MEAN, SUM, ARGMAX, CUMSUM, DIAG_MASK_INF."""

from __future__ import annotations

import numpy as np

from .descriptor import address, number, row_address, rows_of, sizes, word
from .kernel import op_kernel
from .memory import copy_bytes, floats, ld_f32, st_f32, st_i32
from .norms import sum_of
from .words import DST, NB0, PARAM, SRC0

#: Parameters: which op; what is written outside the diagonal's mask (bits), and its column of the first row.
KIND, MASKED, N_PAST = PARAM, PARAM + 1, PARAM + 2
SUM_ROWS, MEAN, CUMSUM, ARGMAX, DIAG_MASK = range(5)


@op_kernel
def reduce_rows(ith, nth, d, ctl):
    """Reduce or scan each row of src0."""
    n, ne1, ne2, first, end = rows_of(d, SRC0, ith, nth)
    kind, n_past, masked = word(d, KIND), word(d, N_PAST), number(d, MASKED)
    for row in range(first, end):
        at = row_address(d, SRC0, row, ne1, ne2)
        x = floats(at)
        if kind == ARGMAX:
            best = 0
            for i in range(n):
                if x[i] > x[best]:
                    best = i
            st_i32(address(d, DST) + 4 * row, best)
            continue
        out = row_address(d, DST, row, ne1, ne2)
        y = floats(out)
        if kind == SUM_ROWS:
            st_f32(out, sum_of(at, n))
        elif kind == MEAN:
            st_f32(out, sum_of(at, n) / np.float32(n))
        elif kind == CUMSUM:
            total = np.float32(0.0)
            for i in range(n):
                total += x[i]
                y[i] = total
        else:
            if out != at:
                copy_bytes(out, at, 4 * n)
            for i in range(max(0, n_past + row % ne1 + 1), n):
                y[i] = masked


@op_kernel
def sum_all(ith, nth, d, ctl):
    """Add all elements up, in double precision from row to row; one thread."""
    n, ne1, ne2, ne3 = sizes(d, SRC0)
    nb0 = word(d, SRC0 + NB0)
    total = 0.0
    for row in range(ne1 * ne2 * ne3):
        at = row_address(d, SRC0, row, ne1, ne2)
        for i in range(n):
            total += ld_f32(at + i * nb0)
    st_f32(address(d, DST), np.float32(total))
