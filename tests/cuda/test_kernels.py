"""The compiled kernels in the emulator: every type against float64, ragged shapes, strides, and what must not happen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from emulated_card import FLOATS, QUANTIZED, Card, mul_mat_id_case, nmse, weights
from pyggml.kernels.cuda import launch, rows, tile

#: as upstream's test-backend-ops
MAX_NMSE = 5e-4
FLOAT_NMSE = 1e-10


def bound(type):
    """Return the error that is allowed: activations are quantised for quantised weights only."""
    return MAX_NMSE if type in QUANTIZED else FLOAT_NMSE


@pytest.mark.parametrize("type", QUANTIZED + FLOATS)
@pytest.mark.parametrize("n_token", [1, 9])
def test_mul_mat_id(type, n_token):
    """Few and many tokens give the product of the dequantised weights, for rows and columns that fill no tile."""
    card = Card()
    got, want = mul_mat_id_case(
        np.random.default_rng(n_token), card, type, n_expert=4, n_row=37, n_k=256, n_used=2, n_token=n_token
    )
    assert nmse(got, want) <= bound(type)
    assert not any(s.local_accesses for s in card.stats.values())


@pytest.mark.parametrize("type", ["q8_0", "mxfp4", "f32"])
@pytest.mark.parametrize("n_token", [2, 7, 8, 33])
def test_ragged_tokens(type, n_token):
    """Any number of tokens works, on either side of the border between the paths; the activations are not shared."""
    case = {"n_expert": 5, "n_row": 130, "n_k": 512, "n_used": 3, "n_token": n_token, "broadcast": False}
    got, want = mul_mat_id_case(np.random.default_rng(7), Card(), type, **case)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q4_1", "q5_0", "mxfp4", "f32", "f16", "bf16"])
@pytest.mark.parametrize(("n_k", "n_token"), [(32, 9), (96, 1), (96, 9), (160, 40)])
def test_odd_rows(type, n_k, n_token):
    """Rows of one block, or of an odd number of them, are right on both paths."""
    case = {"n_expert": 3, "n_row": 5, "n_k": n_k, "n_used": 2, "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(n_k), Card(), type, **case)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize("type", FLOATS)
@pytest.mark.parametrize("n_token", [3, 12])
def test_float_rows_of_any_length(type, n_token):
    """A row length that is no multiple of a wide load takes the kernel that loads one value at a time."""
    card = Card()
    case = {"n_expert": 3, "n_row": 9, "n_k": 77, "n_used": 2, "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(3), card, type, **case)
    assert nmse(got, want) <= bound(type)
    assert any(name.endswith("_any") for name in card.stats)


@pytest.mark.parametrize("ids", ["all one", "none for most", "same twice"])
@pytest.mark.parametrize("type", ["q4_1", "f16"])
def test_uneven_routing(type, ids):
    """One expert may have all tokens, most none, and a token may choose one expert twice."""
    n_token, n_expert = 40, 7
    chosen = {
        "all one": np.stack([np.full(n_token, 6), np.zeros(n_token, int)], 1),
        "none for most": np.stack([np.full(n_token, 2), np.full(n_token, 3)], 1),
        "same twice": np.repeat(np.random.default_rng(0).integers(0, n_expert, (n_token, 1)), 2, 1),
    }[ids]
    case = {"n_expert": n_expert, "n_row": 20, "n_k": 64, "n_used": 2, "n_token": n_token, "ids": chosen}
    got, want = mul_mat_id_case(np.random.default_rng(1), Card(), type, **case)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize("n_expert", [1, 128])
@pytest.mark.parametrize("n_token", [1, 20])
def test_numbers_of_experts(n_expert, n_token):
    """One expert, and as many as fine-grained models have."""
    case = {"n_expert": n_expert, "n_row": 8, "n_k": 64, "n_used": min(8, n_expert), "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(2), Card(), "q8_0", **case)
    assert nmse(got, want) <= MAX_NMSE


@pytest.mark.parametrize("type", ["q8_0", "f32"])
@pytest.mark.parametrize("n_token", [2, 10])
@pytest.mark.parametrize(("gap", "lead"), [(16, 32), (4, 4)])
def test_strided_activations(type, n_token, gap, lead):
    """Rows of activations may lie apart and anywhere; what lies between is never used."""
    case = {"n_expert": 3, "n_row": 10, "n_k": 64, "n_used": 2, "n_token": n_token, "broadcast": False}
    got, want = mul_mat_id_case(np.random.default_rng(4), Card(), type, **case, gap=gap, lead=lead)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize("type", ["q8_0", "q6_K", "f32", "f32_any"])
def test_no_races(type):
    """No word of shared memory is used by two warps without a barrier between."""
    n_k = 77 if type == "f32_any" else 512
    case = {"n_expert": 2, "n_row": 140, "n_k": n_k, "n_used": 2, "n_token": 33}
    card = Card(racecheck=True)
    got, want = mul_mat_id_case(np.random.default_rng(5), card, type.removesuffix("_any"), **case)
    assert nmse(got, want) <= bound(type.removesuffix("_any"))
    assert f"tile_{type}" in card.stats


@pytest.mark.parametrize("cc", [(7, 5), (12, 0)])
@pytest.mark.parametrize(("type", "n_token"), [("mxfp4", 1), ("q8_0", 9), ("f16", 9)])
def test_other_targets(cc, type, n_token):
    """What is compiled for the oldest and the newest target gives the same."""
    case = {"n_expert": 3, "n_row": 20, "n_k": 128, "n_used": 2, "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(6), Card(cc), type, **case)
    assert nmse(got, want) <= bound(type)


def test_zero_activations_give_zero():
    """A block of activations that are all zero has no scale to divide by."""
    rng = np.random.default_rng(0)
    card = Card()
    packed, _ = weights(rng, "q8_0", (1, 6, 64))
    dst = card.result(6, 1, 1)
    ids = card.operand(np.zeros((1, 1), "i4"), "i32", ne=(1, 1))
    card.product(
        launch.mul_mat_id,
        card.operand(packed, "q8_0", ne=(64, 6, 1)),
        card.operand(np.zeros((1, 1, 64), "f4")),
        ids,
        dst,
    )
    assert not card.read(dst).any()


@pytest.mark.parametrize("type", ["q8_0", "f16"])
@pytest.mark.parametrize("n_column", [1, 5, 35])
def test_mul_mat(type, n_column):
    """MUL_MAT is MUL_MAT_ID with matrices for tokens: src0's matrices are repeated as in grouped-query attention."""
    rng = np.random.default_rng(8)
    card = Card()
    packed, values = weights(rng, type, (2, 21, 64))
    y = rng.standard_normal((6, n_column, 64)).astype("f4")
    dst = card.result(21, n_column, 6)
    card.product(launch.mul_mat, card.operand(packed, type, ne=(64, 21, 2)), card.operand(y, gap=8), dst)
    want = np.einsum("cmk,cnk->cnm", np.repeat(values, 3, 0), y.astype("f8"))
    assert nmse(card.read(dst)[0], want) <= bound(type)


def test_grouping_is_stable_and_complete():
    """Every pair comes once, under its expert, in the order of the tokens; every tile belongs to the expert it names."""
    rng = np.random.default_rng(9)
    card = Card()
    n_token, n_used, n_expert = 70, 3, 5
    ids = rng.integers(0, n_expert, (n_token, n_used)).astype("i4")
    n, columns = ids.size, tile.COLUMNS
    row_src, row_dst, bounds = (card.mem.alloc(4 * k) for k in (n, n, n_expert + 1))
    tiles = card.mem.alloc(4 * (n // columns + n_expert))
    pointers = [b.addr for b in (row_src, row_dst, bounds, tiles)]
    args = (card.put(ids), 4, 4 * n_used, n, n_used, n_used, *pointers)
    card.run([launch.Launch("group_ids", (n_expert, 1, 1), (32, 1, 1), args)])
    order = np.argsort(ids.ravel(), kind="stable")
    assert np.array_equal(card.mem.read(row_dst, "i4"), order)
    assert np.array_equal(card.mem.read(row_src, "i4"), order)
    starts = np.searchsorted(ids.ravel()[order], np.arange(n_expert + 1))
    assert np.array_equal(card.mem.read(bounds, "i4"), starts)
    want = np.full(n // columns + n_expert, -1)
    for e in range(n_expert):
        first = starts[e] // columns + e
        want[first : first + -(-(starts[e + 1] - starts[e]) // columns)] = e
    assert np.array_equal(card.mem.read(tiles, "i4"), want)


@pytest.mark.parametrize(("n", "gap"), [(64, 0), (64, 16), (30, 0), (33, 4)])
def test_add_id(n, gap):
    """Each row gets the bias of its expert, whatever the alignment."""
    rng = np.random.default_rng(10)
    card = Card()
    x, bias = rng.standard_normal((5, 2, n)).astype("f4"), rng.standard_normal((4, n)).astype("f4")
    ids = rng.integers(0, 4, (5, 2)).astype("i4")
    dst = card.result(n, 2, 5)
    card.run(launch.add_id(card.operand(x, gap=gap), card.operand(bias), card.operand(ids, "i32"), dst))
    assert np.array_equal(card.read(dst)[0], (x + bias[ids]).astype("f8"))


@pytest.mark.parametrize("kernel", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 8), (1, 2, 1, 8), (3, 1, 4, 1), (1, 1, 1, 4)])
def test_binary(kernel, shape):
    """Two tensors of equal or repeated shape, the same bits as numpy."""
    rng = np.random.default_rng(11)
    card = Card()
    a, b = rng.standard_normal((3, 2, 4, 8)).astype("f4"), rng.standard_normal(shape).astype("f4")
    dst = card.result(8, 4, 2, 3)
    card.run(launch.binary(kernel, card.operand(a), card.operand(b), dst))
    full = np.tile(b, [m // n for m, n in zip(a.shape, b.shape, strict=True)])
    want = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[kernel](a, full)
    assert np.array_equal(card.read(dst), want.astype("f8"))


@pytest.mark.parametrize("n", [5, 64, 3000])
def test_scale(n):
    """SCALE is one multiply-add."""
    card = Card()
    x = np.random.default_rng(12).standard_normal(n).astype("f4")
    dst = card.result(n)
    card.run(launch.scale(card.operand(x), dst, 0.25, 1.5))
    np.testing.assert_allclose(card.read(dst).ravel(), x * 0.25 + 1.5, rtol=1e-6)


@pytest.mark.parametrize(("src", "dst"), rows.COPIES)
def test_copy(src, dst):
    """A transposed tensor becomes contiguous, converted as numpy converts."""
    card = Card()
    x = np.random.default_rng(15).standard_normal((2, 3, 5, 7)).astype({"f32": "f4", "f16": "f2"}[src])
    a = card.operand(x, src)
    swapped = replace(a, ne=[5, 7, 3, 2], nb=[a.nb[1], a.nb[0], a.nb[2], a.nb[3]])
    size = {"f32": 4, "f16": 2}[dst]
    out = card.mem.alloc(x.size * size)
    nb = [size, 5 * size, 35 * size, 105 * size]
    card.run(launch.copy(swapped, launch.Operand(out.addr, dst, [5, 7, 3, 2], nb)))
    want = x.astype({"f32": "f4", "f16": "f2"}[dst]).transpose(0, 1, 3, 2)
    assert np.array_equal(card.mem.read(out, want.dtype, want.shape), want)


@pytest.mark.parametrize("index", ["i4", "i8"])
@pytest.mark.parametrize("type", rows.SETS)
def test_set_rows(type, index):
    """Rows go where the indices say, converted to the type; other rows stay."""
    rng = np.random.default_rng(16)
    card = Card()
    x = rng.standard_normal((2, 3, 8)).astype("f4")
    at = np.array([4, 0, 2]).astype(index)
    size = {"f32": "u4", "f16": "u2", "bf16": "u2"}[type]
    cache = np.zeros((2, 6, 8), size)
    dst = card.operand(cache, type)
    card.run(launch.set_rows(card.operand(x), card.operand(at, {"i4": "i32", "i8": "i64"}[index]), dst))
    bits = x.view("u4")
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")
    cache[:, at] = {"f32": bits, "f16": x.astype("f2").view("u2"), "bf16": rounded}[type]
    assert np.array_equal(card.mem.read(card.mem.locate(dst.address)[0], size, cache.shape), cache)


@pytest.mark.parametrize("n", [5, 256, 1000])
def test_rms_norm(n):
    """Rows are divided by the root of their mean square."""
    card = Card(racecheck=True)
    x = np.random.default_rng(17).standard_normal((4, n)).astype("f4")
    dst = card.result(n, 4)
    card.run(launch.rms_norm(card.operand(x, gap=8), dst, 1e-5))
    want = x / np.sqrt((x.astype("f8") ** 2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(card.read(dst)[0, 0], want, rtol=1e-5)


def gated(name, x, g, alpha, limit):
    """Return what each gate is defined as, in float64."""
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    low, high = np.minimum(x, limit), np.clip(g, -limit, limit)
    return {
        "reglu": np.maximum(x, 0) * g,
        "geglu": 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))) * g,
        "swiglu": x * sigmoid(x) * g,
        "swiglu_oai": low * sigmoid(alpha * low) * (1 + high),
        "geglu_erf": 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) * g,
        "geglu_quick": x * sigmoid(1.702 * x) * g,
        "swiglu_clamp": low * sigmoid(low) * high,
    }[name]


@pytest.mark.parametrize("name", sorted(rows.GATES))
def test_glu(name):
    """Every gate follows its definition."""
    rng = np.random.default_rng(13)
    card = Card()
    x, g = (rng.standard_normal((7, 50)).astype("f4") * 3 for _ in range(2))
    dst = card.result(50, 7)
    card.run(launch.glu(name, card.operand(x, gap=8), card.operand(g), dst, 1.25, 2.0))
    want = gated(name, x.astype("f8"), g.astype("f8"), 1.25, 2.0)
    np.testing.assert_allclose(card.read(dst)[0, 0], want, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("type", QUANTIZED + FLOATS)
def test_every_type_on_every_target(type, cc):
    """The cases of test-backend-ops in small, for every target."""
    rng = np.random.default_rng(14)
    for n_token in (1, 4, 5, 17, 32, 129):
        for n_expert, n_used, broadcast in ((4, 1, False), (4, 2, True), (8, 4, False)):
            case = {"n_expert": n_expert, "n_row": 96, "n_k": 256, "n_used": n_used, "n_token": n_token}
            got, want = mul_mat_id_case(rng, Card(cc), type, **case, broadcast=broadcast)
            assert nmse(got, want) <= bound(type), case
