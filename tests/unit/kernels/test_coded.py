"""Weights with codebooks, ternary weights and other types that are only read: rows, products, experts.

``python test_coded.py`` compares rows of random bytes with libggml's; a test runs it in a process of its own.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Memory, nmse
from pyggml.kernels.cpu import coded

from pyggml.tensor import Tensor
from pyggml.types import Op, Type

TYPES = [Type(typ) for typ in coded.TYPES]
#: Types that ggml multiplies with Q8_0, whose scales of activations are halves.
HALF_SCALED = (Type.NVFP4, Type.Q1_0, Type.Q2_0)
#: Where a block keeps its half; the others have scales of their own kind.
HALF_AT = {
    **dict.fromkeys(TYPES, 0),
    Type.TQ1_0: 52,
    Type.TQ2_0: 64,
}


def blocks(rng: np.random.Generator, typ: Type, n: int) -> np.ndarray:
    """Return n random blocks with tame scales: uint8, (n, bytes)."""
    raw = rng.integers(0, 256, (n, typ.type_size), np.uint8)
    halves = rng.uniform(0.005, 0.02, n).astype(np.float16).view(np.uint16)
    if typ is Type.NVFP4:
        raw[:, :4] = rng.integers(0x20, 0x48, (n, 4))
    elif typ is Type.IQ1_M:  # four bits in each of four words
        for i in range(4):
            raw[:, 49 + 2 * i] = raw[:, 49 + 2 * i] & 15 | (halves >> 4 * i & 15) << 4
    else:
        at = HALF_AT[typ]
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw


def weights(memory: Memory, rng: np.random.Generator, typ: Type, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of random blocks, in numpy's order."""
    t = Tensor(typ, shape[::-1], name="blk.3.ffn_up_exps.weight")
    return memory.place(t, blocks(rng, typ, t.nbytes // typ.type_size))


def test_each_type_is_as_large_as_in_files():
    """Block and bytes are those of the table of types."""
    for typ, kind in coded.CODES.items():
        assert (Type(typ).ggml_name, Type(typ).block_size, Type(typ).type_size) == (kind.name, kind.unit, kind.size)


@pytest.mark.parametrize("typ", TYPES, ids=lambda t: t.name)
def test_rows_of_any_bytes_are_read(memory, typ):
    """Whatever the bytes, all ones among them, GET_ROWS gives gguf's numbers; NaN where the scale is none."""
    rng = np.random.default_rng(1)
    t = Tensor(typ, (512, 9))
    raw = rng.integers(0, 256, t.nbytes, np.uint8).reshape(9, -1)
    raw[3], raw[4] = 255, 0
    table = memory.place(t, raw)
    ids = np.array([8, 3, 0, 4, 3], "i4")
    got = memory.compute(Op.GET_ROWS, (512, 5), table, memory.tensor(ids))
    with np.errstate(invalid="ignore", over="ignore"):
        want = memory.values(table).reshape(9, 512)[ids]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rows_are_libggmls_to_the_last_bit():
    """Of random bytes, every type's floats are what libggml makes of them."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(TYPES)} types\n"


@pytest.mark.parametrize("typ", [t for t in TYPES if t not in HALF_SCALED], ids=lambda t: t.name)
def test_activations_of_any_size_are_as_good_as_of_size_one(memory, typ):
    """Activations far below and above what a half can scale lose nothing; one that is no number makes its token none."""
    rng = np.random.default_rng(5)
    w = weights(memory, rng, typ, (33, 512))
    for size in (1e-30, 1e-7, 1e-5, 1e7, 1e30):
        x = (rng.standard_normal((3, 512)) * size).astype("f4")
        got = memory.compute(Op.MUL_MAT, (33, 3), w, memory.tensor(x)).astype("f8") / size
        assert nmse(got, x.astype("f8") / size @ memory.values(w).astype("f8").T) < 5e-4, size
    x[1, 300] = np.nan
    got = memory.compute(Op.MUL_MAT, (33, 3), w, memory.tensor(x)).reshape(3, 33)
    assert [np.isfinite(row).any() for row in got] == [True, False, True]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("typ", TYPES, ids=lambda t: t.name)
def test_product_equals_float64_within_upstreams_bound(memory, typ, n):
    """Rows as they lie and panels give the product, for every number of tokens."""
    rng = np.random.default_rng(n)
    w, x = weights(memory, rng, typ, (70, 512)), rng.standard_normal((n, 512), dtype="f4")
    got = memory.compute(Op.MUL_MAT, (70, n), w, memory.tensor(x))
    assert nmse(got.reshape(n, 70), x.astype("f8") @ memory.values(w).astype("f8").T) < 5e-4


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("typ", [t for t in TYPES if t.block_size < 256], ids=lambda t: t.name)
def test_product_of_few_blocks(memory, typ, n):
    """Rows need not be of whole 256s where blocks are smaller."""
    rng, k = np.random.default_rng(n), 3 * typ.block_size
    w, x = weights(memory, rng, typ, (33, k)), rng.standard_normal((n, k), dtype="f4")
    got = memory.compute(Op.MUL_MAT, (33, n), w, memory.tensor(x))
    assert nmse(got.reshape(n, 33), x.astype("f8") @ memory.values(w).astype("f8").T) < 5e-4


@pytest.mark.parametrize("n_token", [1, 40])
@pytest.mark.parametrize("typ", TYPES, ids=lambda t: t.name)
def test_experts_equal_float64(memory, typ, n_token):
    """Each token meets the experts it chose."""
    rng = np.random.default_rng(n_token)
    w, x = weights(memory, rng, typ, (6, 70, 256)), rng.standard_normal((n_token, 1, 256), dtype="f4")
    ids = np.stack([rng.permutation(6)[:2] for _ in range(n_token)]).astype("i4")
    got = memory.compute(Op.MUL_MAT_ID, (70, 2, n_token), w, memory.tensor(x), memory.tensor(ids))
    full = memory.values(w).astype("f8")
    want = np.stack([[full[e] @ x[t, 0].astype("f8") for e in row] for t, row in enumerate(ids)])
    assert nmse(got.reshape(want.shape), want) < 5e-4


@pytest.mark.parametrize("to", [Type.F32, Type.F16, Type.Q8_0], ids=lambda t: t.name)
def test_copies_to_other_types(memory, to):
    """CPY reads them row by row, and writes what rows can be turned into."""
    rng = np.random.default_rng(2)
    w = weights(memory, rng, Type.IQ3_S, (4, 256))
    got = memory.run(memory.node(Op.CPY, (256, 4), w, None, type=to))
    assert nmse(got.reshape(4, 256), memory.values(w)) < (1e-6 if to is not Type.Q8_0 else 1e-4)


def test_kernels_are_made_when_needed_and_not_before():
    """Importing what plans products compiles none of them and reads no codebook; nor does warming up."""
    code = """
import sys
from pyggml.opset import kernels
kernels.matmul, kernels.attention
from pyggml.kernels.cpu import coded
from pyggml.kernels.cpu.kernel import KERNELS
assert not [k for k in KERNELS.values() if k.rare and (k._address or k.name.startswith(("rows_", "unpack_")))]
assert "gguf" not in sys.modules
kernel = coded.dequantise_kernel(19)
assert kernel.rare and kernel is coded.dequantise_kernel(19)
class Seen(Exception): pass
def look(name, i, n):
    assert n == sum(not k.rare for k in KERNELS.values()) < len(KERNELS)
    raise Seen
from pyggml.kernels.cpu.kernel import warm_up
try:
    warm_up(look)
except Seen:
    print("seen")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "seen\n", done.stderr


def main() -> None:
    """Compare rows of all types with libggml's and print how many types there were."""
    folder = Path(importlib.util.find_spec("libggml").origin).parent / "lib64"
    base = c.CDLL(str(folder / "libggml-base.so"))
    rng = np.random.default_rng(0)
    for typ in TYPES:
        raw = rng.integers(0, 256, 300 * typ.type_size, np.uint8)
        ours, theirs = (np.zeros(300 * typ.block_size, "f4") for _ in range(2))
        dequantise = getattr(base, f"dequantize_row_{typ.ggml_name}")
        dequantise.restype, dequantise.argtypes = None, [c.c_void_p, c.c_void_p, c.c_int64]
        dequantise(raw.ctypes.data, theirs.ctypes.data, len(theirs))
        coded.dequantise_kernel(typ)(typ, raw.ctypes.data, ours.ctypes.data, len(ours))
        both_nan = np.isnan(ours) & np.isnan(theirs)
        assert bool(((ours.view("u4") == theirs.view("u4")) | both_nan).all()), typ.name
    print(len(TYPES), "types")


if __name__ == "__main__":
    main()
