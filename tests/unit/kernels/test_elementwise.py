"""UNARY, GLU, maps and joins against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import nmse

from pyggml.tensor import pack_params
from pyggml.types import GluOp, Op, UnaryOp


def sample() -> np.ndarray:
    """Values around zero, far from it, and zero itself; no multiple of a vector."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(4000), 30 * rng.standard_normal(999), [0.0, -0.0, 2.5, -2.5, 0.5]])
    return x.astype("f4").reshape(3, -1)


@pytest.mark.parametrize("op", list(UnaryOp), ids=lambda o: o.name)
def test_unary(memory, op):
    """Each sub-op of UNARY equals its definition."""
    x = sample()
    params = pack_params(int(op), 0.8, 1.2, 0.5, -1e-6) if op is UnaryOp.XIELU else (int(op),)
    got = memory.compute(Op.UNARY, x.shape[::-1], memory.tensor(x), params=params)
    with np.errstate(over="ignore"):
        want = memory.define(Op.UNARY, x.shape[::-1], memory.tensor(x), params=params).reshape(got.shape)
    finite = want < 1e38
    np.testing.assert_allclose(got[finite], want[finite], rtol=3e-6, atol=1e-30 if op is UnaryOp.EXP else 1e-6)
    assert np.isinf(got[~finite]).all()


@pytest.mark.parametrize("op", [UnaryOp.EXP, UnaryOp.TANH, UnaryOp.SILU, UnaryOp.GELU_ERF], ids=lambda o: o.name)
def test_extremes_of_functions(memory, op):
    """Infinities go to limits, and a NaN stays one."""
    x = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30], "f4")
    got = memory.compute(Op.UNARY, (5,), memory.tensor(x), params=(int(op),))
    with np.errstate(all="ignore"):
        want = {UnaryOp.EXP: np.exp, UnaryOp.TANH: np.tanh}.get(op)
        if want is not None:
            np.testing.assert_array_equal(got, want(x))
    assert np.isnan(got[2])
    assert got[3] > 0
    assert abs(got[4]) <= 1


@pytest.mark.parametrize(
    ("op", "params"),
    [
        *((op, ()) for op in (Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS)),
        (Op.SCALE, (2.5, -1.0)),
        (Op.CLAMP, (0.25, 1.5)),
        (Op.LEAKY_RELU, (0.1,)),
        (Op.FILL, (3.5,)),
    ],
    ids=lambda v: v.name if isinstance(v, Op) else "",
)
@pytest.mark.parametrize("in_place", [False, True])
def test_maps(memory, op, params, in_place):
    """Ops of one element equal their definitions, also in the memory of their source."""
    x = np.abs(sample()) + np.float32(0.01)
    t, params = memory.tensor(x), pack_params(*params)
    want = memory.define(op, t.ne, t, params=params)
    if in_place:
        got = memory.run(memory.node(op, t.ne, t, params=params, into=t))
    else:
        got = memory.compute(op, t.ne, t, params=params)
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=2e-6, atol=1e-6)


def test_map_of_rows_with_gaps(memory):
    """Rows apart from each other are taken one by one."""
    x = sample()
    view = memory.view(memory.tensor(x), (10, 3), (4, 4 * x.shape[1]), offset=20)
    got = memory.compute(Op.UNARY, (10, 3), view, params=(int(UnaryOp.NEG),))
    np.testing.assert_array_equal(got, -x[:, 5:15])


@pytest.mark.parametrize("form", ["two", "one", "swapped"])
@pytest.mark.parametrize("op", list(GluOp), ids=lambda o: o.name)
def test_glu(memory, op, form):
    """Each sub-op of GLU takes gate and value from two tensors, or from halves of one in either order."""
    rng = np.random.default_rng(1)
    gate, value = (5 * rng.standard_normal((3, 2, 37), dtype="f4") for _ in range(2))
    if form == "two":
        arrays = [gate, value]
    else:
        arrays = [np.concatenate([gate, value] if form == "one" else [value, gate], axis=-1), None]
    params = pack_params(int(op), int(form == "swapped"), 1.702, 7.0)
    src = [None if x is None else memory.tensor(x) for x in arrays]
    got = memory.compute(Op.GLU, (37, 2, 3), *src, params=params)
    want = memory.define(Op.GLU, (37, 2, 3), *src, params=params).reshape(got.shape)
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 50), (1, 1, 1, 50), (1, 3, 1, 50), (2, 1, 4, 1), (1, 1, 1, 10)], ids=str)
@pytest.mark.parametrize("op", [Op.ADD, Op.SUB, Op.MUL, Op.DIV], ids=lambda o: o.name)
def test_join_repeats_the_second_source(memory, op, shape):
    """The second source is repeated over any dimension, within rows too."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 3, 4, 50), dtype="f4"), rng.uniform(0.5, 2, shape).astype("f4")
    got = memory.compute(op, (50, 4, 3, 2), memory.tensor(a), memory.tensor(b.reshape(shape)))
    np.testing.assert_allclose(got, memory.define(op, (50, 4, 3, 2), memory.tensor(a), memory.tensor(b)), rtol=1e-6)


def test_join_in_place_and_with_gaps(memory):
    """The result may take the first source's memory, and the second may be a column view."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((6, 40), dtype="f4"), rng.standard_normal((40, 6), dtype="f4")
    t = memory.tensor(a)
    turned = memory.permute(memory.tensor(b), 1, 0)
    got = memory.run(memory.node(Op.ADD, t.ne, t, turned, into=t))
    np.testing.assert_array_equal(got, a + b.T)


def test_one_long_row_is_shared_by_threads(memory):
    """A single row longer than a chunk has no seams."""
    x = np.random.default_rng(4).standard_normal(50_001, dtype="f4")
    got = memory.compute(Op.ADD, (50_001,), memory.tensor(x), memory.tensor(x))
    np.testing.assert_array_equal(got, x + x)
    assert nmse(memory.compute(Op.UNARY, (50_001,), memory.tensor(x), params=(int(UnaryOp.EXP),)), np.exp(x)) < 1e-12
