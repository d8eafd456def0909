"""Rows of quantised weights as floats, block by block; for GET_ROWS and attention, where few rows are read.

Each type's kernel is written out: Numba's cache never finds a function that closes over another.
"""

from __future__ import annotations

import numba
import numpy as np

from .kernel import device, kernel
from .memory import f32_of_bits, floats, ld_f16, ld_i8, ld_i32, ld_u8
from .words import IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0

#: Doubled values of MXFP4's sixteen codes; its scale is halved in turn.
MXFP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
#: Values of IQ4_NL's sixteen codes.
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@device
def _q8_0(at, y):
    d = ld_f16(at)
    for j in range(32):
        y[j] = d * np.float32(ld_i8(at + 2 + j))


@device
def _nibbles(at, y, d, less):
    """Sixteen bytes: low halves first, then high; (q - 8) * d, or q * d + less."""
    for j in range(16):
        q = ld_u8(at + j)
        y[j] = np.float32(q & 15) * d + less
        y[j + 16] = np.float32(q >> 4) * d + less


@device
def _five_bits(at, high_at, y, d, less):
    high = ld_i32(high_at)
    for j in range(16):
        q = ld_u8(at + j)
        y[j] = np.float32((q & 15) | ((high >> j) & 1) << 4) * d + less
        y[j + 16] = np.float32((q >> 4) | ((high >> (j + 16)) & 1) << 4) * d + less


@device
def _mxfp4(at, y):
    exponent = ld_u8(at)
    bits = (0x200000 << exponent) if exponent < 2 else (exponent - 1) << 23
    d = f32_of_bits(numba.int64(bits))
    for j in range(16):
        q = ld_u8(at + 1 + j)
        y[j] = np.float32(MXFP4_DOUBLED[q & 15]) * d
        y[j + 16] = np.float32(MXFP4_DOUBLED[q >> 4]) * d


@device
def _iq4_nl(at, y):
    d = ld_f16(at)
    for j in range(16):
        q = ld_u8(at + 2 + j)
        y[j] = d * np.float32(IQ4_NL_VALUES[q & 15])
        y[j + 16] = d * np.float32(IQ4_NL_VALUES[q >> 4])


@device
def _q2_k(at, y):
    d, least = ld_f16(at + 80), ld_f16(at + 82)
    for i in range(256):
        scale = ld_u8(at + i // 16)
        q = (ld_u8(at + 16 + i // 128 * 32 + i % 32) >> (i % 128 // 32 * 2)) & 3
        y[i] = d * np.float32(scale & 15) * np.float32(q) - least * np.float32(scale >> 4)


@device
def _q3_k(at, y):
    d = ld_f16(at + 108)
    for i in range(256):
        j = i // 16
        scale = ((ld_u8(at + 96 + j % 8) >> (j // 8 * 4)) & 15) | ((ld_u8(at + 104 + j % 4) >> (j // 4 * 2)) & 3) << 4
        q = (ld_u8(at + 32 + i // 128 * 32 + i % 32) >> (i % 128 // 32 * 2)) & 3
        q |= ((ld_u8(at + i % 32) >> (i // 32)) & 1) << 2
        y[i] = d * np.float32(scale - 32) * np.float32(q - 4)


@device
def _k_scale(at, j):
    """Sub-block j's scale and minimum, six bits each, out of 12 bytes.

    Without branches: with them LLVM 22 takes the caller's loop over j for endless, and drops it.
    """
    a, b, c = ld_u8(at + (j & 3)), ld_u8(at + 4 + (j & 3)), ld_u8(at + 8 + (j & 3))
    second = j >> 2  # 0 for the first four sub-blocks
    scale = (1 - second) * (a & 63) + second * ((c & 15) | (a >> 6) << 4)
    return scale, (1 - second) * (b & 63) + second * ((c >> 4) | (b >> 6) << 4)


@device
def _q4_q5_k(at, y, five):
    d, least = ld_f16(at), ld_f16(at + 2)
    low_at = at + 16 + 32 * five
    for j in range(8):
        scale, minimum = _k_scale(at + 4, j)
        ds, ms = d * np.float32(scale), least * np.float32(minimum)
        for i in range(32):
            q = (ld_u8(low_at + j // 2 * 32 + i) >> (4 * (j & 1))) & 15
            q |= five * (((ld_u8(at + 16 + i) >> j) & 1) << 4)
            y[32 * j + i] = ds * np.float32(q) - ms


@device
def _q6_k(at, y):
    d = ld_f16(at + 208)
    for i in range(256):
        half, inside = i // 128, i % 128
        quarter, column = inside // 32, inside % 32
        low = (ld_u8(at + 64 * half + 32 * (quarter & 1) + column) >> (4 * (quarter >> 1))) & 15
        high = (ld_u8(at + 128 + 32 * half + column) >> (2 * quarter)) & 3
        scale = ld_i8(at + 192 + i // 16)
        y[i] = d * np.float32(scale) * np.float32((low | high << 4) - 32)


@kernel(4)
def dequantise_q8_0(_type, src, dst, n):
    """Write n elements of Q8_0 as floats."""
    for i in range(n // 32):
        _q8_0(src + 34 * i, floats(dst + 128 * i))


@kernel(4)
def dequantise_q4_0(_type, src, dst, n):
    """Write n elements of Q4_0 as floats."""
    for i in range(n // 32):
        at = src + 18 * i
        d = ld_f16(at)
        _nibbles(at + 2, floats(dst + 128 * i), d, np.float32(-8.0) * d)


@kernel(4)
def dequantise_q4_1(_type, src, dst, n):
    """Write n elements of Q4_1 as floats."""
    for i in range(n // 32):
        at = src + 20 * i
        _nibbles(at + 4, floats(dst + 128 * i), ld_f16(at), ld_f16(at + 2))


@kernel(4)
def dequantise_q5_0(_type, src, dst, n):
    """Write n elements of Q5_0 as floats."""
    for i in range(n // 32):
        at = src + 22 * i
        d = ld_f16(at)
        _five_bits(at + 6, at + 2, floats(dst + 128 * i), d, np.float32(-16.0) * d)


@kernel(4)
def dequantise_q5_1(_type, src, dst, n):
    """Write n elements of Q5_1 as floats."""
    for i in range(n // 32):
        at = src + 24 * i
        _five_bits(at + 8, at + 4, floats(dst + 128 * i), ld_f16(at), ld_f16(at + 2))


@kernel(4)
def dequantise_mxfp4(_type, src, dst, n):
    """Write n elements of MXFP4 as floats."""
    for i in range(n // 32):
        _mxfp4(src + 17 * i, floats(dst + 128 * i))


@kernel(4)
def dequantise_q4_k(_type, src, dst, n):
    """Write n elements of Q4_K as floats."""
    for i in range(n // 256):
        _q4_q5_k(src + 144 * i, floats(dst + 1024 * i), 0)


@kernel(4)
def dequantise_q5_k(_type, src, dst, n):
    """Write n elements of Q5_K as floats."""
    for i in range(n // 256):
        _q4_q5_k(src + 176 * i, floats(dst + 1024 * i), 1)


@kernel(4)
def dequantise_q6_k(_type, src, dst, n):
    """Write n elements of Q6_K as floats."""
    for i in range(n // 256):
        _q6_k(src + 210 * i, floats(dst + 1024 * i))


@kernel(4)
def dequantise_iq4_nl(_type, src, dst, n):
    """Write n elements of IQ4_NL as floats."""
    for i in range(n // 32):
        _iq4_nl(src + 18 * i, floats(dst + 128 * i))


@kernel(4)
def dequantise_q2_k(_type, src, dst, n):
    """Write n elements of Q2_K as floats."""
    for i in range(n // 256):
        _q2_k(src + 84 * i, floats(dst + 1024 * i))


@kernel(4)
def dequantise_q3_k(_type, src, dst, n):
    """Write n elements of Q3_K as floats."""
    for i in range(n // 256):
        _q3_k(src + 110 * i, floats(dst + 1024 * i))


#: By type, the kernel ``(type, src, dst, n)`` that writes n elements as floats; n is a multiple of the block size.
DEQUANTISE = {
    Q8_0: dequantise_q8_0,
    Q4_0: dequantise_q4_0,
    Q4_1: dequantise_q4_1,
    Q5_0: dequantise_q5_0,
    Q5_1: dequantise_q5_1,
    MXFP4: dequantise_mxfp4,
    Q4_K: dequantise_q4_k,
    Q5_K: dequantise_q5_k,
    Q6_K: dequantise_q6_k,
    IQ4_NL: dequantise_iq4_nl,
    Q2_K: dequantise_q2_k,
    Q3_K: dequantise_q3_k,
}
