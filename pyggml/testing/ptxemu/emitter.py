"""The parts of a translated PTX kernel: basic blocks, registers, constants, addresses, and generated lines.

Every register holds a 2-D array of shape (1|B, 1|T): B blocks of the chunk by T threads (padded to whole warps).
Values that are the same for all threads, for the threads of a block, or for all blocks stay small and are broadcast.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import Unsupported
from .parser import Instr, Kernel, Label

#: numpy type of a value that an instruction reads or makes, by PTX type
NP = {
    "b8": "u1",
    "u8": "u1",
    "s8": "i1",
    "b16": "u2",
    "u16": "u2",
    "s16": "i2",
    "f16": "f2",
    "bf16": "u2",
    "b32": "u4",
    "u32": "u4",
    "s32": "i4",
    "f32": "f4",
    "tf32": "u4",
    "f16x2": "u4",
    "bf16x2": "u4",
    "b64": "u8",
    "u64": "u8",
    "s64": "i8",
    "f64": "f8",
    "pred": "?",
}
#: numpy type of a register: bits, but for floats and predicates
CANON = {
    "pred": "?",
    "b8": "u1",
    "u8": "u1",
    "s8": "u1",
    "b16": "u2",
    "u16": "u2",
    "s16": "u2",
    "f16": "u2",
    "b32": "u4",
    "u32": "u4",
    "s32": "u4",
    "f32": "f4",
    "f16x2": "u4",
    "b64": "u8",
    "u64": "u8",
    "s64": "u8",
    "f64": "f8",
}
SIZE = {"u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8, "?": 1}
#: instructions that end a basic block
TERM = {"bra", "ret", "exit", "bar", "barrier", "trap", "brx"}


class BB:
    """A basic block: instructions, then one that may leave.

    Attributes
    ----------
    kinds : dict
        Instructions by kind, for the counts; ``n`` is their number.
    fn : callable
        Runs the block; returns the guard of its last instruction, or None.
    """

    fn: Callable[..., Any]  # a compiled basic block returns a predicate array or None

    def __init__(self, idx: int) -> None:
        self.idx = idx
        self.instrs: list[Instr] = []
        self.term: Instr | None = None
        self.kinds: dict[str, int] = {}
        self.n = 0


def reg_names(s: str) -> list[str]:
    """Return the possible register names in an operand."""
    return re.findall(r"%?[A-Za-z_$][\w$]*", s)


def split_bbs(kernel: Kernel) -> tuple[list[BB], dict[str, int]]:
    """Cut a kernel into basic blocks; return them and the block that each label stands for."""
    bbs: list[BB] = []
    labels: dict[str, int] = {}
    cur: BB | None = None
    pend: list[str] = []
    for it in kernel.body:
        if isinstance(it, Label):
            pend.append(it.name)
            cur = None
            continue
        if cur is None:
            cur = BB(len(bbs))
            bbs.append(cur)
            for lb in pend:
                labels[lb] = cur.idx
            pend = []
        if it.op[0] in TERM:
            cur.term = it
            cur = None
        else:
            cur.instrs.append(it)
    for lb in pend:  # a label at the very end
        labels[lb] = len(bbs)
    return bbs, labels


class Emitter:
    """The translation of one kernel, without its instructions.

    Attributes
    ----------
    meta : list of Instr
        The memory and warp instructions; the generated code names them by index, for errors.
    slot : dict
        Index of each register that is used.
    """

    def __init__(self, kernel: Kernel, symbols: dict[str, int], params: Callable[[str, int, str], str]) -> None:
        self.k, self.symbols, self.params = kernel, symbols, params
        self.regs = kernel.regs
        self.bbs, self.labels = split_bbs(kernel)
        self.consts: dict[Any, tuple[str, Any]] = {}  # keys are numbers or float bits; values are arrays
        self.meta: list[Instr] = []
        self.lines: list[str] = []
        self._uses()

    def _uses(self) -> None:
        """Find the registers that live in one basic block only: they become Python variables."""
        where: dict[str, tuple[set[int], list[bool]]] = {}
        for bb in self.bbs:
            seen: set[str] = set()
            for it in bb.instrs + ([bb.term] if bb.term else []):
                names: set[str] = set()
                for a in it.args:
                    names.update(reg_names(a))
                if it.pred:
                    names.add(it.pred)
                dst = self._dst_names(it)
                for n in names & self.regs.keys():
                    w = where.setdefault(n, (set(), []))
                    w[0].add(bb.idx)
                    # used before it is written here, or written under a guard: must live across blocks
                    if n in dst and n not in seen:
                        if it.pred:
                            w[1].append(True)
                        src = " ".join(a for i, a in enumerate(it.args) if i > 0 or n not in reg_names(it.args[0]))
                        if n in reg_names(src):
                            w[1].append(True)
                        seen.add(n)
                    elif n not in seen:
                        w[1].append(True)
        self.local = {n for n, (b, live) in where.items() if len(b) == 1 and not live}
        self.slot = {n: i for i, n in enumerate(sorted(self.regs.keys() & where.keys()))}
        self.local_id = {n: f"v{i}" for n, i in self.slot.items()}

    def _dst_names(self, it: Instr) -> set[str]:
        if it.op[0] in ("st", "red", "bra", "bar", "membar", "fence", "cp", "prefetch") or not it.args:
            return set()
        return set(reg_names(it.args[0])) & self.regs.keys()

    def const(self, value: float, dt: str) -> str:
        """Return the name of a constant."""
        key = (value if not isinstance(value, float) else struct.pack("<d", value), dt)
        if key not in self.consts:
            if dt == "?":
                a = np.array([[bool(value)]])
            elif dt[0] in "ui" and not isinstance(value, float):
                n = SIZE[dt]
                a = np.frombuffer((value & (1 << 8 * n) - 1).to_bytes(n, "little"), dt).reshape(1, 1)
            else:
                a = np.array([[value]], dt)
            self.consts[key] = (f"K{len(self.consts)}", a)
        return self.consts[key][0]

    def src(self, s: str, t: str) -> str:
        """Return the expression for operand s read as PTX type t."""
        dt = NP[t]
        neg = False
        if s.startswith("!"):
            s, neg = s[1:].strip(), True
        if s in self.regs:
            have = CANON[self.regs[s]]
            e = self.local_id[s] if s in self.local else f"R[{self.slot[s]}]"
            if neg:
                return f"~{e}"
            if have == dt:
                return e
            if SIZE[have] == SIZE[dt]:
                return f"{e}.view({dt!r})"
            if SIZE[have] > SIZE[dt]:
                base = f"{e}.view('u{SIZE[have]}')" if have[0] == "f" else e
                return f"{base}.astype('u{SIZE[dt]}')" + ("" if dt[0] == "u" else f".view({dt!r})")
            return f"{e}.astype('u{SIZE[dt]}')" + ("" if dt[0] == "u" else f".view({dt!r})")
        m = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", s)
        if m:
            bits = int(m.group(1), 16)
            if dt[0] == "f" and dt != "f4":
                return self.const(struct.unpack("<f", struct.pack("<I", bits))[0], dt)
            if dt == "f4":
                return self.const(bits, "u4") + ".view('f4')"
            return self.const(bits, dt)
        m = re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", s)
        if m:
            v = struct.unpack("<d", struct.pack("<Q", int(m.group(1), 16)))[0]
            return self.const(v, dt) if dt[0] == "f" else self.const(int(m.group(1), 16), dt)
        m = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", s)
        if m:
            v = int(m.group(2), 0 if not re.fullmatch(r"0\d+", m.group(2)) else 8)
            v = -v if m.group(1) == "-" else v
            return self.const(float(v) if dt[0] == "f" else v, dt)
        if re.fullmatch(r"[+-]?\d+\.\d*(e[+-]?\d+)?", s):
            return self.const(float(s), dt)
        if s.startswith("%"):
            e = f"E.sreg({s!r})"
            return e if dt == "u4" else f"{e}.astype({dt!r})"
        m = re.fullmatch(r"([\w$]+)(?:\+(-?\d+))?", s)
        if m and m.group(1) in self.symbols:
            return self.const(self.symbols[m.group(1)] + int(m.group(2) or 0), dt)
        raise Unsupported(f"operand {s!r}")

    def put(self, d: str, expr: str, t: str, m: str = "m") -> None:
        """Emit: register d = expr, a value of PTX type t."""
        if d == "_":
            return
        have, dt = CANON[self.regs[d]], NP[t]
        if have != dt:
            if SIZE[have] == SIZE[dt]:
                expr = f"({expr}).view({have!r})"
            elif SIZE[have] > SIZE[dt]:
                wide = ("i" if dt[0] == "i" else "u") + str(SIZE[have])
                bits = f"({expr}).view('u{SIZE[dt]}')" if dt[0] == "f" else f"({expr})"
                expr = f"{bits}.astype({wide!r})" + ("" if wide == have else f".view({have!r})")
            else:
                expr = f"({expr}).astype({have!r})"
        if d in self.local and m == "m":
            self.emit(f"{self.local_id[d]} = {expr}")
            return
        tgt = self.local_id[d] if d in self.local else f"R[{self.slot[d]}]"
        if m == "m":
            self.emit(f"{tgt} = {expr} if m is None else where(m, {expr}, {tgt})")
        else:
            self.emit(f"{tgt} = where({m}, {expr}, {tgt})")

    def emit(self, s: str) -> None:
        """Append a line to the basic block."""
        self.lines.append("    " + s)

    def addr(self, s: str) -> tuple[str, int]:
        """Return the base expression and the offset of an address ``[reg+imm]``."""
        s = s.strip()[1:-1].strip()
        m = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?\w+))?", s)
        if not m:
            raise Unsupported(f"address {s!r}")
        return self.src(m.group(1), "u64"), int(m.group(2) or "0", 0)
