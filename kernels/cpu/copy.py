"""Ops that move elements: CPY, CONT, DUP, REPEAT, CONCAT."""

from __future__ import annotations

from .convert import ld_element, row_from_f32, row_to_f32, st_element
from .descriptor import number, own_scratch, repeated_row_address, row_address, row_at, rows_of, share, sizes, word
from .kernel import device, op_kernel
from .memory import copy_bytes, ld_i32, ld_i64, ld_u8, ld_u16, st_i32, st_i64, st_u8, st_u16
from .words import DST, F32, NB0, NE0, PARAM, SRC0, SRC1, TYPE

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
    row_bytes = word(d, BYTES)
    _, ne1, ne2, ne3 = sizes(d, DST)
    pieces = (row_bytes + PIECE - 1) // PIECE
    first, end = share(ne1 * ne2 * ne3 * pieces, ith, nth)
    for unit in range(first, end):
        row = unit // pieces
        start = (unit - row * pieces) * PIECE
        at, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        if at != out:
            copy_bytes(out + start, at + start, min(PIECE, row_bytes - start))


@device
def _types(d):
    return word(d, SRC0 + TYPE), word(d, DST + TYPE)


@op_kernel
def copy_converted_rows(ith, nth, d, ctl):
    """Copy rows to another element type."""
    src_type, dst_type = _types(d)
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    dequantise, quantise = word(d, DEQUANTISE), word(d, QUANTISE)
    floats_at = own_scratch(ctl, ith)
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
    bytes_ = word(d, BYTES)
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    nb00, nb0 = word(d, SRC0 + NB0), word(d, DST + NB0)
    for row in range(first, end):
        at, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        for i in range(n):
            _copy_element(bytes_, src_type, dst_type, at + i * nb00, out + i * nb0)


@device
def _element_address(d, tensor, i):
    """Address of element i, counted in the tensor's own shape."""
    ne0, ne1, ne2, _ = sizes(d, tensor)
    row = i // ne0
    return row_address(d, tensor, row, ne1, ne2) + (i - row * ne0) * word(d, tensor + NB0)


@op_kernel
def copy_reshaped(ith, nth, d, ctl):
    """Copy elements to another shape, perhaps with gaps, and perhaps to another element type."""
    src_type, dst_type = _types(d)
    bytes_ = word(d, BYTES)
    ne0, ne1, ne2, ne3 = sizes(d, DST)
    first, end = share(ne0 * ne1 * ne2 * ne3, ith, nth)
    for i in range(first, end):
        _copy_element(bytes_, src_type, dst_type, _element_address(d, SRC0, i), _element_address(d, DST, i))


@op_kernel
def add_elements(ith, nth, d, ctl):
    """Add src1, repeated, to src0: elements of any float type, as masks of F16 are added."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    nb0, nb00, nb10 = word(d, DST + NB0), word(d, SRC0 + NB0), word(d, SRC1 + NB0)
    a_type, dst_type = _types(d)
    b_type, n1 = word(d, SRC1 + TYPE), word(d, SRC1 + NE0)
    for row in range(first, end):
        a, out = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        b = repeated_row_address(d, SRC1, row % ne1, row // ne1 % ne2, row // (ne1 * ne2))
        for i in range(n):
            total = ld_element(a_type, a + i * nb00) + ld_element(b_type, b + i % n1 * nb10)
            st_element(dst_type, out + i * nb0, total)


@op_kernel
def fill_elements(ith, nth, d, ctl):
    """Set each element to a number, the first parameter."""
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    type_, nb0 = word(d, DST + TYPE), word(d, DST + NB0)
    value = number(d, PARAM)
    for row in range(first, end):
        out = row_address(d, DST, row, ne1, ne2)
        for i in range(n):
            st_element(type_, out + i * nb0, value)


@op_kernel
def repeat_rows(ith, nth, d, ctl):
    """Fill dst with src0, repeated over all dimensions; PARAM: bytes of an element."""
    size = word(d, PARAM)
    n, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    n, n0 = n * size, word(d, SRC0 + NE0) * size
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
    size, dim = word(d, PARAM), word(d, PARAM + 1)
    _, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    left, right = word(d, SRC0 + NE0), word(d, SRC1 + NE0)
    nb00, nb10 = word(d, SRC0 + NB0), word(d, SRC1 + NB0)
    before = word(d, SRC0 + NE0 + dim)
    for row in range(first, end):
        i1, i2, i3 = row % ne1, row // ne1 % ne2, row // (ne1 * ne2)
        out = row_address(d, DST, row, ne1, ne2)
        if dim == 0:
            _copy_row(out, row_at(d, SRC0, i1, i2, i3), left, size, nb00)
            _copy_row(out + left * size, row_at(d, SRC1, i1, i2, i3), right, size, nb10)
            continue
        j1, j2, j3 = (
            i1 - before if dim == 1 else i1,
            i2 - before if dim == 2 else i2,
            i3 - before if dim == 3 else i3,
        )
        if j1 < 0 or j2 < 0 or j3 < 0:
            _copy_row(out, row_at(d, SRC0, i1, i2, i3), left, size, nb00)
        else:
            _copy_row(out, row_at(d, SRC1, j1, j2, j3), right, size, nb10)
