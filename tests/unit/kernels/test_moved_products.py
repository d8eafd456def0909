"""Products that a plan computes in an earlier stage than their place among the nodes: K and V beside Q."""

from __future__ import annotations

import random

import numpy as np
import pytest
from conftest import Memory
from pyggml.kernels.cpu import words
from test_products import weights

from pyggml.backends.host.plan import HostPlan
from pyggml.errors import ComputeError
from pyggml.tensor import Tensor, pack_params
from pyggml.types import Op, Type

N = 256
EPS = pack_params(1e-6)


def plan_of(nodes: list[Tensor]) -> HostPlan:
    """Return the plan of nodes in numpy's memory."""
    return HostPlan(nodes, lambda t: t.data)


def stages_of(plan: HostPlan) -> list[int]:
    """Return the number of descriptors of each stage."""
    return [plan._words[s + words.STAGE] for s in plan._starts if plan._words[s + words.STAGE]]


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_k_and_v_are_computed_beside_q(memory, pool, kind):
    """They share Q's stage although a norm of Q comes between and V is placed in Q's memory; each result is what it is alone."""
    rng = np.random.default_rng(0)
    x = memory.tensor(rng.standard_normal((1, N), dtype="f4"))
    wq, wv, wk = (weights(memory, rng, kind, (N, N)) for _ in range(3))
    q = memory.node(Op.MUL_MAT, (N, 1), wq, x, name="q")
    q_norm = memory.node(Op.RMS_NORM, (N, 1), q, params=EPS)
    v = memory.node(Op.MUL_MAT, (N, 1), wv, x, name="v", into=q)
    k = memory.node(Op.MUL_MAT, (N, 1), wk, x, name="k")
    k_norm = memory.node(Op.RMS_NORM, (N, 1), k, params=EPS)
    total = memory.node(Op.ADD, (N, 1), v, k_norm)
    nodes = [q, q_norm, v, k, k_norm, total]
    plan = plan_of(nodes)
    shared = [i for i, s in enumerate(plan._starts) if plan._words[s + words.STAGE] and plan._words[s + words.PARALLEL]]
    (first,) = shared
    assert [plan._owners[i].name for i in range(first, first + 3)] == ["q", "v", "k"]
    plan.run(pool)
    got = [memory.bytes(t) for t in (q_norm, v, k, k_norm, total)]
    one_by_one = HostPlan(nodes, lambda t: t.data, share=False)
    for i in range(len(nodes)):
        one_by_one.run_node(i, pool)
    assert got == [memory.bytes(t) for t in (q_norm, v, k, k_norm, total)]


def test_no_product_moves_before_a_node_that_can_fail(memory, pool):
    """After a row index out of range, the next stage has not been computed, although its product could have moved before it."""
    rng = np.random.default_rng(0)
    x = memory.tensor(rng.standard_normal((1, N), dtype="f4"))
    q = memory.node(Op.MUL_MAT, (N, 1), weights(memory, rng, Type.F32, (N, N)), x)
    row = memory.node(Op.GET_ROWS, (N, 1), q, memory.tensor(np.asarray([1], "i4")))
    k = memory.node(Op.MUL_MAT, (N, 1), weights(memory, rng, Type.F32, (N, N)), x, into=q)
    plan_of([q]).run(pool)
    of_q = memory.bytes(q)
    with pytest.raises(ComputeError, match="row index 1"):
        plan_of([q, row, k]).run(pool)
    assert memory.bytes(k) == of_q


def test_memory_that_is_used_again_holds_what_it_holds_without_moves(memory, pool):
    """After random nodes in random places of a small memory, every byte is that of nodes computed one after the other."""
    rng, np_rng = random.Random(3), np.random.default_rng(3)
    kinds = (Type.F32, Type.Q8_0, Type.Q4_K)
    ws = [weights(memory, np_rng, kind, (N, N)) for kind in kinds for _ in range(2)]
    arena = np.zeros((7, N), "f4")
    n_moved = 0
    for _ in range(60):
        arena[:] = start = np_rng.standard_normal((7, N)).astype("f4")
        nodes = [_random_node(memory, rng, arena, ws) for _ in range(rng.randrange(4, 24))]
        plan = plan_of(nodes)
        order = [nodes.index(t) for t in plan._owners]
        n_moved += order != sorted(order)
        plan.run(pool)
        got = arena.tobytes()
        arena[:] = start
        one_by_one = HostPlan(nodes, lambda t: t.data, share=False)
        for i in range(len(nodes)):
            one_by_one.run_node(i, pool)
        assert got == arena.tobytes(), stages_of(plan)
    assert n_moved > 10


def _random_node(memory: Memory, rng: random.Random, arena: np.ndarray, ws: list[Tensor]) -> Tensor:
    """Return a node that reads rows of a memory and writes one of them."""

    def at(row: int) -> Tensor:
        t = Tensor(Type.F32, (N, 1))
        t.data = arena[row].ctypes.data
        return t

    row, sources = rng.randrange(7), [at(rng.randrange(7)) for _ in range(2)]
    if rng.random() < 0.5:
        while any(s.data == arena[row].ctypes.data for s in sources[:1]):
            row = rng.randrange(7)
        node = memory.node(Op.MUL_MAT, (N, 1), rng.choice(ws), sources[0], into=at(row))
    elif rng.random() < 0.5:
        node = memory.node(Op.RMS_NORM, (N, 1), sources[0], params=EPS, into=at(row))
    else:
        node = memory.node(Op.ADD, (N, 1), *sources, into=at(row))
    return node
