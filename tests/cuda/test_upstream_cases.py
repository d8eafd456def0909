"""The cases of upstream's test-backend-ops: some in every run, all of them under ``slow``."""

from __future__ import annotations

import numpy as np
import pytest
from emulated_card import QUANTIZED, Card, mul_mat_id_case, nmse
from pyggml.kernels.cuda import launch
from upstream_cases import ADD_ID, MUL_MAT_ID, QUICK

#: upstream's bound, and ours where nothing is rounded to bytes
MAX_NMSE, FLOAT_NMSE = 5e-4, 1e-10


def check_mul_mat_id(card, case, rows):
    """Run one case with so many rows, and compare with the float64 product."""
    got, want = mul_mat_id_case(
        np.random.default_rng(case.n),
        card,
        case.type,
        n_expert=case.n_mats,
        n_row=rows,
        n_k=case.k,
        n_used=case.n_used,
        n_token=case.n,
        broadcast=case.broadcast,
        amax=case.amax,
        n_row_apart=case.m_v,
    )
    assert nmse(got, want) <= (MAX_NMSE if case.type in QUANTIZED else FLOAT_NMSE)


def check_add_id(card, n_embd, n_mats, n_used, n_token):
    """Run one case; a sum of two float32 has one right result."""
    rng = np.random.default_rng(n_token)
    x, bias = (rng.uniform(-1, 1, s).astype("f4") for s in ((n_token, n_used, n_embd), (n_mats, n_embd)))
    ids = np.stack([rng.permutation(n_mats)[:n_used] for _ in range(n_token)]).astype("i4")
    dst = card.result(n_embd, n_used, n_token)
    # the ids used are a view of what the router sorted
    card.run(
        launch.add_id(card.operand(x), card.operand(bias), card.operand(ids, "i32", gap=4 * (n_mats - n_used)), dst)
    )
    assert np.array_equal(card.read(dst)[0], (x + bias[ids]).astype("f8"))


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_some_of_mul_mat_id(card, case):
    """Each kind of case that upstream has gives the product of the dequantised weights."""
    check_mul_mat_id(card, case, case.m)


@pytest.mark.parametrize("n_embd", [32, 129])
def test_add_id(card, n_embd):
    """Upstream's cases of ADD_ID give the sum to the bit."""
    for case in ADD_ID:
        if case[0] == n_embd:
            check_add_id(card, *case)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", MUL_MAT_ID, ids=str)
def test_all_of_mul_mat_id(case):
    """Every case that upstream has gives the product of the dequantised weights."""
    check_mul_mat_id(Card(), case, case.rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in ADD_ID if c[0] == 2880])
def test_add_id_of_a_model(case):
    """Rows as long as gpt-oss has them, too."""
    check_add_id(Card(), *case)
