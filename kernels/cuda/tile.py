"""The matrix product for many tokens: tiles of one expert's rows by `COLUMNS` of its tokens, all in one launch.

Which tokens an expert has was laid out by `rows.group_ids`, on the device. Quantised weights are taken apart into signed
bytes in shared memory once for all columns of a tile, and multiplied by dp4a; floats by fused multiply-adds.
"""

from __future__ import annotations

from typing import Any

from .formats import Format, Text
from .mmvq import float_scalar, float_words
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

# floats: 128 rows, 8 x 4 results a thread, 16 values a stage, both tiles transposed
FLOAT_STAGE = 16
FLOAT_PITCH_W, FLOAT_PITCH_Y = ROWS + 4, COLUMNS + 4

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


def _head(rows: int) -> Text:
    shift = COLUMNS.bit_length() - 1
    return _HEAD.format(rows=rows, columns=COLUMNS, shift=shift).strip().split("\n")


def _params(*more: str) -> tuple[Param, ...]:
    return tuple(Param.of(p) for p in (*_COMMON, *more))


def _row_address(p: str, row: str) -> Text:
    """Rows past the last are read as the last: nothing of them is stored."""
    return [f"{p}row = min(u32(row0 + {row}), u32(n_row - u32(1)))", f"{p}wrow = wexpert + u64({p}row) * nb01"]


def _column_source(column: str) -> Text:
    return [f"column = min(u32(column0 + {column}), last)", "source = ld_u32(row_src + u64(column) * u64(4))"]


def _write(rows: int, columns: Text, row: str, steps: list[int]) -> Text:
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
                *_row_address(p, row),
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
        *_column_source("yc"),
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

    return _accumulating(emit, TM * TN)


def _accumulating(emit: Any, n: int) -> dict[str, Any]:
    """Return intrinsics for ``n`` results in a tuple: ``zeros()`` and ``multiply(results, weights, activations)``."""
    from numba import types as T
    from numba.cuda.extending import intrinsic

    from .intrinsics import F32

    results_type = T.UniTuple(T.float32, n)

    def multiply(typingctx, results, w, y):
        def codegen(context, builder, sig, args):
            values = [builder.extract_value(args[0], k) for k in range(n)]
            return context.make_tuple(builder, sig.return_type, emit(builder, values, *args[1:]))

        return results_type(results_type, T.uint64, T.uint64), codegen

    def zeros(typingctx):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, [F32(0.0)] * n)

        return results_type(), codegen

    return {"multiply": intrinsic(multiply), "zeros": intrinsic(zeros)}


def quantized(fmt: Format, *, odd: bool = False) -> Kernel:
    """Return the kernel for a quantised weight type.

    Notes
    -----
    Grid (rows / `ROWS`, places of `rows.group_ids`), block `THREADS`; rows of at least two blocks. The next stage is not
    loaded ahead: the registers go to more blocks side by side, which hide each other's waiting. ``odd``: also for rows
    of an odd number of blocks, whose last stage steps back by one and may be aligned differently.
    """
    staging = _Staging(fmt, is_steady=fmt.is_steady(1 if odd else STAGE))
    y_where, y_load, y_store = _y_stage(fmt)
    stage = [f"kc = min(kb, u32(n_block - u32({STAGE})))", *staging.load, *y_load]
    body = [
        f"sw = shared_address(cuda.shared.array({ROWS * PITCH}, u32, alignment=16))",
        f"sy = shared_address(cuda.shared.array({COLUMNS * PITCH}, u32, alignment=16))",
        *_head(ROWS),
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
    body += _write(ROWS, columns, "tm", [16 * i for i in range(TM)])
    params = _params("yq", "yd", "n_block:u32")
    return Kernel(
        f"tile_{fmt.name}" + ("_odd" if odd else ""), params, body, THREADS, lambda: _multiply_quantized(fmt), blocks=3
    )


# -- floats ----------------------------------------------------------------------


class _FloatStaging:
    """How a stage of floats is loaded and put into shared memory: 16 bytes a lane, or a value a lane.

    Attributes
    ----------
    where : list of str
        Before the loop.
    load, load_last : list of str
        The loads of a whole stage at ``k0``, and of one that the rows may end in.
    store : list of str
        What was loaded goes to shared memory.
    """

    def __init__(self, type: str, *, wide: bool) -> None:
        self.type, self.wide = type, wide
        self.size = 4 if type == "f32" else 2
        self.where: Text = []
        self.load: Text = []
        self.load_last: Text = []
        self.store: Text = []
        self._place("w", 16 // self.size if wide else 1)
        for i, row in enumerate(self._rows("w", ROWS)):
            self.where += [*_row_address(f"w{i}_", row), f"w{i}_wrow = keep(w{i}_wrow + u64(wk * u32({self.size})))"]
            self._weights(f"w{i}_", i)
        self._place("y", 4 if wide else 1)
        for i, column in enumerate(self._rows("y", COLUMNS)):
            self.where += [
                *_column_source(column),
                f"y{i}_src = y + u64(udiv(source, ne11)) * nb12 + u64(urem(source, ne11)) * nb11",
                f"y{i}_src = keep(y{i}_src + u64(yk << u32(2)))",
            ]
            self._activations(f"y{i}_", i)

    def _place(self, name: str, n: int) -> None:
        """Find a lane's place in the stage, ``n`` values of a row, and where they go."""
        self.lanes, self.n = FLOAT_STAGE // n, n
        pitch = FLOAT_PITCH_W if name == "w" else FLOAT_PITCH_Y
        self.where += [
            f"{name}k = u32(u32(t & u32({self.lanes - 1})) * u32({n}))",
            f"{name}r = u32(t >> u32({self.lanes.bit_length() - 1}))",
            f"{name}to = keep(s{name} + u64(u32({name}k * u32({4 * pitch})) + u32({name}r << u32(2))))",
        ]

    def _rows(self, name: str, n_row: int) -> Text:
        """Return the rows of a lane."""
        self.apart = THREADS // self.lanes
        return [f"u32({name}r + u32({i * self.apart}))" for i in range(n_row // self.apart)]

    def _weights(self, p: str, i: int) -> None:
        at = f"{p}wrow + u64(k0) * u64({self.size})"
        if not self.wide:
            self._loaded([f"{p}v"], "f32", float_scalar(self.type, at), "wk")
            self.store.append(f"sts_f32(wto + u64({4 * self.apart * i}), {p}v)")
            return
        self._loaded([f"{p}r{q}" for q in range(4)], "u32", f"ld4_u32({at})", "wk")
        self.store += float_words(f"{p}v", self.type, 4, f"{p}r")
        at = [4 * (q * FLOAT_PITCH_W + i * self.apart) for q in range(self.n)]
        self.store += [f"sts_f32(wto + u64({at[q]}), {p}v{q})" for q in range(self.n)]

    def _activations(self, p: str, i: int) -> None:
        names = [f"{p}{q}" for q in range(self.n)]
        load = "ld4_f32" if self.wide else "ld_f32"
        self._loaded(names, "f32", f"{load}({p}src + u64(k0) * u64(4))", "yk")
        at = [4 * (q * FLOAT_PITCH_Y + i * self.apart) for q in range(self.n)]
        self.store += [f"sts_f32(yto + u64({at[q]}), {name})" for q, name in enumerate(names)]

    def _loaded(self, names: Text, type: str, load: str, k: str) -> None:
        """Load; past the end of the rows there is nothing but zeros."""
        zeros = ", ".join([f"{type}(0)"] * len(names))
        line = f"{', '.join(names)} = {load}"
        self.where.append(f"{', '.join(names)} = {zeros}")
        self.load.append(line)
        self.load_last += [f"if k0 + {k} < n_k:", f"    {line}", "else:", f"    {', '.join(names)} = {zeros}"]

    @property
    def next(self) -> Text:
        """The loads of the stage at ``k0``, if there is one: a question for all of it, and none for each value."""
        whole = [f"if u32(k0 + u32({FLOAT_STAGE})) <= n_k:", *indent(self.load)]
        return [*whole, "elif k0 < n_k:", *indent(self.load_last)]


def _multiply_floats() -> dict[str, Any]:
    """Return the intrinsics that add the outer products of the stage in shared memory."""
    from .intrinsics import F32, shared_load

    def emit(builder: Any, results: list[Any], wat: Any, yat: Any) -> list[Any]:
        for k in range(FLOAT_STAGE):
            xs = shared_load(builder, wat, 4 * k * FLOAT_PITCH_W, F32, 4)
            xs += shared_load(builder, wat, 4 * k * FLOAT_PITCH_W + 2 * ROWS, F32, 4)
            ys = shared_load(builder, yat, 4 * k * FLOAT_PITCH_Y, F32, 4)
            results = [builder.fadd(r, builder.fmul(xs[n // TN], ys[n % TN])) for n, r in enumerate(results)]
        return results

    return _accumulating(emit, TM * TN)


def floating(type: str, *, wide: bool) -> Kernel:
    """Return the kernel for F32, F16 or BF16 weights; ``wide`` loads 16 bytes at a time and needs all rows aligned.

    Notes
    -----
    Grid and block as those of `quantized`. The two kinds differ in how a stage comes to shared memory, and in nothing
    else.
    """
    staging = _FloatStaging(type, wide=wide)
    body = [
        f"sw = shared_address(cuda.shared.array({FLOAT_STAGE * FLOAT_PITCH_W}, f32, alignment=16))",
        f"sy = shared_address(cuda.shared.array({FLOAT_STAGE * FLOAT_PITCH_Y}, f32, alignment=16))",
        *_head(ROWS),
        *staging.where,
        # of 8 rows, 4 lie side by side and 4 half a tile further
        "tm = u32(u32(t & u32(15)) << u32(2))",
        "tn = u32(u32(t >> u32(4)) << u32(2))",
        "wat = keep(sw + u64(tm << u32(2)))",
        "yat = keep(sy + u64(tn << u32(2)))",
        "results = zeros()",
        "k0 = u32(0)",
        *staging.next,
        "while k0 < n_k:",
        *indent(
            [
                *staging.store,
                "cuda.syncthreads()",
                f"k0 = u32(k0 + u32({FLOAT_STAGE}))",
                *staging.next,
                "results = multiply(results, wat, yat)",
                "cuda.syncthreads()",
            ]
        ),
    ]
    steps = [half + i for half in (0, ROWS // 2) for i in range(4)]
    body += _write(ROWS, [f"tn + u32({j})" for j in range(TN)], "tm", steps)
    name = f"tile_{type}" + ("" if wide else "_any")
    params = _params("y", "nb11", "nb12", "ne11:u32", "n_k:u32")
    return Kernel(name, params, body, THREADS, _multiply_floats, blocks=4 if wide else 3)
