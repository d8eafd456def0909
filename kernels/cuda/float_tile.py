"""The tiles of `tile` for F32, F16 and BF16 weights: fused multiply-adds of float32.

128 rows, 8 x 4 results a thread, 16 values a stage, both tiles transposed in shared memory.
"""

from __future__ import annotations

from typing import Any

from .formats import Text
from .mmvq import float_scalar, float_words
from .source import Kernel, indent
from .tile import COLUMNS, ROWS, THREADS, TM, TN, accumulating, column_source, head, params, row_address, write

STAGE = 16
PITCH_W, PITCH_Y = ROWS + 4, COLUMNS + 4


class _FloatStaging:
    """How a stage of floats is loaded and put into shared memory: 16 bytes a lane, or a value a lane.

    Attributes
    ----------
    where : list of str
        Before the loop.
    load : list of str
        The loads of a whole stage at ``k0``.
    lasts : dict
        The loads of a stage that the rows may end in, and what is there instead of a lane past the end, by the lane's place.
    store : list of str
        What was loaded goes to shared memory.
    """

    def __init__(self, type: str, *, wide: bool) -> None:
        self.type, self.wide = type, wide
        self.size = 4 if type == "f32" else 2
        self.where: Text = []
        self.load: Text = []
        self.lasts: dict[str, tuple[Text, Text]] = {"wk": ([], []), "yk": ([], [])}
        self.store: Text = []
        self._place("w", 16 // self.size if wide else 1)
        for i, row in enumerate(self._rows("w", ROWS)):
            self.where += [*row_address(f"w{i}_", row), f"w{i}_wrow = keep(w{i}_wrow + u64(wk * u32({self.size})))"]
            self._weights(f"w{i}_", i)
        self._place("y", 4 if wide else 1)
        for i, column in enumerate(self._rows("y", COLUMNS)):
            self.where += [
                *column_source(column),
                f"y{i}_src = y + u64(udiv(source, ne11)) * nb12 + u64(urem(source, ne11)) * nb11",
                f"y{i}_src = keep(y{i}_src + u64(yk << u32(2)))",
            ]
            self._activations(f"y{i}_", i)

    def _place(self, name: str, n: int) -> None:
        """Find a lane's place in the stage, ``n`` values of a row, and where they go."""
        self.lanes, self.n = STAGE // n, n
        pitch = PITCH_W if name == "w" else PITCH_Y
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
        at = [4 * (q * PITCH_W + i * self.apart) for q in range(self.n)]
        self.store += [f"sts_f32(wto + u64({at[q]}), {p}v{q})" for q in range(self.n)]

    def _activations(self, p: str, i: int) -> None:
        names = [f"{p}{q}" for q in range(self.n)]
        load = "ld4_f32" if self.wide else "ld_f32"
        self._loaded(names, "f32", f"{load}({p}src + u64(k0) * u64(4))", "yk")
        at = [4 * (q * PITCH_Y + i * self.apart) for q in range(self.n)]
        self.store += [f"sts_f32(yto + u64({at[q]}), {name})" for q, name in enumerate(names)]

    def _loaded(self, names: Text, type: str, load: str, k: str) -> None:
        """Load; past the end of the rows there is nothing but zeros."""
        zeros = ", ".join([f"{type}(0)"] * len(names))
        line = f"{', '.join(names)} = {load}"
        self.where.append(f"{', '.join(names)} = {zeros}")
        self.load.append(line)
        loads, empty = self.lasts[k]
        loads.append(line)
        empty.append(f"{', '.join(names)} = {zeros}")

    @property
    def next(self) -> Text:
        """The loads of the stage at ``k0``, if there is one: a question for all of it, and none for each value."""
        whole = [f"if u32(k0 + u32({STAGE})) <= n_k:", *indent(self.load)]
        last: Text = []
        for k, (loads, empty) in self.lasts.items():
            last += [f"if k0 + {k} < n_k:", *indent(loads), "else:", *indent(empty)]
        return [*whole, "elif k0 < n_k:", *indent(last)]


def _multiply_floats() -> dict[str, Any]:
    """Return the intrinsics that add the outer products of the stage in shared memory."""
    from .intrinsics import F32, shared_load

    def emit(builder: Any, results: list[Any], wat: Any, yat: Any) -> list[Any]:
        for k in range(STAGE):
            xs = shared_load(builder, wat, 4 * k * PITCH_W, F32, 4)
            xs += shared_load(builder, wat, 4 * k * PITCH_W + 2 * ROWS, F32, 4)
            ys = shared_load(builder, yat, 4 * k * PITCH_Y, F32, 4)
            results = [builder.fadd(r, builder.fmul(xs[n // TN], ys[n % TN])) for n, r in enumerate(results)]
        return results

    return accumulating(emit, TM * TN)


def floating(type: str, *, wide: bool) -> Kernel:
    """Return the kernel for F32, F16 or BF16 weights; ``wide`` loads 16 bytes at a time and needs all rows aligned.

    Notes
    -----
    Grid and block as those of `tile.quantized`. The two kinds differ in how a stage comes to shared memory, and in nothing
    else.
    """
    staging = _FloatStaging(type, wide=wide)
    body = [
        f"sw = shared_address(cuda.shared.array({STAGE * PITCH_W}, f32, alignment=16))",
        f"sy = shared_address(cuda.shared.array({STAGE * PITCH_Y}, f32, alignment=16))",
        *head(ROWS),
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
                f"k0 = u32(k0 + u32({STAGE}))",
                *staging.next,
                "results = multiply(results, wat, yat)",
                "cuda.syncthreads()",
            ]
        ),
    ]
    steps = [half + i for half in (0, ROWS // 2) for i in range(4)]
    body += write(ROWS, [f"tn + u32({j})" for j in range(TN)], "tm", steps)
    name = f"tile_{type}" + ("" if wide else "_any")
    arguments = params("y", "nb11", "nb12", "ne11:u32", "n_k:u32")
    return Kernel(name, arguments, body, THREADS, _multiply_floats, blocks=4 if wide else 3)
