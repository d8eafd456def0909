"""Weights in super-blocks of 256: Q4_K and Q5_K (8 x 32, with scale and minimum), Q6_K and Q3_K (16 x 16, with scale).

And Q2_K, 16 x 16 with both. Kernels have the signatures of `blocks32`. Where scales are for 16 columns, activations carry
sums of 16 (`activations.quantise_row_halves`), panels two scales a block, and the tile takes each block in two halves.
A panel has no room for Q2_K's minima: its rows are taken as they lie, however many tokens there are.
"""

from __future__ import annotations

from functools import partial

from .blocks32 import split_nibbles
from .coded import product_of_halves
from .codes import Codes
from .emit import (
    F16,
    I8,
    I16,
    I32,
    I64,
    Emit,
    F16x16,
    F32x8,
    F32x16,
    I16x16,
    I32x16,
    U8x16,
    U8x32,
    U8x64,
    ir,
    vec,
)
from .kernel import Kernel, micro_kernel
from .panel import PANEL_BLOCK, put_columns, put_scales, row_addresses
from .rowwise import fetch, make_rows_kernel
from .words import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

NAMES = {Q4_K: "q4_k", Q5_K: "q5_k", Q6_K: "q6_k", Q3_K: "q3_k", Q2_K: "q2_k"}
SIZE = {Q4_K: 144, Q5_K: 176, Q6_K: 210, Q3_K: 110, Q2_K: 84}
#: Where the bytes of low nibbles lie; before them the head (d, dmin, 12 bytes of scales), and Q5_K's fifth bits.
NIBBLES_AT = {Q4_K: 16, Q5_K: 48}
FIFTH_BITS_AT = 16
#: Q6_K: 128 bytes of low nibbles, 64 of high pairs of bits, 16 scales, d.
Q6_HIGH_AT, Q6_SCALES_AT, Q6_D_AT = 128, 192, 208
#: Q3_K: 32 bytes of third bits, 64 of low pairs, 12 of scales, d.
Q3_LOW_AT, Q3_SCALES_AT, Q3_D_AT = 32, 96, 108
#: Q2_K: 16 bytes of a scale and a minimum each, 64 of pairs, d, dmin.
Q2_LOW_AT, Q2_D_AT = 16, 80
#: Q2_K's codes begin at 0; its 4 makes the activations carry plain sums, less than 0.
OFFSET = {Q4_K: 0, Q5_K: 0, Q6_K: 32, Q3_K: 4, Q2_K: 4}
HAS_MINIMUM = frozenset({Q4_K, Q5_K})


def _super_blocks(e: Emit, n_blocks: ir.Value):
    """Return a loop whose index is the first block of 32 of each super-block."""
    return e.loop(n_blocks, 8)


def _shift_bytes(e: Emit, v: ir.Value, shift: int, keep: int) -> ir.Value:
    """Shift bytes right and keep some low bits."""
    if shift:
        words = vec(I16, v.type.count // 2)
        v = e.cast(e.b.lshr(e.cast(v, words), e.const(words, shift)), v.type)
    return e.b.and_(v, e.const(v.type, keep))


def _scales_and_minima(e: Emit, blocks: list[ir.Value]) -> list[ir.Value]:
    """Unpack each head, d, dmin and 12 bytes of six-bit numbers, into 8 scales and 8 minima; all heads at once."""
    b, n = e.b, len(blocks)
    heads = e.cat(*[e.load(vec(I32, 4), block) for block in blocks])

    def words(*values: int) -> ir.Value:
        return e.const(heads.type, list(values) * n)

    def spread(*picks: int) -> ir.Value:
        return e.shuffle(heads, heads, [4 * r + pick for r in range(n) for pick in picks])

    low = b.and_(b.lshr(spread(1, 3, 2, 3), words(0, 0, 0, 4)), words(0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F))
    high = b.and_(b.lshr(spread(1, 1, 2, 2), words(2, 2, 2, 2)), words(0, 0x30303030, 0, 0x30303030))
    numbers = e.cast(b.or_(low, high), vec(I8, 16 * n))
    both = e.to_f32(e.cast(e.shuffle(heads, heads, [4 * r for r in range(n)]), vec(F16, 2 * n)))
    out = []
    for r in range(n):
        ints = b.zext(e.shuffle(numbers, numbers, list(range(16 * r, 16 * r + 16))), I32x16)
        out.append(b.fmul(e.to_f32(ints), e.shuffle(both, both, [2 * r] * 8 + [2 * r + 1] * 8)))
    return out


def _codes_q4_q5(e: Emit, typ: int, at: ir.Value, j: int) -> ir.Value:
    """Load the codes of blocks 2j, the low nibbles of 32 bytes, and 2j + 1, the high ones."""
    b = e.b

    def twice(offset: int) -> ir.Value:
        v = e.load(U8x32, at, offset)
        return e.cat(v, v)

    q = twice(NIBBLES_AT[typ] + 32 * j)
    if typ == Q4_K:
        return b.and_(q, e.const(U8x64, [0x0F] * 32 + [0xF0] * 32))
    words = vec(I16, 32)
    q = e.cast(b.lshr(e.cast(q, words), e.const(words, [0] * 16 + [4] * 16)), U8x64)
    fifth = b.and_(twice(FIFTH_BITS_AT), e.const(U8x64, [1 << 2 * j] * 32 + [2 << 2 * j] * 32))
    is_set = b.icmp_signed("!=", fifth, e.const(U8x64, 0))
    return b.add(b.and_(q, e.const(U8x64, 15)), b.select(is_set, e.const(U8x64, 16), e.const(U8x64, 0)))


def _product_q4_q5(
    typ: int, e: Emit, rows: list[ir.Value], ahead: ir.Value, n_blocks: ir.Value, xs: list[ir.Value]
) -> list[ir.Value]:
    b, n4 = e.b, e.mul(n_blocks, 4)
    acc = [[e.zeros(F32x16) for _ in xs] for _ in rows]  # of even blocks, and of odd ones
    minimum_acc = [[e.zeros(F32x16) for _ in xs] for _ in rows]  # in the upper half
    scales_at = [e.add(x, e.mul(n_blocks, 32)) for x in xs]
    sums_at = [e.add(s, e.mul(n4, 3)) for s in scales_at]
    with _super_blocks(e, n_blocks) as (i, _):
        i4, at_w = e.mul(i, 4), e.mul(b.lshr(i, I64(3)), SIZE[typ])
        at = [e.add(row, at_w) for row in rows]
        fetch(e, ahead, at_w, len(rows), SIZE[typ])
        # a high nibble is taken where it lies, as sixteen times as much; Q5_K's moves down beside its fifth bit
        sixteenth = e.const(F32x8, [1.0, 1.0 if typ == Q5_K else 2.0**-4] * 4)
        dx = [b.fmul(e.load(F32x8, e.add(s, i4)), sixteenth) for s in scales_at]
        sums = [e.cat(e.const(F32x8, 0.0), e.load(F32x8, e.add(s, i4))) for s in sums_at]
        factors: list[list[ir.Value]] = []
        for r, numbers in enumerate(_scales_and_minima(e, at)):
            factors.append([b.fmul(e.halves(numbers)[0], v) for v in dx])
            for t, m in enumerate(minimum_acc[r]):
                b.store(e.fma(numbers, sums[t], b.load(m)), m)
        for j in range(4):
            v = [e.load(U8x64, e.add(x, e.mul(i, 32)), 64 * j) for x in xs]
            for r, block in enumerate(at):
                u = _codes_q4_q5(e, typ, block, j)
                for t, p in enumerate(acc[r]):
                    factor = e.shuffle(factors[r][t], factors[r][t], [2 * j] * 8 + [2 * j + 1] * 8)
                    ints = e.dpbusd(e.const(I32x16, 0), u, v[t])
                    b.store(e.fma(e.to_f32(ints), factor, b.load(p)), p)

    minima = e.sums([e.halves(b.load(p))[1] for of_row in minimum_acc for p in of_row])
    return [b.fsub(x, m) for x, m in zip(e.sums([b.load(p) for of_row in acc for p in of_row]), minima, strict=True)]


def _scales_q6(e: Emit, at: ir.Value) -> ir.Value:
    scales = e.b.sitofp(e.b.sext(e.load(vec(I8, 16), at, Q6_SCALES_AT), I32x16), F32x16)
    return e.b.fmul(scales, e.splat(e.to_f32(e.load(F16, at, Q6_D_AT))))


def _codes_q6(e: Emit, at: ir.Value, j: int) -> ir.Value:
    b, half, shift = e.b, j // 2, 4 * (j % 2)
    low = _shift_bytes(e, e.load(U8x64, at, 64 * half), shift, 15)
    high = e.load(U8x32, at, Q6_HIGH_AT + 32 * half)
    pairs = e.cat(_shift_bytes(e, high, shift, 3), _shift_bytes(e, high, shift + 2, 3))
    return b.or_(low, b.shl(pairs, e.const(U8x64, 4)))


def _scales_q3(e: Emit, at: ir.Value) -> ir.Value:
    """Unpack 12 bytes: sixteen low halves, then four times four upper pairs of bits."""
    b, eight = e.b, e.load(vec(I8, 8), at, Q3_SCALES_AT)
    low = e.cat(_shift_bytes(e, eight, 0, 15), _shift_bytes(e, eight, 4, 15))
    four = e.splat(e.load(I32, at, Q3_SCALES_AT + 8), 4)
    four = b.and_(b.lshr(four, e.const(vec(I32, 4), [0, 2, 4, 6])), e.const(vec(I32, 4), 0x03030303))
    six = b.or_(low, b.shl(e.cast(four, U8x16), e.const(U8x16, 4)))
    scales = b.sitofp(b.sext(b.sub(six, e.const(U8x16, 32)), I32x16), F32x16)
    return b.fmul(scales, e.splat(e.to_f32(e.load(F16, at, Q3_D_AT))))


def _codes_q3(e: Emit, at: ir.Value, j: int) -> ir.Value:
    b, shift = e.b, 4 * (j % 2)
    pairs, third = e.load(U8x32, at, Q3_LOW_AT + 32 * (j // 2)), e.load(U8x32, at)
    low = e.cat(_shift_bytes(e, pairs, shift, 3), _shift_bytes(e, pairs, shift + 2, 3))
    high = e.cat(_shift_bytes(e, third, 2 * j, 1), _shift_bytes(e, third, 2 * j + 1, 1))
    return b.or_(low, b.shl(high, e.const(U8x64, 2)))


def _numbers_q2(shift: int, d_at: int, e: Emit, at: ir.Value) -> ir.Value:
    """Return the scales or the minima, which share bytes."""
    numbers = e.b.zext(_shift_bytes(e, e.load(U8x16, at), shift, 15), I32x16)
    return e.b.fmul(e.to_f32(numbers), e.splat(e.to_f32(e.load(F16, at, d_at))))


def _codes_q2(e: Emit, at: ir.Value, j: int) -> ir.Value:
    pairs, shift = e.load(U8x32, at, Q2_LOW_AT + 32 * (j // 2)), 4 * (j % 2)
    return e.cat(_shift_bytes(e, pairs, shift, 3), _shift_bytes(e, pairs, shift + 2, 3))


#: Types with a scale for 16 columns.
_HALVES = {
    Q6_K: Codes("q6_k", SIZE[Q6_K], 256, _scales_q6, _codes_q6),
    Q3_K: Codes("q3_k", SIZE[Q3_K], 256, _scales_q3, _codes_q3),
    Q2_K: Codes(
        "q2_k", SIZE[Q2_K], 256, partial(_numbers_q2, 0, Q2_D_AT), _codes_q2, partial(_numbers_q2, 4, Q2_D_AT + 2)
    ),
}


def _byte(e: Emit, words: ir.Value, i: int, bits: int, shift: int = 0) -> ir.Value:
    """Bits of byte i of each word."""
    return e.b.and_(e.b.lshr(words, e.const(I32x16, 8 * i + shift)), e.const(I32x16, (1 << bits) - 1))


def _unpack_heads(e: Emit, rows: list[ir.Value], panel: ir.Value) -> None:
    """Scales and minima of 8 blocks of 16 rows: the head's 16 bytes transposed once."""
    b = e.b
    head = e.transpose(rows)

    def half(shift: int) -> ir.Value:
        return e.to_f32(e.cast(b.trunc(b.lshr(head[0], e.const(I32x16, shift)), I16x16), F16x16))

    d, least = half(0), b.fneg(half(16))
    for block in range(8):
        j = block & 3
        if block < 4:
            scale, minimum = _byte(e, head[1], j, 6), _byte(e, head[2], j, 6)
        else:
            four = e.const(I32x16, 4)
            scale = b.or_(_byte(e, head[3], j, 4), b.shl(_byte(e, head[1], j, 2, 6), four))
            minimum = b.or_(_byte(e, head[3], j, 4, 4), b.shl(_byte(e, head[2], j, 2, 6), four))
        at = e.add(panel, block * PANEL_BLOCK)
        put_scales(e, at, b.fmul(e.to_f32(scale), d), b.fmul(e.to_f32(minimum), least))


def _make_unpack_q4_q5(typ: int) -> Kernel:
    def unpack(e, w, stride, n_blocks, panel):
        b, rows_at = e.b, row_addresses(e, w, stride)
        with _super_blocks(e, n_blocks) as (i, _):
            at = e.mul(b.lshr(i, I64(3)), SIZE[typ])
            rows = [e.add(row, at) for row in rows_at]
            block = e.add(panel, e.mul(i, PANEL_BLOCK))
            _unpack_heads(e, rows, block)
            for part in range(2):  # columns 16 * part .. of each block
                fifth = e.transpose([e.add(r, FIFTH_BITS_AT + 16 * part) for r in rows]) if typ == Q5_K else None
                for j in range(4):
                    columns = e.transpose([e.add(r, NIBBLES_AT[typ] + 32 * j + 16 * part) for r in rows])
                    for c, v in enumerate(split_nibbles(e, columns)):
                        if fifth is not None:
                            bits = _shift_bytes(e, e.cast(fifth[c % 4], U8x64), 2 * j + c // 4, 1)
                            v = b.or_(v, b.shl(bits, e.const(U8x64, 4)))
                        put_columns(e, e.add(block, (2 * j + c // 4) * PANEL_BLOCK), 4 * part + c % 4, v)

    unpack.__name__ = f"unpack_{NAMES[typ]}"
    unpack.__doc__ = "Sixteen rows into half a panel."
    return micro_kernel(4)(unpack)


@micro_kernel(4)
def unpack_q6_k(e, w, stride, n_blocks, panel):
    """Sixteen rows into half a panel; a block's scales are those of its halves."""
    b, rows_at = e.b, row_addresses(e, w, stride)
    with _super_blocks(e, n_blocks) as (i, _):
        at = e.mul(b.lshr(i, I64(3)), SIZE[Q6_K])
        rows = [e.add(row, at) for row in rows_at]
        first = e.add(panel, e.mul(i, PANEL_BLOCK))
        d = e.to_f32(e.cast(e.gather(I16, rows, Q6_D_AT), F16x16))
        words = e.transpose([e.add(row, Q6_SCALES_AT) for row in rows])

        def scale(n: int, words=words, d=d) -> ir.Value:
            signed = b.ashr(b.shl(words[n // 4], e.const(I32x16, 24 - 8 * (n % 4))), e.const(I32x16, 24))
            return b.fmul(e.to_f32(signed), d)

        for block in range(8):
            put_scales(e, e.add(first, block * PANEL_BLOCK), scale(2 * block), scale(2 * block + 1))
        for half in range(2):
            high = [
                e.cast(v, U8x64)
                for part in range(2)
                for v in e.transpose([e.add(row, Q6_HIGH_AT + 32 * half + 16 * part) for row in rows])
            ]
            for part in range(4):
                low = split_nibbles(e, e.transpose([e.add(row, 64 * half + 16 * part) for row in rows]))
                for c, v in enumerate(low):
                    upper, column = c // 4, 4 * part + c % 4  # 64 columns later; which four columns
                    pairs = _shift_bytes(e, high[column % 8], 4 * upper + 2 * (column // 8), 3)
                    block = 4 * half + 2 * upper + column // 8
                    v = b.or_(v, b.shl(pairs, e.const(U8x64, 4)))
                    put_columns(e, e.add(first, block * PANEL_BLOCK), column % 8, v)


@micro_kernel(4)
def unpack_q3_k(e, w, stride, n_blocks, panel):
    """Sixteen rows into half a panel; a block's scales are those of its halves."""
    b, rows_at = e.b, row_addresses(e, w, stride)
    with _super_blocks(e, n_blocks) as (i, _):
        at = e.mul(b.lshr(i, I64(3)), SIZE[Q3_K])
        rows = [e.add(row, at) for row in rows_at]
        first = e.add(panel, e.mul(i, PANEL_BLOCK))
        words = e.transpose([e.add(row, Q3_SCALES_AT - 2) for row in rows])  # two bytes before the scales, 12, d
        d = e.to_f32(e.cast(b.trunc(b.lshr(words[3], e.const(I32x16, 16)), I16x16), F16x16))

        def scale(n: int, words=words, d=d) -> ir.Value:
            low, high = 2 + n % 8, 10 + n % 4
            six = _byte(e, words[low // 4], low % 4, 4, n // 8 * 4)
            six = b.or_(six, b.shl(_byte(e, words[high // 4], high % 4, 2, n // 4 * 2), e.const(I32x16, 4)))
            return b.fmul(e.to_f32(b.sub(six, e.const(I32x16, 32))), d)

        for block in range(8):
            put_scales(e, e.add(first, block * PANEL_BLOCK), scale(2 * block), scale(2 * block + 1))

        def columns(offset: int, rows=rows) -> list[ir.Value]:
            """32 bytes of 16 rows, four a vector."""
            parts = [e.transpose([e.add(row, offset + 16 * part) for row in rows]) for part in range(2)]
            return [e.cast(v, U8x64) for part in parts for v in part]

        third = columns(0)
        for half in range(2):
            pairs = columns(Q3_LOW_AT + 32 * half)
            for quarter in range(4):
                block = 4 * half + quarter
                for c in range(8):
                    high = b.shl(_shift_bytes(e, third[c], block, 1), e.const(U8x64, 2))
                    v = b.or_(_shift_bytes(e, pairs[c], 2 * quarter, 3), high)
                    put_columns(e, e.add(first, block * PANEL_BLOCK), c, v)


#: Kernels by type.
ROWS = {
    Q4_K: make_rows_kernel("rows_q4_k", partial(_product_q4_q5, Q4_K), together=4),
    Q5_K: make_rows_kernel("rows_q5_k", partial(_product_q4_q5, Q5_K)),
    Q6_K: make_rows_kernel("rows_q6_k", partial(product_of_halves, _HALVES[Q6_K])),
    Q3_K: make_rows_kernel("rows_q3_k", partial(product_of_halves, _HALVES[Q3_K])),
    Q2_K: make_rows_kernel("rows_q2_k", partial(product_of_halves, _HALVES[Q2_K])),
}
#: Those that have panels.
UNPACK = {Q4_K: _make_unpack_q4_q5(Q4_K), Q5_K: _make_unpack_q4_q5(Q5_K), Q6_K: unpack_q6_k, Q3_K: unpack_q3_k}
