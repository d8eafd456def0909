"""Float weights: rows times up to 4 tokens straight from memory, without a panel; activations stay floats.

For one or two tokens rows are read one after another, with several accumulators each: twice as fast as four rows at
once, because memory is slower with four streams. For more tokens, four rows share the loaded activations.
"""

from __future__ import annotations

from .emit import I64, LANES, Emit, F16x16, F32x16, I16x16, ir
from .kernel import Kernel, micro_kernel
from .words import BF16, F16, F32

NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}
ELEMENT_BYTES = {F32: 4, F16: 2, BF16: 2}
#: How far ahead rows are fetched. One at a time some processors fetch by themselves (`Emit.streams_alone`), a fifth
#: faster on AMD's.
PREFETCH_BYTES = 2048
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
    unroll = max(1, min(4, 16 // (n_rows * n_tokens)))  # accumulators of each product, where registers allow
    per_step = max(2, unroll)  # vectors
    acc = [[[e.zeros(F32x16) for _ in range(unroll)] for _ in x] for _ in rows]

    def step(i: ir.Value, mask: ir.Value | None, which: int) -> None:
        tokens = [e.load_lanes(F32x16, e.add(a, e.mul(i, 4)), mask) for a in x]
        at = e.mul(i, ELEMENT_BYTES[typ])
        for r, row in enumerate(rows):
            if (n_rows > 1 or not e.streams_alone) and mask is None and which * LANES * ELEMENT_BYTES[typ] % 64 == 0:
                e.prefetch(row, e.add(at, PREFETCH_BYTES))
            v = load_floats(e, typ, e.add(row, at), mask)
            for t in range(n_tokens):
                p = acc[r][t][which % unroll]
                b.store(e.fma(v, tokens[t], b.load(p)), p)

    whole = b.and_(k, I64(-per_step * LANES))
    with e.loop(whole, per_step * LANES) as (i, _):
        for which in range(per_step):
            step(e.add(i, LANES * which), None, which)
    with e.loop(k, LANES, whole) as (i, _):  # the rest, fewer than per_step times
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
        together = e.b.icmp_signed("==", n_rows, n_rows.type(MAX_ROWS))

        def tokens(n: int) -> None:
            with e.b.if_else(together) as (four, others):
                with four:
                    _rows_of(e, typ, MAX_ROWS, n, (w, stride, k, xs, outs, out_offset))
                with others, e.loop(n_rows) as (r, _):
                    at, to = e.add(w, e.mul(stride, r)), e.add(out_offset, e.mul(r, 4))
                    _rows_of(e, typ, 1, n, (at, stride, k, xs, outs, to))

        e.switch(n_tokens, range(1, MAX_TOKENS + 1), tokens)

    rows.__name__ = f"rows_{NAMES[typ]}"
    rows.__doc__ = """Take ``(w, stride, n_rows, k, n_tokens, xs, outs, out_offset)``: rows times 1 to 4 tokens.

    Four rows are taken together, any other number one after another, which is how memory is read fastest.
    """
    return micro_kernel(8)(rows)


#: Kernels by type.
ROWS = {typ: _make_rows(typ) for typ in NAMES}
