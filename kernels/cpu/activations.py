"""Prepares the activations of matrix products: rows of floats become blocks of 32 signed bytes.

A quantised row of K elements begins at a cache line: K bytes, then four arrays of K/32: the scale d (f32),
``-offset * sum`` (i32), the same divided by 8 (i32, for kernels that spread it over 8 lanes), and ``d * sum`` (f32, for
types with a minimum). Weights are unsigned bytes minus an offset; the offset is in the start value of each dot product.
"""

from __future__ import annotations

from .convert import row_to_f32
from .descriptor import row_address, rows_of, scratch, sizes, word
from .emit import F32, I32, Emit, F32x16, I32x16, U8x16, ir
from .kernel import device, micro_kernel, op_kernel
from .memory import call4
from .words import PARAM, SRC0, TYPE

#: Parameters: the kind of rows (MODE_*), the offset of the weights, the address of a `quantise_row_*`.
MODE, OFFSET, QUANTISE_ROW = PARAM, PARAM + 1, PARAM + 2
MODE_BYTES, MODE_F32 = 0, 1


def quantised_row_bytes(k: int) -> int:
    """Bytes of a quantised row of k elements."""
    return -(-(k + k // 32 * 16) // 64) * 64


#: If the largest magnitude of a block is smaller, its inverse is infinite, and the block counts as zeros.
_SMALLEST = F32(1e-36)


def _quantise_block(
    e: Emit, x: ir.Value, q: ir.Value, i: ir.Value, *, in_half: bool
) -> tuple[ir.Value, list[ir.Value]]:
    """Store block i's bytes; return its scale and its 32 integers. The scale is NaN if an element is not finite.

    ``in_half``: the scale is rounded through a half, as ggml keeps it beside weights of 32 columns a scale.
    """
    b, at = e.b, e.add(x, e.mul(i, 128))
    v = [e.load(F32x16, at), e.load(F32x16, at, 64)]
    largest = e.fold(e.fmax(e.unary("fabs", v[0]), e.unary("fabs", v[1])), e.fmax)
    zero_or_nan = e.fold(b.fadd(*[b.fsub(y, y) for y in v]), b.fadd)
    exact = b.fdiv(largest, F32(127.0))
    inverse = b.select(b.fcmp_ordered(">", largest, _SMALLEST), b.fdiv(F32(1.0), exact), F32(0.0))
    ints = [b.fptosi(e.unary("nearbyint", b.fmul(y, e.splat(inverse))), I32x16) for y in v]
    e.store(e.cat(*[b.trunc(y, U8x16) for y in ints]), e.add(q, e.mul(i, 32)))
    return b.fadd(e.round_f16(exact) if in_half else exact, zero_or_nan), ints


def _quantise_row(e: Emit, x: ir.Value, q: ir.Value, n_blocks: ir.Value, offset: ir.Value, *, in_half: bool) -> None:
    b = e.b
    scales = e.add(q, e.mul(n_blocks, 32))
    starts = e.add(scales, e.mul(n_blocks, 4))
    starts8 = e.add(starts, e.mul(n_blocks, 4))
    sums = e.add(starts8, e.mul(n_blocks, 4))
    offset = b.trunc(offset, I32)
    with e.loop(n_blocks) as (i, _):
        d, ints = _quantise_block(e, x, q, i, in_half=in_half)
        total = e.fold(b.add(*ints), b.add)
        at = e.mul(i, 4)
        e.store(d, e.add(scales, at))
        e.store(b.neg(b.mul(total, offset)), e.add(starts, at))
        e.store(b.neg(b.mul(total, b.sdiv(offset, I32(8)))), e.add(starts8, at))
        e.store(b.fmul(b.sitofp(total, F32), d), e.add(sums, at))


@micro_kernel(4)
def quantise_row_q8_0(e, x, q, n_blocks, offset):
    """Quantise a row with scales rounded to halves, for types that ggml multiplies with Q8_0 or Q8_1."""
    _quantise_row(e, x, q, n_blocks, offset, in_half=True)


@micro_kernel(4)
def quantise_row_q8_k(e, x, q, n_blocks, offset):
    """Quantise a row with unrounded scales, for types that ggml multiplies with Q8_K."""
    _quantise_row(e, x, q, n_blocks, offset, in_half=False)


def _quantise_row_halves(
    e: Emit, x: ir.Value, q: ir.Value, n_blocks: ir.Value, offset: ir.Value, *, in_half: bool
) -> None:
    b = e.b
    scales = e.add(q, e.mul(n_blocks, 32))
    starts = e.add(scales, e.mul(n_blocks, 4))
    quarter = b.sdiv(b.trunc(offset, I32), I32(4))
    with e.loop(n_blocks) as (i, _):
        d, ints = _quantise_block(e, x, q, i, in_half=in_half)
        e.store(d, e.add(scales, e.mul(i, 4)))
        for part, v in enumerate(ints):
            e.store(b.neg(b.mul(e.fold(v, b.add), quarter)), e.add(starts, e.mul(i, 8)), 4 * part)


@micro_kernel(4)
def quantise_row_halves(e, x, q, n_blocks, offset):
    """Quantise a row for weights with a scale for 16 columns: bytes, scales, ``-offset/4 * sum`` of each 16 (i32)."""
    _quantise_row_halves(e, x, q, n_blocks, offset, in_half=False)


@micro_kernel(4)
def quantise_row_halves_q8_0(e, x, q, n_blocks, offset):
    """Quantise a row the same way with scales rounded to halves, for such types that ggml multiplies with Q8_0."""
    _quantise_row_halves(e, x, q, n_blocks, offset, in_half=True)


@device
def _rows(d, ctl, first, last):
    """Prepare rows first .. last - 1 in the order of ne1, ne2, ne3."""
    k, ne1, ne2, _ = sizes(d, SRC0)
    out = scratch(d, ctl)
    row_bytes = (k + k // 32 * 16 + 63) // 64 * 64
    mode, offset, quantise = word(d, MODE), word(d, OFFSET), word(d, QUANTISE_ROW)
    for r in range(first, last):
        at = row_address(d, SRC0, r, ne1, ne2)
        if mode == MODE_BYTES:
            call4(quantise, at, out + r * row_bytes, k // 32, offset)
        else:
            row_to_f32(word(d, SRC0 + TYPE), at, out + r * 4 * k, k, 0)


@op_kernel
def prepare_activations(ith, nth, d, ctl):
    """Prepare the rows that following products read, in the plan's scratch."""
    _, _, _, first, end = rows_of(d, SRC0, ith, nth)
    _rows(d, ctl, first, end)
