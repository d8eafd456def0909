"""ROPE and FLASH_ATTN_EXT against float64 definitions."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import nmse
from test_rows import normal

from pyggml.tensor import Tensor, pack_params
from pyggml.testing import ref
from pyggml.types import Op, Type


def rope_params(
    n_dims, mode, *, n_ctx_orig=2048, base=10000.0, scale=1.0, ext=0.0, attn=1.0, fast=32.0, slow=1.0, at=0
):
    """Return ROPE's op_params."""
    return pack_params(0, n_dims, mode, 0, n_ctx_orig, base, scale, ext, attn, fast, slow, 0, 0, 0, 0, at)


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"at": 8}, {"scale": 0.25}, {"scale": 0.25, "ext": 1.0, "attn": 1.1}, {"base": 500000.0, "factors": True}],
    ids=str,
)
@pytest.mark.parametrize("n_dims", [64, 40])
def test_rope(memory, mode, options, n_dims):
    """Both kinds of pairs, part of a row, frequency factors, and YaRN's mixture turn as defined."""
    options = dict(options)
    has_factors = options.pop("factors", False)
    x, positions = normal(7, 3, 72), np.array([0, 1, 5, 100, 2000, 3, 77], "i4")
    divisors = np.linspace(1, 8, n_dims // 2).astype("f4") if has_factors else None
    src = (memory.tensor(x), memory.tensor(positions), None if divisors is None else memory.tensor(divisors))
    node, params = (Op.ROPE, (72, 3, 7), *src), rope_params(n_dims, mode, **options)
    got, want = memory.compute(*node, params=params), memory.define(*node, params=params)[0]
    np.testing.assert_allclose(got, want, atol=2e-3)  # angles grow by repeated products of floats, as upstream's
    assert nmse(got, want) < 1e-7


@pytest.mark.parametrize("mode", [0, 2])
def test_rope_in_place_and_shared_angles(memory, mode):
    """ROPE may write where it reads, and nodes with the same positions share their angles."""
    from pyggml.backends.host.plan import HostPlan

    x, positions = normal(5, 2, 64), np.arange(5, dtype="i4")
    t, pos = memory.tensor(x), memory.tensor(positions)
    a = memory.node(Op.ROPE, t.ne, t, pos, None, params=rope_params(64, mode), into=t)
    b = memory.node(Op.ROPE, t.ne, a, pos, None, params=rope_params(64, mode))
    plan = HostPlan([a, b], lambda n: n.data)
    assert plan.n_descriptors == 3
    plan.run(memory.pool)
    want = memory.define(Op.ROPE, t.ne, memory.tensor(x), memory.tensor(2 * positions), params=rope_params(64, mode))
    np.testing.assert_allclose(memory.values(b), want[0], atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("has_factors", [False, True], ids=["plain", "factors"])
@pytest.mark.parametrize("n_dims", [48, 32, 8])
@pytest.mark.parametrize("mode", [0, 2], ids=["normal", "neox"])
def test_rope_of_a_part_of_each_head_of_a_fused_projection(memory, mode, n_dims, has_factors, in_place):
    """The keys that lie between queries and values are turned as defined; the rest of the head and of the row stays."""
    n_token, n_head, row = 6, 3, 48
    fused = normal(n_token, 3, n_head, row, seed=4)
    positions = np.array([0, 1, 7, 40, 511, 1500], "i4")
    divisors = np.linspace(1, 5, row // 2).astype("f4") if has_factors else None
    whole = memory.tensor(fused)
    keys = memory.view(whole, (row, n_head, n_token), (4, 4 * row, 12 * n_head * row), 4 * n_head * row)
    keys.data = whole.data + keys.view_offs
    pos, factors = memory.tensor(positions), None if divisors is None else memory.tensor(divisors)
    params = rope_params(n_dims, mode, scale=0.5)
    want = memory.define(Op.ROPE, keys.ne, keys, pos, factors, params=params)[0]
    node = memory.node(Op.ROPE, keys.ne, keys, pos, factors, params=params, into=keys if in_place else None)
    got = memory.run(node)
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert nmse(got, want) < 1e-8
    np.testing.assert_array_equal(got[..., n_dims:], fused[:, 1, :, n_dims:])
    after = memory.values(whole).reshape(fused.shape)
    np.testing.assert_array_equal(after[:, [0, 2]], fused[:, [0, 2]])
    np.testing.assert_array_equal(after[:, 1], got if in_place else fused[:, 1])


def causal(n_token: int, n_kv: int) -> np.ndarray:
    """Return the mask of the last n_token of n_kv."""
    hidden = np.arange(n_kv) > np.arange(n_token)[:, None] + n_kv - n_token
    return np.where(hidden, -np.inf, 0).astype("f4")[None, None]


def assert_defined(memory, ne, *src, params) -> None:
    """Attention gives what it is defined as."""
    got = memory.compute(Op.FLASH_ATTN_EXT, ne, *src, params=params)
    want = memory.define(Op.FLASH_ATTN_EXT, ne, *src, params=params)
    assert nmse(got.reshape(want.shape), want) < 1e-10


@pytest.mark.parametrize(("n_token", "n_kv"), [(1, 1), (1, 300), (7, 64), (40, 130), (70, 70)])
@pytest.mark.parametrize("kv_type", ["f16", "f32", "bf16", "q8_0"])
def test_attention(memory, kv_type, n_token, n_kv):
    """Grouped heads and a causal mask give softmax(q k) v, for every type of cache and number of tokens."""
    q, k, v = normal(1, 6, n_token, 64), normal(1, 2, n_kv, 64, seed=1), normal(1, 2, n_kv, 32, seed=2)
    mask = causal(n_token, n_kv)
    src = memory.tensor(q), memory.tensor(k, kv_type), memory.tensor(v, kv_type), memory.tensor(mask, "f16")
    assert_defined(memory, (32, 6, n_token, 1), *src, params=pack_params(0.125, 0.0, 0.0))


@pytest.mark.parametrize("options", [{"max_bias": 8.0}, {"softcap": 20.0}, {"sinks": True}, {"mask": False}], ids=str)
def test_attention_options(memory, options):
    """ALiBi, soft capping, sinks, and no mask at all act as defined; batches keep apart."""
    q, k, v = normal(2, 3, 5, 40), normal(2, 3, 90, 40, seed=1), normal(2, 3, 90, 40, seed=2)
    mask = causal(5, 90) if options.get("mask", True) else None
    sinks = 2 * normal(3, seed=3) if options.get("sinks") else None
    max_bias, softcap = options.get("max_bias", 0.0), options.get("softcap", 0.0)
    src = [memory.tensor(q), memory.tensor(k), memory.tensor(v)]
    src += [None if x is None else memory.tensor(x, t) for x, t in ((mask, "f16"), (sinks, "f32"))]
    assert_defined(memory, (40, 3, 5, 2), *src, params=pack_params(0.2, max_bias, softcap))


def test_attention_over_a_strided_cache(memory):
    """Keys and values are permuted views of caches in which heads lie side by side."""
    q, cache_k, cache_v = normal(3, 4, 64), normal(256, 2, 64, seed=1), normal(256, 2, 64, seed=2)
    mask = causal(3, 200)
    queries = memory.permute(memory.tensor(q), 0, 2, 1)
    views = []
    for x in (cache_k, cache_v):
        t = memory.tensor(x, "f16")
        views.append(memory.view(t, (64, 200, 2), (2, t.nb[2], t.nb[1])))
    src = queries, *views, memory.tensor(mask, "f16")
    assert_defined(memory, (64, 4, 3), *src, params=pack_params(0.125, 0.0, 0.0))


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_hidden_keys_are_never_read(memory, kv_type):
    """Cells that nobody wrote hold NaN, and do no harm behind the mask; a token that sees nothing gets zeros."""
    k, v = normal(1, 1, 128, 32, seed=1), normal(1, 1, 128, 32, seed=2)
    kt, vt = memory.tensor(k, kv_type), memory.tensor(v, kv_type)
    for t in (kt, vt):
        memory.arrays[-1 if t is vt else -2][t.nb[1] * 70 :] = 0xFF
    mask = causal(4, 70)
    mask = np.concatenate([mask, np.full((1, 1, 4, 58), -np.inf, "f4")], axis=-1)
    mask[0, 0, 2] = -np.inf
    q = normal(1, 1, 4, 32)
    got = memory.compute(
        Op.FLASH_ATTN_EXT, (32, 1, 4), memory.tensor(q), kt, vt, memory.tensor(mask, "f16"),
        params=pack_params(0.2, 0.0, 0.0),
    )  # fmt: skip
    assert np.isfinite(got).all()
    assert not got.reshape(4, 32)[2].any()


#: A sink that counts, one that hardly does, one that takes nearly all, and none.
SINKS = np.array([0.5, -3.0, 40.0, -np.inf], "f4")
#: Of 4 tokens and 40 cells: all are seen, the first half, none, and one only.
PARTLY = np.zeros((1, 1, 4, 40), "f4")
PARTLY[..., 1, 20:] = PARTLY[..., 2, :] = PARTLY[..., 3, :39] = -np.inf
MASKS = {"partly": PARTLY, "whole": np.full_like(PARTLY, -np.inf)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [1.0, 3e4], ids=["usual", "huge"])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"max_bias": 8.0}, {"cap": 30.0}], ids=str)
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
def test_attention_where_little_or_nothing_is_seen(memory, kv_type, options, size, mask):
    """Rows that are masked whole are zeros, sinks or not; scores of any size give the definition's numbers, never NaN."""
    q, k, v = size * normal(1, 4, 4, 64), normal(1, 2, 40, 64, seed=1), normal(1, 2, 40, 64, seed=2)
    kt, vt = memory.tensor(k, kv_type), memory.tensor(v, kv_type)
    src = [memory.tensor(q), kt, vt, memory.tensor(MASKS[mask], "f16")]
    src += [memory.tensor(SINKS)] if options.get("sinks") else []
    params = pack_params(0.125, options.get("max_bias", 0.0), options.get("cap", 0.0))
    got = memory.compute(Op.FLASH_ATTN_EXT, (64, 4, 4, 1), *src, params=params).reshape(1, 4, 4, 64)
    node = Tensor(Type.F32, (64, 4, 4, 1), op=Op.FLASH_ATTN_EXT, src=src, op_params=params)
    with np.errstate(over="ignore"):
        want = ref.compute(node, [memory.values(t) for t in src])
    if options.get("sinks"):  # a sink of -inf over nothing is 0 / 0, as libggml's
        hidden = np.isneginf(MASKS[mask]).all(-1)[0, 0]
        assert np.isnan(got[0, hidden, 3]).all()
        got[0, hidden, 3] = 0
    assert np.isfinite(got).all()
    assert ref.nmse(want, got) < 5e-4 if want.any() else not got.any()
    assert not got[0, 2].any()


def test_a_sinks_mass_is_taken_from_the_keys(memory):
    """With equal scores, the values' share is n / (n + e^sink): 0.3013 of 4 cells for a sink of 2.2274."""
    share = 0.3013
    sinks = np.full(2, np.log(4 / share - 4), "f4")
    mask = np.where(np.arange(40) < 4, 0, -np.inf).astype("f4").reshape(1, 1, 1, 40)
    zeros, ones = np.zeros((1, 2, 1, 64), "f4"), np.ones((1, 2, 40, 64), "f4")
    src = [memory.tensor(zeros), memory.tensor(ones, "f16"), memory.tensor(ones, "f16"), memory.tensor(mask, "f16")]
    got = memory.compute(Op.FLASH_ATTN_EXT, (64, 2, 1), *src, memory.tensor(sinks), params=pack_params(0.125, 0.0, 0.0))
    np.testing.assert_allclose(got, share, rtol=1e-5)
    scores = memory.tensor(np.zeros((1, 2, 1, 40), "f4"))
    got = memory.compute(
        Op.SOFT_MAX, scores.ne, scores, memory.tensor(mask), memory.tensor(sinks), params=pack_params(1.0, 0.0)
    )
    np.testing.assert_allclose(got.reshape(2, 40).sum(-1), share, rtol=1e-5)


def test_attention_types_are_kept_apart():
    """The node's types decide support: a mask of floats is refused with its name."""
    from pyggml.opset import reason_unsupported, supports_op

    q, k = Tensor(Type.F32, (32, 4, 1)), Tensor(Type.F16, (32, 8, 1))
    mask = Tensor(Type.F32, (8, 4), name="KQ_mask")
    node = Tensor(Type.F32, (32, 1, 4), op=Op.FLASH_ATTN_EXT, src=(q, k, k, mask))
    assert not supports_op(node)
    assert "KQ_mask" in reason_unsupported(node)
