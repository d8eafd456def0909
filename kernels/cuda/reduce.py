"""Kernels over whole float32 rows: RMS_NORM, SUM_ROWS, SOFT_MAX, ARGSORT and TOP_K.

Grid: rows; block: up to `THREADS`, a multiple of 32 (short rows take fewer).
"""

from __future__ import annotations

from .rows import TAKE_ROW_APART
from .source import Kernel, Text, indent, params

THREADS = 256
_WARPS = THREADS // 32
#: longest row that is sorted
MAX_SORTED = 1024
#: types of masks that SOFT_MAX takes
MASKS = ("none", "f32", "f16")

_HEAD = [
    *TAKE_ROW_APART.strip().split("\n"),
    "t = u32(cuda.threadIdx.x)",
    "step = u32(cuda.blockDim.x)",
    "x = src + u64(i1) * nb01 + u64(i2) * nb02 + u64(i3) * nb03",
    "z = dst + u64(i1) * nbd1 + u64(i2) * nbd2 + u64(i3) * nbd3",
]
_COMMON = ("src", "nb01", "nb02", "nb03", "dst", "nbd1", "nbd2", "nbd3", "ne0:u32", "ne1:u32", "ne2:u32")


def _over_row(body: Text) -> Text:
    """Let the threads of a block share a row's values."""
    return ["i = t", "while i < ne0:", *indent([*body, "i = u32(i + step)"])]


def _meet(value: str, joined: str, identity: str) -> Text:
    """Join a value of all threads of a block into one that all have; ``joined`` says how a and b become one."""
    join = lambda other: f"{value} = {joined.format(a=value, b=other)}"
    shuffle = lambda n: join(f"cuda.shfl_xor_sync(0xFFFFFFFF, {value}, {n})")
    return [
        f"{value}_parts = cuda.shared.array({_WARPS}, f32)",
        *(shuffle(n) for n in (16, 8, 4, 2, 1)),
        "if t & u32(31) == u32(0):",
        f"    {value}_parts[t >> u32(5)] = {value}",
        "cuda.syncthreads()",
        f"part = u32(t & u32({_WARPS - 1}))",
        f"{value} = {value}_parts[part] if u32(part << u32(5)) < step else f32({identity})",
        *(shuffle(n) for n in (4, 2, 1)),
    ]


def rms_norm() -> Kernel:
    """Return RMS_NORM: each row over the root of its mean square plus ``eps``.

    Notes
    -----
    Mirrors `rms_norm_f32`.
    """
    body = [
        *_HEAD,
        "total = f32(0)",
        *_over_row(["value = ld_f32(x + u64(i) * u64(4))", "total += value * value"]),
        *_meet("total", "{a} + {b}", "0"),
        "factor = f32(1) / math.sqrt(total / f32(ne0) + eps)",
        *_over_row(["st_f32(z + u64(i) * u64(4), ld_f32(x + u64(i) * u64(4)) * factor)"]),
    ]
    return Kernel("rms_norm", params(*_COMMON, "eps:f32"), body, THREADS)


def sum_rows() -> Kernel:
    """Return SUM_ROWS.

    Notes
    -----
    Mirrors `reduce_rows_f32`.
    """
    body = [
        *_HEAD,
        "total = f32(0)",
        *_over_row(["total += ld_f32(x + u64(i) * u64(4))"]),
        *_meet("total", "{a} + {b}", "0"),
        "if t == u32(0):",
        "    st_f32(z, total)",
    ]
    return Kernel("sum_rows", params(*_COMMON), body, THREADS)


def soft_max(mask: str) -> Kernel:
    """Return SOFT_MAX: of ``x * scale + slope * mask``, with a sink for each head if there are any.

    Parameters
    ----------
    mask : str
        Type of the mask, or ``none``.

    Notes
    -----
    Mirrors `soft_max_f32`. ALiBi's slope of head h is ``base0 ** (h + 1)`` for the first ``n_base0`` heads, then a
    power of ``base1``; without ALiBi both bases are 1. What a thread wrote it reads again, and nobody else does.
    """
    value = "ld_f32(x + u64(i) * u64(4)) * scale"
    head: Text = []
    more: tuple[str, ...] = ()
    if mask != "none":
        size, load = (4, "ld_f32({0})") if mask == "f32" else (2, "f16_to_f32(u32(ld_u16({0})))")
        value += f" + slope * {load.format(f'm + u64(i) * u64({size})')}"
        head = [
            "m = mask + u64(i1) * nb11 + u64(urem(i2, ne12)) * nb12 + u64(urem(i3, ne13)) * nb13",
            "slope = f32(1)",
            "if n_base0 > u32(0):",
            "    if i2 < n_base0:",
            "        slope = libdevice.powf(base0, f32(u32(i2 + u32(1))))",
            "    else:",
            "        slope = libdevice.powf(base1, f32(u32(u32(u32(i2 - n_base0) << u32(1)) + u32(1))))",
        ]
        more = ("mask", "nb11", "nb12", "nb13", "ne12:u32", "ne13:u32", "n_base0:u32", "base0:f32", "base1:f32")
    body = [
        *_HEAD,
        *head,
        "top = f32(-3.4028234663852886e38)",
        *_over_row([f"top = max(top, {value})"]),
        *_meet("top", "max({a}, {b})", "-3.4028234663852886e38"),
        "total = f32(0)",
        "if sinks != u64(0):",
        "    sink = ld_f32(sinks + u64(i2) * u64(4))",
        "    top = max(top, sink)",
        "    if t == u32(0):",
        "        total = math.exp(sink - top)",
        *_over_row([f"e = math.exp({value} - top)", "st_f32(z + u64(i) * u64(4), e)", "total += e"]),
        *_meet("total", "{a} + {b}", "0"),
        "inverse = f32(1) / total",
        *_over_row(["st_f32(z + u64(i) * u64(4), own_f32(z + u64(i) * u64(4)) * inverse)"]),
    ]
    return Kernel(f"soft_max_{mask}", params(*_COMMON, "scale:f32", "sinks", *more), body, THREADS)


def argsort() -> Kernel:
    """Return ARGSORT and TOP_K: the ``k`` first indices of a sorted row; of equal values the first comes first.

    Notes
    -----
    A value's place is the number of values before it; each thread counts for its own, 4 others a load. Bits of floats
    become words of the same order (NaN at an end, -0 as 0), so that places are all different whatever the values.
    Before its own 4 an equal value counts, behind them it does not; a word less one says so, as no word is 0.
    ``flip``: 0 for descending order, else all ones. Mirrors what `argsort_f32_i32` computes. Differs: stable.
    """
    count = [
        "k0, k1, k2, k3 = lds4_u32(at + u64(j) * u64(4))",
        "least = u32(key - u32(j < own))",
        *(f"place = u32(place + u32(k{n} > least))" for n in range(4)),
        "j = u32(j + u32(4))",
    ]
    body = [
        *_HEAD,
        f"keys = cuda.shared.array({MAX_SORTED}, u32, alignment=16)",
        "at = shared_address(keys)",
        "n_key = u32(u32(ne0 + u32(3)) & u32(0xFFFFFFFC))",
        "i = t",
        "while i < n_key:",
        "    key = u32(0)",
        "    if i < ne0:",
        "        key = as_u32(ld_f32(x + u64(i) * u64(4)) + f32(0))",
        "        key = u32(key ^ (u32(0xFFFFFFFF) if key >> u32(31) else u32(0x80000000)))",
        "        key = max(u32(key ^ flip), u32(1))",
        "    keys[i] = key",
        "    i = u32(i + step)",
        "cuda.syncthreads()",
        *_over_row(
            [
                "key = keys[i]",
                "place = u32(0)",
                "own = u32(i & u32(0xFFFFFFFC))",
                "j = u32(0)",
                "while j < n_key:",
                *indent(count),
                "k0, k1, k2, k3 = lds4_u32(at + u64(own) * u64(4))",
                *(f"place = u32(place + u32((k{n} == key) & (u32(own + u32({n})) < i)))" for n in range(3)),
                "if place < k:",
                "    st_u32(z + u64(place) * u64(4), i)",
            ]
        ),
    ]
    return Kernel("argsort", params(*_COMMON, "k:u32", "flip:u32"), body, THREADS)
