"""RMS_NORM, NORM, L2_NORM: rows scaled by their norm. Sums are in 64 lanes, always in the same order."""

from __future__ import annotations

import math
from collections.abc import Callable

from .descriptor import number, row_address, rows_of, word
from .emit import I64, LANES, Emit, F32x16, ir, micro, types
from .kernel import op_kernel
from .memory import bits_of
from .words import DST, PARAM, SRC0

import numpy as np  # isort: skip

Join = Callable[[ir.Value, ir.Value], ir.Value]

#: Parameters of `norm_rows`: which norm, epsilon.
KIND, EPS = PARAM, PARAM + 1
RMS_NORM, NORM, L2_NORM = range(3)


def fold_row(e: Emit, n: ir.Value, start: float, load: Callable[..., ir.Value], step: Join, join: Join) -> ir.Value:
    """Fold 16 lanes at a time into four accumulators, then these and their lanes into one number.

    Parameters
    ----------
    n : i64
        Number of elements.
    start : float
        What joins without effect.
    load : callable
        ``load(i, mask)``: 16 elements from i on.
    step, join : callable
        ``step(v, acc)`` takes lanes in, ``join`` puts accumulators together.
    """
    b = e.b
    acc = [e.var(e.const(F32x16, start)) for _ in range(4)]
    whole = b.and_(n, I64(-4 * LANES))
    with e.loop(whole, 4 * LANES) as (i, _):
        for j, p in enumerate(acc):
            b.store(step(load(e.add(i, LANES * j), None), b.load(p)), p)

    def rest(i: ir.Value, mask: ir.Value | None) -> None:
        old = b.load(acc[0])
        new = step(load(e.add(i, whole), mask), old)
        b.store(new if mask is None else b.select(mask, new, old), acc[0])

    e.vectors(b.sub(n, whole), rest)
    x, y, z, w = (b.load(p) for p in acc)
    return e.fold(join(join(x, y), join(z, w)), join)


def _floats_at(e: Emit, addr: ir.Value) -> Callable[..., ir.Value]:
    return lambda i, mask: e.load_lanes(F32x16, e.add(addr, e.mul(i, 4)), mask)


@micro(types.float32, 3)
def sum_of_squares(e, x, n, less):
    """Sum of squares of n floats, each less the float of some bits."""
    less = e.splat(e.float_of(less))

    def step(v: ir.Value, acc: ir.Value) -> ir.Value:
        v = e.b.fsub(v, less)
        return e.fma(v, v, acc)

    return fold_row(e, n, 0.0, _floats_at(e, x), step, e.b.fadd)


@micro(types.float32, 2)
def sum_of(e, x, n):
    """Sum of n floats."""
    return fold_row(e, n, 0.0, _floats_at(e, x), e.b.fadd, e.b.fadd)


@micro(types.float32, 2)
def largest_of(e, x, n):
    """Largest of n floats."""
    return fold_row(e, n, -math.inf, _floats_at(e, x), e.fmax, e.fmax)


@micro(types.void, 5)
def scale_row(e, x, y, n, less, factor):
    """``y = (x - less) * factor``; both are bits of floats."""
    less, factor = e.splat(e.float_of(less)), e.splat(e.float_of(factor))

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        v = e.load_lanes(F32x16, e.add(x, at), mask)
        e.store_lanes(e.b.fmul(e.b.fsub(v, less), factor), e.add(y, at), mask)

    e.vectors(n, body)


@op_kernel
def norm_rows(ith, nth, d, ctl):
    """Scale each row by one over its norm; NORM takes off its mean first."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    kind, eps = word(d, KIND), number(d, EPS)
    for row in range(first, end):
        x, y = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        mean = np.float32(0.0)
        if kind == NORM:
            mean = sum_of(x, n) / np.float32(n)
        squares = sum_of_squares(x, n, bits_of(mean))
        if kind == L2_NORM:
            factor = np.float32(1.0) / max(np.float32(math.sqrt(squares)), eps)
        else:
            factor = np.float32(1.0) / np.float32(math.sqrt(squares / np.float32(n) + eps))
        scale_row(x, y, n, bits_of(mean), bits_of(factor))
