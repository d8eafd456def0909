"""What the lanes of a warp do together: shuffles, votes, reductions, matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .lanes import Array, Mask
from .memory import PtxError
from .other_memory import AllMemory


class Warps(AllMemory):
    """Instructions that cross lanes."""

    def lanes(self, x: Array) -> Array:
        """Return a value with an axis for the lanes of each warp."""
        return np.broadcast_to(x, (self.B, self.TP)).reshape(self.B, self.W, 32)

    def active(self, m: Mask) -> Array:
        """Return which lanes are active, warp by warp."""
        a = self.tidx < self.T
        return self.lanes(a if m is None else a & m)

    def shfl(self, mode: str, a: Array, b: Array, c: Array, mask: Mask, m: Mask, i: int) -> tuple[Array, Array]:
        """Exchange values between the lanes of each warp."""
        act = self.active(m)
        lane = np.arange(32)[None, None, :]
        bv, cv = self.lanes(b).astype("i8") & 31, self.lanes(c).astype("i8")
        seg, cl = cv >> 8 & 31, cv & 31
        mx, mn = (lane & seg) | (cl & ~seg), lane & seg
        j = {"up": lane - bv, "down": lane + bv, "bfly": lane ^ bv, "idx": mn | (bv & ~seg)}[mode]
        p = j >= mx if mode == "up" else j <= mx
        j = np.where(p, j, lane)
        if self.check:
            ok = np.take_along_axis(act, j, 2) | ~act
            if not ok.all():
                w, q, ln = (x[0] for x in np.nonzero(~ok))
                self.fail(PtxError, i, "shfl reads a lane that is not active", (w, q * 32 + ln))
            if mask is not None:
                mk = self.lanes(mask)
                bad = act & ((mk >> lane.astype("u4") & np.uint32(1)) == 0)
                if bad.any():
                    w, q, ln = (x[0] for x in np.nonzero(bad))
                    self.fail(PtxError, i, "lane executes shfl.sync outside its member mask", (w, q * 32 + ln))
        v = np.take_along_axis(self.lanes(a), j, 2).reshape(self.B, self.TP)
        return v, np.broadcast_to(p, act.shape).reshape(self.B, self.TP)

    def vote(self, mode: str, p: Array, m: Mask, i: int) -> Array:
        """Vote over the active lanes of each warp."""
        act = self.active(m)
        p = self.lanes(p)
        if mode == "ballot":
            r = ((p & act).astype("u4") << np.arange(32, dtype="u4")).sum(2, dtype="u4")
        elif mode == "any":
            r = (p & act).any(2)
        elif mode == "all":
            r = (p | ~act).all(2)
        else:
            r = (p | ~act).all(2) | ~(p & act).any(2)
        return np.repeat(r, 32, axis=1)

    def redux(self, fn: str, a: Array, m: Mask, i: int) -> Array:
        """Reduce over the active lanes of each warp."""
        act, v = self.active(m), self.lanes(a)
        ii = np.iinfo(v.dtype)
        neutral = {"add": 0, "min": ii.max, "max": ii.min, "and": -1 if ii.min else ii.max, "or": 0, "xor": 0}[fn]
        v = np.where(act, v, np.array(neutral, v.dtype))
        f = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[fn]
        return np.repeat(f.reduce(v, axis=2, dtype=v.dtype), 32, axis=1)

    def _fragment(self, r: Array, t: str) -> Array:
        """Return a register's values as float32 or int32, (blocks, warps, lanes, values)."""
        x = np.ascontiguousarray(self.lanes(r))
        if t == "f16":
            v = x.view("f2").astype("f4")
        elif t == "bf16":
            v = (x.view("u2").astype("u4") << np.uint32(16)).view("f4")
        elif t == "tf32":
            v = (x & ~np.uint32(0x1FFF)).view("f4")
        else:
            v = x.view("i1" if t == "s8" else "u1").astype("i4")
        return v.reshape(self.B, self.W, 32, -1)

    def mma(
        self, shape: str, at: str, bt: str, ct: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], m: Mask
    ) -> list[Array]:
        """Multiply 16xK by Kx8 matrices in the fragments of the PTX ISA; sums in float32 (any order on hardware) or int32."""
        K = int(shape.split("k")[1])
        el = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}[at]
        per = 4 // el  # values in one register
        acc = "f4" if ct == "f4" else "i4"
        MA, MB = np.zeros((self.B, self.W, 16, K), acc), np.zeros((self.B, self.W, K, 8), acc)
        g, t = np.arange(32) // 4, np.arange(32) % 4
        for r, x in enumerate(a):
            v = self._fragment(x, at)
            for e in range(per):
                MA[:, :, g + 8 * (r % 2), t * per + e + (r // 2) * 4 * per] = v[..., e]
        for r, x in enumerate(b):
            v = self._fragment(x, bt)
            for e in range(per):
                MB[:, :, t * per + e + r * 4 * per, g] = v[..., e]
        D = MA @ MB
        out = []
        for r in range(4):
            d = D[:, :, g + 8 * (r // 2), t * 2 + r % 2].reshape(self.B, self.TP)
            out.append((c[r] + d).astype(ct))
        return out

    def ldmatrix(self, base: Array, off: int, num: int, trans: bool, m: Mask, i: int) -> list[Array]:
        """Load 8x8 matrices of 16-bit values: lanes 8q..8q+7 give matrix q's rows, lane l gets two of row l // 4."""
        addr = np.broadcast_to(base + np.uint64(off & 2**64 - 1), (self.B, self.TP))
        rows = addr.reshape(self.B, self.W, 32)
        g, t = np.arange(32) // 4, np.arange(32) % 4
        out = []
        for q in range(num):
            if trans:  # element (t*2+e, g)
                a = [(rows[..., 8 * q + 2 * t + e] + (2 * g).astype("u8")).reshape(self.B, self.TP) for e in (0, 1)]
                lo, hi = (self.ld_shared(x, 0, "u2", 1, m, i).astype("u4") for x in a)
                out.append(lo | hi << np.uint32(16))
            else:
                a = (rows[..., 8 * q + g] + (4 * t).astype("u8")).reshape(self.B, self.TP)
                out.append(self.ld_shared(a, 0, "u4", 1, m, i))
        return out
