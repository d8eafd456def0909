"""Kernels that work row by row: quantise activations, group ids by expert, ADD_ID, ADD, MUL, SCALE, the GLU family.

CLAMP and unary functions take a contiguous tensor as one row, as SCALE does.

Grid (rows, pieces of a row), block `THREADS`; a row's index is taken apart on the device. Tensors are given as an
address and strides in bytes; dimension 0 is dense.
"""

from __future__ import annotations

from .source import Kernel, Text, indent, params

THREADS = 256
#: values of a row that one block of `quantize_q8_1` takes: 8 lanes for 32 of them
QUANTIZE_VALUES = 1024

TAKE_ROW_APART = """
row = u32(cuda.blockIdx.x)
i1 = urem(row, ne1)
rest = udiv(row, ne1)
i2 = urem(rest, ne2)
i3 = udiv(rest, ne2)
"""


def _loop(n: str, step: int, body: Text) -> Text:
    """Let all threads of all blocks of a row share its ``n`` values, ``step`` at a time."""
    return [
        f"i = u32(u32(u32(cuda.blockIdx.y) * u32({THREADS}) + u32(cuda.threadIdx.x)) * u32({step}))",
        f"while i < {n}:",
        *indent([*body, f"i = u32(i + u32(cuda.gridDim.y) * u32({THREADS * step}))"]),
    ]


def quantize_q8_1(*, wide: bool) -> Kernel:
    """Return the kernel that quantises rows of activations to q8_1, once for all weights that meet them.

    Notes
    -----
    Row ``token * ne11 + i11`` of the result: ``n_k`` signed bytes at ``yq``, and for each 32 of them a pair of float32
    at ``yd``: the scale, and the sum of the bytes. ``wide``: rows start at multiples of 16 bytes.
    Mirrors `quantize_q8_1`. Differs: quants and scales lie apart, so that 16 bytes can be loaded at once; scales are
    float32 of 16 significant bits, so that `tile` can multiply them exactly.
    """
    names = ("a", "b", "c", "d")
    if wide:
        load = ["a, b, c, d = ld4_f32(x + u64(k) * u64(4))"]
    else:
        load = [f"{n} = ld_f32(x + u64(k) * u64(4) + u64({4 * i}))" for i, n in enumerate(names)]
    body = [
        "row = u32(cuda.blockIdx.x)",
        "x = src + u64(udiv(row, ne1)) * nb2 + u64(urem(row, ne1)) * nb1",
        f"k = u32(u32(u32(cuda.blockIdx.y) * u32({THREADS}) + u32(cuda.threadIdx.x)) * u32(4))",
        "a = b = c = d = f32(0)",
        "if k < n_k:",  # n_k is a multiple of 32: all 8 lanes of a block, or none
        *indent(load),
        "top = max(max(abs(a), abs(b)), max(abs(c), abs(d)))",
        *(f"top = max(top, cuda.shfl_xor_sync(0xFFFFFFFF, top, {n}))" for n in (4, 2, 1)),
        "scale = as_f32(u32(u32(as_u32(top / f32(127)) + u32(128)) & u32(0xFFFFFF00)))",
        "inverse = f32(1) / scale if scale > f32(0) else f32(0)",
        *(f"{n}q = libdevice.float2int_rn({n} * inverse)" for n in names),
        "total = i32(aq + bq + cq + dq)",
        *(f"total = i32(total + cuda.shfl_xor_sync(0xFFFFFFFF, total, {n}))" for n in (4, 2, 1)),
        "if k < n_k:",
        *indent(
            [
                "low = u32(u32(u32(aq) & u32(255)) | u32(u32(u32(bq) & u32(255)) << u32(8)))",
                "high = u32(u32(u32(u32(cq) & u32(255)) << u32(16)) | u32(u32(dq) << u32(24)))",
                "st_u32(yq + u64(row) * u64(n_k) + u64(k), u32(low | high))",
                "if k & u32(31) == u32(0):",
                "    st2_f32(yd + u64(row) * u64(n_k >> u32(2)) + u64(k >> u32(2)), scale, f32(total))",
            ]
        ),
    ]
    arguments = params("src", "nb1", "nb2", "ne1:u32", "n_k:u32", "yq", "yd")
    return Kernel("quantize_q8_1" + ("" if wide else "_any"), arguments, body, THREADS)


def group_ids(columns: int) -> Kernel:
    """Return the kernel that sorts (token, slot) pairs by expert, stably, and lays out the tiles of `columns` pairs.

    Notes
    -----
    Grid: experts. Block: one warp, which counts the pairs of lower experts, then writes its own. ``bounds[e]`` is where
    expert e begins in ``row_src`` (row of activations) and ``row_dst`` (row of the result); ``tiles`` names the expert
    of each tile, or -1. Expert e's tiles start at ``bounds[e] / columns + e``: as many places as it can need lie before
    the next expert's first, whatever the ids, so the launch that follows has a fixed size and the host waits for nothing.
    Mirrors what `mm_ids_helper` decides. Differs: the tile list; no block is launched for (tile, expert) pairs that
    cannot be.
    """
    shift = columns.bit_length() - 1
    assert columns == 1 << shift
    scan = [
        "at = u32(base + lane)",
        "id = u32(0xFFFFFFFF)",
        "if at < n:",
        "    id = ld_u32(ids + u64(urem(at, n_used)) * nbi0 + u64(udiv(at, n_used)) * nbi1)",
    ]
    body = [
        "lane = u32(cuda.threadIdx.x)",
        "expert = u32(cuda.blockIdx.x)",
        "first = u32(0)",
        "base = u32(0)",
        "while base < n:",
        *indent([*scan, "first = u32(first + u32(cuda.popc(cuda.ballot_sync(0xFFFFFFFF, id < expert))))"]),
        "    base = u32(base + u32(32))",
        "end = first",
        "base = u32(0)",
        "while base < n:",
        *indent(
            [
                *scan,
                "mine = u32(cuda.ballot_sync(0xFFFFFFFF, id == expert))",
                "if id == expert:",
                "    to = u32(end + u32(cuda.popc(u32(mine & u32(u32(u32(1) << lane) - u32(1))))))",
                "    token = udiv(at, n_used)",
                "    st_u32(row_src + u64(to) * u64(4), u32(token * ne11 + urem(urem(at, n_used), ne11)))",
                "    st_u32(row_dst + u64(to) * u64(4), at)",
                "end = u32(end + u32(cuda.popc(mine)))",
                "base = u32(base + u32(32))",
            ]
        ),
        "if lane == u32(0):",
        "    st_u32(bounds + u64(expert) * u64(4), first)",
        "    if expert == u32(cuda.gridDim.x) - u32(1):",
        "        st_u32(bounds + u64(expert) * u64(4) + u64(4), end)",
        f"place = u32(u32(first >> u32({shift})) + expert)",
        f"stop = u32(u32(end >> u32({shift})) + expert + u32(1))",
        f"used = u32(u32(end - first + u32({columns - 1})) >> u32({shift}))",
        "i = lane",
        "while u32(place + i) < stop:",
        "    st_u32(tiles + u64(place + i) * u64(4), expert if i < used else u32(0xFFFFFFFF))",
        "    i = u32(i + u32(32))",
    ]
    arguments = params(
        "ids", "nbi0", "nbi1", "n:u32", "n_used:u32", "ne11:u32", "row_src", "row_dst", "bounds", "tiles"
    )  # fmt: skip
    return Kernel("group_ids", arguments, body, 32)


def fill_ids() -> Kernel:
    """Return the kernel that names the matrix each of ``n`` matrices of activations meets: every ``n_repeat`` the next.

    Notes
    -----
    MUL_MAT is MUL_MAT_ID with these ids: the activations' rows are slots, their matrices are tokens.
    """
    loop = ["st_u32(ids + u64(i) * u64(4), udiv(i, n_repeat))"]
    return Kernel("fill_ids", params("ids", "n:u32", "n_repeat:u32"), _loop("n", 1, loop), THREADS)


def _values(name: str, address: str, wide: bool) -> Text:
    if not wide:
        return [f"{name}0 = ld_f32({address})"]
    return [f"{', '.join(f'{name}{k}' for k in range(4))} = ld4_f32({address})"]


def _store(address: str, expression: str, wide: bool) -> Text:
    if not wide:
        return [f"st_f32({address}, {expression.format(0)})"]
    return [f"st4_f32({address}, {', '.join(expression.format(k) for k in range(4))})"]


def add_id(*, wide: bool) -> Kernel:
    """Return ADD_ID: to row (slot, token) of src0 add the row of src1 that the id names; all float32.

    Notes
    -----
    Mirrors `add_id_kernel`.
    """
    loop = [
        *_values("a", "x + u64(i) * u64(4)", wide),
        *_values("b", "y + u64(i) * u64(4)", wide),
        *_store("z + u64(i) * u64(4)", "a{0} + b{0}", wide),
    ]
    body = [
        "row = u32(cuda.blockIdx.x)",
        "i1 = urem(row, ne1)",
        "i2 = udiv(row, ne1)",
        "expert = ld_u32(ids + u64(i1) * nbi0 + u64(i2) * nbi1)",
        "x = src0 + u64(i1) * nb01 + u64(i2) * nb02",
        "y = src1 + u64(expert) * nb11",
        "z = dst + u64(i1) * nbd1 + u64(i2) * nbd2",
        *_loop("ne0", 4 if wide else 1, loop),
    ]
    arguments = params(
        "src0", "nb01", "nb02", "src1", "nb11", "ids", "nbi0", "nbi1", "dst", "nbd1", "nbd2", "ne0:u32", "ne1:u32"
    )  # fmt: skip
    return Kernel("add_id" + ("" if wide else "_any"), arguments, body, THREADS)


def binary(name: str, sign: str, *, wide: bool) -> Kernel:
    """Return an op of two float32 tensors, the second repeated along every dimension as often as needed.

    Notes
    -----
    Mirrors `k_bin_bcast`. ``wide``: rows start at multiples of 16 bytes and none is repeated along dimension 0.
    """
    at = "i" if wide else "urem(i, ne10)"
    loop = [
        *_values("a", "x + u64(i) * u64(4)", wide),
        *_values("b", f"y + u64({at}) * u64(4)", wide),
        *_store("z + u64(i) * u64(4)", f"a{{0}} {sign} b{{0}}", wide),
    ]
    body = [
        *TAKE_ROW_APART.strip().split("\n"),
        "x = src0 + u64(i1) * nb01 + u64(i2) * nb02 + u64(i3) * nb03",
        "y = src1 + u64(urem(i1, ne11)) * nb11 + u64(urem(i2, ne12)) * nb12 + u64(urem(i3, ne13)) * nb13",
        "z = dst + u64(i1) * nbd1 + u64(i2) * nbd2 + u64(i3) * nbd3",
        *_loop("ne0", 4 if wide else 1, loop),
    ]
    arguments = params(
        *("src0", "nb01", "nb02", "nb03", "src1", "nb11", "nb12", "nb13", "ne10:u32", "ne11:u32", "ne12:u32"),
        *("ne13:u32", "dst", "nbd1", "nbd2", "nbd3", "ne0:u32", "ne1:u32", "ne2:u32"),
    )
    return Kernel(name + ("" if wide else "_any"), arguments, body, THREADS)


def scale(*, wide: bool) -> Kernel:
    """Return SCALE: ``x * factor + bias`` of a contiguous float32 tensor, as one row.

    Notes
    -----
    Mirrors `scale_f32`.
    """
    loop = [
        *_values("a", "src + u64(i) * u64(4)", wide),
        *_store("dst + u64(i) * u64(4)", "a{0} * factor + bias", wide),
    ]
    body = _loop("n", 4 if wide else 1, loop)
    return Kernel(
        "scale" + ("" if wide else "_any"), params("src", "dst", "n:u32", "factor:f32", "bias:f32"), body, THREADS
    )


_SIGMOID = "f32(1) / (f32(1) + math.exp(-{0}))"
#: how a gate x acts on a value g, as statements that leave r; constants are ggml's
GATES: dict[str, Text] = {
    "reglu": ["r = x * g if x > f32(0) else f32(0)"],
    "geglu": [
        "t = math.tanh(f32(0.79788456080286535588) * x * (f32(1) + f32(0.044715) * x * x))",
        "r = f32(0.5) * x * (f32(1) + t) * g",
    ],
    "swiglu": [f"r = x * ({_SIGMOID.format('x')}) * g"],
    "swiglu_oai": [
        "x = min(x, limit)",
        "g = max(min(g, limit), -limit)",
        f"r = x * ({_SIGMOID.format('(x * alpha)')}) * (f32(1) + g)",
    ],
    "geglu_erf": ["r = f32(0.5) * x * (f32(1) + math.erf(x * f32(0.70710678118654752440))) * g"],
    "geglu_quick": [f"r = x * ({_SIGMOID.format('(x * f32(1.702))')}) * g"],
    "swiglu_clamp": [
        "x = min(x, limit)",
        "g = max(min(g, limit), -limit)",
        f"r = x * ({_SIGMOID.format('x')}) * g",
    ],
}


def glu(name: str) -> Kernel:
    """Return a gated unit: gate and value are rows of two tensors, or the halves of one's rows.

    Notes
    -----
    Mirrors `unary_gated_op_kernel` and its siblings; rows of each tensor are evenly apart.
    """
    loop = [
        "x = ld_f32(a + u64(i) * u64(4))",
        "g = ld_f32(b + u64(i) * u64(4))",
        *GATES[name],
        "st_f32(z + u64(i) * u64(4), r)",
    ]
    body = [
        "row = u64(u32(cuda.blockIdx.x))",
        "a = gate + row * nb_gate",
        "b = value + row * nb_value",
        "z = dst + row * nb_dst",
        *_loop("ne0", 1, loop),
    ]
    arguments = params(
        "gate", "nb_gate", "value", "nb_value", "dst", "nb_dst", "ne0:u32", "alpha:f32", "limit:f32"
    )  # fmt: skip
    return Kernel(name, arguments, body, THREADS)


#: functions of one value x
UNARY = {
    "clamp": "x if x != x else min(max(x, low), high)",
    "silu": f"x * ({_SIGMOID.format('x')})",
    "sigmoid": _SIGMOID.format("x"),
    "relu": "max(x, f32(0))",
    "gelu": "f32(0.5) * x * (f32(1) + math.tanh(f32(0.79788456080286535588) * x * (f32(1) + f32(0.044715) * x * x)))",
    "gelu_erf": "f32(0.5) * x * (f32(1) + math.erf(x * f32(0.70710678118654752440)))",
    "gelu_quick": f"x * ({_SIGMOID.format('(x * f32(1.702))')})",
    "tanh": "math.tanh(x)",
    "exp": "math.exp(x)",
    "neg": "-x",
}


def unary(name: str) -> Kernel:
    """Return CLAMP or a unary function of a contiguous float32 tensor, as one row."""
    loop = ["x = ld_f32(src + u64(i) * u64(4))", f"st_f32(dst + u64(i) * u64(4), {UNARY[name]})"]
    arguments = params("src", "dst", "n:u32", "low:f32", "high:f32")
    return Kernel(name, arguments, _loop("n", 1, loop), THREADS)
