"""ROPE: rotates pairs of a row's elements by angles proportional to the token's position.

Cosines and sines are the same for all layers of a model, so they are an op of their own, run once for all ROPE nodes
of a plan that share positions and parameters: for each token a row of cosines, one a pair, then as many sines.

A token may have four positions (time, height, width, and one more); sections of the pairs say which turns a pair.
"""

from __future__ import annotations

import math

import numpy as np

from .convert import row_from_f32, row_to_f32
from .descriptor import address, number, own_scratch, row_address, rows_of, scratch, share, word
from .emit import I64, LANES, F32x8, F32x16, ir, micro, types
from .kernel import device, op_kernel
from .memory import copy_bytes, floats, ld_f32, ld_i32, ld_i64
from .words import DST, F32, NB0, NB1, NE0, PARAM, SRC0, SRC1, TYPE

#: Parameters of `rope_angles`: pairs of a row. THETA_SCALE: factor of the angle from pair to pair; LOW, HIGH: pairs
#: between which YaRN mixes; MAGNITUDE: factor of cosines and sines. AXES: see below; SECTIONS: pairs of each of the four
#: positions.
N_PAIRS, THETA_SCALE, FREQ_SCALE, EXT_FACTOR, MAGNITUDE, LOW, HIGH, AXES, SECTIONS = (PARAM + i for i in range(9))
#: One position for all pairs; four, in sections one behind another; the first three in turns; in sections whose
#: angles begin anew.
ONE, IN_SECTIONS, IN_TURNS, IN_NEW_SECTIONS = range(4)
#: Parameters of `rope_rows`: turned elements, whether pairs are half of them apart (NEOX) or neighbours, first
#: dimension, the sign of sines (bits).
N_DIMS, IS_NEOX, FIRST_DIM, SINE_SIGN = PARAM, PARAM + 1, PARAM + 2, PARAM + 3


@device
def _axis_of_pair(axes, sections, sector):
    """Return which of the four positions turns a pair, counted within a round of all sections."""
    time, height, width = ld_i64(sections), ld_i64(sections + 8), ld_i64(sections + 16)
    if axes == IN_TURNS:
        axis = sector % 3
        return axis if sector < 3 * ld_i64(sections + 8 * axis) else 3
    return int(sector >= time) + int(sector >= time + height) + int(sector >= time + height + width)


@device
def _pair_angle(d, i, angle, table, half):
    """Write cosine and sine of pair i, whose frequency is divided and scaled first."""
    divisors, freq_scale, ext_factor = address(d, SRC1), number(d, FREQ_SCALE), number(d, EXT_FACTOR)
    magnitude, row = number(d, MAGNITUDE), floats(table)
    extrapolated = angle
    if divisors != 0:
        extrapolated = angle / ld_f32(divisors + 4 * i)
    theta = freq_scale * extrapolated
    if ext_factor != np.float32(0.0):
        low, high = number(d, LOW), number(d, HIGH)
        ramp = (np.float32(i) - low) / max(np.float32(0.001), high - low)
        mix = (np.float32(1.0) - min(np.float32(1.0), max(np.float32(0.0), ramp))) * ext_factor
        theta = theta * (np.float32(1.0) - mix) + extrapolated * mix
    row[i] = math.cos(theta) * magnitude
    row[half + i] = math.sin(theta) * magnitude


@op_kernel
def rope_angles(ith, nth, d, ctl):
    """Write cosines and sines for the positions of src0; src1: divisors of the frequencies, or absent."""
    half, axes, sections = word(d, N_PAIRS), word(d, AXES), d + 8 * SECTIONS
    n_token = word(d, SRC0 + NE0) // (1 if axes == ONE else 4)
    theta_scale, positions, nb0 = number(d, THETA_SCALE), address(d, SRC0), word(d, SRC0 + NB0)
    table = scratch(d, ctl)
    n_sector = ld_i64(sections) + ld_i64(sections + 8) + ld_i64(sections + 16) + ld_i64(sections + 24)
    first, end = share(n_token, ith, nth)
    for t in range(first, end):
        at, row = positions + nb0 * t, table + 8 * half * t
        angle = np.float32(ld_i32(at))
        if axes == ONE:
            for i in range(half):
                _pair_angle(d, i, angle, row, half)
                angle *= theta_scale
            continue
        height, width, more = (
            np.float32(ld_i32(at + nb0 * n_token)),
            np.float32(ld_i32(at + nb0 * n_token * 2)),
            np.float32(ld_i32(at + nb0 * n_token * 3)),
        )
        for i in range(half):
            sector = i % n_sector
            axis = _axis_of_pair(axes, sections, sector)
            if axes == IN_NEW_SECTIONS:
                # where a section is empty, upstream begins only the first that starts there
                if sector == 0:
                    angle = np.float32(ld_i32(at))
                elif sector == ld_i64(sections):
                    height = np.float32(ld_i32(at + nb0 * n_token))
                elif sector == ld_i64(sections) + ld_i64(sections + 8):
                    width = np.float32(ld_i32(at + nb0 * n_token * 2))
                elif sector == ld_i64(sections) + ld_i64(sections + 8) + ld_i64(sections + 16):
                    more = np.float32(ld_i32(at + nb0 * n_token * 3))
            chosen = angle if axis == 0 else height if axis == 1 else width if axis == 2 else more
            _pair_angle(d, i, chosen, row, half)
            angle, height, width, more = (
                angle * theta_scale,
                height * theta_scale,
                width * theta_scale,
                more * theta_scale,
            )


@micro(types.void, 5)
def _turn_halves(e, x, y, table, half, sign):
    """Turn pairs (i, i + half); all lanes are read before any is written, so y may be x."""
    b = e.b
    sign = e.splat(e.float_of(sign))

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        far = e.add(at, e.mul(half, 4))
        p, q = e.load_lanes(F32x16, e.add(x, at), mask), e.load_lanes(F32x16, e.add(x, far), mask)
        c = e.load_lanes(F32x16, e.add(table, at), mask)
        s = b.fmul(e.load_lanes(F32x16, e.add(table, far), mask), sign)
        e.store_lanes(b.fsub(b.fmul(p, c), b.fmul(q, s)), e.add(y, at), mask)
        e.store_lanes(b.fadd(b.fmul(p, s), b.fmul(q, c)), e.add(y, far), mask)

    e.vectors(half, body)


@micro(types.void, 5)
def _turn_neighbours(e, x, y, table, half, sign):
    """Turn pairs (2i, 2i + 1), eight at a time."""
    b = e.b
    sign = e.splat(e.float_of(sign))
    swap = [i ^ 1 for i in range(LANES)]

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        # i counts elements; its pairs are i/2 ..., spread so that both of a pair see their angle
        at, angle = e.add(x, e.mul(i, 4)), e.mul(i, 2)
        v = e.load_lanes(F32x16, at, mask)
        pairs = None if mask is None else e.lanes_below(b.sub(half, b.lshr(i, I64(1))))
        spread = [k // 2 for k in range(LANES)]

        def angles(at: ir.Value) -> ir.Value:
            if pairs is None:
                return e.load(F32x8, at)
            return e.load_lanes(F32x16, at, b.and_(pairs, e.lanes_below(I64(8))))

        c, s = angles(e.add(table, angle)), angles(e.add(e.add(table, angle), e.mul(half, 4)))
        s = b.fmul(s, e.halves(sign)[0] if pairs is None else sign)
        c, s = e.shuffle(c, c, spread), e.shuffle(s, s, spread)
        other = e.shuffle(v, v, swap)
        signed = b.fmul(s, e.const(F32x16, [-1.0, 1.0] * 8))
        e.store_lanes(b.fadd(b.fmul(v, c), b.fmul(other, signed)), e.add(y, e.mul(i, 4)), mask)

    e.vectors(e.mul(half, 2), body)


@device
def _turn_row(x, y, table, n_dims, is_neox, sign):
    if is_neox != 0:
        _turn_halves(x, y, table, n_dims // 2, sign)
    else:
        _turn_neighbours(x, y, table, n_dims // 2, sign)


@op_kernel
def rope_rows(ith, nth, d, ctl):
    """Turn n_dims elements of each row, from FIRST_DIM on, and copy the rest."""
    ne0, ne1, ne2, first, end = rows_of(d, DST, ith, nth)
    n_dims, first_dim = word(d, N_DIMS), word(d, FIRST_DIM)
    is_neox, sign = word(d, IS_NEOX), word(d, SINE_SIGN)
    table, type = scratch(d, ctl), word(d, SRC0 + TYPE)
    floats_at = own_scratch(ctl, ith)
    nb01, nb1, start = word(d, SRC0 + NB1), word(d, DST + NB1), 4 * first_dim
    head, token = first % ne1, first // ne1 % ne2
    x, y = row_address(d, SRC0, first, ne1, ne2) - nb01, row_address(d, DST, first, ne1, ne2) - nb1
    for row in range(first, end):
        x, y = x + nb01, y + nb1
        if head == ne1:  # the next token: divisions are for these only
            head, token = 0, row // ne1 % ne2
            x, y = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        head += 1
        if type != F32:  # F16: the row is turned as floats
            row_to_f32(type, x, floats_at, ne0, 0)
            at = floats_at + start
            _turn_row(at, at, table + 4 * n_dims * token, n_dims, is_neox, sign)
            row_from_f32(type, floats_at, y, ne0, 0)
            continue
        if x != y:
            copy_bytes(y, x, start)
            copy_bytes(y + start + 4 * n_dims, x + start + 4 * n_dims, 4 * (ne0 - n_dims - first_dim))
        _turn_row(x + start, y + start, table + 4 * n_dims * token, n_dims, is_neox, sign)
