"""ROPE: pairs of a row turned by the angle of their position, in the modes NORMAL and NEOX.

Grid (rows, pieces of a row), block `THREADS`; a thread turns one pair.
"""

from __future__ import annotations

from .copies import LOADS, SIZES, STORES
from .rows import TAKE_ROW_APART
from .source import Kernel, indent, params

THREADS = 128
TYPES = ("f32", "f16")

#: 1 / 2 pi, and 2 pi as a sum of three float32, the first with zeros at its end
_TURNS = "f32(0.15915494309189535)"
_CIRCLE = ("f32(6.28125)", "f32(0.0019350051879882812)", "f32(3.019916050561733e-07)")


def rope(type: str) -> Kernel:
    """Return ROPE for rows of a type.

    Notes
    -----
    ``next``: how far apart first elements of pairs lie, ``apart``: the two of a pair. Pairs past ``n_pair`` are copied.
    Mirrors `rope_norm` and `rope_neox`. Sine and cosine are the hardware's, of an angle brought between -pi and pi in
    three exact steps, so that long contexts cost no accuracy and no stack.
    """
    load, store, size = LOADS[type], STORES[type], SIZES[type]
    turn = [
        "angle = f32(i32(ld_u32(positions + u64(i2) * nbp))) * libdevice.powf(theta_scale, f32(pair))",
        "if factors != u64(0):",
        "    angle = angle / ld_f32(factors + u64(pair) * u64(4))",
        "theta = freq_scale * angle",
        "if ext_factor != f32(0):",
        "    ramp = (f32(pair) - low) / max(f32(0.001), high - low)",
        "    mix = (f32(1) - min(f32(1), max(f32(0), ramp))) * ext_factor",
        "    theta = theta * (f32(1) - mix) + angle * mix",
        f"turns = -libdevice.rintf(theta * {_TURNS})",
        *(f"theta = libdevice.fmaf(turns, {part}, theta)" for part in _CIRCLE),
        "cosine = libdevice.fast_cosf(theta) * magnitude",
        "sine = libdevice.fast_sinf(theta) * magnitude",
        "first = u32(pair * next)",
        "second = u32(first + apart)",
        f"a = {load.format(f'x + u64(first) * u64({size})')}",
        f"b = {load.format(f'x + u64(second) * u64({size})')}",
        store.format(f"z + u64(first) * u64({size})", "a * cosine - b * sine"),
        store.format(f"z + u64(second) * u64({size})", "a * sine + b * cosine"),
    ]
    rest = [
        f"at = u64(u32(pair << u32(1))) * u64({size})",
        f"a = {load.format('x + at')}",
        f"b = {load.format(f'x + at + u64({size})')}",
        store.format("z + at", "a"),
        store.format(f"z + at + u64({size})", "b"),
    ]
    body = [
        *TAKE_ROW_APART.strip().split("\n"),
        "x = src + u64(i1) * nb01 + u64(i2) * nb02 + u64(i3) * nb03",
        "z = dst + u64(i1) * nbd1 + u64(i2) * nbd2 + u64(i3) * nbd3",
        f"pair = u32(u32(cuda.blockIdx.y) * u32({THREADS}) + u32(cuda.threadIdx.x))",
        "if pair < n_pair:",
        *indent(turn),
        "elif u32(pair << u32(1)) < ne0:",
        *indent(rest),
    ]
    arguments = params(
        *("src", "nb01", "nb02", "nb03", "dst", "nbd1", "nbd2", "nbd3", "ne0:u32", "ne1:u32", "ne2:u32"),
        *("positions", "nbp", "factors", "n_pair:u32", "next:u32", "apart:u32", "theta_scale:f32", "freq_scale:f32"),
        *("ext_factor:f32", "magnitude:f32", "low:f32", "high:f32"),
    )
    return Kernel(f"rope_{type}", arguments, body, THREADS)
