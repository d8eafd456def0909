"""MUL_MAT and MUL_MAT_ID against float64 products of the dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import Memory, nmse

from pyggml.tensor import Tensor
from pyggml.types import Op, Type

FLOATS = [Type.F32, Type.F16, Type.BF16]
BLOCKS_32 = [Type.Q8_0, Type.Q4_1, Type.Q4_0, Type.Q5_0, Type.Q5_1, Type.MXFP4, Type.IQ4_NL]
K_QUANTS = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
#: Where a block that gguf cannot make keeps its halves.
HALVES_AT = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
}
#: Upstream's bound for quantised products (test-backend-ops), and what floats must keep.
BOUND = {**dict.fromkeys(FLOATS, 1e-7), **dict.fromkeys(BLOCKS_32 + K_QUANTS, 5e-4)}


def weights(memory: Memory, rng: np.random.Generator, typ: Type, shape: tuple[int, ...]) -> Tensor:
    """Return random weights of a type: quantised by gguf where it can, else random blocks with tame scales."""
    if typ not in HALVES_AT:
        return memory.tensor(rng.standard_normal(shape, dtype="f4"), typ, name="blk.3.ffn_up_exps.weight")
    t = Tensor(typ, shape[::-1], name="blk.3.ffn_up_exps.weight")
    blocks = rng.integers(0, 256, (t.nbytes // typ.type_size, typ.type_size), np.uint8)
    for at in HALVES_AT[typ]:
        halves = rng.uniform(0.005, 0.02, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return memory.place(t, blocks)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize("typ", FLOATS + BLOCKS_32 + K_QUANTS, ids=lambda t: t.name)
def test_product_equals_float64_within_upstreams_bound(memory, typ, n):
    """Every weight type and number of tokens gives the product, whole panels of rows and the rest alike."""
    rng = np.random.default_rng(n)
    w, x = weights(memory, rng, typ, (70, 512)), rng.standard_normal((n, 512), dtype="f4")
    got = memory.compute(Op.MUL_MAT, (70, n), w, memory.tensor(x))
    want = x.astype("f8") @ memory.values(w).astype("f8").T
    assert nmse(got.reshape(n, 70), want) < BOUND[typ]


@pytest.mark.parametrize("k", [1, 15, 16, 17, 33, 63, 100])
@pytest.mark.parametrize("typ", FLOATS, ids=lambda t: t.name)
def test_float_product_of_any_length(memory, typ, k):
    """Rows whose length is no multiple of a vector lose nothing and read nothing behind their end."""
    rng = np.random.default_rng(k)
    w, x = weights(memory, rng, typ, (9, k)), rng.standard_normal((5, k), dtype="f4")
    got = memory.compute(Op.MUL_MAT, (9, 5), w, memory.tensor(x))
    assert nmse(got, x.astype("f8") @ memory.values(w).reshape(9, k).astype("f8").T) < 1e-7


@pytest.mark.parametrize("k", [32, 64, 96, 160, 224])
@pytest.mark.parametrize("typ", BLOCKS_32, ids=lambda t: t.name)
def test_quantised_product_of_few_blocks(memory, typ, k):
    """Rows of any number of blocks are whole: the last one, two or three have steps of their own."""
    rng = np.random.default_rng(k)
    w, x = weights(memory, rng, typ, (33, k)), rng.standard_normal((3, k), dtype="f4")
    got = memory.compute(Op.MUL_MAT, (33, 3), w, memory.tensor(x))
    assert nmse(got, x.astype("f8") @ memory.values(w).reshape(33, k).astype("f8").T) < BOUND[typ]


def test_every_scale_of_mxfp4(memory):
    """Scales from two to the power of -127 to that of 127 are exact, and no product overflows early."""
    t = Tensor(Type.MXFP4, (32, 255))
    blocks = np.zeros((255, t.type.type_size), np.uint8)
    blocks[:, 0], blocks[:, 1] = np.arange(255), 2  # one weight a row: 1, times the scale
    x = np.zeros((1, 32), "f4")
    x[0, 0] = 127 / 4096
    got = memory.compute(Op.MUL_MAT, (255, 1), memory.place(t, blocks), memory.tensor(x)).ravel()
    assert np.array_equal(got, np.ldexp(x[0, 0], np.arange(255) - 127))


@pytest.mark.parametrize("typ", [Type.F32, Type.F16, Type.Q8_0], ids=lambda t: t.name)
def test_matrices_are_shared_by_heads_and_batches(memory, typ):
    """A matrix serves as many of src1 as there are more, in dimensions 2 and 3."""
    rng = np.random.default_rng(0)
    w, x = weights(memory, rng, typ, (2, 3, 40, 64)), rng.standard_normal((4, 6, 5, 64), dtype="f4")
    got = memory.compute(Op.MUL_MAT, (40, 5, 6, 4), w, memory.tensor(x))
    full = memory.values(w).astype("f8").repeat(2, axis=1).repeat(2, axis=0)
    assert nmse(got, np.einsum("abmk,abnk->abnm", full, x.astype("f8"))) < BOUND[typ]


@pytest.mark.parametrize("typ", [Type.F32, Type.F16, Type.Q8_0], ids=lambda t: t.name)
def test_permuted_caches_and_queries(memory, typ):
    """Strided views serve as weights and as activations: keys of a cache, queries whose heads were moved."""
    rng = np.random.default_rng(1)
    cache, q = weights(memory, rng, typ, (48, 2, 64)), rng.standard_normal((5, 4, 64), dtype="f4")  # cells, heads, row
    keys, queries = memory.permute(cache, 0, 2, 1), memory.permute(memory.tensor(q), 0, 2, 1)
    keys = memory.view(cache, (64, 40, 2), (keys.nb[0], keys.nb[1], keys.nb[2]))
    got = memory.compute(Op.MUL_MAT, (40, 5, 4), keys, queries)
    k = memory.values(cache).astype("f8").transpose(1, 0, 2)[:, :40].repeat(2, axis=0)
    assert nmse(got, np.einsum("hmk,nhk->hnm", k, q.astype("f8"))) < BOUND[typ]


@pytest.mark.parametrize("x_type", [Type.F16, Type.BF16], ids=lambda t: t.name)
def test_activations_of_other_float_types(memory, x_type):
    """Float weights take halves and bfloats as activations."""
    rng = np.random.default_rng(2)
    w, x = weights(memory, rng, Type.F16, (10, 48)), memory.tensor(rng.standard_normal((3, 48), dtype="f4"), x_type)
    got = memory.compute(Op.MUL_MAT, (10, 3), w, x)
    assert nmse(got, memory.values(x).astype("f8") @ memory.values(w).astype("f8").T) < 1e-7


def experts_case(memory, rng, typ, n_token, n_x, *, n_used=2, n_expert=6, ids=None):
    """Return weights, activations, ids, and what their product is."""
    w = weights(memory, rng, typ, (n_expert, 70, 256))
    x = rng.standard_normal((n_token, n_x, 256), dtype="f4")
    if ids is None:
        ids = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_token)])
    full = memory.values(w).astype("f8")
    want = np.stack([[full[e] @ x[t, u % n_x].astype("f8") for u, e in enumerate(row)] for t, row in enumerate(ids)])
    return w, memory.tensor(x), ids.astype("i4"), want


@pytest.mark.parametrize("n_x", [1, 2])
@pytest.mark.parametrize("n_token", [1, 2, 40])
@pytest.mark.parametrize("typ", FLOATS + BLOCKS_32 + K_QUANTS, ids=lambda t: t.name)
def test_experts_equal_float64(memory, typ, n_token, n_x):
    """Each token meets the experts it chose, with one row for all slots or a row for each."""
    w, x, ids, want = experts_case(memory, np.random.default_rng(n_token), typ, n_token, n_x)
    got = memory.compute(Op.MUL_MAT_ID, (70, 2, n_token), w, x, memory.tensor(ids))
    assert nmse(got.reshape(want.shape), want) < BOUND[typ]


@pytest.mark.parametrize("typ", [Type.F32, Type.Q8_0], ids=lambda t: t.name)
def test_all_tokens_choose_one_expert_twice(memory, typ):
    """Experts without tokens, and one with all of them in both slots, are nothing special."""
    ids = np.full((20, 2), 4)
    w, x, ids, want = experts_case(memory, np.random.default_rng(3), typ, 20, 2, ids=ids)
    got = memory.compute(Op.MUL_MAT_ID, (70, 2, 20), w, x, memory.tensor(ids))
    assert nmse(got, want) < BOUND[typ]


@pytest.mark.parametrize("n_token", [1, 2, 40])
@pytest.mark.parametrize("typ", [Type.F32, Type.Q8_0, Type.MXFP4], ids=lambda t: t.name)
def test_negative_ids_are_skipped_if_asked_for(memory, typ, n_token):
    """Without some experts their rows are 0, and the others bit-equal to the product of all; none, some, and all left out."""
    rng = np.random.default_rng(n_token)
    w, x, ids, _ = experts_case(memory, rng, typ, n_token, 2)
    whole = memory.compute(Op.MUL_MAT_ID, (70, 2, n_token), w, x, memory.tensor(ids)).reshape(n_token, 2, 70)
    for left_out in ([], [0, 2, 3], range(6)):
        skipped = np.isin(ids, left_out)
        which = memory.tensor(np.where(skipped, -1 - rng.integers(0, 9, ids.shape), ids).astype("i4"))
        got = memory.compute(Op.MUL_MAT_ID, (70, 2, n_token), w, x, which, params=(0, 1)).reshape(whole.shape)
        np.testing.assert_array_equal(got, np.where(skipped[:, :, None], np.float32(0), whole))


def test_ids_are_columns_of_a_longer_row(memory):
    """Ids are a view of the sorted order of all experts, as models make them."""
    rng = np.random.default_rng(4)
    order = np.stack([rng.permutation(6) for _ in range(7)]).astype("i4")
    w, x, _, want = experts_case(memory, rng, Type.Q8_0, 7, 1, ids=order[:, :2])
    ids = memory.view(memory.tensor(order), (2, 7), (4, 24))
    assert nmse(memory.compute(Op.MUL_MAT_ID, (70, 2, 7), w, x, ids), want) < 5e-4


def test_no_tokens(memory):
    """A product with no tokens is nothing to do."""
    w, x = memory.tensor(np.ones((8, 32), "f4")), memory.place(Tensor(Type.F32, (32, 0)))
    memory.run(memory.node(Op.MUL_MAT, (8, 0), w, x))


def test_products_of_one_input_share_its_quantised_rows(memory):
    """Three products of the same activations have them quantised once, until something writes over these."""
    from pyggml.backends.host.plan import HostPlan

    rng = np.random.default_rng(5)
    x = memory.tensor(rng.standard_normal((4, 256), dtype="f4"))
    ws = [weights(memory, rng, Type.Q8_0, (32, 256)) for _ in range(3)]
    products = [memory.node(Op.MUL_MAT, (32, 4), w, x) for w in ws]
    write = memory.node(Op.ADD, (256, 4), x, x, into=x)
    again = memory.node(Op.MUL_MAT, (32, 4), ws[0], x)
    plan = HostPlan([*products, write, again], lambda t: t.data)
    assert plan.n_descriptors == 3 + 1 + 1 + 1 + 1
    plan.run(memory.pool)
    np.testing.assert_allclose(memory.values(again), 2 * memory.values(products[0]), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-5, 1e6, 1e7, 1e30])
@pytest.mark.parametrize("typ", K_QUANTS, ids=lambda t: t.name)
def test_activations_of_any_size_are_as_good_as_of_size_one(memory, typ, size):
    """Weights that ggml multiplies with Q8_K take activations far below and above what a half can scale."""
    rng = np.random.default_rng(3)
    w, x = weights(memory, rng, typ, (33, 512)), (rng.standard_normal((7, 512)) * size).astype("f4")
    got = memory.compute(Op.MUL_MAT, (33, 7), w, memory.tensor(x)).astype("f8") / size
    assert nmse(got, x.astype("f8") / size @ memory.values(w).astype("f8").T) < BOUND[typ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("typ", FLOATS + BLOCKS_32 + K_QUANTS, ids=lambda t: t.name)
def test_what_is_no_number_stays_none(memory, typ, bad):
    """One element that is not finite makes every result of its token NaN or infinite, and none of the others."""
    rng = np.random.default_rng(4)
    w, x = weights(memory, rng, typ, (33, 512)), rng.standard_normal((7, 512), dtype="f4")
    x[3, 77] = bad
    got = memory.compute(Op.MUL_MAT, (33, 7), w, memory.tensor(x)).reshape(7, 33)
    assert not np.isfinite(got[3]).any()
    assert np.isfinite(np.delete(got, 3, axis=0)).all()
