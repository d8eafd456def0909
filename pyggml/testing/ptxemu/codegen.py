"""Translate a parsed kernel into one Python function per basic block, one instruction after the other."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import ops
from .emitter import BB, NP, Emitter
from .memory import Unsupported
from .parser import TYPE_SIZE, Instr

__all__ = ["Gen"]

WIDER = {"u2": "u4", "i2": "i4", "u4": "u8", "i4": "i8", "f4": "f8", "u1": "u2", "i1": "i2"}
CMP = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
#: Instructions that are one expression of their operands, the operands' types and the result's: the instruction's (t), that
#: without sign (u), u32 (w) or a predicate (p).
SIMPLE = {
    "and": ("{} & {}", "tt", "t"),
    "or": ("{} | {}", "tt", "t"),
    "xor": ("{} ^ {}", "tt", "t"),
    "not": ("~{}", "t", "t"),
    "cnot": ("({} == 0).astype({type})", "t", "t"),
    "rem": ("irem({}, {})", "tt", "t"),
    "shl": ("shl({}, {})", "uw", "u"),
    "bfe": ("bfe({}, {}, {})", "tww", "t"),
    "bfi": ("bfi({}, {}, {}, {})", "uuww", "u"),
    "copysign": ("np.copysign({1}, {0})", "tt", "t"),
    "selp": ("where({2}, {0}, {1})", "ttp", "t"),
}

Op = tuple[str, ...]
Args = list[str]


def _bits(size: int) -> str:
    return f"b{8 * size}"


def _np_uint(size: int) -> str:
    return f"u{size}"


def _match(pattern: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, text)
    if found is None:
        raise Unsupported(f"operand {text!r}")
    return found


class Gen(Emitter):
    """The translation of one kernel."""

    def build(self) -> list[BB]:
        """Compile all basic blocks."""
        out = []
        for bb in self.bbs:
            self.lines = []
            self.bb = bb
            for it in bb.instrs:
                kind = it.op[0] + ("." + it.op[1] if it.op[0] in ("ld", "st", "atom", "red") else "")
                if it.op[0] in ("ld", "st"):
                    kind = ".".join(
                        x for x in it.op[:3] if x in ("ld", "st", "global", "shared", "local", "param", "const")
                    )
                bb.kinds[kind] = bb.kinds.get(kind, 0) + 1
                self.instr(it)
            bb.n = len(bb.instrs) + (bb.term is not None)
            if bb.term is not None:
                k = bb.term.op[0]
                bb.kinds[k] = bb.kinds.get(k, 0) + 1
            ret = "None"
            t = bb.term
            if t is not None and t.pred:
                ret = self.src(("!" if t.neg else "") + t.pred, "pred")
            out.append(f"def bb{bb.idx}(R, m, E):\n" + "\n".join(self.lines or ["    pass"]) + f"\n    return {ret}\n")
        src = "\n".join(out)
        ns: dict[str, Any] = {k: getattr(ops, k) for k in dir(ops) if not k.startswith("_")}
        ns.update(where=np.where, np=np)
        ns.update({n: a for n, a in self.consts.values()})
        exec(compile(src, f"<ptx {self.k.name[:40]}>", "exec"), ns)  # noqa: S102 - the translation of the kernel
        for bb in self.bbs:
            bb.fn = ns[f"bb{bb.idx}"]
        self.source = src
        return self.bbs

    def instr(self, it: Instr) -> None:
        """Emit one instruction."""
        m = "m"
        if it.pred:
            g = self.src(("!" if it.neg else "") + it.pred, "pred")
            self.emit(f"mg = {g} if m is None else m & {g}")
            m = "mg"
        op = it.op
        fn = getattr(self, "_op_" + op[0], None)
        if fn is None:
            raise Unsupported(f"line {it.line}: {it.text}")
        try:
            fn(it, op, it.args, m)
        except (KeyError, IndexError, ValueError) as e:
            raise Unsupported(f"line {it.line}: {it.text} ({type(e).__name__}: {e})") from e

    def _op_mov(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        d, s = a
        if d.startswith("{"):
            parts = [x.strip() for x in d[1:-1].split(",")]
            w = TYPE_SIZE[t] // len(parts)
            self.emit(f"tv = {self.src(s, _bits(w * len(parts)))}")
            for i, p in enumerate(parts):
                self.put(p, f"(tv >> {self.const(8 * w * i, _np_uint(TYPE_SIZE[t]))}).astype('u{w}')", f"b{8 * w}", m)
        elif s.startswith("{"):
            parts = [x.strip() for x in s[1:-1].split(",")]
            w, tot = TYPE_SIZE[t] // len(parts), TYPE_SIZE[t]
            e = " | ".join(
                f"({self.src(p, _bits(w))}.astype('u{tot}') << {self.const(8 * w * i, _np_uint(tot))})"
                for i, p in enumerate(parts)
            )
            self.put(d, e, f"b{8 * tot}", m)
        else:
            self.put(d, self.src(s, t), t, m)

    def _op_cvta(self, it: Instr, op: Op, a: Args, m: str) -> None:
        base = {"shared": "SHARED_BASE", "local": "LOCAL_BASE"}
        sp = next(x for x in op if x in ("shared", "local", "global", "const", "param"))
        e = self.src(a[1], "u64")
        if sp in base:
            e = f"{e} {'-' if 'to' in op else '+'} {base[sp]}"
        self.put(a[0], e, "u64", m)

    def _space(self, op: Op) -> str:
        for x in op[1:]:
            x = x.split("-")[0]
            if x in ("global", "shared", "local", "const", "param"):
                return {"const": "global"}.get(x, x)
        return "generic"

    def _op_ld(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        sp = self._space(op)
        if sp == "param":
            mm = _match(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", a[1])
            if mm.group(1) not in {p.name for p in self.k.params}:  # the result of a call
                self.put(a[0], self.const(0, f"u{TYPE_SIZE[t]}"), f"u{8 * TYPE_SIZE[t]}", m)
                return
            self.put(a[0], self.params(mm.group(1), int(mm.group(2) or 0), NP[t]), t, m)
            return
        n = {"v2": 2, "v4": 4, "v8": 8}.get(next((x for x in op if x in ("v2", "v4", "v8")), ""), 1)
        base, off = self.addr(a[1])
        i = len(self.meta)
        self.meta.append(it)
        if n == 1:
            self.put(a[0], f"E.ld_{sp}({base}, {off}, {NP[t]!r}, 1, {m}, {i})", t, m)
        else:
            self.emit(f"tv = E.ld_{sp}({base}, {off}, {NP[t]!r}, {n}, {m}, {i})")
            for j, r in enumerate(x.strip() for x in a[0][1:-1].split(",")):
                self.put(r, f"tv[{j}]", t, m)

    _op_ldu = _op_ld

    def _op_st(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        sp = self._space(op)
        if sp == "param":  # an argument of a call
            return
        base, off = self.addr(a[0])
        i = len(self.meta)
        self.meta.append(it)
        vals = [x.strip() for x in a[1][1:-1].split(",")] if a[1].startswith("{") else [a[1]]
        v = ", ".join(self.src(x, t) for x in vals)
        self.emit(f"E.st_{sp}({base}, {off}, {NP[t]!r}, ({v},), {m}, {i})")

    def _op_atom(self, it: Instr, op: Op, a: Args, m: str) -> None:
        red = op[0] == "red"
        t = op[-1]
        sp = self._space(op)
        fn = next(x for x in op if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
        base, off = self.addr(a[0 if red else 1])
        vals = ", ".join(self.src(x, t) for x in a[(1 if red else 2) :])
        i = len(self.meta)
        self.meta.append(it)
        e = f"E.atom({sp!r}, {fn!r}, {base}, {off}, {NP[t]!r}, ({vals},), {m}, {i})"
        if red or a[0] == "_":
            self.emit(e)
        else:
            self.emit(f"tv = {e}")
            self.put(a[0], "tv", t, m)

    _op_red = _op_atom

    # cp.async: done at once; a missing wait_group is therefore not detected
    def _op_cp(self, it: Instr, op: Op, a: Args, m: str) -> None:
        if op[1] != "async":
            raise ValueError("cp")
        if "commit_group" in op or "wait_group" in op or "wait_all" in op:
            return
        n = int(a[2], 0)
        d, doff = self.addr(a[0])
        s, soff = self.addr(a[1])
        i = len(self.meta)
        self.meta.append(it)
        self.emit(f"tv = E.ld_global({s}, {soff}, 'u4', {n // 4}, {m}, {i})")
        if n == 4:
            self.emit("tv = (tv,)")
        self.emit(f"E.st_shared({d}, {doff}, 'u4', tuple(tv), {m}, {i})")

    def _nop(self, it: Instr, op: Op, a: Args, m: str) -> None:
        pass

    def _op_call(self, it: Instr, op: Op, a: Args, m: str) -> None:
        name = next((x for x in a if re.fullmatch(r"[A-Za-z_$][\w$]*", x)), "?")
        self.emit(f"E.called({name!r}, {m})")

    _op_membar = _op_fence = _op_prefetch = _op_prefetchu = _op_discard = _nop

    def _bin(self, it: Instr, op: Op, a: Args, m: str, f: str) -> None:
        t = op[-1]
        if t in ("f16", "bf16", "f16x2", "bf16x2"):
            self.put(a[0], f"half({t!r}, {f!r}, {self.src(a[1], t)}, {self.src(a[2], t)})", t, m)
            return
        x, y = self.src(a[1], t), self.src(a[2], t)
        e = {
            "add": f"{x} + {y}",
            "sub": f"{x} - {y}",
            "mul": f"{x} * {y}",
            "min": f"np.{'f' if t[0] == 'f' else ''}{'min' if t[0] == 'f' else 'minimum'}({x}, {y})",
            "max": f"np.{'f' if t[0] == 'f' else ''}{'max' if t[0] == 'f' else 'maximum'}({x}, {y})",
        }[f]
        if "sat" in op:
            e = f"np.clip({e}, 0, 1).astype('f4')" if t[0] == "f" else f"sat_{f}({x}, {y})"
        self.put(a[0], e, t, m)

    def _op_add(self, it: Instr, op: Op, a: Args, m: str) -> None:
        self._bin(it, op, a, m, op[0])

    _op_sub = _op_min = _op_max = _op_add

    def _op_mul(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        if t[0] in "fb":
            return self._bin(it, op, a, m, "mul")
        x, y = self.src(a[1], t), self.src(a[2], t)
        if "wide" in op:
            w = WIDER[NP[t]]
            self.put(a[0], f"{x}.astype({w!r}) * {y}", {"u4": "u32", "i4": "s32", "u8": "u64", "i8": "s64"}[w], m)
        elif "hi" in op:
            self.put(a[0], f"mulhi({x}, {y})", t, m)
        else:
            self.put(a[0], f"{x} * {y}", t, m)

    _op_mul24 = _op_mul

    def _op_mad(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        if t[0] == "f":
            return self._op_fma(it, op, a, m)
        x, y = self.src(a[1], t), self.src(a[2], t)
        if "wide" in op:
            w = WIDER[NP[t]]
            wt = {"u4": "u32", "i4": "s32", "u8": "u64", "i8": "s64"}[w]
            self.put(a[0], f"{x}.astype({w!r}) * {y} + {self.src(a[3], wt)}", wt, m)
        elif "hi" in op:
            self.put(a[0], f"mulhi({x}, {y}) + {self.src(a[3], t)}", t, m)
        else:
            self.put(a[0], f"{x} * {y} + {self.src(a[3], t)}", t, m)

    def _op_fma(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        f = {"f32": "fma32", "f64": "fma64"}.get(t)
        xs = ", ".join(self.src(x, t) for x in a[1:])
        self.put(a[0], f"{f}({xs})" if f else f"half({t!r}, 'fma', {xs})", t, m)

    def _op_div(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        x, y = self.src(a[1], t), self.src(a[2], t)
        self.put(a[0], f"{x} / {y}" if t[0] == "f" else f"idiv({x}, {y})", t, m)

    def _un(self, it: Instr, op: Op, a: Args, m: str, f: str) -> None:
        t = op[-1]
        if t in ("f16", "bf16", "f16x2", "bf16x2"):
            self.put(a[0], f"half({t!r}, {f!r}, {self.src(a[1], t)})", t, m)
        else:
            e = {
                "neg": "-({})",
                "abs": "np.abs({})",
                "sqrt": "np.sqrt({})",
                "rsqrt": "1 / np.sqrt({})",
                "rcp": "1 / {}",
                "ex2": "np.exp2({})",
                "lg2": "np.log2({})",
                "sin": "np.sin({})",
                "cos": "np.cos({})",
                "tanh": "np.tanh({})",
            }[f].format(self.src(a[1], t))
            self.put(a[0], f"({e}).astype({NP[t]!r})", t, m)

    def _op_and(self, it: Instr, op: Op, a: Args, m: str) -> None:
        text, kinds, result = SIMPLE[op[0]]
        t = op[-1]
        types = {"t": t, "u": "u" + t[1:], "w": "u32", "p": "pred"}
        operands = (self.src(x, types[kind]) for x, kind in zip(a[1:], kinds, strict=True))
        self.put(a[0], text.format(*operands, type=repr(NP.get(t))), types[result], m)

    _op_or = _op_xor = _op_not = _op_cnot = _op_rem = _op_shl = _op_bfe = _op_bfi = _op_copysign = _op_selp = _op_and

    def _op_neg(self, it: Instr, op: Op, a: Args, m: str) -> None:
        self._un(it, op, a, m, op[0])

    _op_abs = _op_sqrt = _op_rsqrt = _op_rcp = _op_ex2 = _op_lg2 = _op_sin = _op_cos = _op_tanh = _op_neg

    def _op_popc(self, it: Instr, op: Op, a: Args, m: str) -> None:
        self.put(a[0], f"{op[0]}({self.src(a[1], op[-1])})", op[-1] if op[0] == "brev" else "u32", m)

    _op_clz = _op_brev = _op_bfind = _op_popc

    def _op_shr(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = "u" + op[-1][1:] if op[-1][0] == "b" else op[-1]
        self.put(a[0], f"shr({self.src(a[1], t)}, {self.src(a[2], 'u32')})", t, m)

    def _op_shf(self, it: Instr, op: Op, a: Args, m: str) -> None:
        self.put(a[0], f"shf({op[1]!r}, {op[2] == 'wrap'}, {', '.join(self.src(x, 'u32') for x in a[1:])})", "u32", m)

    def _op_lop3(self, it: Instr, op: Op, a: Args, m: str) -> None:
        self.put(a[0], f"lop3({', '.join(self.src(x, 'u32') for x in a[1:4])}, {int(a[4], 0)})", "u32", m)

    def _op_prmt(self, it: Instr, op: Op, a: Args, m: str) -> None:
        if len(op) > 2:
            raise ValueError("prmt mode")
        self.put(a[0], f"prmt({', '.join(self.src(x, 'u32') for x in a[1:])})", "u32", m)

    def _op_dp4a(self, it: Instr, op: Op, a: Args, m: str) -> None:
        ta, tb = op[1], op[2]
        self.put(
            a[0],
            f"dp4a({self.src(a[1], 'u32')}, {self.src(a[2], 'u32')}, {self.src(a[3], 'u32')}, "
            f"{NP[ta[0] + '8']!r}, {NP[tb[0] + '8']!r})",
            "u32",
            m,
        )

    def _op_testp(self, it: Instr, op: Op, a: Args, m: str) -> None:
        x = self.src(a[1], op[-1])
        f = {"finite": "np.isfinite", "infinite": "np.isinf", "notanumber": "np.isnan", "number": "~np.isnan"}[op[1]]
        self.put(a[0], f"{f}({x})", "pred", m)

    def _cmp(self, c: str, x: str, y: str, t: str) -> str:
        if t in ("f16", "bf16"):
            x, y = f"tof32({t!r}, {x})", f"tof32({t!r}, {y})"
        if t[0] == "f" or t == "bf16":
            if c == "num":
                return f"~(np.isnan({x}) | np.isnan({y}))"
            if c == "nan":
                return f"(np.isnan({x}) | np.isnan({y}))"
            if len(c) == 3:
                return f"(({x} {CMP[c[:2]]} {y}) | np.isnan({x}) | np.isnan({y}))"
            if c == "ne":
                return f"(({x} < {y}) | ({x} > {y}))"
        return f"({x} {CMP[c]} {y})"

    def _op_setp(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        e = self._cmp(op[1], self.src(a[1], t), self.src(a[2], t), t)
        d = a[0].split("|")
        comb = next((x for x in op[2:-1] if x in ("and", "or", "xor")), None)
        c = self.src(a[3], "pred") if comb else None
        s = dict(zip(("and", "or", "xor"), "&|^", strict=True)).get(comb or "")
        if len(d) == 2:
            self.emit(f"tc = {e}")
            e = "tc"
            self.put(d[1].strip(), f"(~tc {s} {c})" if comb else "~tc", "pred", m)
        self.put(d[0].strip(), f"({e} {s} {c})" if comb else e, "pred", m)

    def _op_set(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t, dt = op[-1], op[-2]
        e = self._cmp(op[1], self.src(a[1], t), self.src(a[2], t), t)
        one = self.const(1.0 if dt[0] == "f" else -1, NP[dt])
        self.put(a[0], f"where({e}, {one}, {self.const(0.0 if dt[0] == 'f' else 0, NP[dt])})", dt, m)

    def _op_cvt(self, it: Instr, op: Op, a: Args, m: str) -> None:
        d, s = op[-2], op[-1]
        mods = op[1:-2]
        if d in ("f16x2", "bf16x2"):
            self.put(a[0], f"pack2({d!r}, {self.src(a[1], 'f32')}, {self.src(a[2], 'f32')})", d, m)
            return
        x = self.src(a[1], s)
        rnd = next((r for r in mods if r in ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")), None)
        if not {d, s} & {"f16", "bf16", "f32", "f64", "tf32"}:
            if "sat" in mods:
                self.put(a[0], f"sat_cvt({x}, {NP[d]!r})", d, m)
            else:
                self.put(a[0], f"{x}.astype({NP[d]!r})", d, m)
        else:
            self.put(a[0], f"cvt({x}, {s!r}, {d!r}, {rnd!r}, {'sat' in mods})", d, m)

    def _op_shfl(self, it: Instr, op: Op, a: Args, m: str) -> None:
        mode = op[2] if op[1] == "sync" else op[1]
        d = a[0].split("|")
        mask = self.src(a[4], "u32") if len(a) > 4 else "None"
        i = len(self.meta)
        self.meta.append(it)
        self.emit(
            f"tv, tp = E.shfl({mode!r}, {self.src(a[1], 'u32')}, {self.src(a[2], 'u32')}, "
            f"{self.src(a[3], 'u32')}, {mask}, {m}, {i})"
        )
        self.put(d[0].strip(), "tv", "u32", m)
        if len(d) > 1:
            self.put(d[1].strip(), "tp", "pred", m)

    def _op_vote(self, it: Instr, op: Op, a: Args, m: str) -> None:
        mode = op[2]
        i = len(self.meta)
        self.meta.append(it)
        self.emit(f"tv = E.vote({mode!r}, {self.src(a[1], 'pred')}, {m}, {i})")
        self.put(a[0], "tv", "u32" if mode == "ballot" else "pred", m)

    def _op_redux(self, it: Instr, op: Op, a: Args, m: str) -> None:
        t = op[-1]
        i = len(self.meta)
        self.meta.append(it)
        self.put(a[0], f"E.redux({op[2]!r}, {self.src(a[1], t)}, {m}, {i})", t, m)

    def _op_activemask(self, it: Instr, op: Op, a: Args, m: str) -> None:
        self.put(a[0], f"E.vote('ballot', {self.const(1, '?')}, {m}, -1)", "u32", m)

    def _op_ldmatrix(self, it: Instr, op: Op, a: Args, m: str) -> None:
        if "m8n8" not in op:
            raise ValueError("ldmatrix shape")
        num = {"x1": 1, "x2": 2, "x4": 4}[next(x for x in op if x in ("x1", "x2", "x4"))]
        base, off = self.addr(a[1])
        i = len(self.meta)
        self.meta.append(it)
        self.emit(f"tm = E.ldmatrix({base}, {off}, {num}, {'trans' in op}, {m}, {i})")
        for j, r in enumerate(x.strip() for x in a[0][1:-1].split(",")):
            self.put(r, f"tm[{j}]", "b32", m)

    def _op_mma(self, it: Instr, op: Op, a: Args, m: str) -> None:
        regs = [[x.strip() for x in v[1:-1].split(",")] for v in a]
        shape = next(x for x in op if x.startswith("m16n8"))
        dt, at, bt, ct = op[-4:]
        t = {"f32": "f32", "s32": "s32", "f16": "b32"}
        A = ", ".join(self.src(x, "b32") for x in regs[1])
        B = ", ".join(self.src(x, "b32") for x in regs[2])
        C = ", ".join(self.src(x, t[ct]) for x in regs[3])
        if t[dt] == "b32":
            raise ValueError("mma with f16 accumulators")
        self.emit(f"tm = E.mma({shape!r}, {at!r}, {bt!r}, {NP[t[dt]]!r}, ({A},), ({B},), ({C},), {m})")
        for j, r in enumerate(regs[0]):
            self.put(r, f"tm[{j}]", t[dt], m)
