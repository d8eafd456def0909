"""Ops whose every result depends on one element of each source: UNARY, GLU, SCALE, CLAMP, ..., ADD, SUB, MUL, DIV.

Codes below 100 are those of `UnaryOp`; the rest are ours. Rows are cut into chunks, which threads share.
"""

from __future__ import annotations

from collections.abc import Callable

from .descriptor import repeated_row_address, row_address, share, sizes, word
from .emit import F32, Emit, F32x16, ir, micro, types
from .functions import V, exp, expm1, gelu, gelu_erf, gelu_quick, sigmoid, silu, tanh
from .kernel import device, op_kernel
from .memory import floats, ld_f32
from .words import DST, NB0, NE0, PARAM, SRC0, SRC1

#: Elements of a chunk: long enough that its start costs nothing, short enough to share a single row.
CHUNK = 4096

# -- maps of one source ----------------------------------------------------------------

(SQR, SQRT, LOG, SIN, COS, SCALE, CLAMP, LEAKY_RELU, FILL) = range(100, 109)

#: Parameters of `map_rows`: the code, then up to four floats.
CODE = PARAM

Map = Callable[[V, list[V]], V]


def _xielu(x: V, p: list[V]) -> V:
    alpha_n, alpha_p, beta, eps = p
    return (alpha_p * x * x + beta * x).where(x > 0.0, (expm1(x.least(eps)) - x) * alpha_n + beta * x)


def _hard(x: V) -> V:
    return ((x + 3.0) / 6.0).most(0.0).least(1.0)


MAPS: dict[int, Map] = {
    0: lambda x, p: x.apply("fabs"),
    1: lambda x, p: V(x.e, x.e.const(F32x16, 1.0)).where(x > 0.0, V(x.e, x.e.const(F32x16, -1.0)).where(x < 0.0, 0.0)),
    2: lambda x, p: -x,
    3: lambda x, p: V(x.e, x.e.const(F32x16, 1.0)).where(x > 0.0, 0.0),
    4: lambda x, p: tanh(x),
    5: lambda x, p: x.where(x > 0.0, expm1(x)),
    6: lambda x, p: x.where(x > 0.0, 0.0),
    7: lambda x, p: sigmoid(x),
    8: lambda x, p: gelu(x),
    9: lambda x, p: gelu_quick(x),
    10: lambda x, p: silu(x),
    11: lambda x, p: x * _hard(x),
    12: lambda x, p: _hard(x),
    13: lambda x, p: exp(x),
    14: lambda x, p: expm1(x),
    15: lambda x, p: x.where(x > 20.0, (1.0 + exp(x.least(20.0))).apply("log")),
    16: lambda x, p: gelu_erf(x),
    17: _xielu,
    18: lambda x, p: x.apply("floor"),
    19: lambda x, p: x.apply("ceil"),
    20: lambda x, p: x.apply("round"),
    21: lambda x, p: x.apply("trunc"),
    SQR: lambda x, p: x * x,
    SQRT: lambda x, p: x.apply("sqrt"),
    LOG: lambda x, p: x.apply("log"),
    SIN: lambda x, p: x.apply("sin"),
    COS: lambda x, p: x.apply("cos"),
    SCALE: lambda x, p: x * p[0] + p[1],
    CLAMP: lambda x, p: x.most(p[0]).least(p[1]),
    LEAKY_RELU: lambda x, p: x.where(x > 0.0, x * p[0]),
    FILL: lambda x, p: p[0],
}


@micro(types.void, 5)
def _map(e, code, x, y, n, params):
    p = [V(e, e.splat(e.load(F32, params, 8 * i))) for i in range(4)]

    def write(case: int) -> None:
        def body(i: ir.Value, mask: ir.Value | None) -> None:
            at = e.mul(i, 4)
            v = V(e, e.load_lanes(F32x16, e.add(x, at), mask))
            e.store_lanes(MAPS[case](v, p).v, e.add(y, at), mask)

        e.vectors(n, body)

    e.switch(code, MAPS, write)


@op_kernel
def map_rows(ith, nth, d, ctl):
    """Apply a function of one float to each element."""
    n, ne1, ne2, ne3 = sizes(d, DST)
    chunks = (n + CHUNK - 1) // CHUNK
    first, end = share(ne1 * ne2 * ne3 * chunks, ith, nth)
    code = word(d, CODE)
    for unit in range(first, end):
        row = unit // chunks
        start = (unit - row * chunks) * CHUNK
        x, y = row_address(d, SRC0, row, ne1, ne2), row_address(d, DST, row, ne1, ne2)
        _map(code, x + 4 * start, y + 4 * start, min(CHUNK, n - start), d + 8 * (CODE + 1))


# -- GLU: a gate times a value ------------------------------------------------------------

#: Parameters: the code of `GluOp`, bytes from a row's start to its gate, the same of the value, alpha, limit.
GATE_AT, VALUE_AT, ALPHA, LIMIT = PARAM + 1, PARAM + 2, PARAM + 3, PARAM + 4

GLUS: dict[int, Callable[[V, V, V, V], V]] = {
    0: lambda gate, value, alpha, limit: gate.where(gate > 0.0, 0.0) * value,
    1: lambda gate, value, alpha, limit: gelu(gate) * value,
    2: lambda gate, value, alpha, limit: silu(gate) * value,
    3: lambda gate, value, alpha, limit: (
        gate.least(limit) / (1.0 + exp(-(alpha * gate.least(limit)))) * (value.least(limit).most(-limit) + 1.0)
    ),
    4: lambda gate, value, alpha, limit: gelu_erf(gate) * value,
    5: lambda gate, value, alpha, limit: gelu_quick(gate) * value,
    6: lambda gate, value, alpha, limit: silu(gate.least(limit)) * value.least(limit).most(-limit),
}


@micro(types.void, 6)
def _glu(e, code, gate, value, y, n, params):
    alpha, limit = (V(e, e.splat(e.load(F32, params, 8 * i))) for i in range(2))

    def write(case: int) -> None:
        def body(i: ir.Value, mask: ir.Value | None) -> None:
            at = e.mul(i, 4)
            g, v = (V(e, e.load_lanes(F32x16, e.add(a, at), mask)) for a in (gate, value))
            e.store_lanes(GLUS[case](g, v, alpha, limit).v, e.add(y, at), mask)

        e.vectors(n, body)

    e.switch(code, GLUS, write)


@op_kernel
def glu_rows(ith, nth, d, ctl):
    """Multiply a function of the gate with the value; src1 is the value, or src0 again."""
    n, ne1, ne2, ne3 = sizes(d, DST)
    chunks = (n + CHUNK - 1) // CHUNK
    first, end = share(ne1 * ne2 * ne3 * chunks, ith, nth)
    gate_at, value_at, code = word(d, GATE_AT), word(d, VALUE_AT), word(d, CODE)
    for unit in range(first, end):
        row = unit // chunks
        start = (unit - row * chunks) * CHUNK
        gate, value = row_address(d, SRC0, row, ne1, ne2) + gate_at, row_address(d, SRC1, row, ne1, ne2) + value_at
        y = row_address(d, DST, row, ne1, ne2)
        _glu(code, gate + 4 * start, value + 4 * start, y + 4 * start, min(CHUNK, n - start), d + 8 * ALPHA)


# -- two sources, the second repeated ---------------------------------------------------------

ADD, SUB, MUL, DIV = range(4)


def _join(e: Emit, case: int, a: ir.Value, b: ir.Value) -> ir.Value:
    return (e.b.fadd, e.b.fsub, e.b.fmul, e.b.fdiv)[case](a, b)


@micro(types.void, 5)
def join_row(e, code, a, b, y, n):
    """``y = a op b`` for n elements."""

    def write(case: int) -> None:
        def body(i: ir.Value, mask: ir.Value | None) -> None:
            at = e.mul(i, 4)
            left, right = (e.load_lanes(F32x16, e.add(x, at), mask) for x in (a, b))
            e.store_lanes(_join(e, case, left, right), e.add(y, at), mask)

        e.vectors(n, body)

    e.switch(code, range(4), write)


@micro(types.void, 5)
def _join_one(e, code, a, b, y, n):
    right = e.splat(e.load(F32, b))

    def write(case: int) -> None:
        def body(i: ir.Value, mask: ir.Value | None) -> None:
            at = e.mul(i, 4)
            left = e.load_lanes(F32x16, e.add(a, at), mask)
            e.store_lanes(_join(e, case, left, right), e.add(y, at), mask)

        e.vectors(n, body)

    e.switch(code, range(4), write)


@device
def _join_strided(code, a, b, nb10, ne10, y, start, n):
    left, out = floats(a), floats(y)
    for i in range(n):
        right = ld_f32(b + (start + i) % ne10 * nb10)
        if code == ADD:
            out[i] = left[i] + right
        elif code == SUB:
            out[i] = left[i] - right
        elif code == MUL:
            out[i] = left[i] * right
        else:
            out[i] = left[i] / right


@op_kernel
def join_rows(ith, nth, d, ctl):
    """Join src0 with src1, repeated over any dimension."""
    n, ne1, ne2, ne3 = sizes(d, DST)
    ne10, nb10 = word(d, SRC1 + NE0), word(d, SRC1 + NB0)
    chunks = (n + CHUNK - 1) // CHUNK if ne10 == n else 1
    per = (n + chunks - 1) // chunks
    first, end = share(ne1 * ne2 * ne3 * chunks, ith, nth)
    code = word(d, CODE)
    for unit in range(first, end):
        row = unit // chunks
        start = (unit - row * chunks) * per
        a, y = row_address(d, SRC0, row, ne1, ne2) + 4 * start, row_address(d, DST, row, ne1, ne2) + 4 * start
        b = repeated_row_address(d, SRC1, row % ne1, row // ne1 % ne2, row // (ne1 * ne2))
        count = min(per, n - start)
        if ne10 == 1:
            _join_one(code, a, b, y, count)
        elif nb10 != 4:
            _join_strided(code, a, b, nb10, ne10, y, start, count)
        elif ne10 == n:
            join_row(code, a, b + 4 * start, y, count)
        else:
            for i in range(0, n, ne10):
                join_row(code, a + 4 * i, b, y + 4 * i, ne10)
