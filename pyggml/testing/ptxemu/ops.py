"""PTX arithmetic that is not a single numpy operator. All arguments are 2-D arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import LOCAL_BASE as _LB
from .memory import SHARED_BASE as _SB

# numpy arrays whose types the PTX decides
Array = Any


SHARED_BASE = np.array([[_SB]], "u8")
LOCAL_BASE = np.array([[_LB]], "u8")


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c, rounded to float32."""
    # the product of two floats is exact in double; one rounding to double (rarely) and one to float remain
    return (np.multiply(a, b, dtype="f8") + c).astype("f4")


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c for float64."""
    return (np.multiply(a, b, dtype=np.longdouble) + c).astype("f8")


def mulhi(a: Array, b: Array) -> Array:
    """Return the upper half of a product."""
    n = a.dtype.itemsize
    if n == 8:
        sg = a.dtype.kind == "i"
        x, y = a.astype(object), b.astype(object)
        r = (x * y) >> 64
        return (r % (1 << 64)).astype("u8").view("i8") if sg else r.astype("u8")
    w = f"{a.dtype.kind}{2 * n}"
    return (a.astype(w) * b.astype(w) >> np.array(8 * n, w)).astype(a.dtype)


def idiv(a: Array, b: Array) -> Array:
    """Divide integers towards 0; by 0 gives all ones."""
    z = b == 0
    d = np.where(z, np.ones_like(b), b)
    if a.dtype.kind == "u":
        q = a // d
    else:
        q = np.abs(a) // np.abs(d)
        q = np.where((a < 0) != (d < 0), -q, q).astype(a.dtype)
    return np.where(z, np.array(-1, "i8").astype(a.dtype), q)


def irem(a: Array, b: Array) -> Array:
    """Return the remainder that belongs to `idiv`."""
    return a - idiv(a, b) * b


def shl(a: Array, n: Array) -> Array:
    """Shift left; too far gives 0."""
    bits = 8 * a.dtype.itemsize
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), np.zeros((1, 1), a.dtype))


def shr(a: Array, n: Array) -> Array:
    """Shift right; too far gives 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    r = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return r if a.dtype.kind == "i" else np.where(n < bits, r, np.zeros((1, 1), a.dtype))


def shf(d: str, wrap: bool, a: Array, b: Array, c: Array) -> Array:
    """Shift a pair of words (`shf.l`, `shf.r`)."""
    c = (c & 31 if wrap else np.minimum(c, 32)).astype("u8")
    v = b.astype("u8") << np.uint64(32) | a
    return (v << c >> np.uint64(32) if d == "l" else v >> c).astype("u4")


def lop3(a: Array, b: Array, c: Array, t: int) -> Array:
    """Return any function of three bits, by its table."""
    r = np.zeros((1, 1), "u4")
    for i in range(8):
        if t >> i & 1:
            r = r | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return r


def prmt(a: Array, b: Array, c: Array) -> Array:
    """Pick bytes of a pair of words."""
    v = b.astype("u8") << np.uint64(32) | a
    r = np.zeros((1, 1), "u4")
    for i in range(4):
        s = (c >> np.uint32(4 * i)) & np.uint32(15)
        byte = (v >> ((s & np.uint32(7)).astype("u8") * np.uint64(8)) & np.uint64(255)).astype("u4")
        byte = np.where(s & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
        r = r | byte.astype("u4") << np.uint32(8 * i)
    return r


def bfe(a: Array, pos: Array, n: Array) -> Array:
    """Extract a bit field."""
    bits = 8 * a.dtype.itemsize
    pos, n = pos & np.uint32(255), n & np.uint32(255)
    u = a.view(f"u{a.dtype.itemsize}").astype("u8")
    mask = np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, 63).astype("u8")) - np.uint64(1))
    r = np.where(pos < bits, u >> np.minimum(pos, 63).astype("u8"), np.uint64(0)) & mask
    if a.dtype.kind == "i":
        top = np.minimum(pos.astype("i8") + n - 1, bits - 1)
        sign = np.where(n == 0, np.uint64(0), (u >> np.maximum(top, 0).astype("u8")) & np.uint64(1))
        r = np.where(sign != 0, r | ~mask, r)
    return r.astype(f"u{a.dtype.itemsize}").view(a.dtype)


def bfi(a: Array, b: Array, pos: Array, n: Array) -> Array:
    """Insert a bit field."""
    pos, n = (pos & np.uint32(255)).astype("u8"), (n & np.uint32(255)).astype("u8")
    bits = 8 * a.dtype.itemsize
    mask = np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1))
    p = np.minimum(pos, np.uint64(63))
    mask = np.where(pos < bits, mask << p, np.uint64(0))
    return ((a.astype("u8") << p & mask) | (b.astype("u8") & ~mask)).astype(a.dtype)


def popc(a: Array) -> Array:
    """Count set bits."""
    return np.bitwise_count(a).astype("u4")


def bfind(a: Array) -> Array:
    """Return the position of the highest bit that differs from the sign."""
    v = np.where(a < 0, ~a, a).astype("u8") if a.dtype.kind == "i" else a.astype("u8")
    r = np.full(v.shape, -1, "i8")
    for i in range(8 * a.dtype.itemsize):
        r = np.where(v >> np.uint64(i) & np.uint64(1), i, r)
    return r.astype("u4")


def clz(a: Array) -> Array:
    """Count leading zeros."""
    u = a.view(f"u{a.dtype.itemsize}")
    return (8 * a.dtype.itemsize - 1 - bfind(u).view("i4")).astype("u4")


def brev(a: Array) -> Array:
    """Reverse the bits."""
    n = a.dtype.itemsize
    b = np.unpackbits(np.ascontiguousarray(a).view("u1").reshape(*a.shape, n), axis=2, bitorder="little")
    return np.packbits(b[..., ::-1], axis=2, bitorder="little").view(a.dtype)[..., 0]


def _bytes(a: Array, dt: str) -> Array:
    return np.ascontiguousarray(a).view(dt).reshape(*a.shape, 4).astype("i4")


def dp4a(a: Array, b: Array, c: Array, ta: str, tb: str) -> Array:
    """Return c plus the dot product of four bytes."""
    products = _bytes(a, ta) * _bytes(b, tb)
    return (c.view("i4") + products[..., 0] + products[..., 1] + products[..., 2] + products[..., 3]).view("u4")


def tof32(t: str, x: Array) -> Array:
    """Return half-precision values as float32."""
    if t == "f16":
        return x.view("f2").astype("f4")
    return (x.view("u2").astype("u4") << np.uint32(16)).view("f4")


def _tobf16(x: Array) -> Array:
    u = np.ascontiguousarray(x).view("u4")
    r = ((u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype("u2")
    return np.where(np.isnan(x), np.uint16(0x7FFF), r)


def fromf32(t: str, x: Array) -> Array:
    """Round float32 to half precision."""
    return x.astype("f2") if t == "f16" else _tobf16(x)


def half(t: str, f: str, *xs: Array) -> Array:
    """Compute in half precision, by way of float64."""
    if t.endswith("x2"):
        t = t[:-2]
        lo = half(t, f, *[x.astype("u2").view("f2") if t == "f16" else x.astype("u2") for x in xs])
        hi = half(
            t,
            f,
            *[
                (x >> np.uint32(16)).astype("u2").view("f2") if t == "f16" else (x >> np.uint32(16)).astype("u2")
                for x in xs
            ],
        )
        return lo.view("u2").astype("u4") | hi.view("u2").astype("u4") << np.uint32(16)
    v = [tof32(t, x).astype("f8") for x in xs]
    r = {
        "add": lambda: v[0] + v[1],
        "sub": lambda: v[0] - v[1],
        "mul": lambda: v[0] * v[1],
        "fma": lambda: v[0] * v[1] + v[2],
        "min": lambda: np.fmin(v[0], v[1]),
        "max": lambda: np.fmax(v[0], v[1]),
        "neg": lambda: -v[0],
        "abs": lambda: np.abs(v[0]),
        "ex2": lambda: np.exp2(v[0]),
        "tanh": lambda: np.tanh(v[0]),
    }[f]()
    return r.astype("f2") if t == "f16" else _tobf16(r.astype("f4"))


def pack2(t: str, hi: Array, lo: Array) -> Array:
    """Pack two floats into a pair of halves."""
    t = t[:-2]
    return (fromf32(t, hi).view("u2").astype("u4") << np.uint32(16)) | fromf32(t, lo).view("u2").astype("u4")


_INT = {f"{s}{b}": f"{'i' if s == 's' else 'u'}{b // 8}" for s in "su" for b in (8, 16, 32, 64)}
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def sat_cvt(x: Array, dt: str) -> Array:
    """Convert integers, limited to the target's range."""
    i = np.iinfo(dt)
    return np.clip(x.astype("i8"), i.min, min(i.max, 2**63 - 1)).astype(dt)


def cvt(x: Array, s: str, d: str, rnd: str | None, sat: bool) -> Array:
    """Convert where a float is involved."""
    if s in _INT:
        if d in ("f32", "f64"):
            r = x.astype("f4" if d == "f32" else "f8")
        else:
            r = fromf32(d, x.astype("f8").astype("f4")) if d == "bf16" else x.astype("f8").astype("f2")
        return r
    if s in ("f16", "bf16"):
        x = tof32(s, x)
    if rnd in _ROUND:
        x = _ROUND[rnd](x)
    if d in _INT:
        i = np.iinfo(_INT[d])
        y = x.astype("f8")
        lo, hi = float(i.min), float(i.max)
        z = np.isnan(y)
        inside = np.where(z | (y <= lo) | (y >= hi), 0.0, y).astype(_INT[d])
        r = np.where(y >= hi, np.array(i.max, _INT[d]), np.where(y <= lo, np.array(i.min, _INT[d]), inside))
        return np.where(z, np.zeros((1, 1), _INT[d]), r)
    if sat:
        x = np.clip(np.nan_to_num(x, nan=0.0), 0, 1)
    if d == "f64":
        return x.astype("f8")
    if d in ("f32", "tf32"):
        r = x.astype("f4")
        if rnd == "rz" and s == "f64":
            r = np.where(np.abs(r.astype("f8")) > np.abs(x), np.nextafter(r, np.float32(0)), r)
        if d == "tf32":
            u = r.view("u4")
            return (u + np.uint32(0x1000)) & ~np.uint32(0x1FFF)
        return r
    if d == "bf16" and rnd == "rz":
        return (x.astype("f4").view("u4") >> np.uint32(16)).astype("u2")
    return fromf32(d, x.astype("f4") if s != "f64" else x)
