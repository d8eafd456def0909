"""Weights in blocks of 32: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4, IQ4_NL.

Every type is an unsigned byte minus an offset, times a scale, plus a minimum for some types. The offset is part of the
start value of the dot product (`activations`), so it costs nothing. Each type has two kernels:

``rows_TYPE(w, stride, n_rows, n_blocks, n_tokens, xs, outs, out_offset)``
    Few tokens: rows are read as they lie in the file (`rowwise`).
``unpack_TYPE(w, stride, n_blocks, panel)``
    Many: 16 rows go into half a panel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    F32x16,
    I16x16,
    I32x16,
    I64x8,
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


def _scales(e: Emit, typ: int, block: ir.Value, n: int, at: int = 0) -> ir.Value:
    """Load the scales of n blocks, or what else is a half in their heads."""
    return e.to_f32(e.cast(e.scalars(e.add(block, at), SIZE[typ], n, 16), vec(F16, n)))


def _two(e: Emit, at: ir.Value, offset: int, stride: int, n: int) -> ir.Value:
    """Load 32 bytes of two blocks; zeros for the second where n is 1."""
    first = e.load(U8x32, at, offset)
    return e.cat(first, e.load(U8x32, at, offset + stride) if n > 1 else e.const(U8x32, 0))


def _product_q8(
    e: Emit, rows: list[ir.Value], ahead: ir.Value, n_blocks: ir.Value, xs: list[ir.Value]
) -> list[ir.Value]:
    """Return the products of rows of Q8_0 with tokens: four blocks a step, each with eight lanes of sums of its own."""
    b, n4 = e.b, e.mul(n_blocks, 4)
    acc = [[[e.zeros(F32x16) for _ in range(2)] for _ in xs] for _ in rows]
    scales = [e.add(x, e.mul(n_blocks, 32)) for x in xs]
    starts8 = [e.add(s, e.mul(n4, 2)) for s in scales]

    def step(i: ir.Value, n: int) -> None:
        """Take n blocks from i on, two by two, into the first sums."""
        i4, at_w = e.mul(i, 4), e.mul(i, SIZE[Q8_0])
        at = [e.add(row, at_w) for row in rows]
        fetch(e, ahead, at_w, len(rows), n * SIZE[Q8_0])
        dx = [e.load(vec(F32, n), e.add(s, i4)) for s in scales]
        eighths = [e.load(vec(I32, n), e.add(s, i4)) for s in starts8]
        factors = [[b.fmul(_scales(e, Q8_0, block, n), d) for d in dx] for block in at]
        for j in range(0, n, 2):
            two = [j] * 8 + [min(j + 1, n)] * 8
            first = [e.shuffle(x, e.const(x.type, 0), two) for x in eighths]
            v = [_two(e, e.add(x, e.mul(i, 32)), 32 * j, 32, n - j) for x in xs]
            for r, block in enumerate(at):
                u = b.xor(_two(e, block, SIZE[Q8_0] * j + HEAD[Q8_0], SIZE[Q8_0], n - j), e.const(U8x64, 128))
                for t, factor in enumerate(factors[r]):
                    p = acc[r][t][j // 2]
                    own = e.shuffle(factor, e.const(factor.type, 0.0), two)
                    b.store(e.fma(e.to_f32(e.dpbusd(first[t], u, v[t])), own, b.load(p)), p)

    _steps(e, n_blocks, step)

    return e.sums([b.fadd(*map(b.load, two)) for of_row in acc for two in of_row])


def _steps(e: Emit, n_blocks: ir.Value, step: Callable[[ir.Value, int], None]) -> None:
    """Write a step of four blocks from an index on, and those of the last two and one."""
    b = e.b
    fours, twos = b.and_(n_blocks, I64(-4)), b.and_(n_blocks, I64(-2))
    with e.loop(fours, 4) as (i, _):
        step(i, 4)
    with e.when(b.icmp_signed("<", fours, twos)):
        step(fours, 2)
    with e.when(b.icmp_signed("<", twos, n_blocks)):
        step(twos, 1)


#: Lanes of four blocks' numbers, each for the four lanes that have its block's sums.
_BY_FOUR = [lane // 4 for lane in range(16)]


def _by_four(e: Emit, v: ir.Value) -> ir.Value:
    """Spread the numbers of up to four blocks over the lanes of their sums; zeros where there is no block."""
    n = v.type.count
    return e.shuffle(v, e.const(v.type, 0), [min(lane, n) for lane in _BY_FOUR])


def _codes(e: Emit, typ: int, block: ir.Value, n: int) -> list[ir.Value]:
    """Load the codes of n blocks: 16 bytes of columns 0 .. 15 of each, then the same of columns 16 .. 31."""
    b = e.b
    none = e.const(U8x16, 0)
    parts = [e.load(U8x16, block, SIZE[typ] * j + HEAD[typ]) if j < n else none for j in range(4)]
    low = e.cat(*parts)
    begins = [SIZE[typ] * j + HEAD[typ] for j in range(3)]
    if n == 4 and begins[2] + 16 <= 64 and e.has("avx512vbmi"):  # three in one load
        v = e.load(U8x64, block)
        low = e.shuffle(v, v, [begin + i for begin in (*begins, 0) for i in range(16)])
        low = e.shuffle(low, e.cat(*parts[3:] * 4), [*range(48), *range(64, 80)])
    words = vec(I16, 32)
    high = e.cast(b.lshr(e.cast(low, words), e.const(words, 4)), U8x64)
    if typ in BYTES:
        return [e.lookup(BYTES[typ], low), e.lookup(BYTES[typ], high)]
    out = [b.and_(v, e.const(U8x64, 15)) for v in (low, high)]
    if typ in FIFTH_BITS:
        for half in range(2):
            bits = e.scalars(e.add(block, FIFTH_BITS[typ] + 2 * half), SIZE[typ], n, 16)
            bits = e.cast(e.shuffle(bits, e.const(bits.type, 0), [min(j, n) for j in range(4)]), vec(I1, 64))
            out[half] = b.or_(out[half], b.select(bits, e.const(U8x64, 16), e.const(U8x64, 0)))
    return out


def _columns(e: Emit, x: ir.Value, n: int) -> list[ir.Value]:
    """Load the activations of n blocks in the order of `_codes`."""
    none = e.const(U8x32, 0)
    blocks = [e.load(U8x32, x, 32 * j) if j < n else none for j in range(4)]
    low, high = (e.cast(e.cat(*two), I64x8) for two in (blocks[:2], blocks[2:]))
    halves = ([half + i // 2 * 4 + i % 2 for i in range(8)] for half in (0, 2))
    return [e.cast(e.shuffle(low, high, lanes), U8x64) for lanes in halves]


def _scales_by_four(e: Emit, typ: int, block: ir.Value, n: int) -> ir.Value:
    """Load the scales of n blocks, by fours; of MXFP4, twice as much."""
    if typ != MXFP4:
        return _by_four(e, _scales(e, typ, block, n))
    b, v = e.b, e.load(vec(I8, 16 * n), block)
    none, at = v.type.count, [SIZE[typ] * j for j in range(n)] + [v.type.count] * (4 - n)
    bits = e.shuffle(v, e.const(v.type, 0), [x for j in _BY_FOUR for x in (none, none, none, at[j])])
    bits = b.lshr(e.cast(bits, I32x16), e.const(I32x16, 1))
    least = e.const(I32x16, 1 << 22)  # two to the power of -127
    return e.cast(b.select(b.icmp_unsigned(">", bits, least), bits, least), F32x16)


def _product(
    typ: int, e: Emit, rows: list[ir.Value], ahead: ir.Value, n_blocks: ir.Value, xs: list[ir.Value]
) -> list[ir.Value]:
    """Return the products of rows of nibbles with tokens: four blocks a step, each in four lanes of the sums."""
    b, n4 = e.b, e.mul(n_blocks, 4)
    acc = [[e.zeros(F32x16) for _ in xs] for _ in rows]
    minimum_acc = [[e.zeros(F32x4) for _ in xs] for _ in rows]
    scales = [e.add(x, e.mul(n_blocks, 32)) for x in xs]
    starts8 = [e.add(s, e.mul(n4, 2)) for s in scales]
    sums = [e.add(s, e.mul(n4, 3)) for s in scales]

    def step(i: ir.Value, n: int) -> None:
        """Take n blocks from i on."""
        i4, at_w = e.mul(i, 4), e.mul(i, SIZE[typ])
        fetch(e, ahead, at_w, len(rows), n * SIZE[typ])
        dx, first, v = [], [], []
        for t, x in enumerate(xs):
            own = e.load(vec(F32, n), e.add(scales[t], i4))
            dx.append(_by_four(e, b.fmul(own, e.const(own.type, 0.5)) if typ == MXFP4 else own))
            eighths = _by_four(e, e.load(vec(I32, n), e.add(starts8[t], i4)))
            first.append(b.shl(eighths, e.const(I32x16, 1)))
            v.append(_columns(e, e.add(x, e.mul(i, 32)), n))
        for r, row in enumerate(rows):
            block = e.add(row, at_w)
            codes = _codes(e, typ, block, n)
            dw = _scales_by_four(e, typ, block, n)
            for t in range(len(xs)):
                ints = first[t]
                for u, columns in zip(codes, v[t], strict=True):
                    ints = e.dpbusd(ints, u, columns)
                p = acc[r][t]
                b.store(e.fma(e.to_f32(ints), b.fmul(dw, dx[t]), b.load(p)), p)
            if typ in HAS_MINIMUM:
                minima = _scales(e, typ, block, n, 2)
                for t, s in enumerate(sums):
                    m = b.fmul(minima, e.load(vec(F32, n), e.add(s, i4)))
                    m = e.shuffle(m, e.const(m.type, 0), [min(n, lane) for lane in range(4)])
                    b.store(b.fadd(m, b.load(minimum_acc[r][t])), minimum_acc[r][t])

    _steps(e, n_blocks, step)

    totals = e.sums([b.load(p) for of_row in acc for p in of_row])
    if typ in HAS_MINIMUM:
        minima = e.sums([b.load(p) for of_row in minimum_acc for p in of_row])
        totals = [b.fadd(*both) for both in zip(totals, minima, strict=True)]
    return totals


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
    product = _product_q8 if typ == Q8_0 else partial(_product, typ)
    return make_rows_kernel(f"rows_{NAMES[typ]}", product, together=1 if typ == Q8_0 else 4)


#: Kernels by type.
ROWS = {typ: _make_rows(typ) for typ in NAMES}
UNPACK = {typ: _make_unpack(typ) for typ in NAMES}
