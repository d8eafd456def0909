"""What an op kernel reads in its descriptor (`words`): sizes, strides and addresses of tensors, parameters, its share of the work.

A tensor is named by its first word: `DST`, `SRC0`, ... These functions are compiled into their callers.
"""

from __future__ import annotations

from .emit import F32, I64, Emit, ir, micro, types
from .kernel import device
from .memory import ld_i64
from .words import ADDRESS, NB0, NB1, NE0, SCRATCH, SHARED, THREAD_BYTES, THREADS

_FOUR = types.UniTuple(types.int64, 4)


def _words(e: Emit, d: ir.Value, tensor: ir.Value, first: int, n: int) -> list[ir.Value]:
    """Return n words of a tensor."""
    at = e.add(d, e.mul(tensor, 8))
    return [e.load(I64, at, 8 * (first + i)) for i in range(n)]


def _tuple(e: Emit, values: list[ir.Value]) -> ir.Value:
    made = ir.Constant(ir.ArrayType(I64, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        made = e.b.insert_value(made, value, i)
    return made


@micro(types.int64, 2)
def word(e, d, at):
    """Return one word: a parameter, or a tensor's, such as ``word(d, SRC0 + NE2)``."""
    return e.load(I64, e.add(d, e.mul(at, 8)))


@micro(types.float32, 2)
def number(e, d, at):
    """Return a word that has the bits of a float."""
    return e.load(F32, e.add(d, e.mul(at, 8)))


@micro(types.int64, 2)
def address(e, d, tensor):
    """Return the address of a tensor's first byte; 0: there is none."""
    return _words(e, d, tensor, ADDRESS, 1)[0]


@micro(_FOUR, 2)
def sizes(e, d, tensor):
    """Return ``ne0, ne1, ne2, ne3`` of a tensor."""
    return _tuple(e, _words(e, d, tensor, NE0, 4))


@micro(_FOUR, 2)
def strides(e, d, tensor):
    """Return ``nb0, nb1, nb2, nb3`` of a tensor, in bytes."""
    return _tuple(e, _words(e, d, tensor, NB0, 4))


@micro(types.int64, 5)
def row_at(e, d, tensor, i1, i2, i3):
    """Return the address of a row of a tensor."""
    at = _words(e, d, tensor, ADDRESS, 1)[0]
    for i, stride in zip((i1, i2, i3), _words(e, d, tensor, NB1, 3), strict=True):
        at = e.add(at, e.mul(i, stride))
    return at


@device
def row_address(d, tensor, row, ne1, ne2):
    """Return the address of a row of a tensor, rows counted over dimensions of ne1 and ne2."""
    outer = row // ne1
    return row_at(d, tensor, row % ne1, outer % ne2, outer // ne2)


@device
def repeated_row_address(d, tensor, i1, i2, i3):
    """Return the address of a row of a tensor that is repeated as often as need be."""
    _, ne1, ne2, ne3 = sizes(d, tensor)
    return row_at(d, tensor, i1 % ne1, i2 % ne2, i3 % ne3)


@device
def share(n, ith, nth):
    """Return the first and the end of what thread ith of nth does of n equal parts."""
    per = (n + nth - 1) // nth
    return min(n, ith * per), min(n, ith * per + per)


@device
def rows_of(d, tensor, ith, nth):
    """Return ``ne0, ne1, ne2`` of a tensor, and the first and the end of the rows that thread ith of nth does."""
    ne0, ne1, ne2, ne3 = sizes(d, tensor)
    first, end = share(ne1 * ne2 * ne3, ith, nth)
    return ne0, ne1, ne2, first, end


@device
def scratch(d, ctl):
    """Return the address of the op's part of the plan's shared scratch."""
    return ld_i64(ctl + 8 * SHARED) + ld_i64(d + 8 * SCRATCH)


@device
def own_scratch(ctl, ith):
    """Return the address of a thread's own scratch."""
    return ld_i64(ctl + 8 * THREADS) + ith * ld_i64(ctl + 8 * THREAD_BYTES)
