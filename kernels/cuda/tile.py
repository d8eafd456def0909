"""The matrix product for many tokens: tiles of one expert's rows and `COLUMNS` of its tokens, all in one launch.

`rows.group_ids` sorts the tokens by expert on the device. Quantised weights are decoded to signed bytes in shared
memory once for all columns of a tile, and multiplied by dp4a; `float_tile` has the kernels for floats.
"""

from __future__ import annotations

from typing import Any

from .formats import Format, Text
from .source import Kernel, Param, indent

THREADS = 128
#: tokens of a tile
COLUMNS = 32

# quantised: 128 rows, 8 x 4 results a thread; a stage is two blocks of 32 values
ROWS = 128
TM, TN = 8, 4
STAGE = 2
#: bytes of a block in shared memory: 8 words, then its factors, then nothing, for 16-byte loads
BLOCK = 48
#: words of a row: two blocks and a gap. 28 times r modulo 32 differs by at least 4 for any 8 neighbouring rows, so that
#: 16-byte loads have no bank conflicts.
PITCH = BLOCK // 4 * STAGE + 4

#: 1.5 * 2**23 as bits and as a value: the float of these bits plus n is the value plus n, for any |n| < 2**22
MAGIC, MAGIC_VALUE = 0x4B400000, 12582912

_HEAD = """
t = u32(cuda.threadIdx.x)
place = u32(cuda.blockIdx.y)
expert = ld_u32(tiles + u64(place) * u64(4))
if expert == u32(0xFFFFFFFF):
    return
first = ld_u32(bounds + u64(expert) * u64(4))
last = u32(ld_u32(bounds + u64(expert) * u64(4) + u64(4)) - u32(1))
column0 = u32(first + u32(u32(place - expert - u32(first >> u32({shift}))) * u32({columns})))
row0 = u32(u32(cuda.blockIdx.x) * u32({rows}))
wexpert = w + u64(expert) * nb02
"""
_COMMON = ("w", "nb01", "nb02", "row_src", "row_dst", "bounds", "tiles", "dst", "nbd", "n_row:u32")


def head(rows: int) -> Text:
    """Return what finds the tile of a block: its expert, first column and row; ends where there is none."""
    shift = COLUMNS.bit_length() - 1
    return _HEAD.format(rows=rows, columns=COLUMNS, shift=shift).strip().split("\n")


def params(*more: str) -> tuple[Param, ...]:
    """Return the parameters of a tile kernel."""
    return tuple(Param.of(p) for p in (*_COMMON, *more))


def row_address(p: str, row: str) -> Text:
    """Rows past the last are read as the last: nothing of them is stored."""
    return [f"{p}row = min(u32(row0 + {row}), u32(n_row - u32(1)))", f"{p}wrow = wexpert + u64({p}row) * nb01"]


def column_source(column: str) -> Text:
    """Find the row of activations of a column; past the last it is the last."""
    return [f"column = min(u32(column0 + {column}), last)", "source = ld_u32(row_src + u64(column) * u64(4))"]


def write(rows: int, columns: Text, row: str, steps: list[int]) -> Text:
    """Write the results: whole tiles without a question for each row."""
    text: Text = []
    for j, column in enumerate(columns):
        text += [
            f"column = u32(column0 + {column})",
            "if column <= last:",
            f"    to = dst + u64(ld_u32(row_dst + u64(column) * u64(4))) * nbd + u64(u32(row0 + {row})) * u64(4)",
            f"    if u32(row0 + u32({rows})) <= n_row:",
            *(f"        st_f32(to + u64({4 * step}), results[{len(columns) * i + j}])" for i, step in enumerate(steps)),
            "    else:",
        ]
        for i, step in enumerate(steps):
            text += [
                f"        if u32(row0 + {row} + u32({step})) < n_row:",
                f"            st_f32(to + u64({4 * step}), results[{len(columns) * i + j}])",
            ]
    return text


# -- quantised -------------------------------------------------------------------


class _Staging:
    """How the weights of a stage are loaded, taken apart and put into shared memory.

    Attributes
    ----------
    where, load, store : list of str
        Before the loop; for the stage that begins at block ``kb``; after both.
    """

    def __init__(self, fmt: Format, *, is_steady: bool) -> None:
        self.fmt, self.is_steady = fmt, is_steady
        lanes = {"block": 2, "half": 4, "pair": 2, "q6": 2}[fmt.tile]  # of one row
        self.where = [f"piece = u32(t & u32({lanes - 1}))", f"wr = u32(t >> u32({lanes.bit_length() - 1}))"]
        self.load: Text = []
        self.store: Text = []
        self.factors: Text = []
        if self.is_steady:
            self.where.append("u = piece")
            self.load.append(f"off = u64(kc) * u64({fmt.block_bytes})")
        else:
            self.load += ["off = u64(0)", f"u = u32({'u32(kc << u32(1))' if fmt.tile == 'half' else 'kc'} + piece)"]
        halves = f"u32(u32(piece >> u32(1)) * u32({BLOCK})) + u32(u32(piece & u32(1)) << u32(4))"
        place = {"block": f"piece * u32({BLOCK})", "half": halves}.get(fmt.tile, "piece << u32(4)")
        for i in range(ROWS * lanes // THREADS):
            p, row = f"p{i}_", f"u32(wr + u32({i * THREADS // lanes}))"
            self.where += [
                *row_address(p, row),
                f"{p}to = keep(sw + u64(u32({row} * u32({4 * PITCH}))) + u64(u32({place})))",
            ]
            self._unit(p)
        first = "piece & u32(1) == u32(0)" if fmt.tile == "half" else ""
        self.store += [f"if {first}:", *indent(self.factors)] if first else self.factors

    def _unit(self, p: str) -> None:
        fmt, unit = self.fmt, self.fmt.unit(p)
        (self.where if self.is_steady else self.load).extend([f"{p}u = u", *unit.aim])
        if self.is_steady:
            made = {line.split(" = ")[0] for line in unit.aim}
            self.where += [f"{n} = keep({n})" for n in (f"{p}at", f"{p}q_low", f"{p}q_last") if n in made]
        self.load += unit.load
        self.store += unit.decode
        words = [w for g in unit.groups for w in g.words]
        for k in range(0, len(words), 4):
            at = BLOCK * k // 4 if fmt.tile in ("pair", "q6") else 4 * k
            self.store.append(f"sts4_u32({p}to + u64({at}), {', '.join(words[k : k + 4])})")
        if fmt.tile == "q6":  # the factor of half h lies in word h behind the block: 16 bytes of quants become 4
            at = f"{p}to - u64(piece * u32(12))"
            self.factors += [f"sts_f32({at} + u64({32 + BLOCK * k}), {p}d{k})" for k in range(2)]
            return
        # of a pair, each half takes care of one block's factors
        scale = f"({p}d0 if piece == u32(0) else {p}d1)" if fmt.tile == "pair" else f"{p}d"
        place = f"{p}to + u64(32)"
        if fmt.tile == "pair":
            place += f" + u64(piece * u32({BLOCK - 16}))"
        if unit.minimum:
            self.factors.append(f"sts2_f32({place}, {scale}, {unit.minimum})")
        else:
            self.factors.append(f"sts_f32({place}, {scale})")


def _y_stage(fmt: Format) -> tuple[Text, Text, Text]:
    """Return what comes before the loop, the loads and the stores of a stage of activations: 16 bytes a lane."""
    unit = fmt.unit()
    apart = 2 if fmt.tile == "q6" else 1  # the two blocks of a stage
    where = [
        "yc = u32(t >> u32(2))",
        "yp = u32(t & u32(3))",
        "yb = u32(yp >> u32(1))",
        "yh = u32(yp & u32(1))",
        *column_source("yc"),
        f"ysrc = yq + u64(source) * u64(n_block) * u64(32) + u64(u32(yb * u32({32 * apart})) + u32(yh << u32(4)))",
        f"dsrc = yd + u64(source) * u64(n_block) * u64(8) + u64(yb * u32({8 * apart}))",
        f"yto = sy + u64(yc * u32({4 * PITCH})) + u64(yb * u32({BLOCK}))",
        "yto = keep(yto + u64(yh << u32(4)))",
        "ysrc = keep(ysrc)",
        "dsrc = keep(dsrc)",
    ]
    load = [
        "ky = kc",
        "g0, g1, g2, g3 = ld4_u32(ysrc + u64(ky) * u64(32))",
        "gd, gs = ld2_f32(dsrc + u64(ky) * u64(8))",
        # where the last stage steps back to be whole, its first block was counted before
        "gz = (kc < kb) and (yp < u32(2))",
    ]
    if fmt.tile == "q6":
        # stages of blocks 0 and 2, 1 and 3, 4 and 6, 5 and 7; rows are whole stages
        load[0] = "ky = u32(u32(kc & u32(0xFFFFFFFC)) | u32(u32(kc >> u32(1)) & u32(1)))"
        load[-1] = "gz = False"
        start = f"u32({MAGIC:#x})"
        for k in range(4):
            start = f"dp4a(g{k}, u32({256 - unit.offset} * 0x01010101), {start})"
        store = [
            "sts4_u32(yto, g0, g1, g2, g3)",
            # of each half its own, behind the factor
            f"sts_f32(yto + u64(36) - u64(yh * u32(12)), as_f32(u32({start})))",
            "if yh == u32(0):",
            "    sts_f32(yto + u64(32), gd)",
        ]
        return where, load, store
    second = "f32(0)"
    if unit.minimum:
        second = "ge * gs"
    elif unit.offset:
        second = f"as_f32(u32(u32({MAGIC:#x}) - u32(libdevice.float2int_rn(gs) * i32({unit.offset}))))"
    store = [
        "sts4_u32(yto, g0, g1, g2, g3)",
        "if yh == u32(0):",
        "    ge = f32(0) if gz else gd",
        f"    sts2_f32(yto + u64(32), ge, {second})",
    ]
    return where, load, store


def _multiply_quantized(fmt: Format) -> dict[str, Any]:
    """Return the intrinsics that add what the stage in shared memory gives to a thread's results."""
    from llvmlite import ir

    from .intrinsics import F32, I32, emit_dp4a, emit_dp4a_fma, shared_load

    unit = fmt.unit()
    by_halves = fmt.tile == "q6"
    two_factors = bool(unit.minimum) or by_halves

    def words(builder: Any, at: Any, row: int) -> list[Any]:
        halves = (shared_load(builder, at, 4 * (row * PITCH + k), I32, 4) for k in (0, 4))
        return [w for half in halves for w in half]

    def emit(builder: Any, results: list[Any], wat: Any, yat: Any) -> list[Any]:
        y_factors = [shared_load(builder, yat, 4 * 8 * j * PITCH + 32, F32, 4 if by_halves else 2) for j in range(TN)]
        scales = [y[0] for y in y_factors]
        minus = [builder.fmul(d, ir.Constant(F32, -float(MAGIC_VALUE))) for d in scales]
        ys = [words(builder, yat, 8 * j) for j in range(TN)]

        def start(j: int, half: int) -> Any:
            return builder.bitcast(y_factors[j][1 + half], I32) if unit.offset else ir.Constant(I32, MAGIC)

        def dot(xs: list[Any], j: int, chosen: range) -> Any:
            chain = start(j, chosen[0] // 4)
            for k in chosen[:-1]:
                chain = emit_dp4a(builder, xs[k], ys[j][k], chain)
            k = chosen[-1]
            return emit_dp4a_fma(builder, xs[k], ys[j][k], chain, scales[j], minus[j])

        for i in range(TM):
            xs = words(builder, wat, 16 * i)
            factors = shared_load(builder, wat, 4 * 16 * i * PITCH + 32, F32, 2 if two_factors else 1)
            for j in range(TN):
                n = TN * i + j
                if by_halves:  # a factor for each half of a block
                    for h in range(2):
                        part = dot(xs, j, range(4 * h, 4 * h + 4))
                        results[n] = builder.fadd(results[n], builder.fmul(factors[h], part))
                    continue
                results[n] = builder.fadd(results[n], builder.fmul(factors[0], dot(xs, j, range(8))))
                if unit.minimum:
                    results[n] = builder.fadd(results[n], builder.fmul(factors[1], y_factors[j][1]))
        return results

    return accumulating(emit, TM * TN)


def accumulating(emit: Any, n: int) -> dict[str, Any]:
    """Return intrinsics for ``n`` results in a tuple: ``zeros()`` and ``multiply(results, weights, activations)``."""
    from numba import types as T

    from .intrinsics import F32, instruction

    kind = T.UniTuple(T.float32, n)

    @instruction(kind, kind, T.uint64, T.uint64)
    def multiply(builder, results, w, y):
        return emit(builder, [builder.extract_value(results, k) for k in range(n)], w, y)

    @instruction(kind)
    def zeros(builder):
        return [F32(0.0)] * n

    return {"multiply": multiply, "zeros": zeros}


def quantized(fmt: Format, *, odd: bool = False) -> Kernel:
    """Return the kernel for a quantised weight type.

    Notes
    -----
    Grid (rows / `ROWS`, places of `rows.group_ids`), block `THREADS`; rows of at least two blocks. The next stage is
    not loaded ahead: the registers go to more blocks side by side, which hide each other's waiting. ``odd``: also for
    rows of an odd number of blocks, whose last stage steps back by one and may be aligned differently.
    """
    staging = _Staging(fmt, is_steady=fmt.is_steady(1 if odd else STAGE))
    y_where, y_load, y_store = _y_stage(fmt)
    stage = [f"kc = min(kb, u32(n_block - u32({STAGE})))", *staging.load, *y_load]
    body = [
        f"sw = shared_address(cuda.shared.array({ROWS * PITCH}, u32, alignment=16))",
        f"sy = shared_address(cuda.shared.array({COLUMNS * PITCH}, u32, alignment=16))",
        *head(ROWS),
        *staging.where,
        *y_where,
        "tm = u32(t & u32(15))",
        "tn = u32(t >> u32(4))",
        f"wat = keep(sw + u64(tm * u32({4 * PITCH})))",
        f"yat = keep(sy + u64(tn * u32({4 * PITCH})))",
        "results = zeros()",
        "kb = u32(0)",
        "while kb < n_block:",
        *indent(
            [
                *stage,
                *staging.store,
                *y_store,
                "cuda.syncthreads()",
                # a loop of two turns, which nobody unrolls: registers for one block of activations are enough
                "b = u64(0)",
                f"while b < u64({BLOCK * STAGE}):",
                "    results = multiply(results, wat + b, yat + b)",
                f"    b += u64({BLOCK})",
                "cuda.syncthreads()",
                f"kb = u32(kb + u32({STAGE}))",
            ]
        ),
    ]
    columns = [f"tn + u32({8 * j})" for j in range(TN)]
    body += write(ROWS, columns, "tm", [16 * i for i in range(TM)])
    return Kernel(
        f"tile_{fmt.name}" + ("_odd" if odd else ""),
        params("yq", "yd", "n_block:u32"),
        body,
        THREADS,
        lambda: _multiply_quantized(fmt),
        blocks=3,
    )
