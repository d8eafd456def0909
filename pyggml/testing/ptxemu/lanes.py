"""What all instructions of a running kernel need: who the lanes are, and how an error names one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .memory import Memory, PtxError, Unsupported
from .stats import Stats

if TYPE_CHECKING:
    from .engine import CompiledKernel

# numpy arrays, (1 or blocks, 1 or threads); the PTX decides their types, so a type checker cannot
Array = Any
# which lanes are active: an array of bool, or None for all
Mask = Any
#: Finds the block and thread behind the j-th of the flattened lanes.
Where = Callable[[int], tuple[Any, Any]]
# one array, or one for each element of a vector: the generated code knows which
Loaded = Any


class Lanes:
    """The lanes of a chunk of blocks: special registers, parameters, errors.

    Attributes
    ----------
    B, T, W, TP : int
        Blocks of the chunk, threads and warps of a block, threads padded to whole warps.
    b0 : int
        Linear index of the first block.
    S : int
        Bytes of shared memory of a block.
    """

    def __init__(
        self,
        code: CompiledKernel,
        mem: Memory,
        params: Array,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        b0: int,
        n_blocks: int,
        dynamic_shared: int,
        st: Stats,
        *,
        stats: bool,
        check: bool,
        racecheck: bool,
    ) -> None:
        self.code, self.mem, self.params, self.st = code, mem, params, st
        self.grid, self.block, self.b0, self.B = grid, block, b0, n_blocks
        self.T = block[0] * block[1] * block[2]
        self.W = -(-self.T // 32)
        self.TP = 32 * self.W
        self.stats, self.check, self.race = stats, check, racecheck
        self.bidx = np.arange(n_blocks)[:, None]
        self.tidx = np.arange(self.TP)[None, :]
        self.S = code.static_shared + int(dynamic_shared)
        n = -(-self.S // 16) * 16 + 16
        self.smem: Array = np.full((n_blocks, n), 0xFF, np.uint8)
        self.sinit: Array = np.zeros((n_blocks, n), bool)
        self.lmem: Array = np.full((n_blocks * self.TP, code.local_bytes), 0xFF, np.uint8)
        self.sviews: dict[str, Array] = {}
        self.epoch = 1  #: barriers passed; the race check compares it
        if racecheck:
            s = (n_blocks, n // 4)
            self.wep, self.rep = np.zeros(s, "i4"), np.zeros(s, "i4")
            self.wwp, self.rwp = np.zeros(s, "i2"), np.zeros(s, "i2")
        self.pcache: dict[tuple[int, str], Array] = {}
        self.scache: dict[str, Array] = {}

    def param(self, off: int, dt: str) -> Array:
        """Return a kernel parameter."""
        v = self.pcache.get((off, dt))
        if v is None:
            n = np.dtype(dt).itemsize
            v = self.pcache[off, dt] = self.params[off : off + n].copy().view(dt).reshape(1, 1)
        return v

    def sreg(self, name: str) -> Array:
        """Return a special register."""
        v = self.scache.get(name)
        if v is None:
            base, _, c = name[1:].partition(".")
            i = "xyz".find(c) if c else 0
            bx, by, _bz = self.block
            lin = self.b0 + self.bidx
            if base == "tid":
                v = (self.tidx % bx, self.tidx // bx % by, self.tidx // (bx * by))[i]
            elif base == "ctaid":
                g = self.grid
                v = (lin % g[0], lin // g[0] % g[1], lin // (g[0] * g[1]))[i]
            elif base == "ntid":
                v = np.array([[self.block[i]]])
            elif base == "nctaid":
                v = np.array([[self.grid[i]]])
            elif base == "laneid":
                v = self.tidx % 32
            elif base == "warpid":
                v = self.tidx // 32
            elif base == "nwarpid":
                v = np.array([[self.W]])
            elif base.startswith("lanemask_"):
                ln = (self.tidx % 32).astype("u8")
                lt = (np.uint64(1) << ln) - np.uint64(1)
                eq = np.uint64(1) << ln
                v = {"lt": lt, "le": lt | eq, "eq": eq, "gt": ~(lt | eq), "ge": ~lt}[base[9:]] & np.uint64(0xFFFFFFFF)
            elif base in ("clock", "clock_hi", "clock64", "globaltimer", "smid"):
                v = np.array([[0]])
            else:
                raise Unsupported(f"special register {name}")
            v = self.scache[name] = v.astype("u4")
        return v

    def called(self, name: str, m: Mask) -> None:
        """Fail if a call is reached."""
        if m is None or m.any():
            raise PtxError(f"the kernel called {name} (calls are not emulated; printf and assert end here)")

    def fail(self, cls: type[PtxError], i: int, why: str, where: tuple[Any, Any] | None = None) -> NoReturn:
        """Raise an error that names the lane and the PTX line."""
        it = self.code.meta[i] if i >= 0 else None
        msg = why
        if where is not None:
            b, t = where
            lin = self.b0 + int(b)
            g, k = self.grid, self.block
            msg += (
                f"; block ({lin % g[0]},{lin // g[0] % g[1]},{lin // (g[0] * g[1])})"
                f" thread ({int(t) % k[0]},{int(t) // k[0] % k[1]},{int(t) // (k[0] * k[1])})"
            )
        if it is not None:
            msg += f"; PTX line {it.line}: {it.text}"
            if it.loc:
                msg += f" [{self.code.module.files.get(it.loc[0], '?')}:{it.loc[1]}]"
        raise cls(msg)

    def fit(self, mask: Mask, shape: tuple[int, ...]) -> Mask:
        """Return the mask in an address's shape: whether any lane behind an element is active."""
        if mask is None:
            return None
        for ax in (0, 1):
            if shape[ax] == 1 and mask.shape[ax] != 1:
                mask = mask.any(axis=ax, keepdims=True)
        return mask

    def warps(self, m: Mask) -> int:
        """Return the number of warps with an active lane."""
        if m is None:
            return self.B * self.W
        x = m if m.shape[1] == 1 else m.reshape(m.shape[0], -1, 32).any(2)
        n: int = int(x.sum()) * (self.B // x.shape[0]) * (self.W // x.shape[1])
        return n
