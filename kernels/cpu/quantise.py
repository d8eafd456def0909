"""Rows of floats as quantised elements, byte for byte as ggml's CPU backend writes them; for SET_ROWS and copies.

Blocks of 32 are written here, sixteen elements at a time; super-blocks in `quantise_k`. Q8_0 rounds like upstream's
code for x86-64; other types like upstream's reference, in which each operation rounds separately.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from .dequantise import IQ4_NL_VALUES, MXFP4_DOUBLED
from .emit import F32, I8, I16, I32, I64, LANES, Emit, F32x16, I32x16, U8x16, ir, micro, types
from .kernel import Kernel, kernel
from .quantise_k import quantise_q2_k, quantise_q3_k, quantise_q4_k, quantise_q5_k, quantise_q6_k
from .words import IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0

#: Bytes of a block of 32.
SIZE = {Q8_0: 34, Q4_0: 18, Q4_1: 20, Q5_0: 22, Q5_1: 24, MXFP4: 17, IQ4_NL: 18}
#: Blocks whose largest magnitude is at most this count as zeros, in types for which upstream does so.
ALL_ZERO = 1e-15

Halves = list[ir.Value]


def _each_block(typ: int, write: Callable[[Emit, ir.Value, Halves, ir.Value], None]) -> Callable[[int, int, int], None]:
    """Return the intrinsic that goes over blocks; ``write(e, address of floats, their two halves, block)``."""

    def row(e, src, dst, n_blocks):
        with e.loop(n_blocks) as (i, _):
            at = e.add(src, e.mul(i, 128))
            write(e, at, [e.load(F32x16, at), e.load(F32x16, at, 64)], e.add(dst, e.mul(i, SIZE[typ])))

    return micro(types.void, 3)(row)


def _store_half(e: Emit, v: ir.Value, at: ir.Value, off: int = 0) -> None:
    """Store a float as a half."""
    e.store(e.b.extract_element(e.to_f16(e.splat(v, 4)), I32(0)), at, off)


def _largest(e: Emit, x: Halves) -> ir.Value:
    magnitudes = [e.unary("fabs", v) for v in x]
    return e.fold(e.fmax(*magnitudes), e.fmax)


def _first_of(e: Emit, at: ir.Value, x: Halves, value: ir.Value) -> ir.Value:
    """Load the first element of a block at whose place x equals a value."""
    b, value = e.b, e.splat(value)
    found = [b.fcmp_ordered("==", v, value) for v in x]
    low, high = (b.zext(e.cast(mask, I16), I32) for mask in found)
    bits = b.or_(b.or_(low, b.shl(high, I32(16))), I32(1 << 31))  # NaN only: any will do
    first = b.call(e.fn("llvm.cttz.i32", I32, I32, ir.IntType(1)), [bits, ir.IntType(1)(1)])
    return e.load(F32, e.add(at, e.mul(b.zext(first, I64), 4)))


def _most_extreme(e: Emit, at: ir.Value, x: Halves, largest: ir.Value) -> ir.Value:
    """Return the first element of the largest magnitude, with its sign; plain 0 if there are but zeros."""
    found = _first_of(e, at, [e.unary("fabs", v) for v in x], largest)
    return e.b.select(e.b.fcmp_ordered(">", largest, F32(0.0)), found, F32(0.0))


def _reciprocal(e: Emit, d: ir.Value) -> ir.Value:
    return e.b.select(e.b.fcmp_unordered("!=", d, F32(0.0)), e.b.fdiv(F32(1.0), d), F32(0.0))


def _least_int(e: Emit, v: ir.Value, top: int) -> ir.Value:
    limit = e.const(I32x16, top)
    return e.b.select(e.b.icmp_signed("<", v, limit), v, limit)


def _store_nibbles(e: Emit, codes: Halves, at: ir.Value) -> None:
    """Store the low four bits of the first half below those of the second."""
    b, fifteen = e.b, e.const(I32x16, 15)
    low, high = (b.and_(v, fifteen) for v in codes)
    e.store(b.trunc(b.or_(low, b.shl(high, e.const(I32x16, 4))), U8x16), at)


def _store_fifth_bits(e: Emit, codes: Halves, at: ir.Value) -> None:
    b, sixteen = e.b, e.const(I32x16, 16)
    masks = [b.icmp_signed("!=", b.and_(v, sixteen), e.const(I32x16, 0)) for v in codes]
    low, high = (b.zext(e.cast(mask, I16), I32) for mask in masks)
    e.store(b.or_(low, b.shl(high, I32(16))), at)


def _q8_0(e: Emit, at: ir.Value, x: Halves, block: ir.Value) -> None:
    b, largest = e.b, _largest(e, x)
    inverse = b.select(b.fcmp_unordered("!=", largest, F32(0.0)), b.fdiv(F32(127.0), largest), F32(0.0))
    _store_half(e, b.fdiv(largest, F32(127.0)), block)
    ints = [b.fptosi(e.unary("nearbyint", b.fmul(v, e.splat(inverse))), I32x16) for v in x]
    e.store(e.cat(*[b.trunc(v, U8x16) for v in ints]), block, 2)


def _symmetric(bits: int) -> Callable[[Emit, ir.Value, Halves, ir.Value], None]:
    """Q4_0, Q5_0: the most extreme element becomes the lowest code."""
    middle = 1 << (bits - 1)

    def write(e: Emit, at: ir.Value, x: Halves, block: ir.Value) -> None:
        b = e.b
        d = b.fdiv(_most_extreme(e, at, x, _largest(e, x)), F32(-float(middle)))
        inverse = e.splat(_reciprocal(e, d))
        _store_half(e, d, block)
        half = e.const(F32x16, middle + 0.5)
        codes = [_least_int(e, b.fptosi(b.fadd(b.fmul(v, inverse), half), I32x16), 2 * middle - 1) for v in x]
        if bits == 5:
            _store_fifth_bits(e, codes, e.add(block, 2))
        _store_nibbles(e, codes, e.add(block, 2 + 4 * (bits == 5)))

    return write


def _with_minimum(bits: int) -> Callable[[Emit, ir.Value, Halves, ir.Value], None]:
    """Q4_1, Q5_1: codes count from the least element."""

    def write(e: Emit, at: ir.Value, x: Halves, block: ir.Value) -> None:
        b, top = e.b, (1 << bits) - 1
        least, most = (e.fold(join(*x), join) for join in (e.fmin, e.fmax))
        least = _first_of(e, at, x, least)  # 0 and -0 are equal
        d = b.call(e.fn("llvm.fabs.f32", F32, F32), [b.fdiv(b.fsub(most, least), F32(float(top)))])
        inverse, start, half = e.splat(_reciprocal(e, d)), e.splat(least), e.const(F32x16, 0.5)
        _store_half(e, d, block)
        _store_half(e, least, block, 2)
        codes = [_least_int(e, b.fptosi(b.fadd(b.fmul(b.fsub(v, start), inverse), half), I32x16), top) for v in x]
        if bits == 5:
            _store_fifth_bits(e, codes, e.add(block, 4))
        _store_nibbles(e, codes, e.add(block, 4 + 4 * (bits == 5)))

    return write


def _mxfp4(e: Emit, at: ir.Value, x: Halves, block: ir.Value) -> None:
    b, largest = e.b, _largest(e, x)
    log2 = b.call(e.fn("llvm.log2.f32", F32, F32), [largest])
    exponent = b.fptosi(b.call(e.fn("llvm.floor.f32", F32, F32), [log2]), I32)
    some = b.fcmp_ordered(">", largest, F32(0.0))
    byte = b.and_(b.select(some, b.add(exponent, I32(125)), I32(0)), I32(255))
    e.store(b.trunc(byte, I8), block)
    # half of 2**(byte - 127), for values are doubled; the two smallest are subnormal
    bits = b.select(b.icmp_signed("<", byte, I32(2)), b.shl(I32(0x200000), byte), b.shl(b.sub(byte, I32(1)), I32(23)))
    d = e.splat(b.bitcast(bits, F32))
    codes = []
    for v in x:
        best, code = e.unary("fabs", b.fsub(b.fmul(d, e.const(F32x16, 0.0)), v)), e.const(I32x16, 0)
        for i, value in enumerate(MXFP4_DOUBLED[1:], 1):
            error = e.unary("fabs", b.fsub(b.fmul(d, e.const(F32x16, float(value))), v))
            better = b.fcmp_ordered("<", error, best)
            best, code = b.select(better, error, best), b.select(better, e.const(I32x16, i), code)
        codes.append(code)
    _store_nibbles(e, codes, e.add(block, 1))


def _iq4_nl(e: Emit, at: ir.Value, x: Halves, block: ir.Value) -> None:
    b, largest = e.b, _largest(e, x)
    extreme = _most_extreme(e, at, x, largest)
    inverse = e.splat(b.fdiv(F32(1.0), b.fdiv(extreme, F32(float(IQ4_NL_VALUES[0])))))
    codes, terms = [], []
    for v in x:
        y = b.fmul(inverse, v)
        code, q = e.const(I32x16, 0), e.const(F32x16, float(IQ4_NL_VALUES[0]))
        for i, (below, above) in enumerate(pairwise(IQ4_NL_VALUES), 1):
            left, right = b.fsub(y, e.const(F32x16, float(below))), b.fsub(e.const(F32x16, float(above)), y)
            nearer = b.fcmp_unordered(">=", left, right)
            code = b.select(nearer, e.const(I32x16, i), code)
            q = b.select(nearer, e.const(F32x16, float(above)), q)
        wq = b.fmul(b.fmul(v, v), q)
        terms.append((b.fmul(wq, v), b.fmul(wq, q)))
        codes.append(code)
    # upstream adds one after another
    sums = [F32(0.0), F32(0.0)]
    for pair in terms:
        for lane in range(LANES):
            sums = [b.fadd(s, b.extract_element(term, I32(lane))) for s, term in zip(sums, pair, strict=True)]
    d = b.select(b.fcmp_ordered(">", sums[1], F32(0.0)), b.fdiv(sums[0], sums[1]), F32(0.0))
    none = b.fcmp_ordered("<", largest, F32(ALL_ZERO))
    _store_half(e, b.select(none, F32(0.0), d), block)
    keep = e.splat(b.select(none, I32(0), I32(15)))
    _store_nibbles(e, [b.and_(v, keep) for v in codes], e.add(block, 2))


_quantise_q8_0 = _each_block(Q8_0, _q8_0)
_quantise_q4_0 = _each_block(Q4_0, _symmetric(4))
_quantise_q4_1 = _each_block(Q4_1, _with_minimum(4))
_quantise_q5_0 = _each_block(Q5_0, _symmetric(5))
_quantise_q5_1 = _each_block(Q5_1, _with_minimum(5))
_quantise_mxfp4 = _each_block(MXFP4, _mxfp4)
_quantise_iq4_nl = _each_block(IQ4_NL, _iq4_nl)


@kernel(4)
def floats_to_blocks(type, src, dst, n):
    """Write n floats as elements of a type in blocks of 32; n is a multiple of the block size."""
    if type == Q8_0:
        _quantise_q8_0(src, dst, n // 32)
    elif type == Q4_0:
        _quantise_q4_0(src, dst, n // 32)
    elif type == Q4_1:
        _quantise_q4_1(src, dst, n // 32)
    elif type == Q5_0:
        _quantise_q5_0(src, dst, n // 32)
    elif type == Q5_1:
        _quantise_q5_1(src, dst, n // 32)
    elif type == MXFP4:
        _quantise_mxfp4(src, dst, n // 32)
    elif type == IQ4_NL:
        _quantise_iq4_nl(src, dst, n // 32)


@kernel(4, rare=True)  # no cache of keys and values has such types, and they take long to compile
def floats_to_super_blocks(type, src, dst, n):
    """Write n floats as elements of a type in super-blocks of 256."""
    if type == Q4_K:
        quantise_q4_k(src, dst, n // 256)
    elif type == Q5_K:
        quantise_q5_k(src, dst, n // 256)
    elif type == Q6_K:
        quantise_q6_k(src, dst, n // 256)
    elif type == Q2_K:
        quantise_q2_k(src, dst, n // 256)
    elif type == Q3_K:
        quantise_q3_k(src, dst, n // 256)


def quantiser(typ: int) -> Kernel:
    """Return the kernel ``(type, src, dst, n)`` that writes elements of a quantised type."""
    return floats_to_blocks if typ in SIZE else floats_to_super_blocks
