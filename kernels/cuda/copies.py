"""Kernels that copy values with any strides, one per thread: CPY, SET_ROWS, GET_ROWS.

Grid (values of a matrix, matrices), block `THREADS`.
"""

from __future__ import annotations

from .source import Kernel, params

THREADS = 256


#: how a value of each type is loaded from an address, and stored
LOADS = {
    "f32": "ld_f32({0})",
    "f16": "f16_to_f32(u32(ld_u16({0})))",
    "bf16": "as_f32(u32(u32(ld_u16({0})) << u32(16)))",
}
STORES = {
    "f32": "st_f32({0}, {1})",
    "f16": "st_u16({0}, f32_to_f16({1}))",
    # to the nearest, ties to even
    "bf16": "st_u16({0}, u32(u32(as_u32({1}) + u32(0x7FFF) + u32(u32(as_u32({1}) >> u32(16)) & u32(1))) >> u32(16)))",
}
SIZES = {"f32": 4, "f16": 2, "bf16": 2}
#: pairs of types that can be copied, and types of rows that can be set
COPIES = (("f32", "f32"), ("f32", "f16"), ("f16", "f32"), ("f16", "f16"))
SETS = ("f32", "f16", "bf16")
#: types of rows that can be got; i32 stays what it is, others become f32
GETS = ("f32", "f16", "bf16", "i32")

_TAKE_MATRIX_APART = """
e = u32(u32(cuda.blockIdx.x) * u32({threads}) + u32(cuda.threadIdx.x))
if e >= u32(ne0 * ne1):
    return
i0 = urem(e, ne0)
i1 = udiv(e, ne0)
i2 = urem(u32(cuda.blockIdx.y), ne2)
i3 = udiv(u32(cuda.blockIdx.y), ne2)
"""


def copy(src: str, dst: str) -> Kernel:
    """Return CPY between two types: one value a thread, whatever the strides. Grid (values of a matrix, matrices)."""
    body = [
        *_TAKE_MATRIX_APART.format(threads=THREADS).strip().split("\n"),
        "x = src + u64(i0) * nb00 + u64(i1) * nb01 + u64(i2) * nb02 + u64(i3) * nb03",
        "z = dst + u64(i0) * nbd0 + u64(i1) * nbd1 + u64(i2) * nbd2 + u64(i3) * nbd3",
        f"value = {LOADS[src].format('x')}",
        STORES[dst].format("z", "value"),
    ]
    arguments = params(
        *("src", "nb00", "nb01", "nb02", "nb03", "dst", "nbd0", "nbd1", "nbd2", "nbd3"),
        *("ne0:u32", "ne1:u32", "ne2:u32"),
    )
    return Kernel(f"copy_{src}_{dst}", arguments, body, THREADS)


def set_rows(type: str) -> Kernel:
    """Return SET_ROWS of float32 rows into rows of a type; one value a thread. Grid (values of a matrix, matrices).

    Notes
    -----
    Mirrors `k_set_rows`. Of a 64-bit index the lower half is read: no tensor has so many rows.
    """
    body = [
        *_TAKE_MATRIX_APART.format(threads=THREADS).strip().split("\n"),
        "x = src0 + u64(i0) * u64(4) + u64(i1) * nb01 + u64(i2) * nb02 + u64(i3) * nb03",
        "at = src1 + u64(i1) * nb10 + u64(urem(i2, ne11)) * nb11 + u64(urem(i3, ne12)) * nb12",
        f"z = dst + u64(i0) * u64({SIZES[type]}) + u64(ld_u32(at)) * nbd1 + u64(i2) * nbd2 + u64(i3) * nbd3",
        "value = ld_f32(x)",
        STORES[type].format("z", "value"),
    ]
    arguments = params(
        *("src0", "nb01", "nb02", "nb03", "src1", "nb10", "nb11", "nb12", "ne11:u32", "ne12:u32"),
        *("dst", "nbd1", "nbd2", "nbd3", "ne0:u32", "ne1:u32", "ne2:u32"),
    )
    return Kernel(f"set_rows_{type}", arguments, body, THREADS)


def get_rows(type: str) -> Kernel:
    """Return GET_ROWS: rows of a type, named by i32 indices, as float32; i32 as it is.

    Notes
    -----
    Mirrors `k_get_rows_float`.
    """
    load, store = ("ld_u32({0})", "st_u32({0}, {1})") if type == "i32" else (LOADS[type], STORES["f32"])
    body = [
        *_TAKE_MATRIX_APART.format(threads=THREADS).strip().split("\n"),
        "row = ld_u32(src1 + u64(i1) * nb10 + u64(i2) * nb11 + u64(i3) * nb12)",
        f"x = src0 + u64(i0) * u64({SIZES.get(type, 4)}) + u64(row) * nb01 + u64(i2) * nb02 + u64(i3) * nb03",
        "z = dst + u64(i0) * u64(4) + u64(i1) * nbd1 + u64(i2) * nbd2 + u64(i3) * nbd3",
        f"value = {load.format('x')}",
        store.format("z", "value"),
    ]
    arguments = params(
        *("src0", "nb01", "nb02", "nb03", "src1", "nb10", "nb11", "nb12"),
        *("dst", "nbd1", "nbd2", "nbd3", "ne0:u32", "ne1:u32", "ne2:u32"),
    )
    return Kernel(f"get_rows_{type}", arguments, body, THREADS)
