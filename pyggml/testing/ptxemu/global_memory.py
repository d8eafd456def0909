"""Loads from and stores to global memory: bounds, alignment, initialisation, sectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .lanes import Array, Lanes, Loaded, Mask, Where
from .memory import SEG, Buffer, Misaligned, OutOfBounds, Race, Uninitialised


def _nth(where: Where, chosen: Array, j: int) -> tuple[Any, Any]:
    return where(chosen[j])


class GlobalMemory(Lanes):
    """Global memory as the lanes see it."""

    def sectors(self, addr: Array, m: Mask, kind: str, size: int) -> None:
        """Count one load or store instruction: requests, 32-byte sectors, bytes."""
        st = self.st
        act = self.warps(m)
        nlanes = self.B * self.T if m is None else int(m.sum()) * (self.B * self.TP // m.size)
        sec = addr >> 5
        if addr.shape[1] == 1:
            n = act
        else:
            if m is not None:
                sec = np.where(m, sec, np.uint64(2**64 - 1))
            s = np.sort(sec.reshape(sec.shape[0], -1, 32), axis=2)
            d = (s[..., 1:] != s[..., :-1]).sum() + s.shape[0] * s.shape[1]
            if m is not None:
                d -= (s[..., -1] == np.uint64(2**64 - 1)).sum()
            n = int(d) * (self.B // sec.shape[0])
        setattr(st, f"global_{kind}_requests", getattr(st, f"global_{kind}_requests") + act)
        setattr(st, f"global_{kind}_sectors", getattr(st, f"global_{kind}_sectors") + n)
        setattr(st, f"global_{kind}_bytes", getattr(st, f"global_{kind}_bytes") + nlanes * size)

    def locate(
        self, flat: Array, size: int, i: int, where: Where, write: bool
    ) -> tuple[Any, Array]:  # Any: a Buffer, or None if they lie in several
        """Return the buffer that contains flat addresses, and their offsets; no buffer if they are in several."""
        lo, hi = int(flat.min()), int(flat.max())
        b = self.mem.buffers.get(lo >> SEG)
        if b is None or lo < b.addr or hi + size > b.addr + b.nbytes:
            if b is not None and hi >> SEG != lo >> SEG and (hi >> SEG) in self.mem.buffers:
                return None, None  # lanes point into several buffers
            bad = np.ones(flat.shape, bool) if b is None else (flat < b.addr) | (flat + size > b.addr + b.nbytes)
            j = int(np.argmax(bad))
            a = int(flat[j])
            nb = self.mem.buffers.get(a >> SEG)
            desc = f"offset {a - nb.addr} of '{nb.name}' ({nb.nbytes} bytes)" if nb is not None else "no buffer"
            self.fail(OutOfBounds, i, f"{'write' if write else 'read'} of {size} bytes at {a:#x}: {desc}", where(j))
        if write and b.readonly:
            self.fail(OutOfBounds, i, f"write to read-only '{b.name}'", where(0))
        return b, flat - np.uint64(b.addr)

    def aligned(self, flat: Array, size: int, i: int, where: Where) -> None:
        """Fail if an address is no multiple of the access's size."""
        bad = flat & np.uint64(size - 1)
        if bad.any():
            j = int(np.argmax(bad != 0))
            self.fail(Misaligned, i, f"{size}-byte access at {int(flat[j]):#x}", where(j))

    def ld_global(self, base: Array, off: int, dt: str, n: int, m: Mask, i: int) -> Loaded:
        """Load ``n`` values a lane from global memory."""
        addr = base + np.uint64(off) if off >= 0 else base - np.uint64(-off)
        fm = self.fit(m, addr.shape)
        if fm is not None and fm.shape != addr.shape:
            sh = np.broadcast_shapes(fm.shape, addr.shape)
            addr, fm = np.broadcast_to(addr, sh), np.broadcast_to(fm, sh)
        isz = np.dtype(dt).itemsize
        size = isz * n
        if self.stats:
            self.sectors(addr, m, "load", size)
        return self._load(addr, fm, dt, n, isz, i)

    def _load(self, addr: Array, fm: Mask, dt: str, n: int, isz: int, i: int) -> Loaded:
        size = isz * n
        if fm is None and self.T != self.TP and addr.shape[1] != 1:
            fm = np.broadcast_to(self.tidx < self.T, addr.shape)
        if fm is None:
            flat = addr.reshape(-1)
            sel = None
        else:
            sel = np.nonzero(fm)
            flat = addr[sel]
            if not flat.size:
                z = np.zeros((1, 1), dt)
                return z if n == 1 else [z] * n
        where = (lambda j: divmod(j, addr.shape[1])) if sel is None else (lambda j: (sel[0][j], sel[1][j]))
        self.aligned(flat, size, i, where)
        b, o = self.locate(flat, size, i, where, False)
        if b is None:
            outs = [np.zeros(flat.shape, dt) for _ in range(n)]
            seg = flat >> np.uint64(SEG)
            for s in np.unique(seg):
                w = np.nonzero(seg == s)[0]
                bb, oo = self.locate(flat[w], size, i, partial(_nth, where, w), False)
                for q, v in enumerate(self._fetch(bb, oo, dt, n, isz, i, where)):
                    outs[q][w] = v
        else:
            outs = self._fetch(b, o, dt, n, isz, i, where)
        if sel is None:
            outs = [v.reshape(addr.shape) for v in outs]
        else:
            full = []
            for v in outs:
                z = np.zeros(addr.shape, dt)
                z[sel] = v
                full.append(z)
            outs = full
        return outs[0] if n == 1 else outs

    def _fetch(self, b: Buffer, o: Array, dt: str, n: int, isz: int, i: int, where: Where) -> list[Array]:
        if b.init is not None:
            ok = b.init[o]
            if not ok.all():
                self.fail(Uninitialised, i, f"read of unwritten bytes of '{b.name}'", where(int(np.argmax(~ok))))
        if self.stats:
            t = self.st.touched.get(b.addr)
            if t is None:
                t = self.st.touched[b.addr] = np.zeros(len(b.raw) // 32 + 1, bool)
            t[o >> np.uint64(5)] = True
        v = b.view(dt)
        k = o // np.uint64(isz)
        return [v[k + np.uint64(q)] if q else v[k] for q in range(n)]

    def spread(self, addr: Array, vals: Sequence[Array], m: Mask) -> tuple[Array, list[Array], Any, Any]:
        """Return address and values at one common shape, as flat arrays of the active lanes."""
        sh = np.broadcast_shapes(addr.shape, *[v.shape for v in vals], *([] if m is None else [m.shape]))
        if m is None and (self.T != self.TP) and sh[1] != 1:
            m = self.tidx < self.T
        a = np.broadcast_to(addr, sh)
        vs = [np.broadcast_to(v, sh) for v in vals]
        if m is None:
            return a.reshape(-1), [v.reshape(-1) for v in vs], None, sh
        sel = np.nonzero(np.broadcast_to(m, sh))
        return a[sel], [v[sel] for v in vs], sel, sh

    def st_global(self, base: Array, off: int, dt: str, vals: Sequence[Array], m: Mask, i: int) -> None:
        """Store values to global memory."""
        addr = base + np.uint64(off) if off >= 0 else base - np.uint64(-off)
        isz = np.dtype(dt).itemsize
        size = isz * len(vals)
        if self.stats:
            a2 = addr
            if m is not None and m.shape != addr.shape:
                a2 = np.broadcast_to(addr, np.broadcast_shapes(m.shape, addr.shape))
            self.sectors(a2, m, "store", size)
        flat, vs, sel, sh = self.spread(addr, vals, m)
        if not flat.size:
            return
        where = (lambda j: divmod(j, sh[1])) if sel is None else (lambda j: (sel[0][j], sel[1][j]))
        self.aligned(flat, size, i, where)
        b, o = self.locate(flat, size, i, where, True)
        groups: list[Array]
        if b is None:
            seg = flat >> np.uint64(SEG)
            groups = [np.nonzero(seg == s)[0] for s in np.unique(seg)]
        else:
            groups = [None]
        for w in groups:
            if w is not None:
                b, o = self.locate(flat[w], size, i, partial(_nth, where, w), True)
            k = o // np.uint64(isz)
            for q, v in enumerate(vs):
                view = b.view(dt)
                x = v if w is None else v[w]
                view[k + np.uint64(q)] = x
                if self.race:
                    back = view[k + np.uint64(q)]
                    bad = back.view(f"u{isz}") != np.ascontiguousarray(x).view(f"u{isz}")
                    if bad.any():
                        self.fail(
                            Race,
                            i,
                            f"lanes store different values to one address of '{b.name}'",
                            where(int(np.argmax(bad))),
                        )
                if b.init is not None:
                    for z in range(isz):
                        b.init[o + np.uint64(q * isz + z)] = True
