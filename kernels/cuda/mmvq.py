"""The matrix product for few tokens: one warp for each row and slot; the device reads the expert's id.

Tokens are not sorted by expert, and shared memory is not used. For quantised weights the activations are in q8_1
(`rows.quantize_q8_1`); for F32, F16 and BF16 they are floats.
"""

from __future__ import annotations

from .formats import Format, Text, Unit
from .source import Kernel, Param, indent

#: warps of a block, and so rows
WARPS = 4

_HEAD = """
lane = u32(cuda.threadIdx.x)
row = u32(u32(cuda.blockIdx.x) * u32({warps}) + u32(cuda.threadIdx.y))
slot = u32(cuda.blockIdx.y)
token = u32(cuda.blockIdx.z)
if row >= n_row:
    return
expert = ld_u32(ids + u64(slot) * nbi0 + u64(token) * nbi1)
wrow = w + u64(expert) * nb02 + u64(row) * nb01
"""
_TAIL = """
for_shuffles
if lane == u32(0):
    st_f32(dst + u64(token) * nbd2 + u64(slot) * nbd1 + u64(row) * u64(4), acc)
"""
_COMMON = ("w", "nb01", "nb02", "ids", "nbi0", "nbi1", "dst", "nbd1", "nbd2", "n_row:u32", "ne11:u32")


def _head() -> Text:
    return _HEAD.format(warps=WARPS).strip().split("\n")


def _tail() -> Text:
    shuffles = [f"acc += cuda.shfl_xor_sync(0xFFFFFFFF, acc, {n})" for n in (16, 8, 4, 2, 1)]
    return [*shuffles, *_TAIL.replace("for_shuffles\n", "").strip().split("\n")]


def _params(*more: str) -> tuple[Param, ...]:
    return tuple(Param.of(p) for p in (*_COMMON, *more))


def _dot(unit: Unit) -> Text:
    """Multiply a unit by its activations and add to ``acc``."""
    text: Text = []
    for g, group in enumerate(unit.groups):
        half = f" + u64({group.half} << u32(4))" if group.half else ""
        text += [f"yb{g} = {group.block}", f"ya{g} = yrow + u64(yb{g}) * u64(32){half}"]
        names = [f"y{g}_{k}" for k in range(len(group.words))]
        for k in range(0, len(names), 4):
            text.append(f"{', '.join(names[k : k + 4])} = ld4_u32(ya{g} + u64({4 * k}))")
        text.append(f"dy{g}, ty{g} = ld2_f32(drow + u64(yb{g}) * u64(8))")
    text += unit.decode
    for g, group in enumerate(unit.groups):
        text.append(f"s{g} = i32(0)")
        for k, word in enumerate(group.words):
            text.append(f"s{g} = dp4a({word}, y{g}_{k}, s{g})")
            if unit.offset and group.half:  # the sum of half a block is not at hand
                text.append(f"s{g} = dp4a(u32({(256 - unit.offset) * 0x01010101:#x}), y{g}_{k}, s{g})")
        if unit.offset and not group.half:
            text.append(f"acc += {group.scale} * (dy{g} * (f32(s{g}) - f32({unit.offset}) * ty{g}))")
        else:
            text.append(f"acc += {group.scale} * (dy{g} * f32(s{g}))")
    if unit.minimum:
        sums = " if half == u32(0) else ".join(f"dy{g} * ty{g}" for g in range(len(unit.groups)))
        text.append(f"acc += {unit.minimum} * ({sums})")
    return text


def quantized(fmt: Format) -> Kernel:
    """Return the kernel for a quantised weight type.

    Notes
    -----
    Grid (rows / `WARPS`, slots, tokens), block (32, `WARPS`). Mirrors what `mul_mat_vec_q` computes.
    """
    unit = fmt.unit()
    body = [
        *_head(),
        "yi = u32(token * ne11 + urem(slot, ne11))",
        "yrow = yq + u64(yi) * u64(n_block) * u64(32)",
        "drow = yd + u64(yi) * u64(n_block) * u64(8)",
        "acc = f32(0)",
        f"n_unit = n_block{' * u32(2)' if fmt.unit_values == 16 else ''}",
        "u = lane",
        "off = u64(0)",
        "while u < n_unit:",
        *indent([*unit.aim, *unit.load, *_dot(unit), "u = u32(u + u32(32))"]),
        *_tail(),
    ]
    return Kernel(f"mmvq_{fmt.name}", _params("yq", "yd", "n_block:u32"), body, threads=32 * WARPS)


def float_words(name: str, type: str, n: int, register: str) -> Text:
    """Make float32 ``name0 ..`` of ``n`` words of weights ``register0 ..``."""
    if type == "f32":
        return [f"{name}{k} = as_f32({register}{k})" for k in range(n)]
    low = "f16_to_f32({0})" if type == "f16" else "as_f32(u32({0} << u32(16)))"
    high = "f16_to_f32(u32({0} >> u32(16)))" if type == "f16" else "as_f32(u32({0} & u32(0xFFFF0000)))"
    text = []
    for k in range(n):
        text += [
            f"{name}{2 * k} = {low.format(f'{register}{k}')}",
            f"{name}{2 * k + 1} = {high.format(f'{register}{k}')}",
        ]
    return text


def float_scalar(type: str, address: str) -> str:
    """Return the expression that loads one weight."""
    if type == "f32":
        return f"ld_f32({address})"
    bits = f"u32(ld_u16({address}))"
    return f"f16_to_f32({bits})" if type == "f16" else f"as_f32(u32({bits} << u32(16)))"


def floating(type: str, *, wide: bool) -> Kernel:
    """Return the kernel for F32, F16 or BF16 weights; ``wide`` loads 16 bytes at a time and needs all rows aligned."""
    size = 4 if type == "f32" else 2
    n = 16 // size if wide else 1
    if wide:
        loop = [
            f"r0, r1, r2, r3 = ld4_u32(wrow + u64(k) * u64({size}))",
            *(
                f"{', '.join(f'y{j}' for j in range(i, i + 4))} = ld4_f32(yrow + u64(k) * u64(4) + u64({4 * i}))"
                for i in range(0, n, 4)
            ),
            *float_words("x", type, 4, "r"),
            *(f"acc += x{j} * y{j}" for j in range(n)),
        ]
    else:
        weight = float_scalar(type, f"wrow + u64(k) * u64({size})")
        loop = [f"acc += {weight} * ld_f32(yrow + u64(k) * u64(4))"]
    body = [
        *_head(),
        "yrow = y + u64(token) * nb12 + u64(urem(slot, ne11)) * nb11",
        "acc = f32(0)",
        f"k = u32(lane * u32({n}))",
        "while k < n_k:",
        *indent([*loop, f"k = u32(k + u32({32 * n}))"]),
        *_tail(),
    ]
    name = f"mmv_{type}" + ("" if wide else "_any")
    return Kernel(name, _params("y", "nb11", "nb12", "n_k:u32"), body, threads=32 * WARPS)
