"""The stack, generic addresses and atomics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .lanes import Array, Loaded, Mask
from .memory import LOCAL_BASE, SHARED_BASE, OutOfBounds, Unsupported
from .shared_memory import SharedMemory, _lane

#: what an atomic leaves behind, by the old value and its operands
_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, v: old + v[0],
    "min": lambda old, v: min(old, v[0]),
    "max": lambda old, v: max(old, v[0]),
    "and": lambda old, v: old & v[0],
    "or": lambda old, v: old | v[0],
    "xor": lambda old, v: old ^ v[0],
    "exch": lambda old, v: v[0],
    "cas": lambda old, v: v[1] if old == v[0] else old,
    "inc": lambda old, v: 0 if old >= v[0] else old + 1,
    "dec": lambda old, v: v[0] if old == 0 or old > v[0] else old - 1,
}


class AllMemory(SharedMemory):
    """Every space that a load, store or atomic may mean."""

    def _local(self, base: Array, off: int, dt: str, n: int) -> tuple[Array, Array]:
        addr = base + np.uint64(off & 2**64 - 1)
        self.st.local_accesses += 1
        lane = self.bidx * self.TP + self.tidx
        if int(addr.max()) + np.dtype(dt).itemsize * n > self.code.local_bytes:
            raise OutOfBounds(f"local access at {int(addr.max())} of {self.code.local_bytes}")
        return lane, (addr // np.uint64(np.dtype(dt).itemsize)).astype("i8")

    def ld_local(self, base: Array, off: int, dt: str, n: int, m: Mask, i: int) -> Loaded:
        """Load from a lane's stack."""
        if m is not None:
            base = np.where(m, base, np.uint64(0))
            off_ok = base + np.uint64(off)
            base, off = np.where(m, off_ok, np.uint64(0)), 0
        lane, k = self._local(base, off, dt, n)
        v = self.lmem.view(dt)
        out = [v[lane, k + q] for q in range(n)]
        return out[0] if n == 1 else out

    def st_local(self, base: Array, off: int, dt: str, vals: Sequence[Array], m: Mask, i: int) -> None:
        """Store to a lane's stack."""
        addr = base + np.uint64(off & 2**64 - 1)
        if m is not None:
            addr = np.where(m, addr, np.uint64(0))
        lane, k = self._local(addr, 0, dt, len(vals))
        sh = (self.B, self.TP)
        mm = np.ones(sh, bool) if m is None else np.broadcast_to(m, sh)
        v = self.lmem.view(dt)
        k = np.broadcast_to(k, sh)[mm]
        for q, x in enumerate(vals):
            v[lane[mm], k + q] = np.broadcast_to(x, sh)[mm]

    def _generic(self, base: Array, m: Mask) -> tuple[str, int]:
        top = base >> np.uint64(61)
        t = (
            top
            if m is None
            else top[np.broadcast_to(m, np.broadcast_shapes(m.shape, top.shape))]
            if m.shape == top.shape
            else top
        )
        u = np.unique(t)
        if len(u) != 1:
            raise Unsupported("generic access that mixes address spaces within one instruction")
        return {0: ("global", 0), SHARED_BASE >> 61: ("shared", SHARED_BASE), LOCAL_BASE >> 61: ("local", LOCAL_BASE)}[
            int(u[0])
        ]

    def ld_generic(self, base: Array, off: int, dt: str, n: int, m: Mask, i: int) -> Loaded:
        """Load from the memory of a generic address."""
        sp, w = self._generic(base, m)
        return getattr(self, "ld_" + sp)(base - np.uint64(w), off, dt, n, m, i)

    def st_generic(self, base: Array, off: int, dt: str, vals: Sequence[Array], m: Mask, i: int) -> None:
        """Store where a generic address lies."""
        sp, w = self._generic(base, m)
        getattr(self, "st_" + sp)(base - np.uint64(w), off, dt, vals, m, i)

    def atom(self, sp: str, fn: str, base: Array, off: int, dt: str, vals: Sequence[Array], m: Mask, i: int) -> Array:
        """Run an atomic, one lane after the other in lane order."""
        if sp == "generic":
            sp, w = self._generic(base, m)
            base = base - np.uint64(w)
        addr = base + np.uint64(off & 2**64 - 1)
        self.st.atomics += self.warps(m)
        sh = (self.B, self.TP)
        mm = np.broadcast_to(self.tidx < self.T, sh)
        mm = mm if m is None else mm & m
        sel = np.nonzero(mm)
        flat = np.broadcast_to(addr, sh)[sel]
        vs = [np.broadcast_to(v, sh)[sel] for v in vals]
        isz = np.dtype(dt).itemsize
        out = np.zeros(sh, dt)
        if not flat.size:
            return out
        where = partial(_lane, sel)
        self.aligned(flat, isz, i, where)
        if sp == "shared":
            self.scheck(flat, isz, i, where, True)
            mem = self.sview(dt)
            row, k = sel[0], (flat // np.uint64(isz)).astype("i8")
            index: list[Any] = list(zip(row, k, strict=True))
        else:
            b, o = self.locate(flat, isz, i, where, True)
            if b is None:
                raise Unsupported("atomic over several buffers")
            mem = b.view(dt)
            k = (o // np.uint64(isz)).astype("i8")
            index = list(k)
        f = _ATOMIC[fn]
        for j in range(flat.size):
            g = index[j]
            old = mem[g]
            out[sel[0][j], sel[1][j]] = old
            mem[g] = f(old, [v[j] for v in vs])
        return out
