"""Vector code through llvmlite: `micro` makes Numba intrinsics whose body an `Emit` writes instruction by instruction.

Arguments are int64 addresses and counts, so a read-only map needs no second specialisation. Vectors have 512 bits;
LLVM splits them on narrower CPUs, and only a few methods look at the CPU's features. They ask the code generator, never
a global: so Numba's disk cache, which is keyed by the same features, holds code for several CPUs side by side.

Mind two traps. A small value inserted into an undefined vector makes LLVM reuse some register, and wait for it: join in
a general register instead (`scalars`) or start from zeros (`gather`). And without F16C a half must be converted by
integer arithmetic, because LLVM would call a function that no library here has, and end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

from . import cache  # noqa: F401  isort: skip  (before Numba reads its environment)

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def vec(type: ir.Type, n: int) -> ir.VectorType:
    """Return the vector type of n elements."""
    return ir.VectorType(type, n)


U8x16, U8x32, U8x64 = vec(I8, 16), vec(I8, 32), vec(I8, 64)
I16x16, I32x8, I32x16, I64x4, I64x8 = vec(I16, 16), vec(I32, 8), vec(I32, 16), vec(I64, 4), vec(I64, 8)
F16x16, F32x4, F32x8, F32x16 = vec(F16, 16), vec(F32, 4), vec(F32, 8), vec(F32, 16)
LANES = 16
#: One rounding for a product and a sum where the CPU has it.
CONTRACT = ("contract",)


class Emit:
    """Writes code at the place of a builder; values are LLVM's."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.b = builder
        self.triple, _, features = context.codegen().magic_tuple()
        self.features = set(features.split(","))

    def has(self, *names: str) -> bool:
        """Whether the CPU that is compiled for has all these features."""
        return all("+" + name in self.features for name in names)

    @property
    def streams_alone(self) -> bool:
        """Whether the CPU reads one row after another best without prefetches: AMD's do, Intel's stop at each page."""
        return self.has("sse4a")  # which only AMD's have

    # -- constants and addresses ---------------------------------------------

    def const(self, type: ir.VectorType, value: Any) -> ir.Constant:
        """Return a vector constant: one value for all lanes, or a list."""
        return ir.Constant(type, value if isinstance(value, list) else [value] * type.count)

    def add(self, a: ir.Value, v: Any) -> ir.Value:
        """Return a + v for an integer a and an integer or value v."""
        return self.b.add(a, v if isinstance(v, ir.Value) else a.type(v))

    def mul(self, a: ir.Value, v: Any) -> ir.Value:
        """Return a * v for an integer a and an integer or value v."""
        return self.b.mul(a, v if isinstance(v, ir.Value) else a.type(v))

    # -- memory: every load and store says align 1 ----------------------------

    def pointer(self, type: ir.Type, addr: ir.Value, off: Any = 0) -> ir.Value:
        """Return the address as a pointer to a type."""
        at = addr if isinstance(off, int) and off == 0 else self.add(addr, off)
        return self.b.inttoptr(at, type.as_pointer())

    def load(self, type: ir.Type, addr: ir.Value, off: Any = 0) -> ir.Value:
        """Load a value of a type."""
        return self.b.load(self.pointer(type, addr, off), align=1)

    def store(self, value: ir.Value, addr: ir.Value, off: Any = 0) -> None:
        """Store a value."""
        self.b.store(value, self.pointer(value.type, addr, off), align=1)

    def lanes_below(self, n: ir.Value) -> ir.Value:
        """Return the mask of the first n (an i64) of 16 lanes."""
        numbers = self.const(I32x16, list(range(LANES)))
        return self.b.icmp_signed("<", numbers, self.splat(self.b.trunc(n, I32), LANES))

    def load_lanes(self, type: ir.VectorType, addr: ir.Value, mask: ir.Value | None) -> ir.Value:
        """Load the lanes of a mask, zeros elsewhere; without a mask, all."""
        if mask is None:
            return self.load(type, addr)
        suffix = f"v{type.count}{_suffix(type.element)}"
        f = self.fn(f"llvm.masked.load.{suffix}.p0", type, type.as_pointer(), I32, vec(I1, type.count), type)
        return self.b.call(f, [self.pointer(type, addr), I32(1), mask, ir.Constant(type, None)])

    def store_lanes(self, value: ir.Value, addr: ir.Value, mask: ir.Value | None) -> None:
        """Store the lanes of a mask; without a mask, all."""
        if mask is None:
            return self.store(value, addr)
        type = value.type
        suffix = f"v{type.count}{_suffix(type.element)}"
        f = self.fn(f"llvm.masked.store.{suffix}.p0", ir.VoidType(), type, type.as_pointer(), I32, vec(I1, type.count))
        self.b.call(f, [value, self.pointer(type, addr), I32(1), mask])
        return None

    def prefetch(self, addr: ir.Value, off: Any = 0, level: int = 3) -> None:
        """Prefetch the cache line at an address, which may be after the end of memory."""
        f = self.fn("llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
        self.b.call(f, [self.pointer(I8, addr, off), I32(0), I32(level), I32(1)])

    # -- vectors ---------------------------------------------------------------

    def fn(self, name: str, result: ir.Type, *args: ir.Type) -> Any:
        """Return an external function or an LLVM intrinsic."""
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, args), name)

    def splat(self, v: ir.Value, n: int = LANES) -> ir.Value:
        """Return a vector with v in all lanes."""
        first = self.b.insert_element(ir.Constant(vec(v.type, n), ir.Undefined), v, I32(0))
        return self.b.shuffle_vector(first, first, ir.Constant(vec(I32, n), [0] * n))

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        """Return lanes picked from a and, counted on, b."""
        return self.b.shuffle_vector(a, b, ir.Constant(vec(I32, len(lanes)), lanes))

    def cat(self, *parts: ir.Value) -> ir.Value:
        """Return 1, 2, 4, ... vectors as one."""
        while len(parts) > 1:
            both = list(range(2 * parts[0].type.count))
            parts = tuple(self.shuffle(a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True))
        return parts[0]

    def halves(self, v: ir.Value) -> list[ir.Value]:
        """Return the lower and the upper half."""
        n = v.type.count
        return [self.shuffle(v, v, list(range(n // 2))), self.shuffle(v, v, list(range(n // 2, n)))]

    def cast(self, v: ir.Value, type: ir.Type) -> ir.Value:
        """Return the same bits as another type."""
        return self.b.bitcast(v, type)

    def gather(self, type: ir.Type, addresses: list[ir.Value], off: Any = 0) -> ir.Value:
        """Return one element of each address as a vector."""
        v = self.const(vec(type, len(addresses)), 0)
        for i, addr in enumerate(addresses):
            v = self.b.insert_element(v, self.load(type, addr, off), I32(i))
        return v

    def opaque(self, v: ir.Value) -> ir.Value:
        """Return a value in a register whose origin LLVM does not see: an integer, or a vector of 256 bits."""
        wide = isinstance(v.type, ir.VectorType)
        if wide and not self.has("avx"):
            return v
        return self.b.call(ir.InlineAsm(ir.FunctionType(v.type, [v.type]), "", "=x,0" if wide else "=r,0"), [v])

    def gather_longs(self, addresses: list[ir.Value]) -> ir.Value:
        """Return eight bytes of each of eight addresses, loaded as floats: LLVM loads those into a register's upper half."""
        f64 = ir.DoubleType()
        pairs = [
            self.b.insert_element(
                self.b.insert_element(ir.Constant(vec(f64, 2), ir.Undefined), self.load(f64, low), I32(0)),
                self.load(f64, high),
                I32(1),
            )
            for low, high in zip(addresses[::2], addresses[1::2], strict=True)
        ]
        return self.cast(self.cat(*pairs), U8x64)

    def deposit(self, value: ir.Value, places: int) -> ir.Value:
        """Return a word with the low bits of another at the places of the bits that are set; needs "bmi2"."""
        return self.b.call(self.fn("llvm.x86.bmi.pdep.64", I64, I64, I64), [value, I64(places)])

    def keep_order(self) -> None:
        """Let no load or store move across here: LLVM would load much at once, and run out of registers."""
        self.b.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", side_effect=True), [])

    def table(self, name: str, type: ir.Type, values: Iterable[Any]) -> ir.Value:
        """Return the address of constants in the module, put there once under a name."""
        table = self.b.module.globals.get(name)
        if table is None:
            entries = [ir.Constant(type, v) for v in values]
            table = ir.GlobalVariable(self.b.module, ir.ArrayType(type, len(entries)), name)
            table.linkage, table.global_constant = "internal", True
            table.initializer = ir.Constant(table.type.pointee, entries)
        return self.b.ptrtoint(table, I64)

    def scalars(self, addr: ir.Value, stride: int, n: int, bits: int) -> ir.Value:
        """Return n small integers, ``stride`` bytes apart, as a vector joined in a general register."""
        b, type = self.b, ir.IntType(bits)
        if n == 1:
            return self.cast(self.load(type, addr), vec(type, 1))
        word = ir.IntType(bits * n)
        v = b.zext(self.load(type, addr), word)
        for i in range(1, n):
            v = b.or_(v, b.shl(b.zext(self.load(type, addr, stride * i), word), word(bits * i)))
        return self.cast(self.opaque(v), vec(type, n))

    # -- floats ------------------------------------------------------------------

    def to_f32(self, v: ir.Value) -> ir.Value:
        """Return halves or signed integers as floats; a vector or a scalar."""
        wide = isinstance(v.type, ir.VectorType)
        element = v.type.element if wide else v.type
        type = vec(F32, v.type.count) if wide else F32
        if element != F16:
            return self.b.sitofp(v, type)
        return self.b.fpext(v, type) if self.has("f16c") else self._f16_to_f32_bits(v, type)

    def _f16_to_f32_bits(self, v: ir.Value, type: ir.Type) -> ir.Value:
        b, wide = self.b, isinstance(type, ir.VectorType)
        ints, shorts = (vec(I32, type.count), vec(I16, type.count)) if wide else (I32, I16)

        def k(c: int) -> ir.Constant:
            return self.const(ints, c) if wide else I32(c)

        h = b.zext(b.bitcast(v, shorts), ints)
        scale = self.const(type, 2.0**112) if wide else F32(2.0**112)
        m = b.bitcast(b.fmul(b.bitcast(b.shl(b.and_(h, k(0x7FFF)), k(13)), type), scale), ints)
        m = b.select(b.icmp_unsigned("==", b.and_(h, k(0x7C00)), k(0x7C00)), b.or_(m, k(0x7F800000)), m)
        return b.bitcast(b.or_(m, b.shl(b.and_(h, k(0x8000)), k(16))), type)

    def to_f16(self, v: ir.Value) -> ir.Value:
        """Return float lanes as 16-bit patterns of halves, rounded to nearest even."""
        b, n = self.b, v.type.count
        if self.has("f16c"):
            return b.bitcast(b.fptrunc(v, vec(F16, n)), vec(I16, n))
        ints, shorts = vec(I32, n), vec(I16, n)

        def k(c: int) -> ir.Constant:
            return self.const(ints, c)

        bits = b.bitcast(v, ints)
        sign, magnitude = b.and_(bits, k(-0x80000000)), b.and_(bits, k(0x7FFFFFFF))
        # subnormal halves: adding 0.5 leaves their bits, rounded, at the end of the float
        small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, v.type), self.const(v.type, 0.5)), ints), k(0x3F000000))
        odd = b.and_(b.lshr(magnitude, k(13)), k(1))
        normal = b.lshr(b.add(b.add(magnitude, k(0xFFF - (112 << 23))), odd), k(13))
        large = b.select(b.icmp_unsigned(">", magnitude, k(0x7F800000)), k(0x7E00), k(0x7C00))
        half = b.select(b.icmp_unsigned("<", magnitude, k(113 << 23)), small, normal)
        half = b.select(b.icmp_unsigned(">=", magnitude, k(143 << 23)), large, half)
        return b.trunc(b.or_(half, b.lshr(sign, k(16))), shorts)

    def bf16_to_f32(self, v: ir.Value) -> ir.Value:
        """Return 16-bit patterns of bfloats as floats."""
        n = v.type.count
        return self.cast(self.b.shl(self.b.zext(v, vec(I32, n)), self.const(vec(I32, n), 16)), vec(F32, n))

    def to_bf16(self, v: ir.Value) -> ir.Value:
        """Return float lanes as 16-bit patterns of bfloats, rounded to nearest even; a NaN stays one."""
        b, n = self.b, v.type.count
        ints = vec(I32, n)
        bits = b.bitcast(v, ints)
        sixteen, one = self.const(ints, 16), self.const(ints, 1)
        rounded = b.lshr(b.add(b.add(bits, self.const(ints, 0x7FFF)), b.and_(b.lshr(bits, sixteen), one)), sixteen)
        quiet = b.or_(b.lshr(bits, sixteen), self.const(ints, 64))
        return b.trunc(b.select(b.fcmp_unordered("uno", v, v), quiet, rounded), vec(I16, n))

    def round_f16(self, d: ir.Value) -> ir.Value:
        """Return a float rounded to a half's precision (without F16C: its 11 bits, without underflow)."""
        b = self.b
        if self.has("f16c"):
            return b.fpext(b.fptrunc(d, F16), F32)
        bits = b.bitcast(d, I32)
        bits = b.add(b.add(bits, I32(0xFFF)), b.and_(b.lshr(bits, I32(13)), I32(1)))
        return b.bitcast(b.and_(bits, I32(0xFFFFE000)), F32)

    def float_of(self, bits: ir.Value) -> ir.Value:
        """Return the float whose bits are the low 32 of an i64."""
        return self.b.bitcast(self.b.trunc(bits, I32), F32)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c, rounded once where the CPU can."""
        if not self.has("fma") and not self.triple.startswith(("aarch64", "arm64")):
            return self.b.fadd(self.b.fmul(a, b), c)  # LLVM would call fmaf for each lane
        n = a.type.count
        return self.b.call(self.fn(f"llvm.fma.v{n}f32", *[a.type] * 4), [a, b, c])

    def unary(self, name: str, v: ir.Value) -> ir.Value:
        """Return LLVM's intrinsic of a name (``fabs``, ``sqrt``) for float lanes."""
        return self.b.call(self.fn(f"llvm.{name}.v{v.type.count}f32", v.type, v.type), [v])

    def fmax(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the larger lanes; where one is NaN, b's."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def fmin(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the smaller lanes; where one is NaN, b's."""
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def fold(self, v: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Return the lanes joined pairwise, always in the same order."""
        while v.type.count > 1:
            v = join(*self.halves(v))
        return self.b.extract_element(v, I32(0))

    def sum(self, v: ir.Value) -> ir.Value:
        """Return the sum of float lanes."""
        return self.fold(v, self.b.fadd)

    def sums(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """Return the sums of 1, 2 or 4 vectors of float lanes; bits are those of `sum`."""
        n_lanes, width = vectors[0].type.count, vectors[0].type.count  # width: lanes of a vector's sum
        while width > 1:
            width //= 2
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0],) * 2]
            begins = range(0, 2 * n_lanes if len(vectors) > 1 else n_lanes, 2 * width)
            low = [b + i for b in begins for i in range(width)]
            vectors = [
                self.b.fadd(*[self.shuffle(*pair, [lane + up for lane in low]) for up in (0, width)]) for pair in pairs
            ]
            n_lanes = len(low)
        return [self.b.extract_element(v, I32(lane)) for v in vectors for lane in range(n_lanes)]

    # -- bytes ---------------------------------------------------------------------

    def lookup(self, table: Iterable[int], v: ir.Value) -> ir.Value:
        """Return the entries of a table of sixteen bytes at the indices in 32 or 64 lanes; their upper four bits are ignored."""
        entries, n = [x & 255 for x in table], v.type.count
        if n == 32 and self.has("avx512vbmi", "avx512vl"):
            f = self.fn("llvm.x86.avx512.permvar.qi.256", U8x32, U8x32, U8x32)
            return self.b.call(f, [ir.Constant(U8x32, entries * 2), v])
        if n == 64 and self.has("avx512vbmi"):
            f = self.fn("llvm.x86.avx512.permvar.qi.512", U8x64, U8x64, U8x64)
            return self.b.call(f, [ir.Constant(U8x64, entries * 4), v])
        v = self.b.and_(v, self.const(v.type, 15))
        if self.has("avx512bw") and n == 64:
            f = self.fn("llvm.x86.avx512.pshuf.b.512", U8x64, U8x64, U8x64)
            return self.b.call(f, [ir.Constant(U8x64, entries * 4), v])
        if self.has("avx2") and n == 32:
            f = self.fn("llvm.x86.avx2.pshuf.b", U8x32, U8x32, U8x32)
            return self.b.call(f, [ir.Constant(U8x32, entries * 2), v])
        if self.has("avx2"):
            return self.cat(*[self.lookup(entries, half) for half in self.halves(v)])
        out = ir.Constant(v.type, [0] * n)  # plain: one select for each entry
        for i, x in enumerate(entries):
            if x:
                out = self.b.select(self.b.icmp_unsigned("==", v, self.const(v.type, i)), self.const(v.type, x), out)
        return out

    def dpbusd(self, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        """Return int32 lanes plus four products each of unsigned bytes u and signed bytes s, exactly; 8 or 16 lanes."""
        b, n = self.b, acc.type.count
        if n == LANES and self.has("avx512vnni"):
            return b.call(self.fn("llvm.x86.avx512.vpdpbusd.512", I32x16, I32x16, U8x64, U8x64), [acc, u, s])
        if n == LANES // 2 and (self.has("avxvnni") or self.has("avx512vnni", "avx512vl")):
            return b.call(self.fn("llvm.x86.avx512.vpdpbusd.256", I32x8, I32x8, U8x32, U8x32), [acc, u, s])
        if n == LANES and self.has("avx2"):
            parts = zip(self.halves(acc), self.halves(u), self.halves(s), strict=True)
            return self.cat(*[self.dpbusd(*part) for part in parts])
        if self.has("avx2"):
            return b.add(acc, self._dot4_by_i16(u, s))
        for j in range(4):
            x, y = (self.shuffle(v, v, list(range(j, 4 * n, 4))) for v in (u, s))
            acc = b.add(acc, b.mul(b.zext(x, acc.type), b.sext(y, acc.type)))
        return acc

    def _dot4_by_i16(self, u: ir.Value, s: ir.Value) -> ir.Value:
        """Widen to i16 first: pmaddubsw would saturate at 2 * 255 * 127."""
        b, wide = self.b, vec(I16, 16)
        f = self.fn("llvm.x86.avx2.pmadd.wd", I32x8, wide, wide)
        pairs = zip(self.halves(u), self.halves(s), strict=True)
        both = self.cat(*[b.call(f, [b.zext(x, wide), b.sext(y, wide)]) for x, y in pairs])
        even, odd = (self.shuffle(both, both, list(range(i, 16, 2))) for i in (0, 1))
        return b.add(even, odd)

    def transpose(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Load 16 bytes at each of 16 addresses; return four vectors: bytes 0-3, 4-7, 8-11, 12-15 of all rows."""
        four = vec(I32, 4)
        quads = []
        for i in range(4):  # rows i, i+4, i+8, i+12 in the four lanes
            q = [self.cast(self.load(U8x16, rows[i + 4 * lane]), four) for lane in range(4)]
            quads.append(self.cat(*q))

        def within_lanes(a: ir.Value, b: ir.Value, pick: list[int]) -> ir.Value:
            return self.shuffle(a, b, [x + 4 * l if x < 4 else x + 12 + 4 * l for l in range(4) for x in pick])

        a, b = (within_lanes(quads[0], quads[1], p) for p in ([0, 4, 1, 5], [2, 6, 3, 7]))
        c, d = (within_lanes(quads[2], quads[3], p) for p in ([0, 4, 1, 5], [2, 6, 3, 7]))
        low, high = [0, 1, 4, 5], [2, 3, 6, 7]
        return [within_lanes(a, c, low), within_lanes(a, c, high), within_lanes(b, d, low), within_lanes(b, d, high)]

    # -- control -------------------------------------------------------------------

    def loop(self, n: ir.Value, step: int = 1, start: ir.Value | None = None) -> Any:
        """Return a context ``with e.loop(n) as (i, _)``: i from start below n."""
        return cgutils.for_range_slice(self.b, I64(0) if start is None else start, n, I64(step), intp=I64)

    def var(self, v: ir.Value) -> ir.Value:
        """Return a pointer to a variable that starts as v; LLVM keeps it in a register."""
        p = cgutils.alloca_once(self.b, v.type)
        self.b.store(v, p)
        return p

    def zeros(self, type: ir.VectorType) -> ir.Value:
        """Return a variable of zeros."""
        return self.var(ir.Constant(type, None))

    def vectors(self, n: ir.Value, body: Callable[[ir.Value, ir.Value | None], None]) -> None:
        """Write ``body(i, mask)`` for 16 elements from i on: whole vectors without a mask, then the rest with one."""
        whole = self.b.and_(n, I64(-LANES))
        with self.loop(whole, LANES) as (i, _):
            body(i, None)
        rest = self.b.sub(n, whole)
        with self.b.if_then(self.b.icmp_signed(">", rest, I64(0))):
            body(whole, self.lanes_below(rest))

    def switch(self, value: ir.Value, cases: Iterable[int], body: Callable[[int], None]) -> None:
        """Write ``body(case)`` for each case of an integer; other values do nothing."""
        b = self.b
        end = b.append_basic_block("switch.end")
        jump = b.switch(value, end)
        for case in cases:
            block = b.append_basic_block(f"switch.{case}")
            jump.add_case(value.type(case), block)
            b.position_at_end(block)
            body(case)
            b.branch(end)
        b.position_at_end(end)

    @contextmanager
    def when(self, condition: ir.Value) -> Any:
        """Return a context whose code runs if a condition holds."""
        with self.b.if_then(condition):
            yield


def _suffix(type: ir.Type) -> str:
    return "f32" if type == F32 else f"i{type.width}"


def micro(result: types.Type, n: int) -> Callable[[Callable[..., Any]], Any]:
    """Turn ``body(e, *args)`` into a Numba intrinsic of n int64 arguments.

    Parameters
    ----------
    result : numba type
        What it returns; for ``void`` the body returns None.
    n : int
        Number of arguments.
    """

    def wrap(body: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            value = body(Emit(context, builder), *args)
            return context.get_dummy_value() if value is None else value

        names = ", ".join(f"a{i}" for i in range(n))
        scope = {"signature": result(*[types.int64] * n), "codegen": codegen}
        # Numba counts an intrinsic's arguments by its signature, so it must be written out
        exec(f"def {body.__name__}(typingctx, {names}): return signature, codegen", scope)  # noqa: S102  (our own text)
        made = scope[body.__name__]
        made.__doc__ = body.__doc__  # type: ignore[attr-defined]
        return intrinsic(made)

    return wrap
