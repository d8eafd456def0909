"""Batches of no token and graphs of views alone, one after the other in one scheduler: allocated, computed and read as any other."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml
from pyggml import ops


@pytest.mark.parametrize("parallel", [False, True])
def test_empty_batches_over_two_devices(parallel: bool) -> None:
    """A product of no token on one device, then on another, then with tokens again, needs no more than its turn."""
    cpu, gpus = ggml.CPU(threads=1), [ggml.Sim("rtx4090-pcie4") for _ in range(2)]
    weights = []
    for gpu in gpus:
        context = ggml.Context()
        w = context.new_tensor("f32", (32, 16), name="w")
        context.alloc(gpu.device, usage="weights")
        w.set_array(np.ones((16, 32)))
        weights.append(w)
    sched = ggml.Scheduler([*gpus, cpu], parallel=parallel)
    for n, which in ((0, 0), (0, 1), (3, 1), (0, 0), (3, 0), (0, 1)):
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (32, n), name="x")
            y = ops.mul_mat(weights[which], x)
        y.set_output()
        graph.expand(y)
        sched.reset()
        sched.alloc_graph(graph)
        x.set_array(np.ones((n, 32)))
        sched.compute(graph)
        assert y.numpy().size == 16 * n
        assert (y.numpy() == 32).all()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("n", [0, 4])
def test_graphs_of_views_alone(n: int, parallel: bool) -> None:
    """A graph that computes nothing gives the input in its other shape, whichever pipeline copy is its turn."""
    sched = ggml.Scheduler([ggml.Sim("rtx4090-pcie4"), ggml.CPU(threads=1)], parallel=parallel)
    for turn in range(6):
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (32, n), name="x")
            y = ops.reshape_2d(x, 16, 2 * n)
        graph.expand(y)
        sched.reset()
        sched.alloc_graph(graph)
        x.set_array(np.full((n, 32), turn))
        sched.compute(graph)
        assert (y.numpy() == turn).all()
