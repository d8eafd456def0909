"""Ops that move elements: CPY, CONT, DUP, REPEAT, CONCAT."""

from __future__ import annotations

from .convert import ld_element, row_from_f32, row_to_f32, st_element
from .elementwise import repeated_row_address, row_address, share
from .kernel import device, op_kernel
from .memory import copy_bytes, ld_f32, ld_i32, ld_i64, ld_u8, ld_u16, st_i32, st_i64, st_u8, st_u16
from .words import (
    ADDRESS,
    DST,
    F32,
    NB0,
    NB1,
    NB2,
    NB3,
    NE0,
    NE1,
    NE2,
    NE3,
    PARAM,
    SRC0,
    SRC1,
    THREAD_BYTES,
    THREADS,
    TYPE,
)

#: Parameters of copies. BYTES: of an element, 0 if it is converted, or of a row for `copy_raw_rows`. DEQUANTISE: address of
#: a kernel of `DEQUANTISE`; QUANTISE: of `quantiser`.
BYTES, DEQUANTISE, QUANTISE = PARAM, PARAM + 1, PARAM + 2
#: Bytes that one thread copies of a single long row.
PIECE = 1 << 16


@device
def _copy_element(bytes_, src_type, dst_type, at, out):
    """Copy an element; 0 bytes: it is converted."""
    if bytes_ == 4:
        st_i32(out, ld_i32(at))
    elif bytes_ == 2:
        st_u16(out, ld_u16(at))
    elif bytes_ == 8:
        st_i64(out, ld_i64(at))
    elif bytes_ == 1:
        st_u8(out, ld_u8(at))
    else:
        st_element(dst_type, out, ld_element(src_type, at))


@op_kernel
def copy_raw_rows(ith, nth, d, ctl):
    """Copy rows as bytes."""
    row_bytes = ld_i64(d + 8 * BYTES)
    ne1, ne2 = ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    pieces = (row_bytes + PIECE - 1) // PIECE
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)) * pieces, ith, nth)
    for unit in range(first, end):
        row = unit // pieces
        start = (unit - row * pieces) * PIECE
        at, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        if at != out:
            copy_bytes(out + start, at + start, min(PIECE, row_bytes - start))


@device
def _types(d):
    return ld_i64(d + 8 * (SRC0 + TYPE)), ld_i64(d + 8 * (DST + TYPE))


@op_kernel
def copy_converted_rows(ith, nth, d, ctl):
    """Copy rows to another element type."""
    src_type, dst_type = _types(d)
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    dequantise, quantise = ld_i64(d + 8 * DEQUANTISE), ld_i64(d + 8 * QUANTISE)
    floats_at = ld_i64(ctl + 8 * THREADS) + ith * ld_i64(ctl + 8 * THREAD_BYTES)
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        at, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        if dst_type == F32:
            row_to_f32(src_type, at, out, n, dequantise)
        elif src_type == F32:
            row_from_f32(dst_type, at, out, n, quantise)
        else:
            row_to_f32(src_type, at, floats_at, n, dequantise)
            row_from_f32(dst_type, floats_at, out, n, quantise)


@op_kernel
def copy_strided_rows(ith, nth, d, ctl):
    """Copy rows whose elements have gaps between them, perhaps to another element type."""
    src_type, dst_type = _types(d)
    bytes_ = ld_i64(d + 8 * BYTES)
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    nb00, nb0 = ld_i64(d + 8 * (SRC0 + NB0)), ld_i64(d + 8 * (DST + NB0))
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        at, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        for i in range(n):
            _copy_element(bytes_, src_type, dst_type, at + i * nb00, out + i * nb0)


@device
def _element_address(d, tensor, i):
    """Address of element i, counted in the tensor's own shape."""
    ne0, ne1, ne2 = ld_i64(d + 8 * (tensor + NE0)), ld_i64(d + 8 * (tensor + NE1)), ld_i64(d + 8 * (tensor + NE2))
    row = i // ne0
    return row_address(d, tensor, row, ne1, ne2) + (i - row * ne0) * ld_i64(d + 8 * (tensor + NB0))


@op_kernel
def copy_reshaped(ith, nth, d, ctl):
    """Copy elements to another shape, perhaps with gaps, and perhaps to another element type."""
    src_type, dst_type = _types(d)
    bytes_ = ld_i64(d + 8 * BYTES)
    n = ld_i64(d + 8 * (DST + NE0)) * ld_i64(d + 8 * (DST + NE1))
    n *= ld_i64(d + 8 * (DST + NE2)) * ld_i64(d + 8 * (DST + NE3))
    first, end = share(n, ith, nth)
    for i in range(first, end):
        _copy_element(bytes_, src_type, dst_type, _element_address(d, SRC0, i), _element_address(d, DST, i))


@op_kernel
def add_elements(ith, nth, d, ctl):
    """Add src1, repeated, to src0: elements of any float type, as masks of F16 are added."""
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    nb0, nb00, nb10 = ld_i64(d + 8 * (DST + NB0)), ld_i64(d + 8 * (SRC0 + NB0)), ld_i64(d + 8 * (SRC1 + NB0))
    dst_type, a_type, b_type = (
        ld_i64(d + 8 * (DST + TYPE)),
        ld_i64(d + 8 * (SRC0 + TYPE)),
        ld_i64(d + 8 * (SRC1 + TYPE)),
    )
    n1 = ld_i64(d + 8 * (SRC1 + NE0))
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        a, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        b = repeated_row_address(d, SRC1, row % ne1, row // ne1 % ne2, row // (ne1 * ne2))
        for i in range(n):
            total = ld_element(a_type, a + i * nb00) + ld_element(b_type, b + i % n1 * nb10)
            st_element(dst_type, out + i * nb0, total)


@op_kernel
def fill_elements(ith, nth, d, ctl):
    """Set each element to a number, the first parameter."""
    n, ne1, ne2 = ld_i64(d + 8 * (DST + NE0)), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    type_, nb0 = ld_i64(d + 8 * (DST + TYPE)), ld_i64(d + 8 * (DST + NB0))
    value = ld_f32(d + 8 * PARAM)
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        out = row_address(d, DST, row, ne1, ne2)
        for i in range(n):
            st_element(type_, out + i * nb0, value)


@op_kernel
def repeat_rows(ith, nth, d, ctl):
    """Fill dst with src0, repeated over all dimensions; PARAM: bytes of an element."""
    size, ne1, ne2 = ld_i64(d + 8 * PARAM), ld_i64(d + 8 * (DST + NE1)), ld_i64(d + 8 * (DST + NE2))
    n, n0 = ld_i64(d + 8 * (DST + NE0)) * size, ld_i64(d + 8 * (SRC0 + NE0)) * size
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    for row in range(first, end):
        at = repeated_row_address(d, SRC0, row % ne1, row // ne1 % ne2, row // (ne1 * ne2))
        out = row_address(d, DST, row, ne1, ne2)
        if n0 == 4:
            for i in range(0, n, 4):
                st_i32(out + i, ld_i32(at))
        else:
            for i in range(0, n, n0):
                copy_bytes(out + i, at, n0)


@device
def _shifted_row_address(d, tensor, i1, i2, i3):
    nb1, nb2, nb3 = ld_i64(d + 8 * (tensor + NB1)), ld_i64(d + 8 * (tensor + NB2)), ld_i64(d + 8 * (tensor + NB3))
    return ld_i64(d + 8 * (tensor + ADDRESS)) + i1 * nb1 + i2 * nb2 + i3 * nb3


@device
def _copy_row(out, at, n, size, nb0):
    """Copy n elements of some bytes to a row without gaps, from one whose elements lie nb0 bytes apart."""
    if nb0 == size or n == 1:
        copy_bytes(out, at, n * size)
    else:
        for i in range(n):
            _copy_element(size, 0, 0, at + i * nb0, out + i * size)


@op_kernel
def concat_rows(ith, nth, d, ctl):
    """Put src1 behind src0 along a dimension (second parameter); the first: bytes of an element."""
    size, dim, ne1, ne2 = (
        ld_i64(d + 8 * PARAM),
        ld_i64(d + 8 * (PARAM + 1)),
        ld_i64(d + 8 * (DST + NE1)),
        ld_i64(d + 8 * (DST + NE2)),
    )
    first, end = share(ne1 * ne2 * ld_i64(d + 8 * (DST + NE3)), ith, nth)
    left, right = ld_i64(d + 8 * (SRC0 + NE0)), ld_i64(d + 8 * (SRC1 + NE0))
    nb00, nb10 = ld_i64(d + 8 * (SRC0 + NB0)), ld_i64(d + 8 * (SRC1 + NB0))
    before = ld_i64(d + 8 * (SRC0 + NE0 + dim))
    for row in range(first, end):
        i1, i2, i3 = row % ne1, row // ne1 % ne2, row // (ne1 * ne2)
        out = row_address(d, DST, row, ne1, ne2)
        if dim == 0:
            _copy_row(out, _shifted_row_address(d, SRC0, i1, i2, i3), left, size, nb00)
            _copy_row(out + left * size, _shifted_row_address(d, SRC1, i1, i2, i3), right, size, nb10)
            continue
        j1, j2, j3 = (
            i1 - before if dim == 1 else i1,
            i2 - before if dim == 2 else i2,
            i3 - before if dim == 3 else i3,
        )
        if j1 < 0 or j2 < 0 or j3 < 0:
            _copy_row(out, _shifted_row_address(d, SRC0, i1, i2, i3), left, size, nb00)
        else:
            _copy_row(out, _shifted_row_address(d, SRC1, j1, j2, j3), right, size, nb10)
