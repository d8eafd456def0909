"""Kernels for the types of `codes`: rows times few tokens, rows into a panel, rows as floats.

They use one scale per 16 columns, like Q6_K: activations come from `quantise_row_halves`, panels go to `tile_halves`. A
row for a panel is first decoded to bytes and scales on the stack. Kernels are made on first use, and `warm_up` leaves
them out, because few files have such weights.
"""

from __future__ import annotations

from functools import cache, partial

from .codes import CODES, OFFSET, Codes
from .emit import F32, I8, I32, I64, Emit, F32x16, I32x16, U8x16, U8x64, cgutils, ir, vec
from .kernel import Kernel, micro_kernel
from .panel import PANEL_BLOCK, put_columns, put_scales
from .rowwise import fetch, make_rows_kernel

__all__ = ["CODES", "OFFSET", "TYPES", "dequantise_kernel", "rows_kernel", "unpack_kernel"]

TYPES = frozenset(CODES)


def product_of_halves(
    kind: Codes, e: Emit, rows: list[ir.Value], ahead: ir.Value, n_blocks: ir.Value, xs: list[ir.Value]
) -> list[ir.Value]:
    """Return the products of rows with tokens, a unit at a time."""
    b, n = e.b, kind.unit // 32
    acc = [[e.zeros(F32x16) for _ in xs] for _ in rows]
    scales_at = [e.add(x, e.mul(n_blocks, 32)) for x in xs]
    starts_at = [e.add(s, e.mul(n_blocks, 4)) for s in scales_at]
    with e.loop(n_blocks, n) as (i, _):
        at_w = e.mul(b.udiv(i, I64(n)), kind.size)
        at = [e.add(row, at_w) for row in rows]
        dx = [e.load(vec(F32, n), e.add(s, e.mul(i, 4))) for s in scales_at]
        dx = [e.shuffle(d, d, [lane // 2 for lane in range(2 * n)]) for d in dx]
        starts = [e.load(vec(I32, 2 * n), e.add(s, e.mul(i, 8))) for s in starts_at]
        fetch(e, ahead, at_w, len(rows), kind.size)
        factors: list[list[ir.Value]] = []
        for r, block in enumerate(at):
            scales = kind.scales(e, block)
            factors.append([b.fmul(scales, d) for d in dx])
            if kind.minima is not None:
                minima = kind.minima(e, block)
                for t, p in enumerate(acc[r]):  # starts are less than 0, so what is added takes off
                    b.store(e.fma(e.to_f32(starts[t]), b.fmul(minima, dx[t]), b.load(p)), p)
        for j in range(kind.unit // 64):
            fours = [4 * j + lane // 4 for lane in range(16)]
            first = [e.const(I32x16, 0) if kind.minima is not None else e.shuffle(s, s, fours) for s in starts]
            v = [e.load(U8x64, e.add(x, e.mul(i, 32)), 64 * j) for x in xs]
            if kind.in_order:
                e.keep_order()
            for r, block in enumerate(at):
                codes = kind.codes(e, block, j)
                for t, p in enumerate(acc[r]):
                    ints = e.to_f32(e.dpbusd(first[t], codes, v[t]))
                    b.store(e.fma(ints, e.shuffle(factors[r][t], factors[r][t], fours), b.load(p)), p)
    return e.sums([b.load(p) for of_row in acc for p in of_row])


@cache
def rows_kernel(typ: int) -> Kernel:
    """Return the kernel of rows as they lie; see `blocks32`."""
    kind = CODES[typ]
    return make_rows_kernel(f"rows_{kind.name}", partial(product_of_halves, kind), rare=True)


def _on_stack(e: Emit, n: int) -> ir.Value:
    """Return the address of n bytes of the stack."""
    return e.b.ptrtoint(cgutils.alloca_once(e.b, ir.ArrayType(I8, n)), I64)


@cache
def unpack_kernel(typ: int) -> Kernel:
    """Return the kernel that puts sixteen rows into half a panel; see `blocks32`."""
    kind = CODES[typ]

    def unpack(e, w, stride, n_blocks, panel):
        b, unit = e.b, kind.unit
        codes, scales = _on_stack(e, 16 * unit), _on_stack(e, 16 * 64)
        with e.loop(n_blocks, unit // 32) as (i, _):
            first = e.add(w, e.mul(b.udiv(i, I64(unit // 32)), kind.size))
            with e.loop(I64(16)) as (r, _):
                at = e.add(first, b.mul(r, stride))
                e.store(kind.scales(e, at), e.add(scales, e.mul(r, 64)))
                for j in range(unit // 64):
                    e.store(kind.codes(e, at, j), e.add(codes, e.mul(r, unit)), 64 * j)
            rows = [e.add(scales, 64 * r) for r in range(16)]
            by_sixteen = [
                e.cast(v, F32x16) for q in range(unit // 64) for v in e.transpose([e.add(row, 16 * q) for row in rows])
            ]
            block = e.add(panel, e.mul(i, PANEL_BLOCK))
            for j in range(unit // 16):
                to = e.add(block, j // 2 * PANEL_BLOCK)
                if j % 2 == 0:
                    put_scales(e, to, by_sixteen[j], by_sixteen[j + 1])
                for c, v in enumerate(e.transpose([e.add(codes, unit * r + 16 * j) for r in range(16)])):
                    put_columns(e, to, 4 * (j % 2) + c, v)

    unpack.__name__ = f"unpack_{kind.name}"
    unpack.__doc__ = "Sixteen rows into half a panel; see the module."
    return micro_kernel(4, rare=True)(unpack)


@cache
def dequantise_kernel(typ: int) -> Kernel:
    """Return the kernel ``(type, src, dst, n)`` that writes n elements as floats, as those of `DEQUANTISE` do."""
    kind = CODES[typ]

    def dequantise(e, _type, src, dst, n):
        b = e.b
        with e.loop(n, kind.unit) as (i, _):
            at, to = e.add(src, e.mul(b.udiv(i, I64(kind.unit)), kind.size)), e.add(dst, e.mul(i, 4))
            scales = kind.scales(e, at)
            for j in range(kind.unit // 64):
                codes = b.sub(kind.codes(e, at, j), e.const(U8x64, OFFSET))
                for part in range(4):
                    lanes = e.shuffle(codes, codes, list(range(16 * part, 16 * part + 16)))
                    ints = b.sext(e.cast(lanes, U8x16), I32x16)
                    scale = e.shuffle(scales, scales, [4 * j + part] * 16)
                    e.store(b.fmul(e.to_f32(ints), scale), to, 256 * j + 64 * part)

    dequantise.__name__ = f"dequantise_{kind.name}"
    dequantise.__doc__ = "A row as floats; see the module."
    return micro_kernel(4, rare=True)(dequantise)
