"""Super-blocks of 256: Q2_K to Q6_K from floats. The searches are in `search`; here scales are packed and codes made.

Codes are floats until they are packed. Where a sub-block's rounded scale is 0, upstream leaves the codes that its
search had found; so do these.
"""

from __future__ import annotations

from llvmlite import ir

from .emit import I8, F32x16, I32x16, micro, types, vec
from .kernel import device
from .memory import bits_of, copy_bytes, floats, ld_f16, ld_u8, st_f16, st_u8, st_u16
from .search import (
    ALL_ZERO,
    MAGIC,
    PAIR_FLOATS,
    PAIR_FOUND,
    search_scale_and_minimum,
    search_scale_q6,
    search_scales_q3,
)

import numba  # isort: skip
import numpy as np  # isort: skip

#: Bytes of a super-block.
Q2_SIZE, Q3_SIZE, Q4_SIZE, Q5_SIZE, Q6_SIZE = 84, 110, 144, 176, 210
#: What a search gives for each lane, in rows of 16 floats.
SCALE, MINIMUM, FACTOR, START = 0, 16, 32, 48
FACTOR_Q6 = 16

_search_q2 = search_scale_and_minimum(16, 16, 3, -0.5, 15, by_root=False)
_search_q4 = search_scale_and_minimum(32, 8, 15, -1.0, 20, by_root=True)
_search_q5 = search_scale_and_minimum(32, 8, 31, -0.5, 15, by_root=True)


def _stack(n_bytes: int):
    """Return the intrinsic that gives memory of the calling function's frame."""

    def body(e, _):
        with e.b.goto_entry_block():
            place = e.b.alloca(ir.ArrayType(I8, n_bytes))
            place.align = 64
        return e.b.ptrtoint(place, ir.IntType(64))

    return micro(types.int64, 1)(body)


#: 256 floats, twice; what a search gives.
_block_memory = _stack(4 * 256)
_second_memory = _stack(4 * 256)
_found_memory = _stack(4 * 64)
_pair_memory = _stack(2 * PAIR_FLOATS)
_second_pair_memory = _stack(2 * PAIR_FLOATS)
_found_pair_memory = _stack(2 * PAIR_FOUND)


@device
def _nearest(v):
    """Nearest integer, ties to even; too large ones wrap, as upstream's do."""
    return (bits_of(v + np.float32(MAGIC)) & 0x7FFFFF) - 0x400000


@device
def _across(src, dst, n, lanes):
    """Put element i of all sub-blocks side by side."""
    x, y = floats(src), floats(dst)
    for lane in range(lanes):
        for i in range(n):
            y[i * lanes + lane] = x[lane * n + i]


@device
def _codes(x, codes, n, d, less, low, high, offset):
    """Round ``(x + less) / d`` of one sub-block to codes within bounds, plus an offset."""
    for i in range(n):
        code = _nearest((x[i] + less) / d)
        codes[i] = np.float32(max(low, min(high, code)) + offset)


@device
def _kept_codes(x, codes, n, factor, start, low, high, offset):
    """Make the codes of a search again."""
    for i in range(n):
        code = _nearest(factor * (x[i] - start))
        codes[i] = np.float32(max(low, min(high, code)) + offset)


@device
def _greatest(v, n):
    most = np.float32(0.0)
    for i in range(n):
        most = max(most, v[i])
    return most


@device
def _four_codes(codes, i):
    """Join codes 32 apart into a byte of two bits each."""
    byte = numba.int64(codes[i]) | numba.int64(codes[i + 32]) << 2
    return byte | numba.int64(codes[i + 64]) << 4 | numba.int64(codes[i + 96]) << 6


@device
def _q4_q5_block(x, y, found, codes, five):
    """Pack six-bit scales and minima into 12 bytes, then the codes."""
    scale_unit = np.float32(0.0)
    minimum_unit = np.float32(0.0)
    most_scale, most_minimum = _greatest(floats(found), 8), _greatest(floats(found + 4 * MINIMUM), 8)
    if most_scale > 0:
        scale_unit = np.float32(63.0) / most_scale
    if most_minimum > 0:
        minimum_unit = np.float32(63.0) / most_minimum
    f, code_at, at = floats(found), floats(codes), y + 4
    for j in range(4):
        a = min(63, _nearest(scale_unit * f[SCALE + j]) & 255)
        b = min(63, _nearest(minimum_unit * f[MINIMUM + j]) & 255)
        c = min(63, _nearest(scale_unit * f[SCALE + 4 + j]) & 255)
        d = min(63, _nearest(minimum_unit * f[MINIMUM + 4 + j]) & 255)
        st_u8(at + j, a | c >> 4 << 6)
        st_u8(at + 4 + j, b | d >> 4 << 6)
        st_u8(at + 8 + j, (c & 15) | (d & 15) << 4)
    st_f16(y, most_scale / np.float32(63.0))
    st_f16(y + 2, most_minimum / np.float32(63.0))
    unit, minimum = ld_f16(y), ld_f16(y + 2)
    top = 31 if five == 1 else 15
    for j in range(8):
        low = ld_u8(at + (j & 3))
        high, both = ld_u8(at + 4 + (j & 3)), ld_u8(at + 8 + (j & 3))
        scale = low & 63 if j < 4 else (both & 15) | low >> 6 << 4
        least = high & 63 if j < 4 else both >> 4 | high >> 6 << 4
        d = unit * np.float32(scale)
        xs, cs = floats(x + 128 * j), floats(codes + 128 * j)
        if d != np.float32(0.0):
            _codes(xs, cs, 32, d, minimum * np.float32(least), 0, top, 0)
        else:
            _kept_codes(xs, cs, 32, f[FACTOR + j], f[START + j], 0, top, 0)
    if five == 1:
        for i in range(32):
            bits = 0
            for j in range(8):
                bits |= (numba.int64(code_at[32 * j + i]) >> 4) << j
            st_u8(y + 16 + i, bits)
    nibbles = y + 16 + 32 * five
    for j in range(4):
        for i in range(32):
            low, high = numba.int64(code_at[64 * j + i]), numba.int64(code_at[64 * j + 32 + i])
            st_u8(nibbles + 32 * j + i, (low & 15) | (high & 15) << 4)


@device
def quantise_q4_k(src, dst, n_blocks):
    """Write super-blocks of eight 32s, codes 0 to 15."""
    across, second, found = _block_memory(0), _second_memory(0), _found_memory(0)
    for i in range(n_blocks):
        _across(src + 1024 * i, across, 32, 8)
        _search_q4(across, second, found)
        _q4_q5_block(src + 1024 * i, dst + Q4_SIZE * i, found, second, 0)


@device
def quantise_q5_k(src, dst, n_blocks):
    """Write super-blocks of eight 32s, codes 0 to 31."""
    across, second, found = _block_memory(0), _second_memory(0), _found_memory(0)
    for i in range(n_blocks):
        _across(src + 1024 * i, across, 32, 8)
        _search_q5(across, second, found)
        _q4_q5_block(src + 1024 * i, dst + Q5_SIZE * i, found, second, 1)


@device
def _q2_block(x, y, found, codes):
    f, code_at = floats(found), floats(codes)
    most_scale, most_minimum = _greatest(f, 16), _greatest(floats(found + 4 * MINIMUM), 16)
    for j in range(16):
        byte = 0
        if most_scale > 0:
            byte = _nearest(np.float32(15.0) / most_scale * f[SCALE + j]) & 255
        if most_minimum > 0:
            byte |= _nearest(np.float32(15.0) / most_minimum * f[MINIMUM + j]) << 4
        st_u8(y + j, byte)
    st_f16(y + 80, most_scale / np.float32(15.0))
    st_f16(y + 82, most_minimum / np.float32(15.0))
    unit, minimum = ld_f16(y + 80), ld_f16(y + 82)
    for j in range(16):
        byte = ld_u8(y + j)
        d = unit * np.float32(byte & 15)
        xs, cs = floats(x + 64 * j), floats(codes + 64 * j)
        if d != np.float32(0.0):
            _codes(xs, cs, 16, d, minimum * np.float32(byte >> 4), 0, 3, 0)
        else:
            _kept_codes(xs, cs, 16, f[FACTOR + j], f[START + j], 0, 3, 0)
    for j in range(64):
        st_u8(y + 16 + j, _four_codes(code_at, j // 32 * 128 + j % 32))


@device
def quantise_q2_k(src, dst, n_blocks):
    """Write super-blocks of sixteen 16s with minima, codes 0 to 3."""
    across, second, found = _block_memory(0), _second_memory(0), _found_memory(0)
    for i in range(n_blocks):
        _across(src + 1024 * i, across, 16, 16)
        _search_q2(across, second, found)
        _q2_block(src + 1024 * i, dst + Q2_SIZE * i, found, second)


@device
def _most_extreme(f, n):
    """Value of the largest magnitude; the first of equals."""
    extreme = np.float32(0.0)
    for i in range(n):
        if abs(f[i]) > abs(extreme):
            extreme = f[i]
    return extreme


@device
def _q3_block(x, y, found, across, codes):
    """Pack six-bit scales into 12 bytes, then two bits of each code, and the third apart."""
    f = floats(found)
    # the search's codes, which lie across lanes, stay in the memory of what it read
    copy_bytes(across, codes, 1024)
    kept = floats(across)
    extreme = _most_extreme(f, 16)
    for i in range(12):
        st_u8(y + 96 + i, 0)
    st_u16(y + 108, 0)
    if extreme != np.float32(0.0):
        factor = np.float32(-32.0) / extreme
        for j in range(16):
            scale = max(-32, min(31, _wrap(_nearest(factor * f[j])))) + 32
            at = y + 96 + j % 8
            st_u8(at, ld_u8(at) | (scale & 15) << (j // 8 * 4))
            at = y + 104 + j % 4
            st_u8(at, ld_u8(at) | scale >> 4 << (2 * (j // 4)))
        st_f16(y + 108, np.float32(1.0) / factor)
    unit = ld_f16(y + 108)
    for j in range(16):
        low, high = ld_u8(y + 96 + j % 8), ld_u8(y + 104 + j % 4)
        scale = ((low >> (j // 8 * 4)) & 15) | ((high >> (2 * (j // 4))) & 3) << 4
        d = unit * np.float32(scale - 32)
        xs, cs = floats(x + 64 * j), floats(codes + 64 * j)
        if d != np.float32(0.0):
            _codes(xs, cs, 16, d, np.float32(0.0), -4, 3, 4)
        else:
            for i in range(16):
                cs[i] = kept[16 * i + j] + np.float32(4.0)
    _pack_q3(codes, y)


@micro(types.void, 2)
def _pack_q3(e, codes, y):
    """Write the third bits of 256 codes (floats), 32 bytes, and their lower pairs of bits, 64."""
    b = e.b

    def code(i: int) -> ir.Value:
        return b.fptosi(e.load(F32x16, codes, 4 * i), I32x16)

    def join(parts: list[ir.Value], apart: int) -> ir.Value:
        out = parts[0]
        for i, part in enumerate(parts[1:], 1):
            out = b.or_(out, b.shl(part, e.const(I32x16, apart * i)))
        return b.trunc(out, vec(I8, 16))

    for first in (0, 16):
        thirds = [b.lshr(code(32 * j + first), e.const(I32x16, 2)) for j in range(8)]
        e.store(join(thirds, 1), y, first)
        for half in range(2):
            pairs = [b.and_(code(128 * half + 32 * q + first), e.const(I32x16, 3)) for q in range(4)]
            e.store(join(pairs, 2), y, 32 + 32 * half + first)


@device
def _wrap(v):
    """Keep the low byte, signed, as a C conversion does."""
    return ((v + 128) & 255) - 128


@device
def quantise_q3_k(src, dst, n_blocks):
    """Write super-blocks of sixteen 16s, codes -4 to 3, two at a time; a last one is searched twice."""
    across, second, found = _pair_memory(0), _second_pair_memory(0), _found_pair_memory(0)
    for i in range(0, n_blocks, 2):
        for j in range(2):
            _across(src + 1024 * min(i + j, n_blocks - 1), across + PAIR_FLOATS * j, 16, 16)
        search_scales_q3(across, second, found)
        for j in range(min(2, n_blocks - i)):
            own, codes = across + PAIR_FLOATS * j, second + PAIR_FLOATS * j
            _q3_block(src + 1024 * (i + j), dst + Q3_SIZE * (i + j), found + PAIR_FOUND * j, own, codes)


@device
def _q6_block(x, y, found, codes):
    f, code_at = floats(found), floats(codes)
    extreme = _most_extreme(f, 16)
    if abs(extreme) < np.float32(ALL_ZERO):
        for i in range(Q6_SIZE):
            st_u8(y + i, 0)
        return
    factor = np.float32(-128.0) / extreme
    st_f16(y + 208, np.float32(1.0) / factor)
    unit = ld_f16(y + 208)
    for j in range(16):
        scale = _wrap(min(127, _nearest(factor * f[j])))
        st_u8(y + 192 + j, scale)
        d = unit * np.float32(scale)
        xs, cs = floats(x + 64 * j), floats(codes + 64 * j)
        if d != np.float32(0.0):
            _codes(xs, cs, 16, d, np.float32(0.0), -32, 31, 32)
        elif f[FACTOR_Q6 + j] != np.float32(0.0):
            _kept_codes(xs, cs, 16, f[FACTOR_Q6 + j], np.float32(0.0), -32, 31, 32)
        else:
            for i in range(16):
                cs[i] = np.float32(0.0)
    for half in range(2):
        for i in range(32):
            a = numba.int64(code_at[128 * half + i])
            b = numba.int64(code_at[128 * half + 32 + i])
            c = numba.int64(code_at[128 * half + 64 + i])
            d = numba.int64(code_at[128 * half + 96 + i])
            st_u8(y + 64 * half + i, (a & 15) | (c & 15) << 4)
            st_u8(y + 64 * half + 32 + i, (b & 15) | (d & 15) << 4)
            st_u8(y + 128 + 32 * half + i, a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6)


@device
def quantise_q6_k(src, dst, n_blocks):
    """Write super-blocks of sixteen 16s, codes -32 to 31."""
    across, second, found = _block_memory(0), _second_memory(0), _found_memory(0)
    for i in range(n_blocks):
        _across(src + 1024 * i, across, 16, 16)
        search_scale_q6(across, found)
        _q6_block(src + 1024 * i, dst + Q6_SIZE * i, found, second)
