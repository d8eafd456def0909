"""Rows from one element type to another: everything to floats, and floats to anything."""

from __future__ import annotations

from .emit import F16x16, F32x16, I16x16, I32x16, micro, types
from .kernel import device
from .memory import (
    call4,
    copy_bytes,
    f32_of_bits,
    ld_f16,
    ld_f32,
    ld_i32,
    ld_u16,
    st_bf16,
    st_f16,
    st_f32,
    st_i32,
)
from .words import BF16, F16, F32, I32

import numba  # isort: skip
import numpy as np  # isort: skip


@micro(types.void, 3)
def _f16_to_f32(e, src, dst, n):
    def body(i, mask):
        half = e.cast(e.load_lanes(I16x16, e.add(src, e.mul(i, 2)), mask), F16x16)
        e.store_lanes(e.to_f32(half), e.add(dst, e.mul(i, 4)), mask)

    e.vectors(n, body)


@micro(types.void, 3)
def _bf16_to_f32(e, src, dst, n):
    def body(i, mask):
        e.store_lanes(e.bf16_to_f32(e.load_lanes(I16x16, e.add(src, e.mul(i, 2)), mask)), e.add(dst, e.mul(i, 4)), mask)

    e.vectors(n, body)


@micro(types.void, 3)
def _f32_to_f16(e, src, dst, n):
    def body(i, mask):
        e.store_lanes(e.to_f16(e.load_lanes(F32x16, e.add(src, e.mul(i, 4)), mask)), e.add(dst, e.mul(i, 2)), mask)

    e.vectors(n, body)


@micro(types.void, 3)
def _f32_to_bf16(e, src, dst, n):
    def body(i, mask):
        e.store_lanes(e.to_bf16(e.load_lanes(F32x16, e.add(src, e.mul(i, 4)), mask)), e.add(dst, e.mul(i, 2)), mask)

    e.vectors(n, body)


@micro(types.void, 3)
def _i32_to_f32(e, src, dst, n):
    def body(i, mask):
        ints = e.load_lanes(I32x16, e.add(src, e.mul(i, 4)), mask)
        e.store_lanes(e.to_f32(ints), e.add(dst, e.mul(i, 4)), mask)

    e.vectors(n, body)


@micro(types.void, 3)
def _f32_to_i32(e, src, dst, n):
    def body(i, mask):
        v = e.load_lanes(F32x16, e.add(src, e.mul(i, 4)), mask)
        e.store_lanes(e.b.fptosi(v, I32x16), e.add(dst, e.mul(i, 4)), mask)

    e.vectors(n, body)


@device
def row_to_f32(type, src, dst, n, dequantise):
    """Write n elements of a type as floats; quantised ones by a kernel of `DEQUANTISE`, whose address is given."""
    if type == F32:
        copy_bytes(dst, src, 4 * n)
    elif type == F16:
        _f16_to_f32(src, dst, n)
    elif type == BF16:
        _bf16_to_f32(src, dst, n)
    elif type == I32:
        _i32_to_f32(src, dst, n)
    else:
        call4(dequantise, type, src, dst, n)


@device
def row_from_f32(type, src, dst, n, quantise):
    """Write n floats as elements of a type; quantised ones by `quantiser`, whose address is given."""
    if type == F32:
        copy_bytes(dst, src, 4 * n)
    elif type == F16:
        _f32_to_f16(src, dst, n)
    elif type == BF16:
        _f32_to_bf16(src, dst, n)
    elif type == I32:
        _f32_to_i32(src, dst, n)
    else:
        call4(quantise, type, src, dst, n)


@device
def ld_element(type, a):
    """Load one element of F32, F16, BF16 or I32 as a float."""
    if type == F32:
        return ld_f32(a)
    if type == F16:
        return ld_f16(a)
    if type == BF16:
        return f32_of_bits(ld_u16(a) << 16)
    return np.float32(ld_i32(a))


@device
def st_element(type, a, v):
    """Store one float as an element of F32, F16, BF16 or I32."""
    if type == F32:
        st_f32(a, v)
    elif type == F16:
        st_f16(a, v)
    elif type == BF16:
        st_bf16(a, v)
    else:
        st_i32(a, numba.int64(v))
