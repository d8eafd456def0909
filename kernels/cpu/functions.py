"""Functions of 16 float lanes: exponential, hyperbolic tangent, error function, and the activations made of them.

`V` writes arithmetic as Python does. Accuracies (units in the last place, measured against float64) stand at each
function; what is rarely used calls the C library lane by lane.
"""

from __future__ import annotations

from typing import Any

from .emit import CONTRACT, Emit, F32x16, I32x16, ir


class V:
    """Float lanes with operators; numbers on either side become constants.

    Comparisons give masks for `where`; a product and a sum may be rounded once.
    """

    __slots__ = ("e", "v")

    def __init__(self, e: Emit, v: ir.Value) -> None:
        self.e = e
        self.v = v

    def _of(self, other: Any) -> ir.Value:
        return other.v if isinstance(other, V) else self.e.const(F32x16, float(other))

    def __add__(self, other: Any) -> V:
        return V(self.e, self.e.b.fadd(self.v, self._of(other), flags=CONTRACT))

    def __sub__(self, other: Any) -> V:
        return V(self.e, self.e.b.fsub(self.v, self._of(other), flags=CONTRACT))

    def __mul__(self, other: Any) -> V:
        return V(self.e, self.e.b.fmul(self.v, self._of(other), flags=CONTRACT))

    def __truediv__(self, other: Any) -> V:
        return V(self.e, self.e.b.fdiv(self.v, self._of(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> V:
        return V(self.e, self.e.b.fsub(self._of(other), self.v, flags=CONTRACT))

    def __rtruediv__(self, other: Any) -> V:
        return V(self.e, self.e.b.fdiv(self._of(other), self.v))

    def __neg__(self) -> V:
        return V(self.e, self.e.b.fneg(self.v))

    def __gt__(self, other: Any) -> ir.Value:
        return self.e.b.fcmp_ordered(">", self.v, self._of(other))

    def __lt__(self, other: Any) -> ir.Value:
        return self.e.b.fcmp_ordered("<", self.v, self._of(other))

    def where(self, mask: ir.Value, other: Any) -> V:
        """Return self where a mask holds, else the other."""
        return V(self.e, self.e.b.select(mask, self.v, self._of(other)))

    def least(self, other: Any) -> V:
        """Return the smaller; a NaN of self stays."""
        return V(self.e, self.e.b.select(self.e.b.fcmp_ordered(">", self.v, self._of(other)), self._of(other), self.v))

    def most(self, other: Any) -> V:
        """Return the larger; a NaN of self stays."""
        return V(self.e, self.e.b.select(self.e.b.fcmp_ordered("<", self.v, self._of(other)), self._of(other), self.v))

    def apply(self, name: str) -> V:
        """Apply LLVM's intrinsic of a name."""
        return V(self.e, self.e.unary(name, self.v))


def exp(x: V) -> V:
    """Return e to the x; within 1 unit in the last place, subnormal results and infinities included."""
    e, b = x.e, x.e.b
    x = x.least(89.0).most(-104.0)
    # adding 1.5 * 2**23 leaves the nearest integer in the low bits, without a conversion that a NaN would upset
    shifted = V(e, b.fadd(b.fmul(x.v, e.const(F32x16, 1.44269504)), e.const(F32x16, 12582912.0)))
    n = V(e, b.fsub(shifted.v, e.const(F32x16, 12582912.0)))
    r = V(e, e.fma(n.v, e.const(F32x16, -0.693359375), x.v))
    r = V(e, e.fma(n.v, e.const(F32x16, 2.12194440e-4), r.v))
    p = e.const(F32x16, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = e.fma(p, r.v, e.const(F32x16, c))
    y = V(e, e.fma(b.fmul(p, r.v), r.v, b.fadd(r.v, e.const(F32x16, 1.0))))
    power = b.sub(b.bitcast(shifted.v, I32x16), e.const(I32x16, 0x4B400000))
    half = b.ashr(power, e.const(I32x16, 1))
    for part in (half, b.sub(power, half)):  # two factors: their product may be subnormal, they are not
        y = y * V(e, b.bitcast(b.shl(b.add(part, e.const(I32x16, 127)), e.const(I32x16, 23)), F32x16))
    return y


def sigmoid(x: V) -> V:
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp(-x))


def tanh(x: V) -> V:
    """Return the hyperbolic tangent; within 2 units: a polynomial near 0, where the quotient would cancel."""
    e = x.e
    z = x * x
    p = e.const(F32x16, -5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = e.fma(p, z.v, e.const(F32x16, c))
    small = V(e, e.fma(e.b.fmul(p, z.v), x.v, x.v))
    large = 1.0 - 2.0 / (exp(x.apply("fabs") * 2.0) + 1.0)
    signed = large.where(x > 0.0, -large)
    return small.where(x.apply("fabs") < 0.625, signed)


def erf(x: V) -> V:
    """Return the error function; within 2 units: a polynomial near 0, one minus an exponential elsewhere."""
    e = x.e

    def horner(start: float, at: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
        p = e.const(F32x16, start)
        for c in coefficients:
            p = e.fma(p, at, e.const(F32x16, c))
        return p

    t, s = x.apply("fabs"), x * x
    u = horner(-3.88396438e-3, t.v, (2.42546219e-2,))
    r = e.fma(horner(-1.72853470e-5, t.v, (3.83197126e-4,)), s.v, u)
    for c in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = e.fma(r, t.v, e.const(F32x16, c))
    large = 1.0 - exp(V(e, e.fma(r, t.v, e.b.fneg(t.v))))
    signed = large.where(x > 0.0, -large)
    p = horner(-5.96761703e-4, s.v, (4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1))
    return V(e, e.fma(p, x.v, x.v)).where(t < 0.927734375, signed)


def expm1(x: V) -> V:
    """Return exp(x) - 1, by tanh near 0: 2 t / (1 - t) with t = tanh(x / 2)."""
    t = tanh(x * 0.5)
    return (2.0 * t / (1.0 - t)).where(x.apply("fabs") < 1.0, exp(x) - 1.0)


def silu(x: V) -> V:
    """Return x times its sigmoid."""
    return x / (1.0 + exp(-x))


def gelu(x: V) -> V:
    """Return the Gaussian error linear unit, by tanh."""
    return 0.5 * x * (1.0 + tanh(0.79788456080286535588 * x * (1.0 + 0.044715 * x * x)))


def gelu_quick(x: V) -> V:
    """Return x times the sigmoid of 1.702 x."""
    return x / (1.0 + exp(-1.702 * x))


def gelu_erf(x: V) -> V:
    """Return the Gaussian error linear unit, by erf."""
    return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440))
