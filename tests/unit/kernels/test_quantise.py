"""Rows of floats written as quantised ones: SET_ROWS and copies, byte for byte as libggml and gguf write them."""

from __future__ import annotations

import ctypes as c
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyggml.types import Op, Type
from pyggml.values import encode_array

BY_GGUF = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.MXFP4]
WRITTEN = [*BY_GGUF, Type.IQ4_NL, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
#: Elements of a row: two super-blocks.
N = 512


def odd_rows() -> np.ndarray:
    """Return rows of zeros, of subnormal, tiny, large and huge numbers, of one outlier, and of one number a block: (24, N)."""
    rng = np.random.default_rng(1)
    rows = np.zeros((24, N), "f4")
    for i, size in enumerate((1e-40, 1e-8, 6e4, 1e30)):
        rows[4 * i + 1] = size
        rows[4 * i + 2] = rng.standard_normal(N) * size
        rows[4 * i + 3, ::2] = -size
    rows[16] = rng.standard_normal(N)
    rows[16, 7] = 1e4
    rows[17, ::32] = -1.0
    rows[18, ::16] = rng.standard_normal(N // 16)
    return rows


def samples() -> dict[str, np.ndarray]:
    """Return rows of several kinds, (24, N) each."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((24, N), dtype="f4")
    scales = (10.0 ** rng.integers(-6, 4, (24, N // 16))).astype("f4")
    return {
        "normal": normal,
        "whole numbers": rng.integers(-9, 9, (24, N)).astype("f4"),
        "mostly zeros, of both signs": normal * (rng.random((24, N)) < 0.05),
        "zeros": np.zeros((24, N), "f4"),
        "positive": np.abs(normal) + 1,
        "negative": -np.abs(normal) - 1,
        "sub-blocks of many sizes": normal * scales.repeat(16, axis=1),
        "constant": np.repeat(normal[:, :1], N, axis=1),
        "long tails": normal**5,
        "odd sizes": odd_rows(),
    }


@pytest.mark.parametrize("typ", BY_GGUF, ids=lambda t: t.name)
def test_rows_equal_ggufs(memory, typ):
    """A copy to blocks of 32 has the bytes that gguf's numpy quantisers make."""
    for kind in ("normal", "positive", "long tails"):
        x = samples()[kind]
        node = memory.node(Op.CPY, (N, 24), memory.tensor(x), None, type=typ)
        memory.run(node)
        assert memory.bytes(node) == encode_array(node, x).tobytes(), kind


def test_rows_equal_libggmls():
    """Rows of every type have the bytes that libggml's CPU backend writes, whatever the numbers are like."""
    if importlib.util.find_spec("libggml") is None:
        pytest.fail("libggml-python is not installed: it is of the test extra")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(WRITTEN)} types" in done.stdout


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("typ", WRITTEN, ids=lambda t: t.name)
def test_copies_there_and_back(memory, typ, source):
    """A copy of any float type is quantised as its values are; back in floats it is what gguf reads, and near."""
    x = memory.tensor(samples()["normal"], source)
    there = memory.node(Op.CPY, x.ne, x, None, type=typ)
    back = memory.node(Op.CPY, x.ne, there, None)
    got = memory.run(there, back)
    plain = memory.node(Op.CPY, x.ne, memory.tensor(memory.values(x)), None, type=typ)
    memory.run(plain)
    assert memory.bytes(there) == memory.bytes(plain)
    np.testing.assert_allclose(got, memory.values(there), rtol=1e-6, atol=1e-7)
    error = ((got - memory.values(x)) ** 2).mean()
    assert error < (0.15 if typ in (Type.Q2_K, Type.Q3_K) else 0.02), error


@pytest.mark.parametrize("id_type", ["i4", "i8"])
@pytest.mark.parametrize("source", ["f32", "f16"])
@pytest.mark.parametrize("typ", WRITTEN, ids=lambda t: t.name)
def test_set_rows_of_every_type(memory, typ, source, id_type):
    """The chosen rows get the bytes of a copy, in each batch; others keep theirs."""
    x, other = samples()["normal"][:6].reshape(2, 3, N), samples()["long tails"][:16].reshape(2, 8, N)
    values = memory.tensor(x, source)
    cache = memory.node(Op.CPY, (N, 8, 2), memory.tensor(other), None, type=typ)
    new = memory.node(Op.CPY, (N, 3, 2), values, None, type=typ)
    memory.run(cache, new)
    want = np.frombuffer(memory.bytes(cache), "u1").reshape(2, 8, -1).copy()
    ids = np.array([5, 0, 7], id_type)
    want[:, ids] = np.frombuffer(memory.bytes(new), "u1").reshape(2, 3, -1)
    node = memory.node(Op.SET_ROWS, cache.ne, values, memory.tensor(ids), cache, type=typ, into=cache)
    memory.run(node)
    assert memory.bytes(node) == want.tobytes()


def test_get_rows_of_what_set_rows_writes(memory):
    """Rows of IQ4_NL, Q2_K and Q3_K are read back by GET_ROWS."""
    x = samples()["normal"]
    for typ in (Type.IQ4_NL, Type.Q2_K, Type.Q3_K):
        table = memory.node(Op.CPY, (N, 24), memory.tensor(x), None, type=typ)
        ids = np.array([3, 23, 0, 3], "i4")
        got = memory.run(table, memory.node(Op.GET_ROWS, (N, 4), table, memory.tensor(ids)))
        np.testing.assert_allclose(got, memory.values(table)[ids], rtol=1e-6, atol=1e-7)


def main() -> None:
    """Compare all types with libggml and print how many there were."""
    from pyggml.kernels.cpu.quantise import quantiser

    class Traits(c.Structure):
        _fields_ = (
            ("from_float", c.c_void_p),
            ("vec_dot", c.c_void_p),
            ("vec_dot_type", c.c_int),
            ("nrows", c.c_int64),
        )

    folder = Path(importlib.util.find_spec("libggml").origin).parent / "lib64"
    cpu = [c.CDLL(str(folder / f"libggml-{name}.so"), c.RTLD_GLOBAL) for name in ("base", "cpu")][1]
    cpu.ggml_cpu_init()
    traits = cpu.ggml_get_type_traits_cpu
    traits.restype, traits.argtypes = c.POINTER(Traits), [c.c_int]
    for typ in WRITTEN:
        from_float = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_int64)(traits(int(typ))[0].from_float)
        for kind, x in samples().items():
            x = np.ascontiguousarray(x)
            theirs, ours = (np.zeros((24, typ.row_size(N)), "u1") for _ in range(2))
            for row, a, b in zip(x, theirs, ours, strict=True):
                from_float(row.ctypes.data, a.ctypes.data, N)
                quantiser(typ)(int(typ), row.ctypes.data, b.ctypes.data, N)
            if typ is Type.IQ4_NL:  # upstream writes what was on the stack where all elements are as good as 0
                some = np.abs(x).reshape(24, -1, 32).max(-1) >= 1e-15
                theirs, ours = (y.reshape(24, -1, 18)[some] for y in (theirs, ours))
            if (
                typ is Type.Q8_0
            ):  # upstream writes -128 beside a scale of 0 where 127 divided by the largest is infinite
                tiny = np.abs(x).reshape(24, -1, 32).max(-1) < 127 / np.finfo("f4").max
                assert not ours.reshape(24, -1, 34)[tiny].any()
                theirs, ours = (y.reshape(24, -1, 34)[~tiny] for y in (theirs, ours))
            np.testing.assert_array_equal(ours, theirs, f"{typ.name}: {kind}")
    print(len(WRITTEN), "types")


if __name__ == "__main__":
    main()
