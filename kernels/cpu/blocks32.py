"""Weights in blocks of 32: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4, IQ4_NL.

Every type is an unsigned byte minus an offset, times a scale, plus a minimum for some types. The offset is part of the
start value of the dot product (`activations`), so it costs nothing. Each type has two kernels:

``rows_TYPE(w, stride, n_rows, n_blocks, n_tokens, xs, outs, out_offset)``
    Few tokens: rows are read as they lie in the file (`rowwise`).
``unpack_TYPE(w, stride, n_blocks, panel)``
    Many: 16 rows go into half a panel.
"""

from __future__ import annotations

from .dequantise import IQ4_NL_VALUES, MXFP4_DOUBLED
from .emit import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    Emit,
    F16x16,
    F32x4,
    F32x8,
    I16x16,
    I32x8,
    I32x16,
    I64x4,
    U8x16,
    U8x32,
    U8x64,
    ir,
    vec,
)
from .kernel import Kernel, micro_kernel
from .panel import PANEL_BLOCK, put_columns, put_scales, row_addresses
from .rowwise import fetch, make_rows_kernel
from .words import IQ4_NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

NAMES = {Q8_0: "q8_0", Q4_0: "q4_0", Q4_1: "q4_1", Q5_0: "q5_0", Q5_1: "q5_1", MXFP4: "mxfp4", IQ4_NL: "iq4_nl"}
#: Bytes of a block; bytes before its 16 bytes of nibbles (32 of Q8_0).
SIZE = {Q8_0: 34, Q4_0: 18, Q4_1: 20, Q5_0: 22, Q5_1: 24, MXFP4: 17, IQ4_NL: 18}
HEAD = {Q8_0: 2, Q4_0: 2, Q4_1: 4, Q5_0: 6, Q5_1: 8, MXFP4: 1, IQ4_NL: 2}
#: Offset of the 32 fifth bits, in bytes.
FIFTH_BITS = {Q5_0: 2, Q5_1: 4}
#: Offset of the unsigned bytes; a multiple of 8.
OFFSET = {Q8_0: 128, Q4_0: 8, Q4_1: 0, Q5_0: 16, Q5_1: 0, MXFP4: 16, IQ4_NL: 128}
HAS_MINIMUM = frozenset({Q4_1, Q5_1})
#: The values of the sixteen codes of some types, plus the offset; MXFP4's are doubled, and its scale is halved.
BYTES = {MXFP4: [16 + v for v in MXFP4_DOUBLED], IQ4_NL: [128 + v for v in IQ4_NL_VALUES]}


def e8m0(e: Emit, exponent: ir.Value) -> ir.Value:
    """Return half of two to the power of an exponent byte less 127, as floats; the smallest are subnormal."""
    b, type = e.b, exponent.type
    small = b.shl(e.const(type, 0x200000), exponent)
    normal = b.shl(b.sub(exponent, e.const(type, 1)), e.const(type, 23))
    is_small = b.icmp_unsigned("<", exponent, e.const(type, 2))
    return b.bitcast(b.select(is_small, small, normal), vec(F32, type.count))


def _codes(e: Emit, typ: int, block: ir.Value) -> ir.Value:
    """Load the 32 bytes of a block: low nibbles first, then high ones."""
    b = e.b
    if typ == Q8_0:
        return b.xor(e.load(U8x32, block, HEAD[typ]), e.const(U8x32, 128))
    packed = e.load(U8x16, block, HEAD[typ])
    twice = e.cast(e.cat(packed, packed), I64x4)
    u = e.cast(b.lshr(twice, ir.Constant(I64x4, [0, 0, 4, 4])), U8x32)
    if typ in BYTES:
        return e.lookup(BYTES[typ], u)
    u = b.and_(u, e.const(U8x32, 15))
    if typ in FIFTH_BITS:
        fifth = e.cast(e.load(I32, block, FIFTH_BITS[typ]), vec(I1, 32))
        u = b.or_(u, b.select(fifth, e.const(U8x32, 16), e.const(U8x32, 0)))
    return u


def _scales(e: Emit, typ: int, block: ir.Value, n: int) -> tuple[ir.Value, ir.Value | None]:
    """Load the scales of n blocks, and their minima if there are any."""

    def halves(off: int) -> ir.Value:
        return e.to_f32(e.cast(e.scalars(e.add(block, off), SIZE[typ], n, 16), vec(F16, n)))

    return halves(0), halves(2) if typ in HAS_MINIMUM else None


def _product(
    e: Emit, typ: int, rows: list[ir.Value], ahead: ir.Value, n_blocks: ir.Value, xs: list[ir.Value]
) -> list[list[ir.Value]]:
    """Return the products of rows with tokens: four blocks a step, each with sums of its own."""
    b, n4 = e.b, e.mul(n_blocks, 4)
    acc = [[[e.zeros(F32x8) for _ in range(4)] for _ in xs] for _ in rows]
    minimum_acc = [[e.zeros(F32x4) for _ in xs] for _ in rows]
    scales = [e.add(x, e.mul(n_blocks, 32)) for x in xs]
    starts8 = [e.add(s, e.mul(n4, 2)) for s in scales]
    sums = [e.add(s, e.mul(n4, 3)) for s in scales]
    aside = typ != Q8_0  # whose rows are taken alone and would wait for what was stored
    powers = e.table("e8m0", F32, [2.0 ** (exponent - 128) for exponent in range(256)]) if typ == MXFP4 else None

    def take_minima(r: int, minima: ir.Value, i4: ir.Value, n: int) -> None:
        for t, s in enumerate(sums):
            m = b.fmul(minima, e.load(vec(F32, n), e.add(s, i4)))
            if n < 4:
                m = e.shuffle(m, e.const(m.type, 0.0), [min(n, lane) for lane in range(4)])
            b.store(b.fadd(m, b.load(minimum_acc[r][t])), minimum_acc[r][t])

    def step(i: ir.Value, n: int) -> None:
        """Take n blocks from i on into the first n sums."""
        i4, at_w = e.mul(i, 4), e.mul(i, SIZE[typ])
        at = [e.add(row, at_w) for row in rows]
        factors: list[list[ir.Value]] = []
        fetch(e, ahead, at_w, len(rows), n * SIZE[typ])
        for r, block in enumerate(at):
            if powers is None:
                dw, minima = _scales(e, typ, block, n)
                products = [b.fmul(dw, e.load(vec(F32, n), e.add(s, i4))) for s in scales]
                factors.append([e.put_aside(f) for f in products] if aside and n == 4 else products)
                if minima is not None:
                    take_minima(r, minima, i4, n)
        for j in range(n):
            ints = [e.const(I32x8, 0)] * len(xs)
            if OFFSET[typ]:
                ints = [e.splat(e.load(I32, e.add(s, i4), 4 * j), 8) for s in starts8]
            v = [e.load(U8x32, e.add(x, e.mul(i, 32)), 32 * j) for x in xs]
            dx = [e.splat(e.load(F32, e.add(s, i4), 4 * j), 8) for s in scales]
            dx = (
                [e.opaque(d) for d in dx] if powers is not None else dx
            )  # else scalars would be multiplied, then spread
            for r, block in enumerate(at):
                u = _codes(e, typ, e.add(block, SIZE[typ] * j))
                if powers is None:
                    own = [
                        e.splat(e.load(F32, f, 4 * j), 8) if aside and n == 4 else e.shuffle(f, f, [j] * 8)
                        for f in factors[r]
                    ]
                else:  # cheaper than spreading what was computed
                    exponent = b.zext(e.load(I8, block, SIZE[typ] * j), I64)
                    dw = e.splat(e.load(F32, e.add(powers, e.mul(exponent, 4))), 8)
                    own = [b.fmul(dw, d) for d in dx]
                for t, factor in enumerate(own):
                    p = acc[r][t][j]
                    b.store(e.fma(e.to_f32(e.dpbusd(ints[t], u, v[t])), factor, b.load(p)), p)

    fours, twos = b.and_(n_blocks, I64(-4)), b.and_(n_blocks, I64(-2))
    with e.loop(fours, 4) as (i, _):
        step(i, 4)
    with e.when(b.icmp_signed("<", fours, twos)):
        step(fours, 2)
    with e.when(b.icmp_signed("<", twos, n_blocks)):
        step(twos, 1)

    def total(r: int, t: int) -> ir.Value:
        a, b_, c, d = (b.load(p) for p in acc[r][t])
        value = e.sum(b.fadd(b.fadd(a, c), b.fadd(b_, d)))
        return b.fadd(value, e.sum(b.load(minimum_acc[r][t]))) if typ in HAS_MINIMUM else value

    return [[total(r, t) for t in range(len(xs))] for r in range(len(rows))]


def split_nibbles(e: Emit, vectors: list[ir.Value]) -> list[ir.Value]:
    """Return the low nibbles of transposed bytes, then the high ones."""
    b, fifteen = e.b, e.const(U8x64, 15)
    low = [b.and_(e.cast(v, U8x64), fifteen) for v in vectors]
    return low + [b.and_(e.cast(b.lshr(v, e.const(I32x16, 4)), U8x64), fifteen) for v in vectors]


def spread_bits(e: Emit, words: ir.Value, column: int, value_bit: int) -> ir.Value:
    """Bits column .. column+3 of 16 rows' words -> four bytes a row, each with the bit at a place or 0."""
    b = e.b
    out = None
    for j in range(4):
        bit = b.and_(b.lshr(words, e.const(I32x16, column + j)), e.const(I32x16, 1))
        bit = b.shl(bit, e.const(I32x16, 8 * j + value_bit))
        out = bit if out is None else b.or_(out, bit)
    return e.cast(out, U8x64)


def _make_unpack(typ: int) -> Kernel:
    def unpack(e, w, stride, n_blocks, panel):
        b, rows_at = e.b, row_addresses(e, w, stride)

        def halves(words: ir.Value, shift: int) -> ir.Value:
            return e.to_f32(e.cast(b.trunc(b.lshr(words, e.const(I32x16, shift)), I16x16), F16x16))

        with e.loop(n_blocks) as (i, _):
            at = e.mul(i, SIZE[typ])
            rows = [e.add(row, at) for row in rows_at]
            block = e.add(panel, e.mul(i, PANEL_BLOCK))
            columns = e.transpose([e.add(row, HEAD[typ]) for row in rows])
            if typ == Q8_0:
                columns += e.transpose([e.add(row, HEAD[typ] + 16) for row in rows])
                columns = [b.xor(e.cast(v, U8x64), e.const(U8x64, 128)) for v in columns]
            else:
                columns = split_nibbles(e, columns)
            if typ in FIFTH_BITS:
                words = e.gather(I32, rows, FIFTH_BITS[typ])
                columns = [b.or_(v, spread_bits(e, words, 4 * c, 4)) for c, v in enumerate(columns)]
            if typ in BYTES:
                columns = [e.lookup(BYTES[typ], v) for v in columns]
            for c, v in enumerate(columns):
                put_columns(e, block, c, v)
            if typ == MXFP4:
                put_scales(e, block, e8m0(e, b.zext(e.gather(I8, rows), I32x16)), None)
            elif typ in HAS_MINIMUM:
                words = e.gather(I32, rows)
                put_scales(e, block, halves(words, 0), halves(words, 16))
            else:
                put_scales(e, block, e.to_f32(e.cast(e.gather(I16, rows), F16x16)), None)

    unpack.__name__ = f"unpack_{NAMES[typ]}"
    unpack.__doc__ = "Sixteen rows into half a panel; see the module."
    return micro_kernel(4)(unpack)


def _make_rows(typ: int) -> Kernel:
    return make_rows_kernel(f"rows_{NAMES[typ]}", lambda e, *args: _product(e, typ, *args), one_by_one=typ == Q8_0)


#: Kernels by type.
ROWS = {typ: _make_rows(typ) for typ in NAMES}
UNPACK = {typ: _make_unpack(typ) for typ in NAMES}
