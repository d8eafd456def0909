"""Float weights: up to 4 rows times up to 4 tokens straight from memory, without a panel; activations stay floats."""

from __future__ import annotations

from .emit import I64, LANES, Emit, F16x16, F32x16, I16x16, ir
from .kernel import Kernel, micro_kernel
from .words import BF16, F16, F32

NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}
ELEMENT_BYTES = {F32: 4, F16: 2, BF16: 2}
MAX_ROWS = 4
MAX_TOKENS = 4


def load_floats(e: Emit, typ: int, at: ir.Value, mask: ir.Value | None = None) -> ir.Value:
    """Load 16 elements of a float type as floats."""
    if typ == F32:
        return e.load_lanes(F32x16, at, mask)
    bits = e.load_lanes(I16x16, at, mask)
    return e.to_f32(e.cast(bits, F16x16)) if typ == F16 else e.bf16_to_f32(bits)


def _rows_of(e: Emit, typ: int, n_rows: int, n_tokens: int, args: tuple[ir.Value, ...]) -> None:
    w, stride, k, xs, outs, out_offset = args
    b = e.b
    x = [e.load(I64, xs, 8 * t) for t in range(n_tokens)]
    rows = [w if r == 0 else e.add(w, e.mul(stride, r)) for r in range(n_rows)]
    unroll = 2 if n_rows * n_tokens <= 8 else 1  # two accumulators each, where registers allow
    acc = [[[e.zeros(F32x16) for _ in range(unroll)] for _ in x] for _ in rows]

    def step(i: ir.Value, mask: ir.Value | None, which: int) -> None:
        tokens = [e.load_lanes(F32x16, e.add(a, e.mul(i, 4)), mask) for a in x]
        at = e.mul(i, ELEMENT_BYTES[typ])
        for r, row in enumerate(rows):
            if which == 0 and mask is None:
                e.prefetch(row, e.add(at, 2048))
            v = load_floats(e, typ, e.add(row, at), mask)
            for t in range(n_tokens):
                p = acc[r][t][which % unroll]
                b.store(e.fma(v, tokens[t], b.load(p)), p)

    whole = b.and_(k, I64(-2 * LANES))
    with e.loop(whole, 2 * LANES) as (i, _):
        step(i, None, 0)
        step(e.add(i, LANES), None, 1)
    with e.loop(k, LANES, whole) as (i, _):  # at most twice
        step(i, e.lanes_below(b.sub(k, i)), 0)
    for t in range(n_tokens):
        out = e.add(e.load(I64, outs, 8 * t), out_offset)
        for r in range(n_rows):
            v = b.load(acc[r][t][0])
            for p in acc[r][t][1:]:
                v = b.fadd(v, b.load(p))
            e.store(e.sum(v), out, 4 * r)


def _make_rows(typ: int) -> Kernel:
    def rows(e, w, stride, n_rows, k, n_tokens, xs, outs, out_offset):
        args = (w, stride, k, xs, outs, out_offset)
        shape = e.add(e.mul(n_rows, MAX_TOKENS), e.add(n_tokens, -1))
        shapes = [(n_rows, n) for n_rows in (1, MAX_ROWS) for n in range(1, MAX_TOKENS + 1)]
        of = {r * MAX_TOKENS + n - 1: (r, n) for r, n in shapes}
        e.switch(shape, of, lambda key: _rows_of(e, typ, *of[key], args))

    rows.__name__ = f"rows_{NAMES[typ]}"
    rows.__doc__ = """``(w, stride, n_rows, k, n_tokens, xs, outs, out_offset)``: 1 or 4 rows times 1 to 4 tokens."""
    return micro_kernel(8)(rows)


#: Kernels by type.
ROWS = {typ: _make_rows(typ) for typ in NAMES}
