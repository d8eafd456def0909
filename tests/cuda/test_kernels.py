"""The products: every type against float64, ragged shapes, strides, and what must not happen.

Tests that take ``card`` run in the emulator, and under ``gpu`` on a real card.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulated_card import FLOATS, QUANTIZED, Card, mul_mat_id_case, nmse, weights
from pyggml.kernels.cuda import launch, tile

#: as upstream's test-backend-ops
MAX_NMSE = 5e-4
FLOAT_NMSE = 1e-10


def bound(type):
    """Return the error that is allowed: activations are quantised for quantised weights only."""
    return MAX_NMSE if type in QUANTIZED else FLOAT_NMSE


@pytest.mark.parametrize("type", QUANTIZED + FLOATS)
@pytest.mark.parametrize("n_token", [1, 9])
def test_mul_mat_id(card, type, n_token):
    """Few and many tokens give the product of the dequantised weights, for rows and columns that fill no tile."""
    got, want = mul_mat_id_case(
        np.random.default_rng(n_token), card, type, n_expert=4, n_row=37, n_k=256, n_used=2, n_token=n_token
    )
    assert nmse(got, want) <= bound(type)
    assert not any(s.local_accesses for s in card.stats.values())


@pytest.mark.parametrize("type", ["q8_0", "mxfp4", "f32"])
@pytest.mark.parametrize("n_token", [2, 7, 8, 33])
def test_ragged_tokens(card, type, n_token):
    """Any number of tokens works, on either side of the border between the paths; the activations are not shared."""
    case = {"n_expert": 5, "n_row": 130, "n_k": 512, "n_used": 3, "n_token": n_token, "broadcast": False}
    got, want = mul_mat_id_case(np.random.default_rng(7), card, type, **case)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q4_1", "q5_0", "mxfp4", "f32", "f16", "bf16"])
@pytest.mark.parametrize(("n_k", "n_token"), [(32, 9), (96, 1), (96, 9), (160, 40)])
def test_odd_rows(card, type, n_k, n_token):
    """Rows of one block, or of an odd number of them, are right on both paths."""
    case = {"n_expert": 3, "n_row": 5, "n_k": n_k, "n_used": 2, "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(n_k), card, type, **case)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize(
    ("type", "n_token"),
    [*((t, 3) for t in FLOATS), ("f16", 12), *(pytest.param(t, 12, marks=pytest.mark.slow) for t in ("f32", "bf16"))],
)
def test_float_rows_of_any_length(card, type, n_token):
    """A row length that is no multiple of a wide load takes the kernel that loads one value at a time."""
    case = {"n_expert": 3, "n_row": 5, "n_k": 45, "n_used": 2, "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(3), card, type, **case)
    assert nmse(got, want) <= bound(type)
    assert any(name.endswith("_any") for name in card.launched)


@pytest.mark.parametrize("ids", ["all one", "none for most", "same twice"])
@pytest.mark.parametrize("type", ["q4_1", "f16"])
def test_uneven_routing(card, type, ids):
    """One expert may have all tokens, most none, and a token may choose one expert twice."""
    n_token, n_expert = 40, 7
    chosen = {
        "all one": np.stack([np.full(n_token, 6), np.zeros(n_token, int)], 1),
        "none for most": np.stack([np.full(n_token, 2), np.full(n_token, 3)], 1),
        "same twice": np.repeat(np.random.default_rng(0).integers(0, n_expert, (n_token, 1)), 2, 1),
    }[ids]
    case = {"n_expert": n_expert, "n_row": 20, "n_k": 64, "n_used": 2, "n_token": n_token, "ids": chosen}
    got, want = mul_mat_id_case(np.random.default_rng(1), card, type, **case)
    assert nmse(got, want) <= bound(type)


@pytest.mark.parametrize("n_expert", [1, 128])
@pytest.mark.parametrize("n_token", [1, 20])
def test_numbers_of_experts(card, n_expert, n_token):
    """One expert, and as many as fine-grained models have."""
    case = {"n_expert": n_expert, "n_row": 8, "n_k": 64, "n_used": min(8, n_expert), "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(2), card, "q8_0", **case)
    assert nmse(got, want) <= MAX_NMSE


@pytest.mark.parametrize("type", ["q8_0", "f32"])
@pytest.mark.parametrize("n_token", [2, 10])
@pytest.mark.parametrize(("gap", "lead"), [(16, 32), (4, 4)])
def test_strided_activations(card, type, n_token, gap, lead):
    """Rows of activations may lie apart and anywhere; what lies between is never used."""
    case = {"n_expert": 3, "n_row": 10, "n_k": 64, "n_used": 2, "n_token": n_token, "broadcast": False}
    got, want = mul_mat_id_case(np.random.default_rng(4), card, type, **case, gap=gap, lead=lead)
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


def test_zero_activations_give_zero(card):
    """A block of activations that are all zero has no scale to divide by."""
    rng = np.random.default_rng(0)
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
def test_mul_mat(card, type, n_column):
    """MUL_MAT is MUL_MAT_ID with matrices for tokens: src0's matrices are repeated as in grouped-query attention."""
    rng = np.random.default_rng(8)
    packed, values = weights(rng, type, (2, 21, 64))
    y = rng.standard_normal((4, n_column, 64)).astype("f4")
    dst = card.result(21, n_column, 4)
    card.product(launch.mul_mat, card.operand(packed, type, ne=(64, 21, 2)), card.operand(y, gap=8), dst)
    want = np.einsum("cmk,cnk->cnm", np.repeat(values, 2, 0), y.astype("f8"))
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
