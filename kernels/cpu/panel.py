"""Products of many tokens: 32 rows of weights unpacked into a panel, which stays in L2, times up to 6 tokens at once.

A panel holds for each block of 32 columns: bytes [8][32 rows][4 columns], unsigned; 32 scales; 32 minima, negated
(f32). Lanes are rows, so scales are vectors and nothing is summed across lanes. A tile of 32 rows x 6 tokens keeps 12
int32 and 12 float accumulators in registers.
"""

from __future__ import annotations

from collections.abc import Callable

from .emit import F32, I32, I64, Emit, F32x16, I32x16, U8x64, ir
from .kernel import Kernel, micro_kernel

#: Bytes of a panel's block: bytes, scales, minima.
PANEL_BLOCK = 1024 + 128 + 128
SCALES_AT, MINIMA_AT = 1024, 1152
#: Tokens of the widest tile; more accumulators do not fit 32 registers.
TILE_TOKENS = 6
#: The same with 16 registers, of 32 or 16 bytes: so many at a time.
NARROW_TOKENS = 3
ROWS = 32


def row_addresses(e: Emit, w: ir.Value, stride: ir.Value) -> list[ir.Value]:
    """Return the addresses of 16 rows."""
    return [w if r == 0 else e.add(w, e.mul(stride, r)) for r in range(16)]


def put_columns(e: Emit, block: ir.Value, i: int, v: ir.Value) -> None:
    """Store columns 4i .. 4i+3 of 16 rows."""
    e.store(e.cast(v, U8x64), block, 128 * i)


def put_scales(e: Emit, block: ir.Value, scales: ir.Value, minima: ir.Value | None) -> None:
    """Store 16 rows' scales, and what is added for each unit of the activations' sum."""
    e.store(scales, block, SCALES_AT)
    if minima is not None:
        e.store(minima, block, MINIMA_AT)


def _tile_of(e: Emit, n_tokens: int, has_minima: bool, args: tuple[ir.Value, ...]) -> None:
    panel, n_blocks, xs, outs, out_offset, ahead, step = args
    b, n4 = e.b, e.mul(n_blocks, 4)
    x = [e.load(I64, xs, 8 * t) for t in range(n_tokens)]
    scales = [e.add(a, e.mul(n_blocks, 32)) for a in x]
    sums = [e.zeros(F32x16) for _ in range(2 * n_tokens)]
    with e.loop(n_blocks) as (i, _):
        block, i4, i32 = e.add(panel, e.mul(i, PANEL_BLOCK)), e.mul(i, 4), e.mul(i, 32)
        far = e.add(ahead, e.mul(i, step))
        for line in range(9 if has_minima else 17):  # the next 32 rows' bytes of this block, into L2
            e.prefetch(far, 64 * line, level=2)
        if has_minima:
            starts = [e.const(I32x16, 0)] * n_tokens
        else:
            starts = [e.splat(e.load(I32, e.add(e.add(s, n4), i4))) for s in scales]
        acc = [start for start in starts for _ in range(2)]
        for column in range(8):
            w = [e.load(U8x64, block, 128 * column + 64 * half) for half in range(2)]
            for t in range(n_tokens):
                v = e.cast(e.splat(e.load(I32, e.add(x[t], i32), 4 * column)), U8x64)
                for half in range(2):
                    acc[2 * t + half] = e.dpbusd(acc[2 * t + half], w[half], v)
        dw = [e.load(F32x16, block, SCALES_AT + 64 * half) for half in range(2)]
        for t in range(n_tokens):
            dx = e.splat(e.load(F32, e.add(scales[t], i4)))
            for half in range(2):
                p = 2 * t + half
                f = e.fma(e.to_f32(acc[p]), b.fmul(dw[half], dx), b.load(sums[p]))
                if has_minima:
                    x_sum = e.splat(e.load(F32, e.add(e.add(scales[t], e.mul(n4, 3)), i4)))
                    f = e.fma(e.load(F32x16, block, MINIMA_AT + 64 * half), x_sum, f)
                b.store(f, sums[p])
    for t in range(n_tokens):
        out = e.add(e.load(I64, outs, 8 * t), out_offset)
        for half in range(2):
            e.store(b.load(sums[2 * t + half]), out, 64 * half)


def _tile_of_halves(e: Emit, n_tokens: int, args: tuple[ir.Value, ...]) -> None:
    """As `_tile_of`, each block in two halves of 16 columns with scales and starts of their own."""
    panel, n_blocks, xs, outs, out_offset, ahead, step = args
    b = e.b
    x = [e.load(I64, xs, 8 * t) for t in range(n_tokens)]
    scales = [e.add(a, e.mul(n_blocks, 32)) for a in x]
    sums = [e.zeros(F32x16) for _ in range(2 * n_tokens)]
    with e.loop(n_blocks) as (i, _):
        block, i4, i32 = e.add(panel, e.mul(i, PANEL_BLOCK)), e.mul(i, 4), e.mul(i, 32)
        far = e.add(ahead, e.mul(i, step))
        for line in range(14):
            e.prefetch(far, 64 * line, level=2)
        dx = [e.splat(e.load(F32, e.add(s, i4))) for s in scales]
        for part, scales_at in enumerate((SCALES_AT, MINIMA_AT)):
            quarters = [e.load(I32, e.add(e.add(s, e.mul(n_blocks, 4)), e.mul(i, 8)), 4 * part) for s in scales]
            acc = [start for q in quarters for start in [e.splat(b.shl(q, I32(2)))] * 2]
            for column in range(4 * part, 4 * part + 4):
                w = [e.load(U8x64, block, 128 * column + 64 * half) for half in range(2)]
                for t in range(n_tokens):
                    v = e.cast(e.splat(e.load(I32, e.add(x[t], i32), 4 * column)), U8x64)
                    for half in range(2):
                        acc[2 * t + half] = e.dpbusd(acc[2 * t + half], w[half], v)
            dw = [e.load(F32x16, block, scales_at + 64 * half) for half in range(2)]
            for p, ints in enumerate(acc):
                b.store(e.fma(e.to_f32(ints), b.fmul(dw[p % 2], dx[p // 2]), b.load(sums[p])), sums[p])
    for t in range(n_tokens):
        out = e.add(e.load(I64, outs, 8 * t), out_offset)
        for half in range(2):
            e.store(b.load(sums[2 * t + half]), out, 64 * half)


def _make_tile(name: str, write: Callable[[Emit, int, tuple[ir.Value, ...]], None]) -> Kernel:
    def tile(e, n_tokens, *args):
        if e.has("avx512f"):
            e.switch(n_tokens, range(1, TILE_TOKENS + 1), lambda n: write(e, n, args))
            return
        panel, n_blocks, xs, outs, out_offset, ahead, step = args
        b = e.b
        with e.loop(n_tokens, NARROW_TOKENS) as (t, _):
            at, is_first = e.mul(t, 8), b.icmp_signed("==", t, I64(0))
            fetched = [b.select(is_first, v, other) for v, other in ((ahead, panel), (step, I64(0)))]
            own = (panel, n_blocks, e.add(xs, at), e.add(outs, at), out_offset, *fetched)
            left = b.sub(n_tokens, t)
            n = b.select(b.icmp_signed("<", left, I64(NARROW_TOKENS)), left, I64(NARROW_TOKENS))
            e.switch(n, range(1, NARROW_TOKENS + 1), lambda n: write(e, n, own))

    tile.__name__ = name
    tile.__doc__ = (
        "``(n_tokens, panel, n_blocks, xs, outs, out_offset, ahead, step)``: a panel times 1 to 6 tokens.\n\n"
        "    xs, outs : addresses of the tokens' quantised rows, and of where their results go, less out_offset.\n"
        "    ahead, step : where the next 32 rows lie, bytes of them for a block; fetched meanwhile.\n    "
    )
    return micro_kernel(8)(tile)


tile_plain = _make_tile("tile_plain", lambda e, n, args: _tile_of(e, n, False, args))
tile_minima = _make_tile("tile_minima", lambda e, n, args: _tile_of(e, n, True, args))
tile_halves = _make_tile("tile_halves", _tile_of_halves)
