"""Norms, softmax, reductions, sorting, and ops that choose or move rows."""

from __future__ import annotations

import numpy as np
import pytest
from test_products import BLOCKS_32, FLOATS, K_QUANTS, weights

from pyggml.errors import ComputeError, ExpertIdError
from pyggml.tensor import Tensor, pack_params
from pyggml.testing import ref
from pyggml.types import Op, Type


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Return standard normal floats."""
    return np.random.default_rng(seed).standard_normal(shape, dtype="f4")


# -- whole rows -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 15, 64, 100, 577])
@pytest.mark.parametrize("op", [Op.RMS_NORM, Op.NORM, Op.L2_NORM], ids=lambda o: o.name)
def test_norms(memory, op, n):
    """Rows are scaled by their norm, NORM's after its mean was taken off."""
    x, eps = normal(2, 3, n) + np.float32(0.3), 1e-5
    got = memory.compute(op, (n, 3, 2), memory.tensor(x), params=pack_params(eps))
    x = x.astype("f8")
    if op is Op.NORM:
        x = x - x.mean(-1, keepdims=True)
    if op is Op.L2_NORM:
        want = x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), eps)
    else:
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=2e-5, atol=2e-6)


def test_rms_norm_in_place(memory):
    """RMS_NORM may write where it reads."""
    t, x = memory.tensor(normal(3, 70)), normal(3, 70)
    got = memory.run(memory.node(Op.RMS_NORM, t.ne, t, params=pack_params(0.0), into=t))
    np.testing.assert_allclose(got, x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5)


@pytest.mark.parametrize("mask_type", [None, "f32", "f16"])
@pytest.mark.parametrize("max_bias", [0.0, 8.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_soft_max(memory, mask_type, max_bias, has_sinks):
    """Scale, mask with ALiBi's slopes, and sinks act as defined; the mask is shared by heads."""
    x, mask = normal(2, 5, 7, 33), normal(1, 1, 7, 33, seed=1)
    mask[..., 20:] = -np.inf
    sinks = normal(5, seed=2) if has_sinks else None
    src = (
        memory.tensor(x),
        None if mask_type is None else memory.tensor(mask, mask_type),
        None if sinks is None else memory.tensor(sinks),
    )
    node, params = (Op.SOFT_MAX, (33, 7, 5, 2), *src), pack_params(0.7, max_bias)
    np.testing.assert_allclose(
        memory.compute(*node, params=params), memory.define(*node, params=params), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("size", [1.0, 1e30], ids=["usual", "huge"])
def test_soft_max_where_little_or_nothing_is_seen(memory, size, has_sinks):
    """Scores of any size give the definition's numbers; a row masked whole is zeros beside a sink, and NaN without."""
    x, mask = size * normal(1, 4, 4, 40), np.zeros((1, 1, 4, 40), "f4")
    mask[..., 1, 20:] = mask[..., 2, :] = mask[..., 3, :39] = -np.inf
    src = [memory.tensor(x), memory.tensor(mask)]
    src += [memory.tensor(np.array([0.5, -3.0, 40.0, 2.0], "f4"))] if has_sinks else []
    params = pack_params(1.0, 0.0)
    got = memory.compute(Op.SOFT_MAX, (40, 4, 4, 1), *src, params=params).reshape(x.shape)
    node = Tensor(Type.F32, (40, 4, 4, 1), op=Op.SOFT_MAX, src=src, op_params=params)
    want = ref.compute(node, [memory.values(t) for t in src])
    if not has_sinks:  # 0 / 0, as libggml's, where the definition says 0
        assert not want[:, :, 2].any()
        want[:, :, 2] = np.nan
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_soft_max_in_place(memory):
    """SOFT_MAX may write where it reads."""
    t = memory.tensor(normal(9, 300))
    node, params = (Op.SOFT_MAX, t.ne, t, None, None), pack_params(1.0, 0.0)
    want = memory.define(*node, params=params)[0, 0]
    np.testing.assert_allclose(memory.run(memory.node(*node, params=params, into=t)), want, rtol=1e-5, atol=1e-8)


def test_reductions(memory):
    """SUM_ROWS, MEAN, SUM, CUMSUM and ARGMAX equal numpy's, also of rows with gaps."""
    x = normal(4, 3, 101)
    x[0, 0, 7] = x[0, 0, 50] = 9.0  # the first of equals wins
    t = memory.tensor(x)
    view = memory.view(t, (90, 3, 4), t.nb[:3])
    y = x[..., :90].astype("f8")
    sums = memory.compute(Op.SUM_ROWS, (1, 3, 4), view)
    np.testing.assert_allclose(sums.reshape(4, 3), y.sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(memory.compute(Op.MEAN, (1, 3, 4), view).reshape(4, 3), y.mean(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(memory.compute(Op.SUM, (1,), view), y.sum(), rtol=1e-6)
    np.testing.assert_allclose(memory.compute(Op.CUMSUM, (90, 3, 4), view), y.cumsum(-1), rtol=1e-4, atol=1e-4)
    flat = memory.tensor(x.reshape(12, 101))
    np.testing.assert_array_equal(memory.compute(Op.ARGMAX, (12,), flat, type=Type.I32), x.reshape(12, 101).argmax(-1))


@pytest.mark.parametrize("in_place", [False, True])
def test_diag_mask_inf(memory, in_place):
    """Columns after the row's own position become minus infinity."""
    x = normal(2, 4, 9)
    t = memory.tensor(x)
    node = memory.node(Op.DIAG_MASK_INF, t.ne, t, params=(3,), into=t if in_place else None)
    want = np.where(np.arange(9) > np.arange(4)[:, None] + 3, -np.inf, x)
    np.testing.assert_array_equal(memory.run(node), want)


# -- sorting -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 16, 17, 128, 1000])
@pytest.mark.parametrize("descending", [0, 1])
def test_argsort(memory, n, descending):
    """Indices put each row in order."""
    x = normal(5, n)
    got = memory.compute(Op.ARGSORT, (n, 5), memory.tensor(x), params=(descending,), type=Type.I32).reshape(5, n)
    np.testing.assert_array_equal(got, np.argsort(-x if descending else x, axis=-1))


@pytest.mark.parametrize("n", [16, 40, 300])
def test_argsort_of_many_equals_and_nan(memory, n):
    """Equal values keep all indices; up to 16 of them their order too. NaN values do no harm."""
    x = np.random.default_rng(0).integers(0, 4, (6, n)).astype("f4")
    got = memory.compute(Op.ARGSORT, (n, 6), memory.tensor(x), params=(1,), type=Type.I32)
    np.testing.assert_array_equal(np.take_along_axis(x, got, -1), -np.sort(-x, axis=-1))
    if n == 16:
        np.testing.assert_array_equal(got, np.argsort(-x, axis=-1, kind="stable"))
    x[:, ::3] = np.nan
    got = memory.compute(Op.ARGSORT, (n, 6), memory.tensor(x), params=(1,), type=Type.I32)
    np.testing.assert_array_equal(np.sort(got, axis=-1), np.tile(np.arange(n), (6, 1)))


def test_top_k(memory):
    """The k largest are found; the first two stand swapped, as upstream leaves them."""
    x = normal(6, 200)
    got = memory.compute(Op.TOP_K, (5, 6), memory.tensor(x), type=Type.I32)
    want = np.argsort(-x, axis=-1)[:, [1, 0, 2, 3, 4]]
    np.testing.assert_array_equal(got, want)


# -- choosing rows --------------------------------------------------------------------------


@pytest.mark.parametrize("typ", FLOATS + BLOCKS_32 + K_QUANTS, ids=lambda t: t.name)
def test_get_rows_of_every_type(memory, typ):
    """Chosen rows come out as floats, exactly as gguf dequantises them."""
    table = weights(memory, np.random.default_rng(0), typ, (20, 512))
    ids = np.array([3, 19, 0, 3], "i4")
    got = memory.compute(Op.GET_ROWS, (512, 4), table, memory.tensor(ids))
    np.testing.assert_allclose(got, memory.values(table)[ids], rtol=1e-6, atol=1e-7)


def test_get_rows_in_batches_and_of_integers(memory):
    """Each batch chooses from its own rows; integers stay integers."""
    table = np.arange(2 * 5 * 3, dtype="i4").reshape(2, 5, 3)
    ids = np.array([[4, 0], [1, 1]], "i4")
    got = memory.compute(Op.GET_ROWS, (3, 2, 2), memory.tensor(table), memory.tensor(ids), type=Type.I32)
    np.testing.assert_array_equal(got, np.stack([table[b][ids[b]] for b in range(2)]))


@pytest.mark.parametrize("id_type", ["i4", "i8"])
@pytest.mark.parametrize("typ", [*FLOATS, Type.Q8_0, Type.Q4_0], ids=lambda t: t.name)
def test_set_rows(memory, typ, id_type):
    """Rows are converted into the chosen places, and others stay."""
    base = normal(2, 8, 64)
    cache, values = memory.tensor(base, typ), normal(2, 3, 64, seed=1)
    before, ids = memory.values(cache), np.array([5, 0, 7], id_type)
    node = memory.node(Op.SET_ROWS, cache.ne, memory.tensor(values), memory.tensor(ids), type=typ, into=cache)
    got = memory.run(node)
    want = before.copy()
    want[:, ids] = memory.values(memory.tensor(values, typ))
    np.testing.assert_array_equal(got, want)


def test_set_rows_from_halves(memory):
    """Halves are copied to halves and widened to floats."""
    values, ids = memory.tensor(normal(2, 33), "f16"), memory.tensor(np.array([1, 0], "i8"))
    for typ in (Type.F16, Type.F32):
        into = memory.tensor(np.zeros((3, 33), "f4"), typ)
        got = memory.run(memory.node(Op.SET_ROWS, into.ne, values, ids, type=typ, into=into))
        np.testing.assert_array_equal(got[:2], memory.values(values)[::-1])


def test_add_id(memory):
    """Each slot of each token gets the bias of its expert."""
    x, bias, ids = normal(4, 2, 30), normal(6, 30, seed=1), np.array([[0, 5], [2, 2], [1, 0], [4, 3]], "i4")
    got = memory.compute(Op.ADD_ID, (30, 2, 4), memory.tensor(x), memory.tensor(bias), memory.tensor(ids))
    np.testing.assert_array_equal(got, x + bias[ids])


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1])
def test_bad_expert_id_is_named_and_the_pool_lives_on(memory, bad):
    """An id out of bounds names weight, layer, token and slot; nothing later is computed; the next plan runs."""
    x, ids = normal(7, 1, 256), np.zeros((7, 2), "i4")
    ids[4, 1] = bad
    w = weights(memory, np.random.default_rng(0), Type.Q8_0, (6, 40, 256))
    chosen = memory.tensor(ids, name="ffn_moe_topk-3")
    product = memory.node(Op.MUL_MAT_ID, (40, 2, 7), w, memory.tensor(x), chosen)
    after = memory.node(Op.ADD, (40, 2, 7), product, product)
    with pytest.raises(ExpertIdError) as caught:
        memory.run(product, after)
    e = caught.value
    assert (e.tensor, e.layer, e.ids, e.token, e.slot, e.id, e.n_expert) == (
        "blk.3.ffn_up_exps.weight", 3, "ffn_moe_topk-3", 4, 1, bad, 6,
    )  # fmt: skip
    assert np.isnan(memory.values(after)).all()
    good = memory.compute(Op.MUL_MAT_ID, (40, 2, 7), w, memory.tensor(x), memory.tensor(np.zeros((7, 2), "i4")))
    assert np.isfinite(good).all()


@pytest.mark.parametrize("op", [Op.GET_ROWS, Op.SET_ROWS, Op.ADD_ID], ids=lambda o: o.name)
def test_bad_row_index_writes_nothing(memory, op):
    """A row index out of bounds is reported by its first place, whichever thread met it, and touches no memory."""
    n = 500
    ids = np.zeros(n, "i4")
    ids[[123, 400]] = 77, -5
    x, table = memory.tensor(normal(n, 64)), memory.tensor(normal(8, 64))
    chosen = memory.tensor(ids, name="ids")
    if op is Op.GET_ROWS:
        node = memory.node(op, (64, n), table, chosen)
    elif op is Op.SET_ROWS:
        node = memory.node(op, table.ne, x, chosen, into=table)
    else:
        ids2 = memory.tensor(ids.reshape(n, 1), name="ids")
        node = memory.node(op, (64, 1, n), memory.tensor(normal(n, 1, 64)), table, ids2)
    with pytest.raises((ComputeError, ExpertIdError), match="77"):
        memory.run(node)


# -- moving ------------------------------------------------------------------------------------

PERMUTATIONS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3), (3, 1, 2, 0)]


@pytest.mark.parametrize("axes", PERMUTATIONS, ids=str)
@pytest.mark.parametrize(
    ("src", "dst"),
    [("f32", "f32"), ("f32", "f16"), ("f16", "f32"), ("bf16", "f32"), ("f32", "bf16"), ("f16", "f16"), ("f16", "bf16"),
     ("i32", "i32"), ("i32", "f32"), ("f32", "i32")],
)  # fmt: skip
def test_copies_between_types_and_layouts(memory, src, dst, axes):
    """Elements keep their place under any permutation, converted by rounding to nearest even."""
    x = (100 * normal(2, 3, 5, 37)).astype("i4") if src == "i32" else 3 * normal(2, 3, 5, 37)
    t = memory.tensor(x, src)
    view = memory.permute(t, *axes)
    got = memory.compute(Op.CPY, view.ne, view, None, type=Type.of(dst))
    shown = memory.values(t).transpose([3 - axes.index(3 - i) for i in range(4)])
    want = memory.values(memory.tensor(shown.astype("i4" if dst == "i32" else "f4"), dst))
    np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_copies_to_and_from_blocks(memory):
    """Rows are quantised as gguf does, dequantised, and moved as they are."""
    x = normal(3, 2, 96)
    t, q = memory.tensor(x), memory.tensor(x, "q8_0")
    np.testing.assert_array_equal(memory.compute(Op.CPY, t.ne, t, None, type=Type.Q8_0), memory.values(q))
    np.testing.assert_array_equal(memory.compute(Op.CPY, t.ne, q, None), memory.values(q))
    turned = memory.permute(q, 0, 2, 1)
    got = memory.compute(Op.CONT, turned.ne, turned, type=Type.Q8_0)
    np.testing.assert_array_equal(got, memory.values(q).transpose(1, 0, 2))


def test_copies_between_shapes(memory):
    """A copy may give the elements another shape, with gaps on either side."""
    x = normal(4, 6, 10)
    turned = memory.permute(memory.tensor(x), 1, 0, 2)
    want = x.transpose(0, 2, 1).reshape(-1)
    np.testing.assert_array_equal(memory.compute(Op.CONT, (240,), turned), want)
    np.testing.assert_array_equal(
        memory.compute(Op.CONT, (60, 4), memory.tensor(x), type=Type.F16).reshape(-1),
        x.reshape(-1).astype("f2").astype("f4"),
    )
    wide = memory.tensor(np.zeros((12, 32), "f4"))
    into = memory.view(wide, (20, 12), (4, 128))
    node = Tensor(Type.F32, (20, 12), into.nb, op=Op.CPY, src=(turned, into), flags=16)
    node.data = into.data
    memory.run(node)
    np.testing.assert_array_equal(memory.values(wide)[:, :20].reshape(-1), want)


def test_repeat_and_concat(memory):
    """REPEAT tiles over all dimensions; CONCAT puts sources behind each other in any."""
    x = normal(2, 3, 5)
    np.testing.assert_array_equal(memory.compute(Op.REPEAT, (10, 3, 4), memory.tensor(x)), np.tile(x, (2, 1, 2)))
    one = normal(2, 3, 1)
    np.testing.assert_array_equal(memory.compute(Op.REPEAT, (9, 3, 2), memory.tensor(one)), np.tile(one, (1, 1, 9)))
    for dim, shape in enumerate([(2, 3, 4), (2, 1, 5), (6, 3, 5)]):
        y = normal(*shape, seed=1)
        want = np.concatenate([x, y], axis=2 - dim)
        got = memory.compute(Op.CONCAT, want.shape[::-1], memory.tensor(x), memory.tensor(y), params=(dim,))
        np.testing.assert_array_equal(got, want)
