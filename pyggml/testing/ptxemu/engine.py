"""Run a kernel: chunks of whole blocks, all their threads at once, lowest program counter first.

A lane set is (basic block, mask). The lowest basic block runs first, which lets the paths of a branch meet again in
NVVM's layout. bar.sync ends a basic block; a barrier opens when no lane of the chunk can run any more.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .codegen import Gen
from .emitter import CANON, NP, reg_names
from .lanes import Array, Mask
from .memory import BarrierError, Buffer, Memory, PtxError, Unsupported
from .parser import Instr, Kernel, Module, Param, parse
from .stats import Stats
from .warp import Warps

__all__ = ["CompiledKernel", "KernelRunner", "Program"]

#: A kernel argument: a number, a buffer or address for a pointer, bytes for a structure.
Arg = int | float | bytes | Buffer
Dim = int | Sequence[int]


@lru_cache(maxsize=256)
def _parse(ptx: str) -> Module:
    return parse(ptx)


@lru_cache(maxsize=256)
def _uses_variables(ptx: str, name: str) -> bool:
    """Return whether a kernel names a variable in global or constant memory, whose address depends on the memory."""
    module = _parse(ptx)
    names = {v.name for v in module.vars if v.space in ("global", "const")}
    body = module.kernels[name].body
    return any(not names.isdisjoint(reg_names(arg)) for i in body if isinstance(i, Instr) for arg in i.args)


@lru_cache(maxsize=256)
def _compile(ptx: str, name: str) -> CompiledKernel:
    """Compile a kernel that uses no variables in global memory, so that all memories can share it."""
    module = _parse(ptx)
    return CompiledKernel(module, module.kernels[name], {})


class Program:
    """A PTX module loaded against a memory.

    Examples
    --------
    >>> mem = Memory()
    >>> program = Program(ptx, mem)  # doctest: +SKIP
    >>> stats = program.kernel().launch((8, 1), 128, [mem.alloc(4096), 17])  # doctest: +SKIP
    """

    def __init__(self, ptx: str, memory: Memory | None = None) -> None:
        self.ptx = ptx
        self.module = _parse(ptx)
        self.mem = Memory() if memory is None else memory
        self.symbols: dict[str, int] = {}
        for v in self.module.vars:
            if v.space in ("global", "const"):
                b = self.mem.alloc(max(v.size, 1), v.name, readonly=v.space == "const")
                self.mem.write(b, np.zeros(max(v.size, 1), "u1"))
                if v.init:
                    self.mem.write(b, np.frombuffer(v.init, "u1"))
                self.symbols[v.name] = b.addr
        self.kernels: dict[str, KernelRunner] = {}

    def kernel(self, name: str | None = None) -> KernelRunner:
        """Return a kernel by name; the only one, without."""
        if name is None:
            (name,) = self.module.kernels
        if name not in self.kernels:
            if _uses_variables(self.ptx, name):
                code = CompiledKernel(self.module, self.module.kernels[name], self.symbols)
            else:
                code = _compile(self.ptx, name)
            self.kernels[name] = KernelRunner(code, self.mem)
        return self.kernels[name]


class CompiledKernel:
    """A kernel as Python functions, with the layout of its parameters, shared and local memory."""

    def __init__(self, module: Module, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.module, self.k = module, kernel
        syms = dict(symbols)
        soff = loff = 0
        dyn = []  # extern shared arrays: all start where the static ones end
        for v in module.vars + kernel.vars:
            if v.space == "shared":
                soff = -(-soff // v.align) * v.align
                if v.size == 0:
                    dyn.append(v)
                    continue
                syms[v.name] = soff
                soff += v.size
            elif v.space == "local":
                loff = -(-loff // v.align) * v.align
                syms[v.name] = loff
                loff += v.size
        self.static_shared = soff
        if dyn:
            al = max([16] + [v.align for v in dyn])
            self.static_shared = -(-soff // al) * al
            syms.update({v.name: self.static_shared for v in dyn})
        self.local_bytes = -(-loff // 16) * 16
        self.offsets: dict[str, tuple[int, Param]] = {}
        off = 0
        for p in kernel.params:
            off = -(-off // p.align) * p.align
            self.offsets[p.name] = (off, p)
            off += p.size
        self.param_bytes = off
        self.gen = Gen(kernel, syms, self._param_expr)
        self.bbs = self.gen.build()
        self.meta = self.gen.meta
        self.nregs = len(self.gen.slot)

    def _param_expr(self, name: str, extra: int, dt: str) -> str:
        return f"E.param({self.offsets[name][0] + extra}, {dt!r})"

    def pack(self, args: Sequence[Arg]) -> Array:
        """Return the arguments laid out as the kernel's parameter memory."""
        if len(args) != len(self.k.params):
            raise TypeError(f"{len(args)} arguments for {len(self.k.params)} parameters")
        buf = np.zeros(self.param_bytes + 16, np.uint8)
        for a, p in zip(args, self.k.params, strict=True):
            off = self.offsets[p.name][0]
            if isinstance(a, bytes):
                raw = a
            elif isinstance(a, Buffer):
                raw = struct.pack("<Q", a.addr)
            else:
                dt = np.dtype(NP.get(p.type, "u8"))
                if dt.kind == "f" or isinstance(a, (float, np.floating)):
                    raw = np.array(a, {2: "f2", 4: "f4", 8: "f8"}[dt.itemsize]).tobytes()
                else:
                    raw = (int(a) & (1 << 8 * dt.itemsize) - 1).to_bytes(dt.itemsize, "little")
            buf[off : off + len(raw)] = np.frombuffer(raw, "u1")
        return buf


def _dim3(d: Dim) -> tuple[int, int, int]:
    if isinstance(d, int):
        return d, 1, 1
    x, y, z = [*(int(n) for n in d), 1, 1][:3]
    return x, y, z


class KernelRunner:
    """A kernel ready to be launched on a memory."""

    def __init__(self, code: CompiledKernel, memory: Memory) -> None:
        self.code, self.mem = code, memory

    def launch(
        self,
        grid: Dim,
        block: Dim,
        args: Sequence[Arg],
        shared: int = 0,
        *,
        stats: bool = True,
        check: bool = True,
        racecheck: bool = False,
        lanes: int = 1 << 14,
        max_steps: int = 50_000_000,
    ) -> Stats:
        """Run a grid of blocks to its end.

        Parameters
        ----------
        grid, block : int or up to three ints
        shared : int
            Dynamic shared memory in bytes.
        stats, check, racecheck : bool
            Whether to count, to check shared memory and barriers, and to look for races.
        lanes : int
            Threads that run together; more is faster, and takes more memory.

        Raises
        ------
        PtxError
            The kernel made an error, such as an access out of bounds.
        """
        grid, block = _dim3(grid), _dim3(block)
        n_threads = block[0] * block[1] * block[2]
        attrs = self.code.k.attrs
        limit = min([1024] + [int(np.prod([int(x) for x in attrs[a].split(",")])) for a in attrs if "ntid" in a])
        if n_threads > limit:
            raise PtxError(f"{n_threads} threads in a block; {limit} are possible")
        n_blocks = grid[0] * grid[1] * grid[2]
        st = Stats(blocks=n_blocks, threads=n_blocks * n_threads)
        params = self.code.pack(args)
        t0 = time.perf_counter()
        per = max(1, lanes // (32 * -(-n_threads // 32)))
        with np.errstate(all="ignore"):
            for b0 in range(0, n_blocks, per):
                Chunk(
                    self.code, self.mem, params, grid, block, b0, min(per, n_blocks - b0), shared, st,
                    stats=stats, check=check, racecheck=racecheck,
                ).run(max_steps)  # fmt: skip
        st.global_load_unique = sum(int(t.sum()) for t in st.touched.values())
        st.touched = {}
        st.seconds = time.perf_counter() - t0
        return st


class Chunk(Warps):
    """A chunk of blocks, running."""

    def full(self, mask: Array) -> Mask:
        """Return None for a mask of all lanes."""
        if mask is None or (mask.size == 1 and mask[0, 0]):
            return None
        if self.T == self.TP and mask.all():
            return None
        return mask

    def merge(self, pend: dict[int, Mask], pc: int, m: Mask) -> None:
        """Let lanes wait at a program counter, with those that already do."""
        if pc in pend:
            o = pend[pc]
            pend[pc] = None if o is None or m is None else self.full(o | m)
        else:
            pend[pc] = m

    def run(self, max_steps: int) -> None:
        """Run the blocks to their end."""
        code, st, bbs = self.code, self.st, self.code.bbs
        labels, n = code.gen.labels, len(bbs)
        regs: list[Array] = [np.zeros((1, 1), "u8")] * code.nregs
        for name, s in code.gen.slot.items():
            regs[s] = np.zeros((1, 1), CANON[code.k.regs[name]])
        start = None if self.T == self.TP else np.broadcast_to(self.tidx < self.T, (1, self.TP))
        pend: dict[int, Mask] = {0: start}
        waits: dict[int, Mask] = {}
        steps = 0
        while True:
            if not pend:
                if not waits:
                    break
                self.release(waits)
                pend, waits = waits, {}
                continue
            pc = min(pend)
            m = pend.pop(pc)
            if pc >= n:
                continue
            bb = bbs[pc]
            steps += 1
            if steps > max_steps:
                raise PtxError("step limit reached: an endless loop?")
            p = bb.fn(regs, m, self)
            if self.stats:
                w = self.warps(m)
                st.warp_instructions += w * bb.n
                st.thread_instructions += bb.n * (
                    self.B * self.T if m is None else int(m.sum()) * (self.B * self.TP // m.size)
                )
                by = st.by_opcode
                for k, c in bb.kinds.items():
                    by[k] += c * w
            t = bb.term
            if t is None:
                self.merge(pend, pc + 1, m)
                continue
            if p is None:
                yes, any_no = m, False
                no: Mask = None
            else:
                if m is None:
                    yes, no = p, ~p
                else:
                    yes, no = m & p, m & ~p
                any_no = bool(no.any())
                if not any_no:
                    yes = m
                elif not yes.any():
                    self.merge(pend, pc + 1, m)
                    continue
                else:
                    yes, no = self.full(yes), self.full(no)
            if any_no:
                self.merge(pend, pc + 1, no)
            k = t.op[0]
            if k == "bra":
                self.merge(pend, labels[t.args[0]], yes)
            elif k in ("bar", "barrier"):
                if t.op[1] == "warp" or "warp" in t.op:
                    self.merge(pend, pc + 1, yes)
                else:
                    if (t.args and t.args[0] != "0") or len(t.args) > 1:
                        raise Unsupported(f"line {t.line}: {t.text}")
                    self.merge(waits, pc + 1, yes)
            elif k == "trap":
                raise PtxError(f"trap at PTX line {t.line}")
            elif k == "brx":
                raise Unsupported(f"line {t.line}: {t.text}")

    def release(self, waits: dict[int, Mask]) -> None:
        """Open a barrier, if every thread of a block waits at the same one."""
        if len(waits) > 1 and self.check:
            seen = np.zeros((self.B, 1), int)
            for m in waits.values():
                seen += (
                    np.ones((self.B, 1), int)
                    if m is None
                    else np.broadcast_to(m, (self.B, m.shape[1])).any(1, keepdims=True)
                )
            if (seen > 1).any():
                lines = [t.line for pc in waits if (t := self.code.bbs[pc - 1].term) is not None]
                raise BarrierError(
                    f"threads of block {self.b0 + int(np.argmax(seen > 1))} wait at different barriers "
                    f"(PTX lines {lines})"
                )
        for m in waits.values():
            self.st.barriers += self.B if m is None else int(np.broadcast_to(m, (self.B, m.shape[1])).any(1).sum())
        self.epoch += 1
