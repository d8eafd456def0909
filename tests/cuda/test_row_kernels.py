"""Kernels that work row by row, against what their ops are defined as; in the emulator, under ``gpu`` on a real card."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from pyggml.kernels.cuda import copies, launch, reduce, rope, rows

from pyggml.tensor import Tensor, pack_params
from pyggml.testing import ref
from pyggml.types import GluOp, Op, UnaryOp

#: what the emulator is asked beside
CARD_OPTIONS = {"racecheck": True}


def define(op, *arrays, params):
    """Return what an op is defined as; its result has the shape of the first array."""
    src = [None if x is None else Tensor("f32", x.shape[::-1]) for x in arrays]
    node = Tensor("f32", arrays[0].shape[::-1], op=op, src=src, op_params=params)
    return ref.compute(node, [None if x is None else x.astype("f8") for x in arrays])


@pytest.mark.parametrize(("n", "gap"), [(64, 0), (64, 16), (30, 0), (33, 4)])
def test_add_id(card, n, gap):
    """Each row gets the bias of its expert, whatever the alignment."""
    rng = np.random.default_rng(10)
    x, bias = rng.standard_normal((5, 2, n)).astype("f4"), rng.standard_normal((4, n)).astype("f4")
    ids = rng.integers(0, 4, (5, 2)).astype("i4")
    dst = card.result(n, 2, 5)
    card.run(launch.add_id(card.operand(x, gap=gap), card.operand(bias), card.operand(ids, "i32"), dst))
    assert np.array_equal(card.read(dst)[0], (x + bias[ids]).astype("f8"))


@pytest.mark.parametrize("kernel", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 8), (1, 2, 1, 8), (3, 1, 4, 1), (1, 1, 1, 4)])
def test_binary(card, kernel, shape):
    """Two tensors of equal or repeated shape, the same bits as numpy."""
    rng = np.random.default_rng(11)
    a, b = rng.standard_normal((3, 2, 4, 8)).astype("f4"), rng.standard_normal(shape).astype("f4")
    dst = card.result(8, 4, 2, 3)
    card.run(launch.binary(kernel, card.operand(a), card.operand(b), dst))
    full = np.tile(b, [m // n for m, n in zip(a.shape, b.shape, strict=True)])
    want = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[kernel](a, full)
    assert np.array_equal(card.read(dst), want.astype("f8"))


@pytest.mark.parametrize("n", [5, 64, 3000])
def test_scale(card, n):
    """SCALE is one multiply-add."""
    x = np.random.default_rng(12).standard_normal(n).astype("f4")
    dst = card.result(n)
    card.run(launch.scale(card.operand(x), dst, 0.25, 1.5))
    np.testing.assert_allclose(card.read(dst).ravel(), x * 0.25 + 1.5, rtol=1e-6)


@pytest.mark.parametrize(("src", "dst"), copies.COPIES)
def test_copy(card, src, dst):
    """A transposed tensor becomes contiguous, converted as numpy converts."""
    x = np.random.default_rng(15).standard_normal((2, 3, 5, 7)).astype({"f32": "f4", "f16": "f2"}[src])
    a = card.operand(x, src)
    swapped = replace(a, ne=[5, 7, 3, 2], nb=[a.nb[1], a.nb[0], a.nb[2], a.nb[3]])
    out = card.result(5, 7, 3, 2, type=dst)
    card.run(launch.copy(swapped, out))
    want = x.astype({"f32": "f4", "f16": "f2"}[dst]).transpose(0, 1, 3, 2)
    assert np.array_equal(card.read(out), want)


@pytest.mark.parametrize("is_dst_dense", [True, False])
def test_copy_to_another_shape(card, is_dst_dense):
    """Heads side by side become one row, as attention leaves them, and a row becomes heads that lie apart."""
    x = np.random.default_rng(27).standard_normal((5, 3, 8)).astype("f4")
    if is_dst_dense:
        a, out = card.operand(x), card.result(24, 5)
        apart = replace(a, ne=[8, 5, 3, 1], nb=[4, a.nb[2], a.nb[1], a.nb[3]])
        card.run(launch.copy(apart, replace(out, ne=[40, 3, 1, 1], nb=[4, 160, 480, 480])))
        assert np.array_equal(card.read(replace(out, ne=[8, 5, 3])), x.transpose(1, 0, 2).astype("f8"))
        return
    to = card.operand(np.zeros((15, 8), "f4"), gap=16)
    card.run(launch.copy(card.operand(x.reshape(1, 120)), to, is_dst_dense=False))
    rows_of_bytes = np.pad(card.bytes_of(to, 15 * 48 - 16), (0, 16)).reshape(15, 48)
    assert np.array_equal(rows_of_bytes[:, :32], x.reshape(15, 8).view("u1"))


@pytest.mark.parametrize("index", ["i4", "i8"])
@pytest.mark.parametrize("type", copies.SETS)
def test_set_rows(card, type, index):
    """Rows go where the indices say, converted to the type; other rows stay."""
    rng = np.random.default_rng(16)
    x = rng.standard_normal((2, 3, 8)).astype("f4")
    at = np.array([4, 0, 2]).astype(index)
    size = {"f32": "u4", "f16": "u2", "bf16": "u2"}[type]
    cache = np.zeros((2, 6, 8), size)
    dst = card.operand(cache, type)
    card.run(launch.set_rows(card.operand(x), card.operand(at, {"i4": "i32", "i8": "i64"}[index]), dst))
    bits = x.view("u4")
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")
    cache[:, at] = {"f32": bits, "f16": x.astype("f2").view("u2"), "bf16": rounded}[type]
    assert np.array_equal(card.bytes_of(dst, cache.nbytes).view(size).reshape(cache.shape), cache)


@pytest.mark.parametrize("n", [5, 256, 1000])
def test_rms_norm(card, n):
    """Rows are divided by the root of their mean square."""
    x = np.random.default_rng(17).standard_normal((4, n)).astype("f4")
    dst = card.result(n, 4)
    card.run(launch.rms_norm(card.operand(x, gap=8), dst, 1e-5))
    want = x / np.sqrt((x.astype("f8") ** 2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(card.read(dst)[0, 0], want, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(rows.GATES))
def test_glu(card, name):
    """Every gate follows its definition."""
    rng = np.random.default_rng(13)
    x, g = (rng.standard_normal((7, 50)).astype("f4") * 3 for _ in range(2))
    dst = card.result(50, 7)
    card.run(launch.glu(name, card.operand(x, gap=8), card.operand(g), dst, 1.25, 2.0))
    params = pack_params(int(GluOp[name.upper()]), 0, 1.25, 2.0)
    want = define(Op.GLU, x, g, params=params)[0, 0]
    np.testing.assert_allclose(card.read(dst)[0, 0], want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("type", copies.GETS)
def test_get_rows(card, type):
    """Rows are fetched from the matrix of their index, floats as float32; indices may be a view of longer rows."""
    rng = np.random.default_rng(18)
    x = rng.integers(-9, 9, (3, 6, 5)).astype({"i32": "i4", "f16": "f2"}.get(type, "f4"))
    at = np.stack([rng.permutation(6)[:4] for _ in range(3)]).astype("i4")
    stored = (x.view("u4") >> 16).astype("u2") if type == "bf16" else x
    dst = card.result(5, 4, 3, type="i32" if type == "i32" else "f32")
    card.run(launch.get_rows(card.operand(stored, type), card.operand(at, "i32", gap=8), dst))
    assert np.array_equal(card.read(dst)[0], np.stack([x[i, at[i]] for i in range(3)]))


@pytest.mark.parametrize("n", [1, 8, 33, 700])
def test_sum_rows(card, n):
    """Each row becomes its sum."""
    x = np.random.default_rng(19).standard_normal((2, 3, n)).astype("f4")
    dst = card.result(1, 3, 2)
    card.run(launch.sum_rows(card.operand(x, gap=4), dst))
    np.testing.assert_allclose(card.read(dst)[0, ..., 0], x.astype("f8").sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 8, 128, 1024])
@pytest.mark.parametrize("descending", [True, False])
def test_argsort(card, n, descending):
    """Rows are sorted stably: equal values keep their order, and -0 is 0."""
    x = np.random.default_rng(20).integers(-20, 20, (3, n)).astype("f4")
    x[x == 7] = -0.0
    dst = card.result(n, 3, type="i32")
    card.run(launch.argsort(card.operand(x, gap=4), dst, descending=descending))
    assert np.array_equal(card.read(dst)[0, 0], np.argsort(-x if descending else x, axis=1, kind="stable"))


def test_top_k(card):
    """The first of a descending order are the largest."""
    x = np.random.default_rng(21).standard_normal((5, 60)).astype("f4")
    dst = card.result(6, 5, type="i32")
    card.run(launch.argsort(card.operand(x), dst, descending=True))
    assert np.array_equal(card.read(dst)[0, 0], np.argsort(-x, axis=1)[:, :6])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_sorting_what_is_no_number(card, bad):
    """Whatever the values, every index comes once: nobody downstream reads an expert that does not exist."""
    x = np.random.default_rng(22).standard_normal((2, 37)).astype("f4")
    x[:, ::5] = bad
    dst = card.result(37, 2, type="i32")
    card.run(launch.argsort(card.operand(x), dst, descending=True))
    assert np.array_equal(np.sort(card.read(dst)[0, 0], axis=1), np.tile(np.arange(37), (2, 1)))


@pytest.mark.parametrize("n", [5, 64, 600])
@pytest.mark.parametrize("mask", reduce.MASKS)
@pytest.mark.parametrize(("max_bias", "with_sinks"), [(0.0, False), (8.0, False), (0.0, True)])
def test_soft_max(card, n, mask, max_bias, with_sinks):
    """Scaled and masked rows become probabilities; masks are repeated over heads, sloped by ALiBi; sinks take a part."""
    if mask == "none" and max_bias:
        max_bias = 0.0  # there is nothing to slope
    rng = np.random.default_rng(23)
    x = rng.standard_normal((2, 6, 3, n)).astype("f4")
    m = rng.standard_normal((2, 2, 4, n)).astype("f2" if mask == "f16" else "f4")
    m[..., 1::3] = -np.inf
    m[..., 0] = 0
    sinks = rng.standard_normal(6).astype("f4") if with_sinks else None
    dst = card.result(n, 3, 6, 2)
    card.run(
        launch.soft_max(
            card.operand(x),
            None if mask == "none" else card.operand(m, mask),
            None if sinks is None else card.operand(sinks),
            dst,
            0.5,
            max_bias,
        )
    )
    want = define(Op.SOFT_MAX, x, None if mask == "none" else m, sinks, params=pack_params(0.5, max_bias))
    np.testing.assert_allclose(card.read(dst), want, rtol=1e-5, atol=1e-9)


def test_soft_max_of_large_values(card):
    """Values that no exponential can hold make no infinity, in place either."""
    x = np.array([[1e4, 1e4 + 1, -1e4, 0.0]], "f4")
    a = card.operand(x)
    card.run(launch.soft_max(a, None, None, a, 1.0, 0.0))
    np.testing.assert_allclose(
        card.read(a)[0, 0], define(Op.SOFT_MAX, x, None, None, params=pack_params(1.0, 0.0))[0, 0], rtol=1e-6
    )


def turned(x, positions, factors, how):
    """Return what ROPE is defined as; x is (token, head, value)."""
    params = pack_params(0, how.n_dims, 2 * how.is_neox, 0, how.n_ctx_orig, how.freq_base, how.freq_scale)
    params += pack_params(how.ext_factor, how.attn_factor, how.beta_fast, how.beta_slow)
    return define(Op.ROPE, x, positions, factors, params=params)[0]


@pytest.mark.parametrize("type", rope.TYPES)
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("with_factors", [False, True])
def test_rope(card, type, is_neox, yarn, with_factors):
    """Pairs are turned by their token's position, what lies behind them stays; with frequency factors and YaRN, too."""
    rng = np.random.default_rng(24)
    x = rng.standard_normal((5, 3, 80)).astype("f2" if type == "f16" else "f4")
    positions = np.array([0, 1, 77, 4095, 100_000], "i4")
    factors = rng.uniform(1, 8, 40).astype("f4") if with_factors else None
    how = launch.Rope(64, is_neox, 4096, 1e6, 0.25 if yarn else 1.0, 1.0 if yarn else 0.0, 1.2, 32.0, 1.0)
    dst = card.result(80, 3, 5, type=type)
    card.run(
        launch.rope(
            card.operand(x, type, gap=32),
            card.operand(positions, "i32"),
            None if factors is None else card.operand(factors),
            dst,
            how,
        )
    )
    got, want = card.read(dst)[0], turned(x, positions.astype("f8"), factors, how)
    np.testing.assert_allclose(got[:3], want[:3], atol=2e-5 if type == "f32" else 4e-3)
    # angles are float32: a unit in the last place of 100,000 is 0.008
    np.testing.assert_allclose(got, want, atol=0.06)


def test_rope_of_a_long_row_in_place(card):
    """Rows longer than a block's reach are turned whole, on their own memory."""
    x = np.random.default_rng(25).standard_normal((2, 1, 640)).astype("f4")
    how = launch.Rope(640, True, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
    a = card.operand(x)
    card.run(launch.rope(a, card.operand(np.array([3, 9], "i4"), "i32"), None, a, how))
    np.testing.assert_allclose(card.read(a)[0], turned(x, np.array([3.0, 9.0]), None, how), atol=1e-5)


@pytest.mark.parametrize("name", rows.UNARY)
def test_unary(card, name):
    """CLAMP and each unary function follow their definition; CLAMP has limits that may be infinite."""
    x = np.random.default_rng(26).standard_normal(333).astype("f4") * 3
    dst = card.result(333)
    card.run(launch.unary(name, card.operand(x), dst, -0.5, 1.5))
    op, params = (Op.CLAMP, pack_params(-0.5, 1.5)) if name == "clamp" else (Op.UNARY, (UnaryOp[name.upper()],))
    np.testing.assert_allclose(card.read(dst), define(op, x, params=params), rtol=2e-5, atol=1e-6)
    if name == "clamp":
        card.run(launch.unary(name, card.operand(x), dst, 0.25, math.inf))
        assert np.array_equal(card.read(dst).ravel(), np.maximum(x, np.float32(0.25)).astype("f8"))
