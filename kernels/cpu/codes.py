"""What the bits of weights with codebooks, ternary weights and other rare types stand for.

Every type here is "a small integer times a scale for 16 columns" (or for more; then scales repeat). `CODES` tells for
each how 64 integers and the scales of a unit are read; `coded` makes kernels of that. Integers come as bytes that are
`OFFSET` too large. The codebooks are those of the `gguf` package, read when a kernel is compiled and kept in its code;
an index has as many bits as a codebook has entries, so no bytes lead out of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
    F32x4,
    I16x16,
    I32x16,
    I64x8,
    U8x16,
    U8x32,
    U8x64,
    ir,
    vec,
)
from .words import (
    IQ1_M,
    IQ1_S,
    IQ2_S,
    IQ2_XS,
    IQ2_XXS,
    IQ3_S,
    IQ3_XXS,
    IQ4_XS,
    NVFP4,
    Q1_0,
    Q2_0,
    TQ1_0,
    TQ2_0,
)

#: What is added to integers, so that they are unsigned bytes.
OFFSET = 128
_ONES = 0x0101010101010101


@dataclass(frozen=True, slots=True)
class Codes:
    """How a type is read.

    Attributes
    ----------
    name : str
        Of its kernels.
    size, unit : int
        Bytes of a block, and its columns: 64, 128 or 256.
    scales : callable
        ``scales(e, at)``: the scales of a block's columns, 16 by 16.
    codes : callable
        ``codes(e, at, j)``: columns 64j .. 64j+63 of a block, as bytes.
    minima : callable, optional
        The same of what is subtracted from the columns, for a unit of 256 columns.
    in_order : bool
        Whether products load 64 columns after the other; measured.
    """

    name: str
    size: int
    unit: int
    scales: Callable[[Emit, ir.Value], ir.Value]
    codes: Callable[[Emit, ir.Value, int], ir.Value]
    minima: Callable[[Emit, ir.Value], ir.Value] | None = None
    in_order: bool = False


# -- what types share -----------------------------------------------------------------


def _half(e: Emit, at: ir.Value, off: int = 0) -> ir.Value:
    return e.to_f32(e.load(F16, at, off))


def _one_scale(n: int, at_byte: int = 0) -> Callable[[Emit, ir.Value], ir.Value]:
    """Return the reader of one half for a whole block of n times 16 columns."""
    return lambda e, at: e.splat(_half(e, at, at_byte), n)


def _twice(e: Emit, v: ir.Value) -> ir.Value:
    """Scales of 32 columns as those of their halves."""
    return e.shuffle(v, v, [i // 2 for i in range(2 * v.type.count)])


def _shifts(e: Emit, word: ir.Value, shifts: Iterable[int], keep: int) -> ir.Value:
    """Bits of one word from several places on, as 32-bit lanes."""
    places = list(shifts)
    type = vec(word.type, len(places))
    v = e.b.lshr(e.splat(word, len(places)), e.const(type, places))
    v = e.b.and_(v, e.const(type, keep))
    return v if word.type == I32 else e.b.trunc(v, vec(I32, len(places)))


def _scaled(e: Emit, d: ir.Value, steps: ir.Value, first: float, step: float, last: float) -> ir.Value:
    """``d * (first + step * steps) * last``, rounded as often as ggml does."""
    b, type = e.b, vec(F32, steps.type.count)
    number = b.fadd(b.fmul(e.to_f32(steps), e.const(type, step)), e.const(type, first))
    return b.fmul(b.fmul(e.splat(d, type.count), number), e.const(type, last))


def _bits(e: Emit, word: ir.Value, shift: int, keep: int) -> ir.Value:
    """Bits of a 64-bit word."""
    return e.b.and_(e.b.lshr(word, I64(shift)) if shift else word, I64(keep))


def _long(e: Emit, type: ir.Type, at: ir.Value, off: int) -> ir.Value:
    return e.b.zext(e.load(type, at, off), I64)


def _from_book(e: Emit, book: tuple[str, float], indices: list[ir.Value]) -> ir.Value:
    """64 bytes of a codebook: 8 entries of 8, or 16 of 4.

    Parameters
    ----------
    book : (str, float)
        The type whose codebook it is, and what its numbers are multiplied with.
    """
    bytes_ = 64 // len(indices)
    type = ir.IntType(8 * bytes_)
    first = e.table(f"codebook.{book[0]}", type, _book(*book, bytes_))
    addresses = [e.add(first, e.mul(i, bytes_)) for i in indices]
    return e.gather_longs(addresses) if bytes_ == 8 else e.cast(e.gather(type, addresses), U8x64)


def _book(name: str, factor: float, n: int) -> list[int]:
    """Return the entries of one of gguf's codebooks as little-endian words of n bytes."""
    import numpy as np
    from gguf import quants

    book = getattr(quants, name)
    book.init_grid()
    rows = (book.grid.reshape(-1, n) * factor).astype(np.int8).view(np.uint8)
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def _signed(e: Emit, magnitudes: ir.Value, signs: ir.Value) -> ir.Value:
    """Bytes, less than 0 where a bit of a 64-bit word is set."""
    b, offset = e.b, e.const(U8x64, OFFSET)
    return b.select(e.cast(signs, vec(I1, 64)), b.sub(offset, magnitudes), b.add(offset, magnitudes))


def _with_parity(e: Emit, sevens: ir.Value) -> ir.Value:
    """Give eight bytes of seven bits each an eighth one that makes their number even."""
    b, p = e.b, sevens
    for shift in (4, 2, 1):
        p = b.xor(p, b.lshr(p, I64(shift)))
    return b.or_(sevens, b.shl(b.and_(p, I64(_ONES)), I64(7)))


def _four_sevens(e: Emit, word: ir.Value) -> ir.Value:
    """Spread the low 28 bits of a word over four bytes."""
    if e.has("bmi2"):
        return e.deposit(word, 0x7F7F7F7F)
    b, out = e.b, _bits(e, word, 0, 0x7F)
    for i in (1, 2, 3):
        out = b.or_(out, b.and_(b.shl(word, I64(i)), I64(0x7F << (8 * i))))
    return out


# -- IQ2 and IQ3: a codebook of magnitudes, signs apart ---------------------------------------


def _iq2_xxs_scales(e: Emit, at: ir.Value) -> ir.Value:
    steps = e.b.lshr(e.load(I64x8, at, 2), e.const(I64x8, 60))
    return _twice(e, _scaled(e, _half(e, at), e.b.trunc(steps, vec(I32, 8)), 0.5, 1.0, 0.25))


def _iq2_xxs(e: Emit, at: ir.Value, j: int) -> ir.Value:
    b, words = e.b, [e.load(I64, at, 2 + 16 * j + 8 * i) for i in range(2)]
    indices = [_bits(e, word, 8 * i, 255) for word in words for i in range(4)]
    low, high = (_four_sevens(e, b.lshr(word, I64(32))) for word in words)
    signs = _with_parity(e, b.or_(low, b.shl(high, I64(32))))
    return _signed(e, _from_book(e, ("IQ2_XXS", 1), indices), signs)


def _nibble_scales(e: Emit, at: ir.Value, scales_at: int) -> ir.Value:
    """Sixteen nibbles, the low one of each byte first."""
    bytes_ = e.b.zext(e.load(vec(I8, 8), at, scales_at), vec(I32, 8))
    eight = vec(I32, 8)
    low, high = e.b.and_(bytes_, e.const(eight, 15)), e.b.lshr(bytes_, e.const(eight, 4))
    steps = e.shuffle(low, high, [i // 2 + 8 * (i % 2) for i in range(16)])
    return _scaled(e, _half(e, at), steps, 0.5, 1.0, 0.25)


def _iq2_xs(e: Emit, at: ir.Value, j: int) -> ir.Value:
    words = [e.load(I64, at, 2 + 16 * j + 8 * i) for i in range(2)]
    indices = [_bits(e, word, 16 * i, 511) for word in words for i in range(4)]
    eight = vec(I16, 8)
    sevens = e.b.lshr(e.load(eight, at, 2 + 16 * j), e.const(eight, 9))
    signs = _with_parity(e, e.cast(e.b.trunc(sevens, vec(I8, 8)), I64))
    return _signed(e, _from_book(e, ("IQ2_XS", 1), indices), signs)


def _upper(e: Emit, word: ir.Value, shift: int, keep: int, to: int) -> ir.Value:
    return e.b.shl(_bits(e, word, shift, keep), I64(to))


def _iq2_s(e: Emit, at: ir.Value, j: int) -> ir.Value:
    low, high = e.load(I64, at, 2 + 8 * j), _long(e, I16, at, 66 + 2 * j)
    indices = [e.b.or_(_bits(e, low, 8 * i, 255), _upper(e, high, 2 * i, 3, 8)) for i in range(8)]
    return _signed(e, _from_book(e, ("IQ2_S", 1), indices), e.load(I64, at, 34 + 8 * j))


def _iq3_xxs_scales(e: Emit, at: ir.Value) -> ir.Value:
    eight = vec(I32, 8)
    steps = e.b.lshr(e.load(eight, at, 66), e.const(eight, 28))
    return _twice(e, _scaled(e, _half(e, at), steps, 0.5, 1.0, 0.5))


def _iq3_xxs(e: Emit, at: ir.Value, j: int) -> ir.Value:
    b, indices = e.b, [_long(e, I8, at, 2 + 16 * j + i) for i in range(16)]
    low, high = (_four_sevens(e, _long(e, I32, at, 66 + 8 * j + 4 * i)) for i in range(2))
    signs = _with_parity(e, b.or_(low, b.shl(high, I64(32))))
    return _signed(e, _from_book(e, ("IQ3_XXS", 1), indices), signs)


def _iq3_s_scales(e: Emit, at: ir.Value) -> ir.Value:
    steps = _shifts(e, e.load(I32, at, 106), range(0, 32, 4), 15)
    return _twice(e, _scaled(e, _half(e, at), steps, 1.0, 2.0, 1.0))


def _iq3_s(e: Emit, at: ir.Value, j: int) -> ir.Value:
    high = _long(e, I16, at, 66 + 2 * j)
    indices = [e.b.or_(_long(e, I8, at, 2 + 16 * j + i), _upper(e, high, i, 1, 8)) for i in range(16)]
    return _signed(e, _from_book(e, ("IQ3_S", 1), indices), e.load(I64, at, 74 + 8 * j))


# -- IQ1: -1, 0 and 1, all moved by an eighth; integers are eighths ---------------------------


def _moved(e: Emit, low_at: ir.Value, high_at: ir.Value, places: list[int], down: list[int]) -> ir.Value:
    """Entries of a codebook in eighths, each less 1 where its bit is set, else plus 1.

    Parameters
    ----------
    low_at, high_at : i64
        Where the lower bytes of the eight indices lie, and four bytes with their upper bits.
    places, down : list of int
        For each index, the first of its three upper bits in the four bytes, and the bit that says how it is moved.
    """
    b = e.b
    book = [word ^ OFFSET * _ONES for word in _book("IQ1_S", 8, 8)]  # -8, 0, 8 as bytes 120, 128, 136
    table = e.table("codebook.IQ1_S", I64, book)
    low, high = e.load(I64, low_at), _long(e, I32, high_at, 0)
    addresses = []
    if e.has("bmi2"):
        for half in range(2):
            bytes_ = e.deposit(b.lshr(low, I64(32)) if half else _bits(e, low, 0, 0xFFFFFFFF), 0x00FF00FF00FF00FF)
            bits = b.lshr(high, I64(16 * half))
            if places[1] == 3:
                bits = e.deposit(bits, 0x0700070007000700)
            else:  # fours, the last bit of which does not count
                bits = e.deposit(b.and_(bits, I64(0x7777)), 0x0F000F000F000F00)
            four = b.or_(bytes_, bits)
            addresses += [e.add(table, e.mul(_bits(e, four, 16 * i, 0xFFFF), 8)) for i in range(4)]
    else:
        for i, place in enumerate(places):
            bits = b.shl(high, I64(11 - place)) if place <= 11 else b.lshr(high, I64(place - 11))
            first = e.add(table, b.and_(bits, I64(7 << 11)))  # of 256 entries of 8 bytes
            addresses.append(e.add(first, e.mul(_bits(e, low, 8 * i, 0xFF), 8)))
    words = e.cast(e.splat(e.load(I32, high_at), 16), I64x8)
    is_down = b.icmp_unsigned("!=", b.and_(words, e.const(I64x8, [1 << bit for bit in down])), e.const(I64x8, 0))
    step = b.select(is_down, e.const(I64x8, -_ONES), e.const(I64x8, _ONES))
    return e.cast(b.add(e.cast(e.gather_longs(addresses), I64x8), step), U8x64)  # no byte carries into the next


def _iq1_s_scales(e: Emit, at: ir.Value) -> ir.Value:
    eight = vec(I16, 8)
    steps = e.b.lshr(e.load(eight, at, 34), e.const(eight, 12))
    steps = e.b.zext(e.b.and_(steps, e.const(eight, 7)), vec(I32, 8))
    return _twice(e, _scaled(e, _half(e, at), steps, 1.0, 2.0, 0.125))


def _iq1_s(e: Emit, at: ir.Value, j: int) -> ir.Value:
    places = [0, 3, 6, 9, 16, 19, 22, 25]
    return _moved(e, e.add(at, 2 + 8 * j), e.add(at, 34 + 4 * j), places, [15] * 4 + [31] * 4)


def _iq1_m_scales(e: Emit, at: ir.Value) -> ir.Value:
    b, word = e.b, e.load(I64, at, 48)
    bits = _bits(e, word, 12, 0xF)  # d is in the upper four bits of the four 16-bit words
    for shift, keep in ((24, 0xF0), (36, 0xF00), (48, 0xF000)):
        bits = b.or_(bits, _bits(e, word, shift, keep))
    d = e.to_f32(e.cast(b.trunc(bits, I16), F16))
    four = e.load(vec(I16, 4), at, 48)  # and four times three bits
    threes = b.lshr(e.shuffle(four, four, [i // 4 for i in range(16)]), e.const(I16x16, [0, 3, 6, 9] * 4))
    return _scaled(e, d, b.zext(b.and_(threes, e.const(I16x16, 7)), I32x16), 1.0, 2.0, 0.125)


def _iq1_m(e: Emit, at: ir.Value, j: int) -> ir.Value:
    places, down = list(range(0, 32, 4)), list(range(3, 32, 4))
    return _moved(e, e.add(at, 8 * j), e.add(at, 32 + 4 * j), places, down)


# -- nibbles ------------------------------------------------------------------------------------


def _nibbles(e: Emit, bytes_: ir.Value, n: int) -> ir.Value:
    """Low nibbles of 8n bytes, then their high ones, then those of the next."""
    b, words = e.b, vec(I16, 16)
    high = e.cast(b.lshr(e.cast(bytes_, words), e.const(words, 4)), U8x32)
    low, high = (e.cast(b.and_(v, e.const(U8x32, 15)), vec(I64, 4)) for v in (bytes_, high))
    order = [i % n + i // (2 * n) * n + 4 * (i // n % 2) for i in range(8)]
    return e.cast(e.shuffle(low, high, order), U8x64)


def _iq4_xs_scales(e: Emit, at: ir.Value) -> ir.Value:
    b, eight = e.b, vec(I32, 8)
    low = _shifts(e, e.load(I32, at, 4), range(0, 32, 4), 15)
    high = _shifts(e, b.zext(e.load(I16, at, 2), I32), range(0, 16, 2), 3)
    six = b.or_(low, b.shl(high, e.const(eight, 4)))
    steps = e.to_f32(b.sub(six, e.const(eight, 32)))
    return _twice(e, b.fmul(steps, e.splat(_half(e, at), 8)))


def _iq4_xs(e: Emit, at: ir.Value, j: int) -> ir.Value:
    both = _nibbles(e, e.load(U8x32, at, 8 + 32 * j), 2)
    return e.lookup([OFFSET + v for v in IQ4_NL_VALUES], both)


def _nvfp4_scales(e: Emit, at: ir.Value) -> ir.Value:
    """Half of four-bit exponents with three-bit mantissas; no sign, and two patterns are 0."""
    b, four = e.b, vec(I32, 4)
    bytes_ = b.zext(e.load(vec(I8, 4), at), four)
    exponent = b.and_(b.lshr(bytes_, e.const(four, 3)), e.const(four, 15))
    mantissa = b.and_(bytes_, e.const(four, 7))
    small = b.fmul(e.to_f32(mantissa), e.const(F32x4, 2.0**-10))
    bits = b.shl(b.or_(b.shl(b.add(exponent, e.const(four, 119)), e.const(four, 3)), mantissa), e.const(four, 20))
    value = b.select(b.icmp_unsigned("==", exponent, e.const(four, 0)), small, e.cast(bits, F32x4))
    return b.select(b.icmp_unsigned("==", bytes_, e.const(four, 127)), e.const(F32x4, 0.0), value)


def _nvfp4(e: Emit, at: ir.Value, j: int) -> ir.Value:
    return e.lookup([OFFSET + v for v in MXFP4_DOUBLED], _nibbles(e, e.load(U8x32, at, 4), 1))


# -- two bits and fewer ----------------------------------------------------------------------------


def _pairs(e: Emit, bytes_: ir.Value, shift: int) -> ir.Value:
    """Pairs of bits of 32 bytes from two places on, one behind the other; codes begin at -1."""
    b, words = e.b, vec(I16, 16)
    v = [e.cast(b.lshr(e.cast(bytes_, words), e.const(words, s)), U8x32) for s in (shift, shift + 2)]
    return b.add(b.and_(e.cat(*v), e.const(U8x64, 3)), e.const(U8x64, OFFSET - 1))


def _tq2_0(e: Emit, at: ir.Value, j: int) -> ir.Value:
    return _pairs(e, e.load(U8x32, at, 32 * (j // 2)), 4 * (j % 2))


def _tq1_0(e: Emit, at: ir.Value, j: int) -> ir.Value:
    """Five digits to the base of three a byte, as a fraction of 256: the first is whether it exceeds one or two thirds."""
    b, powers = e.b, [1, 3, 9, 27, 81]
    if j < 2:
        bytes_ = e.cat(*[e.load(U8x32, at)] * 2)
        factors = [powers[2 * j]] * 32 + [powers[2 * j + 1]] * 32
    elif j == 2:
        bytes_ = e.cat(e.load(U8x32, at), e.cat(*[e.load(U8x16, at, 32)] * 2))
        factors = [81] * 32 + [1] * 16 + [3] * 16
    else:
        sixteen = e.load(U8x16, at, 32)
        last = e.cast(e.splat(e.load(I32, at, 48), 4), U8x16)
        bytes_ = e.cat(e.cat(sixteen, sixteen), e.cat(sixteen, last))
        factors = [9] * 16 + [27] * 16 + [81] * 16 + [f for f in powers[:4] for _ in range(4)]
    q = b.mul(bytes_, e.const(U8x64, factors))
    out = e.const(U8x64, OFFSET - 1)
    for least in (86, 171):  # 3 * q >= 256, 512
        out = b.add(out, b.zext(b.icmp_unsigned(">=", q, e.const(U8x64, least)), U8x64))
    return out


def _q1_0(e: Emit, at: ir.Value, j: int) -> ir.Value:
    bits = e.cast(e.load(I64, at, 2 + 8 * j), vec(I1, 64))
    return e.b.select(bits, e.const(U8x64, OFFSET + 1), e.const(U8x64, OFFSET - 1))


def _q2_0(e: Emit, at: ir.Value, j: int) -> ir.Value:
    b, bytes_ = e.b, e.b.zext(e.load(U8x16, at, 2), I32x16)
    out = b.and_(bytes_, e.const(I32x16, 3))
    for i in (1, 2, 3):  # pair i of each byte to byte i of its word
        out = b.or_(out, b.and_(b.shl(bytes_, e.const(I32x16, 6 * i)), e.const(I32x16, 3 << (8 * i))))
    return b.add(e.cast(out, U8x64), e.const(U8x64, OFFSET - 1))


CODES = {
    IQ4_XS: Codes("iq4_xs", 136, 256, _iq4_xs_scales, _iq4_xs),
    IQ2_XXS: Codes("iq2_xxs", 66, 256, _iq2_xxs_scales, _iq2_xxs),
    IQ2_XS: Codes("iq2_xs", 74, 256, lambda e, at: _nibble_scales(e, at, 66), _iq2_xs, in_order=True),
    IQ2_S: Codes("iq2_s", 82, 256, lambda e, at: _nibble_scales(e, at, 74), _iq2_s, in_order=True),
    IQ3_XXS: Codes("iq3_xxs", 98, 256, _iq3_xxs_scales, _iq3_xxs, in_order=True),
    IQ3_S: Codes("iq3_s", 110, 256, _iq3_s_scales, _iq3_s, in_order=True),
    IQ1_S: Codes("iq1_s", 50, 256, _iq1_s_scales, _iq1_s, in_order=True),
    IQ1_M: Codes("iq1_m", 56, 256, _iq1_m_scales, _iq1_m, in_order=True),
    TQ1_0: Codes("tq1_0", 54, 256, _one_scale(16, 52), _tq1_0),
    TQ2_0: Codes("tq2_0", 66, 256, _one_scale(16, 64), _tq2_0),
    NVFP4: Codes("nvfp4", 36, 64, _nvfp4_scales, _nvfp4),
    Q1_0: Codes("q1_0", 18, 128, _one_scale(8), _q1_0),
    Q2_0: Codes("q2_0", 18, 64, _one_scale(4), _q2_0),
}
