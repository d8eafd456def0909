"""Searches the scales of K-quants: upstream's three searches, with one lane per sub-block.

A search reads 256 floats sub-block by sub-block across lanes (element i of all, then element i + 1), and writes for
each lane a scale and what its codes were rounded with, for codes are made anew where a scale turns out to be 0. Sums
run in upstream's order and every operation rounds by itself, so results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np

from .emit import F32, I16, I32, I64, Emit, ir, micro, types, vec

#: Sub-blocks whose largest magnitude is at most this count as zeros.
ALL_ZERO = 1e-15
#: Adding it leaves the nearest integer in the low 23 bits.
MAGIC = 12582912.0


class Lanes:
    """Float lanes with operators that round once each, as C's without contraction."""

    __slots__ = ("e", "v")

    def __init__(self, e: Emit, v: ir.Value) -> None:
        self.e = e
        self.v = v

    def of(self, other: Any) -> ir.Value:
        """Return another operand's value; a number becomes a float32 in all lanes."""
        return other.v if isinstance(other, Lanes) else self.e.const(self.v.type, float(np.float32(other)))

    def _with(self, v: ir.Value) -> Lanes:
        return Lanes(self.e, v)

    def __add__(self, other: Any) -> Lanes:
        return self._with(self.e.b.fadd(self.v, self.of(other)))

    def __sub__(self, other: Any) -> Lanes:
        return self._with(self.e.b.fsub(self.v, self.of(other)))

    def __mul__(self, other: Any) -> Lanes:
        return self._with(self.e.b.fmul(self.v, self.of(other)))

    def __truediv__(self, other: Any) -> Lanes:
        return self._with(self.e.b.fdiv(self.v, self.of(other)))

    def __rtruediv__(self, other: Any) -> Lanes:
        return self._with(self.e.b.fdiv(self.of(other), self.v))

    def __neg__(self) -> Lanes:
        return self._with(self.e.b.fneg(self.v))

    def __abs__(self) -> Lanes:
        return self._with(self.e.unary("fabs", self.v))

    def __gt__(self, other: Any) -> ir.Value:
        return self.e.b.fcmp_ordered(">", self.v, self.of(other))

    def __lt__(self, other: Any) -> ir.Value:
        return self.e.b.fcmp_ordered("<", self.v, self.of(other))

    def equals(self, other: Any) -> ir.Value:
        """Return the mask of equal lanes."""
        return self.e.b.fcmp_ordered("==", self.v, self.of(other))

    def where(self, mask: ir.Value, other: Any) -> Lanes:
        """Return self where a mask holds, else the other."""
        return self._with(self.e.b.select(mask, self.v, self.of(other)))

    def nearest(self, low: int, high: int) -> Lanes:
        """Return the nearest integers, ties to even, within bounds; too large ones wrap first, as upstream's do."""
        b, n = self.e.b, self.v.type.count
        ints = vec(I32, n)

        def k(value: int) -> ir.Constant:
            return self.e.const(ints, value)

        found = b.sub(b.and_(b.bitcast((self + MAGIC).v, ints), k(0x7FFFFF)), k(0x400000))
        found = b.select(b.icmp_signed(">", found, k(low)), found, k(low))
        found = b.select(b.icmp_signed("<", found, k(high)), found, k(high))
        return self._with(b.sitofp(found, self.v.type))


class _Search:
    """Where a search reads and writes, and variables that live across its loops."""

    def __init__(self, e: Emit, x: ir.Value, out: ir.Value, n: int, lanes: int) -> None:
        self.e, self.x, self.out, self.n, self.type = e, x, out, n, vec(F32, lanes)

    def number(self, value: float) -> Lanes:
        return Lanes(self.e, self.e.const(self.type, float(np.float32(value))))

    def at(self, array: ir.Value, i: ir.Value) -> ir.Value:
        """Return the address of element i of all lanes."""
        return self.e.add(array, self.e.mul(i, 4 * self.type.count))

    def load(self, array: ir.Value, i: ir.Value) -> Lanes:
        return Lanes(self.e, self.e.load(self.type, self.at(array, i)))

    def each(self, body: Callable[[ir.Value], None], start: int = 0) -> None:
        with self.e.loop(I64(self.n), 1, I64(start)) as (i, _):
            body(i)

    def var(self, value: Lanes) -> _Var:
        return _Var(self.e, value)

    def give(self, *values: Lanes) -> None:
        for i, value in enumerate(values):
            self.e.store(value.v, self.out, 64 * i)

    def extreme(self) -> tuple[Lanes, Lanes]:
        """Return the first element of the largest magnitude, and that magnitude."""
        extreme, largest = self.var(self.number(0.0)), self.var(self.number(0.0))

        def body(i: ir.Value) -> None:
            x = self.load(self.x, i)
            more = abs(x) > largest.value
            extreme.value, largest.value = x.where(more, extreme.value), abs(x).where(more, largest.value)

        self.each(body)
        return extreme.value, largest.value


class _Var:
    """Lanes that change."""

    def __init__(self, e: Emit, value: Lanes) -> None:
        self.e, self.p = e, e.var(value.v)

    @property
    def value(self) -> Lanes:
        return Lanes(self.e, self.e.b.load(self.p))

    @value.setter
    def value(self, new: Lanes) -> None:
        self.e.b.store(new.v, self.p)


@contextmanager
def _trials(s: _Search, first: int, last: int, start: float, step: float) -> Any:
    """Loop over numbers ``start + step * i`` in all lanes, each product and sum rounded to a float."""
    e = s.e
    with e.loop(I64(last + 1), 1, I64(first)) as (i, _):
        yield Lanes(e, e.splat(e.b.sitofp(i, F32), s.type.count)) * step + start


def search_scale_and_minimum(
    n: int, lanes: int, top: int, start: float, n_step: int, *, by_root: bool
) -> Callable[[int, int, int], None]:
    """Return ``f(x, weights, out)``: scale, less the minimum, and the factor and start of the codes, of each lane.

    Parameters
    ----------
    n, lanes : int
        Elements of a sub-block; how many there are.
    top : int
        The largest code.
    start, n_step : float, int
        The first factor tried is for codes up to ``top + start``; each next for 0.1 more.
    by_root : bool
        Weights are the magnitude plus the root of the mean square, and errors count squared; else weights are the
        magnitude, and errors count as they are.

    Notes
    -----
    Mirrors `make_qkx2_quants`.
    """

    def search(e, x, weights, out):
        s = _Search(e, x, out, n, lanes)
        _weigh(s, weights, by_root)
        x0, w0 = s.load(x, I64(0)), s.load(weights, I64(0))
        least, most, sum_w, sum_x = s.var(x0), s.var(x0), s.var(w0), s.var(w0 * x0)

        def first_look(i: ir.Value) -> None:
            v, w = s.load(x, i), s.load(weights, i)
            least.value = v.where(v < least.value, least.value)
            most.value = v.where(v > most.value, most.value)
            sum_w.value = sum_w.value + w
            sum_x.value = sum_x.value + w * v

        s.each(first_look, 1)
        least.value = s.number(0.0).where(least.value > 0.0, least.value)
        flat = most.value.equals(least.value)
        factor = top / (most.value - least.value)
        best_factor, best_start, scale = s.var(factor), s.var(least.value), s.var(1.0 / factor)

        def error_of(factor: Lanes, scale: Lanes, minimum: Lanes) -> Lanes:
            total = s.var(s.number(0.0))

            def body(i: ir.Value) -> None:
                v = s.load(x, i)
                code = (factor * (v - least.value)).nearest(0, top)
                difference = scale * code + minimum - v
                loss = difference * difference if by_root else abs(difference)
                total.value = total.value + s.load(weights, i) * loss

            s.each(body)
            return total.value

        best = s.var(error_of(factor, scale.value, least.value))
        with _trials(s, 0, n_step, start, 0.1) as number:
            factor = (number + top) / (most.value - least.value)
            sum_l, sum_l2, sum_xl = (s.var(s.number(0.0)) for _ in range(3))

            def add_up(i: ir.Value) -> None:
                v, w = s.load(x, i), s.load(weights, i)
                code = (factor * (v - least.value)).nearest(0, top)
                weighted = w * code
                sum_l.value = sum_l.value + weighted
                sum_l2.value = sum_l2.value + weighted * code
                sum_xl.value = sum_xl.value + weighted * v

            s.each(add_up)
            a, b, c = sum_l.value, sum_l2.value, sum_xl.value
            determinant = sum_w.value * b - a * a
            this_scale = (sum_w.value * c - sum_x.value * a) / determinant
            this_least = (b * sum_x.value - a * c) / determinant
            positive = this_least > 0.0
            this_scale, this_least = (c / b).where(positive, this_scale), s.number(0.0).where(positive, this_least)
            error = error_of(factor, this_scale, this_least)
            better = e.b.and_(determinant > 0.0, error < best.value)
            best.value = error.where(better, best.value)
            best_factor.value = factor.where(better, best_factor.value)
            best_start.value = least.value.where(better, best_start.value)
            scale.value = this_scale.where(better, scale.value)
            least.value = this_least.where(better, least.value)
        zero = s.number(0.0)
        s.give(
            zero.where(flat, scale.value),
            -least.value,
            zero.where(flat, best_factor.value),
            zero.where(flat, best_start.value),
        )

    return micro(types.void, 3)(search)


def _weigh(s: _Search, weights: ir.Value, by_root: bool) -> None:
    e = s.e
    root = None
    if by_root:
        total = s.var(s.number(0.0))

        def add(i: ir.Value) -> None:
            v = s.load(s.x, i)
            total.value = total.value + v * v

        s.each(add)
        root = Lanes(e, e.unary("sqrt", (total.value / s.n).v))

    def write(i: ir.Value) -> None:
        weight = abs(s.load(s.x, i))
        e.store((weight if root is None else root + weight).v, s.at(weights, i))

    s.each(write)


@micro(types.void, 2)
def search_scale_q6(e, x, out):
    """Write the scale and the factor of the codes of 16 sub-blocks of 16, codes -32 to 31; errors weigh as squares.

    Notes
    -----
    Mirrors `make_qx_quants`.
    """
    s = _Search(e, x, out, 16, 16)
    extreme, largest = s.extreme()
    none = largest < ALL_ZERO
    factor = -32.0 / extreme
    best_factor = s.var(factor)

    def sums(factor: Lanes) -> tuple[Lanes, Lanes]:
        sum_lx, sum_l2 = s.var(s.number(0.0)), s.var(s.number(0.0))

        def body(i: ir.Value) -> None:
            v = s.load(x, i)
            code, weight = (factor * v).nearest(-32, 31), v * v
            sum_lx.value = sum_lx.value + weight * v * code
            sum_l2.value = sum_l2.value + weight * code * code

        s.each(body)
        return sum_lx.value, sum_l2.value

    sum_lx, sum_l2 = sums(factor)
    scale = s.var((sum_lx / sum_l2).where(e.b.not_(sum_l2.equals(0.0)), s.number(0.0)))
    best = s.var(scale.value * sum_lx)
    for first, last in ((-9, -1), (1, 9)):
        with _trials(s, first, last, 0.0, 0.1) as number:
            factor = -(number + 32.0) / extreme
            sum_lx, sum_l2 = sums(factor)
            better = e.b.and_(sum_l2 > 0.0, sum_lx * sum_lx > best.value * sum_l2)
            scale.value = (sum_lx / sum_l2).where(better, scale.value)
            best.value = (scale.value * sum_lx).where(better, best.value)
            best_factor.value = factor.where(better, best_factor.value)
    zero = s.number(0.0)
    s.give(zero.where(none, scale.value), zero.where(none, best_factor.value))


#: Bytes of a super-block's floats, and of what is found of it, where two lie one behind the other.
PAIR_FLOATS, PAIR_FOUND = 1024, 256


@micro(types.void, 3)
def search_scales_q3(e, x, codes, out):
    """Write the scales and the codes, -4 to 3, of 16 sub-blocks of 16 each of two super-blocks.

    Codes change one by one while that helps. Each change waits for the one before, divisions included; so two
    super-blocks take turns.

    Notes
    -----
    Mirrors `make_q3_quants`.
    """
    other = _SearchQ3(e, e.add(x, PAIR_FLOATS), e.add(codes, PAIR_FLOATS), e.add(out, PAIR_FOUND))
    both = (_SearchQ3(e, x, codes, out), other)
    changed = e.var(I16(1))

    def each(what: Callable[[_SearchQ3, ir.Value], None]) -> None:
        with e.loop(I64(16)) as (i, _):
            for one in both:
                what(one, i)

    each(_SearchQ3.begin)
    with e.loop(I64(5)), e.when(e.b.icmp_unsigned("!=", e.b.load(changed), I16(0))):
        e.b.store(I16(0), changed)  # a lane that changes nothing in one round changes nothing in the next
        each(lambda one, i: e.b.store(e.b.or_(e.b.load(changed), e.cast(one.improve(i), I16)), changed))
    each(_SearchQ3.clear)
    for one in both:
        one.give_scale()


class _SearchQ3(_Search):
    """The search of one super-block; see `search_scales_q3`."""

    def __init__(self, e: Emit, x: ir.Value, codes: ir.Value, out: ir.Value) -> None:
        super().__init__(e, x, out, 16, 16)
        self.codes = codes
        extreme, largest = self.extreme()
        self.none = largest < ALL_ZERO
        self.factor = -4.0 / extreme
        self.sum_lx, self.sum_l2 = self.var(self.number(0.0)), self.var(self.number(0.0))

    def begin(self, i: ir.Value) -> None:
        v = self.load(self.x, i)
        code, weight = (self.factor * v).nearest(-4, 3), v * v
        self.e.store(code.v, self.at(self.codes, i))
        self.sum_lx.value = self.sum_lx.value + weight * v * code
        self.sum_l2.value = self.sum_l2.value + weight * code * code

    def improve(self, i: ir.Value) -> ir.Value:
        """Change code i of the lanes that this helps; return which did."""
        e, sum_lx, sum_l2 = self.e, self.sum_lx, self.sum_l2
        v, code = self.load(self.x, i), self.load(self.codes, i)
        weight = v * v
        slx, sl2 = sum_lx.value - weight * v * code, sum_l2.value - weight * code * code
        new = (v * sl2 / slx).nearest(-4, 3)
        new_slx, new_sl2 = slx + weight * v * new, sl2 + weight * new * new
        better = new_slx * new_slx * sum_l2.value > sum_lx.value * sum_lx.value * new_sl2
        for condition in (slx > 0.0, e.b.not_(new.equals(code)), new_sl2 > 0.0):
            better = e.b.and_(better, condition)
        e.store(new.where(better, code).v, self.at(self.codes, i))
        sum_lx.value = new_slx.where(better, sum_lx.value)
        sum_l2.value = new_sl2.where(better, sum_l2.value)
        return better

    def clear(self, i: ir.Value) -> None:
        code = self.load(self.codes, i)
        self.e.store(self.number(-4.0).where(self.none, code).v, self.at(self.codes, i))

    def give_scale(self) -> None:
        zero = self.number(0.0)
        scale = (self.sum_lx.value / self.sum_l2.value).where(self.sum_l2.value > 0.0, zero)
        self.give(zero.where(self.none, scale))
