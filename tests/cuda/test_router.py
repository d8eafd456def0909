"""An expert block with its router over a fake driver: ids are made on the card, experts lie in host memory."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backends import cuda
from pyggml.testing.fake_driver import FakeMachine

N_IN, N_OUT, N_EXPERT, N_USED, N_TOKEN = 64, 200, 8, 2, 33


def block(graph, router, experts):
    """Build the block as models do, softmax over all experts and weights that add up to 1; return input and result."""
    with graph:
        x = graph.input("f32", (N_IN, N_TOKEN), name="x")
        probs = ggml.soft_max(ggml.mul_mat(router, x))
        chosen = ggml.argsort_top_k(probs, N_USED)
        weights = ggml.get_rows(ggml.reshape_3d(probs, 1, N_EXPERT, N_TOKEN), chosen)
        weights = ggml.reshape_2d(weights, N_USED, N_TOKEN)
        weights = ggml.div(weights, ggml.clamp(ggml.sum_rows(weights), 1e-4, np.inf))
        made = ggml.mul_mat_id(experts, ggml.reshape_3d(x, N_IN, 1, N_TOKEN), chosen)
        made = ggml.mul(made, ggml.reshape_3d(weights, 1, N_USED, N_TOKEN))
        parts = [ggml.view_2d(made, N_OUT, N_TOKEN, made.nb[2], i * made.nb[1]) for i in range(N_USED)]
        result = ggml.add(*parts)
    graph.expand(result.set_output())
    return x, result


def expected(x, router, experts):
    """Return the block's result in float64."""
    logits = x.astype("f8") @ router.T.astype("f8")
    probs = np.exp(logits - logits.max(1, keepdims=True))
    chosen = np.argsort(-probs, axis=1)[:, :N_USED]
    weights = np.take_along_axis(probs, chosen, 1)
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("tu,tumk,tk->tm", weights, experts.astype("f8")[chosen], x.astype("f8"))


@pytest.mark.parametrize("seed", range(20))
def test_the_router_stays_on_the_card(seed):
    """In any order of the driver's work, ids made on the card are read back in time for the copies of used experts."""
    rng = np.random.default_rng(seed)
    machine = FakeMachine(seed=seed)
    device, cpu = cuda.CudaDevice(machine.cards[0]), ggml.CPU(threads=1)
    on_card, on_host = ggml.Context(), ggml.Context()
    router = on_card.new_tensor("f32", (N_IN, N_EXPERT), name="router")
    experts = on_host.new_tensor("q8_0", (N_IN, N_OUT, N_EXPERT), name="experts")
    on_card.alloc(device, usage="weights")
    on_host.alloc(cpu, usage="weights")
    values = rng.standard_normal((N_EXPERT, N_IN)).astype("f4")
    values[N_EXPERT // 2 :, 0] = -10  # with 5 in every token: nobody chooses these
    router.set_array(values)
    experts.set_array(rng.standard_normal((N_EXPERT, N_OUT, N_IN)).astype("f4"))
    graph = ggml.Graph()
    x, result = block(graph, router, experts)
    sched = ggml.Scheduler([device.backend(), cpu])
    sched.alloc_graph(graph)
    given = rng.standard_normal((N_TOKEN, N_IN)).astype("f4")
    given[:, 0] = 5
    x.set_array(given)
    before = machine.cards[0].traffic.bytes_in
    sched.compute(graph)
    assert machine.cards[0].traffic.bytes_in - before < 0.75 * experts.nbytes, "experts that nobody chose were copied"
    assert all(split.backend_id == 0 for split in sched.splits), "something of the block went to the CPU"
    got, want = result.numpy(), expected(given, values, experts.numpy())
    assert ((got - want) ** 2).sum() / (want**2).sum() < 5e-4
