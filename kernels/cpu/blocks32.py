"""Weights in blocks of 32: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4, IQ4_NL.

Every type is "unsigned byte less an offset, times a scale", plus a minimum for some. The offset goes into the start
value of the dot product (`activations`), so it costs nothing. For each type there are two kernels:

``rows_TYPE(w, stride, n_rows, n_blocks, n_tokens, xs, outs, out_offset)``
    Few tokens: rows are read as they lie in the file, one after another, against one or two tokens.
``unpack_TYPE(w, stride, n_blocks, panel)``
    Many: 16 rows go into half a panel.
"""

from __future__ import annotations

from collections.abc import Callable

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
from .words import IQ4_NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

NAMES = {Q8_0: "q8_0", Q4_0: "q4_0", Q4_1: "q4_1", Q5_0: "q5_0", Q5_1: "q5_1", MXFP4: "mxfp4", IQ4_NL: "iq4_nl"}
#: Bytes of a block; bytes before its 16 bytes of nibbles (32 of Q8_0).
SIZE = {Q8_0: 34, Q4_0: 18, Q4_1: 20, Q5_0: 22, Q5_1: 24, MXFP4: 17, IQ4_NL: 18}
HEAD = {Q8_0: 2, Q4_0: 2, Q4_1: 4, Q5_0: 6, Q5_1: 8, MXFP4: 1, IQ4_NL: 2}
#: Where the 32 fifth bits lie.
FIFTH_BITS = {Q5_0: 2, Q5_1: 4}
#: What is taken off the unsigned bytes; a multiple of 8.
OFFSET = {Q8_0: 128, Q4_0: 8, Q4_1: 0, Q5_0: 16, Q5_1: 0, MXFP4: 16, IQ4_NL: 128}
HAS_MINIMUM = frozenset({Q4_1, Q5_1})
#: What the sixteen codes of some stand for, plus the offset; MXFP4's are doubled, and its scale is halved in turn.
BYTES = {MXFP4: [16 + v for v in MXFP4_DOUBLED], IQ4_NL: [128 + v for v in IQ4_NL_VALUES]}


def e8m0(e: Emit, exponent: ir.Value) -> ir.Value:
    """Return half of two to the power of an exponent byte less 127, as floats; the smallest are subnormal."""
    b, type = e.b, exponent.type
    small = b.shl(e.const(type, 0x200000), exponent)
    normal = b.shl(b.sub(exponent, e.const(type, 1)), e.const(type, 23))
    is_small = b.icmp_unsigned("<", exponent, e.const(type, 2))
    return b.bitcast(b.select(is_small, small, normal), vec(F32, type.count))


def _two_blocks_of_nibbles(e: Emit, first: ir.Value, second: ir.Value) -> ir.Value:
    """16 packed bytes each -> 64 bytes: low nibbles, high nibbles of the first block, then of the second."""
    v = e.cast(e.cat(e.cat(first, first), e.cat(second, second)), I64x8)
    v = e.cast(e.b.lshr(v, ir.Constant(I64x8, [0, 0, 4, 4] * 2)), U8x64)
    return e.b.and_(v, e.const(U8x64, 15))


def _bits_to_bytes(e: Emit, bits: ir.Value, value: int) -> ir.Value:
    """64 bits -> 64 bytes: value or 0."""
    mask = e.cast(bits, vec(I1, 64))
    return e.b.select(mask, e.const(U8x64, value), e.const(U8x64, 0))


def _load_blocks(e: Emit, typ: int, w: ir.Value, n: int) -> tuple[list[ir.Value], ir.Value, ir.Value | None]:
    """Load n (4, 2 or 1) blocks: their bytes, two blocks a vector, their scales, and their minima if there are any.

    A lone block stands twice in its vector; the caller gives its twin the scale 0.
    """
    b, size, head = e.b, SIZE[typ], HEAD[typ]

    def halves(off: int) -> ir.Value:
        return e.to_f32(e.cast(e.scalars(e.add(w, off), size, n, 16), vec(F16, n)))

    bytes_ = []
    for i in range(0, n, 2):
        starts = [size * i, size * (i + 1) if n > 1 else size * i]
        if typ == Q8_0:
            u = b.xor(e.cat(*[e.load(U8x32, w, s + head) for s in starts]), e.const(U8x64, 128))
        else:
            u = _two_blocks_of_nibbles(e, *[e.load(U8x16, w, s + head) for s in starts])
        if typ in FIFTH_BITS:
            low, high = (b.zext(e.load(I32, w, s + FIFTH_BITS[typ]), I64) for s in starts)
            u = b.or_(u, _bits_to_bytes(e, b.or_(low, b.shl(high, I64(32))), 16))
        bytes_.append(e.lookup(BYTES[typ], u) if typ in BYTES else u)
    if typ == MXFP4:
        return bytes_, e8m0(e, b.zext(e.scalars(w, size, n, 8), vec(I32, n))), None
    return bytes_, halves(0), halves(2) if typ in HAS_MINIMUM else None


def _row_times_tokens(e: Emit, typ: int, w: ir.Value, n_blocks: ir.Value, xs: list[ir.Value]) -> list[ir.Value]:
    """Return the products of one row with one or two tokens: 128 columns a step, two accumulators a token."""
    b, n4 = e.b, e.mul(n_blocks, 4)
    acc = [[e.zeros(F32x16) for _ in range(2)] for _ in xs]
    minimum_acc = [e.zeros(F32x4) for _ in xs]
    scales = [e.add(x, e.mul(n_blocks, 32)) for x in xs]
    starts8 = [e.add(s, e.mul(n4, 2)) for s in scales]
    sums = [e.add(s, e.mul(n4, 3)) for s in scales]

    def step(i: ir.Value, n: int) -> None:
        at, i4 = e.add(w, e.mul(i, SIZE[typ])), e.mul(i, 4)
        bytes_, dw, minima = _load_blocks(e, typ, at, n)
        if n == 4:
            e.prefetch(at, 2048)
            e.prefetch(at, 2112)
        zero = e.const(vec(F32, n), 0.0)
        for t, x in enumerate(xs):
            factors = b.fmul(dw, e.load(vec(F32, n), e.add(scales[t], i4)))
            start = e.load(vec(I32, n), e.add(starts8[t], i4)) if OFFSET[typ] else None
            at_x = e.add(x, e.mul(i, 32))
            for pair, u in enumerate(bytes_):
                lanes = [2 * pair] * 8 + [2 * pair + 1] * 8
                ints = e.const(I32x16, 0)
                if start is not None:
                    ints = e.shuffle(start, start, lanes if n > 1 else [0] * 16)
                v = e.load(U8x64, at_x, 64 * pair) if n > 1 else e.cat(*[e.load(U8x32, at_x)] * 2)
                products = e.to_f32(e.dpbusd(ints, u, v))
                p = acc[t][pair]
                b.store(e.fma(products, e.shuffle(factors, zero, lanes), b.load(p)), p)
            if minima is not None:
                m = b.fmul(minima, e.load(vec(F32, n), e.add(sums[t], i4)))
                m = m if n == 4 else e.shuffle(m, zero, [*range(n), n, n, n][:4])  # lane n is 0
                b.store(b.fadd(m, b.load(minimum_acc[t])), minimum_acc[t])

    fours, twos = b.and_(n_blocks, I64(-4)), b.and_(n_blocks, I64(-2))
    with e.loop(fours, 4) as (i, _):
        step(i, 4)
    with e.when(b.icmp_signed("<", fours, twos)):
        step(fours, 2)
    with e.when(b.icmp_signed("<", twos, n_blocks)):
        step(twos, 1)
    out = [e.sum(b.fadd(b.load(a[0]), b.load(a[1]))) for a in acc]
    if typ in HAS_MINIMUM:
        out = [b.fadd(v, e.sum(b.load(m))) for v, m in zip(out, minimum_acc, strict=True)]
    return out


RowTimesTokens = Callable[[Emit, ir.Value, ir.Value, list[ir.Value]], list[ir.Value]]


def make_rows_kernel(name: str, product: RowTimesTokens, *, rare: bool = False) -> Kernel:
    """Return the kernel that takes rows one by one, and for each row tokens two by two.

    Parameters
    ----------
    name : str
        Name of the kernel.
    product : callable
        ``product(e, w, n_blocks, xs)``: the products of a row with one or two tokens.
    rare : bool
        See `Kernel`.
    """

    def rows(e, w, stride, n_rows, n_blocks, n_tokens, xs, outs, out_offset):
        b = e.b

        def tokens(row: ir.Value, first: ir.Value, n: int) -> None:
            at = e.mul(first, 8)
            x = [e.load(I64, e.add(xs, at), 8 * t) for t in range(n)]
            values = product(e, e.add(w, e.mul(row, stride)), n_blocks, x)
            for t, value in enumerate(values):
                out = e.load(I64, e.add(outs, at), 8 * t)
                e.store(value, e.add(e.add(out, out_offset), e.mul(row, 4)))

        pairs = b.and_(n_tokens, I64(-2))
        with e.loop(n_rows) as (row, _):
            with e.loop(pairs, 2) as (first, _):
                tokens(row, first, 2)
            with e.when(b.icmp_signed("<", pairs, n_tokens)):
                tokens(row, pairs, 1)

    rows.__name__ = name
    rows.__doc__ = "Rows as they lie times tokens, two by two; see the module."
    return micro_kernel(8, rare=rare)(rows)


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
    return make_rows_kernel(f"rows_{NAMES[typ]}", lambda e, w, n_blocks, xs: _row_times_tokens(e, typ, w, n_blocks, xs))


#: Kernels by type.
ROWS = {typ: _make_rows(typ) for typ in NAMES}
UNPACK = {typ: _make_unpack(typ) for typ in NAMES}
