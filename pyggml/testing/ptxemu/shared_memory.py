"""Shared memory: bounds, initialisation, bank conflicts, races between warps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .global_memory import GlobalMemory
from .lanes import Array, Loaded, Mask, Where
from .memory import OutOfBounds, Race, Uninitialised


def _lane(sel: tuple[Array, ...], j: int) -> tuple[Any, Any]:
    return sel[0][j], sel[1][j]


class SharedMemory(GlobalMemory):
    """Shared memory as the lanes see it."""

    def sview(self, dt: str) -> Array:
        """Return shared memory seen as another type, one row a block."""
        v = self.sviews.get(dt)
        if v is None:
            v = self.sviews[dt] = self.smem.view(dt)
        return v

    def wavefronts(self, addr: Array, m: Mask, kind: str, size: int) -> None:
        """Count one shared access: requests, and the passes that its bank conflicts make of it."""
        st, act = self.st, self.warps(m)
        st_req = f"shared_{kind}_requests"
        setattr(st, st_req, getattr(st, st_req) + act)
        lanes = 32 if size <= 4 else 32 * 4 // size
        if addr.shape[1] == 1:
            n = act
        else:
            if m is not None:
                sh = np.broadcast_shapes(addr.shape, m.shape)
                addr = np.where(m, np.broadcast_to(addr, sh), np.uint64(2**64 - 1))
            w = (addr >> np.uint64(2)).reshape(addr.shape[0], -1, lanes)
            per = max(1, size // 4)
            if per > 1:
                w = (w[..., None] + np.arange(per, dtype="u8")).reshape(w.shape[0], w.shape[1], -1)
            g = w.shape[0] * w.shape[1]
            w = np.sort(w.reshape(g, -1), axis=1)
            new = np.ones(w.shape, bool)
            new[:, 1:] = w[:, 1:] != w[:, :-1]
            new &= w < np.uint64(1 << 61)
            key = np.arange(g)[:, None] * 32 + (w & np.uint64(31)).astype("i8")
            cnt = np.bincount(key[new], minlength=g * 32).reshape(g, 32).max(1)
            n = int(cnt.sum()) * (self.B // addr.shape[0])
        f = f"shared_{kind}_wavefronts"
        setattr(st, f, getattr(st, f) + n)

    def scheck(self, flat: Array, size: int, i: int, where: Where, write: bool) -> None:
        """Fail if a shared access is out of bounds or misaligned."""
        bad = flat + np.uint64(size) > np.uint64(self.S)
        if bad.any():
            j = int(np.argmax(bad))
            self.fail(
                OutOfBounds,
                i,
                f"shared {'write' if write else 'read'} of {size} bytes at offset {int(flat[j])} of {self.S}",
                where(j),
            )
        self.aligned(flat, size, i, where)

    def ld_shared(self, base: Array, off: int, dt: str, n: int, m: Mask, i: int) -> Loaded:
        """Load ``n`` values a lane from shared memory."""
        addr = base + np.uint64(off & 2**64 - 1)
        isz = np.dtype(dt).itemsize
        size = isz * n
        if not self.S:
            self.fail(OutOfBounds, i, "the launch has no shared memory")
        if self.stats:
            self.wavefronts(addr, m, "load", size)
        fast = m is None and self.T == self.TP and not self.race
        if fast:
            flat = addr.reshape(-1)
            self.scheck(flat, size, i, lambda j: divmod(j, addr.shape[1]), False)
            k = (addr // np.uint64(isz)).astype("i8")
            if addr.shape[0] == 1:
                out = [self.sview(dt)[:, k[0] + q] for q in range(n)]
                if self.check:
                    ok = self.sinit[:, flat.astype("i8")]
                    if not ok.all():
                        r, c = np.nonzero(~ok)
                        self.fail(
                            Uninitialised,
                            i,
                            f"read of unwritten shared memory at offset {int(flat[c[0]])}",
                            (r[0], c[0]),
                        )
                return out[0] if n == 1 else out
        sh = np.broadcast_shapes(addr.shape, (self.B, 1), *([m.shape] if m is not None else []))
        if self.race or (self.T != self.TP and sh[1] != 1):
            sh = (self.B, self.TP)
        a = np.broadcast_to(addr, sh)
        mm = np.broadcast_to(self.tidx < self.T, sh) if sh[1] != 1 else np.ones(sh, bool)
        if m is not None:
            mm = mm & m
        sel = np.nonzero(mm)
        flat = a[sel]
        if not flat.size:
            z = np.zeros((1, 1), dt)
            return z if n == 1 else [z] * n
        where = partial(_lane, sel)
        self.scheck(flat, size, i, where, False)
        if self.check:
            ok = self.sinit[sel[0], flat]
            if not ok.all():
                j = int(np.argmax(~ok))
                self.fail(Uninitialised, i, f"read of unwritten shared memory at offset {int(flat[j])}", where(j))
        if self.race:
            for q in range(max(1, size // 4)):
                w, wp, r = (flat >> np.uint64(2)) + np.uint64(q), (sel[1] // 32).astype("i2"), sel[0]
                bad = (self.wep[r, w] == self.epoch) & (self.wwp[r, w] != wp)
                if bad.any():
                    self.fail(
                        Race,
                        i,
                        "shared read of a word another warp wrote since the last barrier",
                        where(int(np.argmax(bad))),
                    )
                multi = (self.rep[r, w] == self.epoch) & (self.rwp[r, w] != wp)
                self.rep[r, w] = self.epoch
                self.rwp[r, w] = wp
                multi |= self.rwp[r, w] != wp
                self.rwp[r[multi], w[multi]] = -2
        v = self.sview(dt)
        k = flat // np.uint64(isz)
        outs = []
        for q in range(n):
            z = np.zeros(sh, dt)
            z[sel] = v[sel[0], k + np.uint64(q)]
            outs.append(z)
        return outs[0] if n == 1 else outs

    def st_shared(self, base: Array, off: int, dt: str, vals: Sequence[Array], m: Mask, i: int) -> None:
        """Store values to shared memory."""
        addr = base + np.uint64(off & 2**64 - 1)
        isz = np.dtype(dt).itemsize
        size = isz * len(vals)
        if not self.S:
            self.fail(OutOfBounds, i, "the launch has no shared memory")
        if self.stats:
            self.wavefronts(addr, m, "store", size)
        sh = np.broadcast_shapes(
            addr.shape, (self.B, 1), *[v.shape for v in vals], *([m.shape] if m is not None else [])
        )
        if self.race or (self.T != self.TP and sh[1] != 1):
            sh = (self.B, self.TP)
        mm = np.broadcast_to(self.tidx < self.T, sh) if sh[1] != 1 else np.ones(sh, bool)
        if m is not None:
            mm = mm & m
        sel = np.nonzero(mm)
        flat = np.broadcast_to(addr, sh)[sel]
        if not flat.size:
            return
        where = partial(_lane, sel)
        self.scheck(flat, size, i, where, True)
        k, r, v = flat // np.uint64(isz), sel[0], self.sview(dt)
        for q, x in enumerate(vals):
            x = np.broadcast_to(x, sh)[sel]
            v[r, k + np.uint64(q)] = x
            if self.race:
                bad = v[r, k + np.uint64(q)].view(f"u{isz}") != np.ascontiguousarray(x).view(f"u{isz}")
                if bad.any():
                    self.fail(Race, i, "lanes store different values to one shared word", where(int(np.argmax(bad))))
        if self.race:
            for q in range(max(1, size // 4)):
                w, wp = (flat >> np.uint64(2)) + np.uint64(q), (sel[1] // 32).astype("i2")
                bad = ((self.wep[r, w] == self.epoch) & (self.wwp[r, w] != wp)) | (
                    (self.rep[r, w] == self.epoch) & (self.rwp[r, w] != wp)
                )
                if bad.any():
                    self.fail(
                        Race,
                        i,
                        "shared write to a word another warp used since the last barrier",
                        where(int(np.argmax(bad))),
                    )
                self.wep[r, w] = self.epoch
                self.wwp[r, w] = wp
                bad = self.wwp[r, w] != wp
                if bad.any():
                    self.fail(Race, i, "two warps write one shared word", where(int(np.argmax(bad))))
        if self.check:
            o = flat.astype("i8")
            for z in range(size):
                self.sinit[r, o + z] = True
