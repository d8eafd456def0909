"""Buffers that are closed while tensors in them are still used."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml


def _product(backend: ggml.Backend) -> tuple[ggml.Context, ggml.Graph, ggml.Tensor, ggml.Tensor]:
    """Return a weight's context, and a graph that multiplies with it."""
    weights = ggml.Context()
    weight = weights.new_tensor("f32", (64, 32), name="weight")
    weights.alloc(backend, usage="weights")
    weight.set_array(np.ones((32, 64)))
    with ggml.Graph() as graph:
        x = graph.input("f32", (64, 40), name="x")
        y = ggml.mul_mat(weight, x)
    graph.expand(y)
    return weights, graph, x, y


def _compute(sched: ggml.Scheduler, graph: ggml.Graph, x: ggml.Tensor) -> None:
    sched.reset()
    sched.alloc_graph(graph)
    x.set_array(np.ones((40, 64)))
    sched.compute(graph)


@pytest.mark.parametrize("with_device", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("is_computed_before", [False, True], ids=["at once", "planned before"])
def test_a_closed_weight_is_an_error_that_names_it(with_device: bool, is_computed_before: bool) -> None:
    """Neither a kernel nor a copy touches memory that was given back, also where a plan was made before."""
    cpu = ggml.CPU(threads=1)
    weights, graph, x, _ = _product(cpu)
    sched = ggml.Scheduler([ggml.Sim(), cpu] if with_device else [cpu])
    if is_computed_before:
        _compute(sched, graph, x)
    weights.tensors[0].buffer.close()
    with pytest.raises(ggml.errors.BackendError, match="'weight' is in a buffer that was closed"):
        _compute(sched, graph, x)


def test_a_weight_placed_anew_is_found_by_plans_made_before() -> None:
    """A plan keeps addresses; it is made anew when a buffer that it rests on was closed."""
    cpu = ggml.CPU(threads=1)
    weights, graph, x, y = _product(cpu)
    sched = ggml.Scheduler([cpu])
    _compute(sched, graph, x)
    weights.close()
    weights.alloc(cpu, usage="weights")
    weights["weight"].set_array(np.full((32, 64), 2.0))
    _compute(sched, graph, x)
    np.testing.assert_array_equal(y.numpy(), np.full((40, 32), 128.0))
