"""A graph that changed after it was allocated is an error or planned again, never computed as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import pyggml as ggml
from pyggml import ops
from pyggml.backend import REGISTRY


class World:
    """``y = w x``, ``z = 2 y``, over a CPU; another tensor of w's and one of y's shape lie ready."""

    def __init__(self) -> None:
        self.cpu = ggml.CPU(threads=1)
        self.weights = ggml.Context()
        self.w = self.weights.new_tensor("f32", (8, 8), name="w")
        self.other = self.weights.new_tensor("f32", (8, 4), name="other")
        self.weights.alloc(self.cpu, usage="weights")
        self.w.set_array(np.eye(8))
        self.other.set_array(np.full((4, 8), 5.0))
        self.graph = ggml.Graph()
        with self.graph:
            self.x = self.graph.input("f32", (8, 4), name="x")
            self.y = ops.mul_mat(self.w, self.x).named("y")
            self.z = ops.scale(self.y, 2.0).named("z")
        self.x.set_output()
        self.graph.expand(self.z)
        self.sched = ggml.Scheduler([self.cpu])

    def alloc(self) -> None:
        """Allocate, and set the input."""
        self.sched.alloc_graph(self.graph)
        self.x.set_array(np.ones((4, 8)))


def _more(a: World) -> None:
    with a.graph:
        last = ops.scale_inplace(a.z, 3.0)
    a.graph.expand(last)


def _source(a: World, j: int) -> None:
    a.z.src[j:] = [a.other]
    a.graph.leafs.append(a.other)


def _move(a: World) -> None:
    a.w.buffer = a.w.data = None
    a.weights.alloc(a.cpu, usage="weights")
    a.w.set_array(np.eye(8) * 3)


CHANGES: dict[str, tuple[Callable[[World], object], str]] = {
    "a node more": (_more, r"node 2 is 'z \(view\)', and was missing"),
    "a node less": (lambda a: a.graph.nodes.pop(), "node 1 is missing, and was 'z'"),
    "nodes in another order": (lambda a: a.graph.nodes.reverse(), "node 0 is 'z', and was 'y'"),
    "another source": (lambda a: _source(a, 0), "source 0 of 'z' is 'other', and was 'y'"),
    "a source more": (lambda a: _source(a, 1), "source 1 of 'z' is 'other', and was missing"),
    "another parameter": (
        lambda a: setattr(a.z, "op_params", ops.scale(a.y, 7.0).op_params),
        "'z' has other parameters",
    ),
    "another flag": (lambda a: a.y.set_output(), "'y' has other flags"),
    "a weight elsewhere": (_move, "'w' is at another place in memory"),
}


@pytest.mark.parametrize("computed_before", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_allocation_is_refused(name: str, computed_before: bool) -> None:
    """Computing names what changed; after `reset` and a new allocation the changed graph is right, or refused for its order."""
    a = World()
    a.alloc()
    if computed_before:
        a.sched.compute(a.graph)
        assert (a.z.numpy() == 2).all()
    change, text = CHANGES[name]
    change(a)
    with pytest.raises(ggml.errors.SchedError, match=text):
        a.sched.compute(a.graph)
    a.sched.reset()
    if name == "nodes in another order":
        with pytest.raises(ggml.errors.GraphError, match="comes before its source"):
            a.alloc()
        return
    a.alloc()
    a.sched.compute(a.graph)
    want = {
        "a node more": 6.0,
        "a node less": 1.0,
        "another source": 10.0,
        "another parameter": 7.0,
        "a weight elsewhere": 6.0,
    }
    assert (a.graph.nodes[-1].numpy() == want.get(name, 2.0)).all()


@pytest.mark.parametrize("device", ["cpu", "sim", "libggml:CPU"])
def test_a_backend_used_by_hand_plans_a_changed_range_again(device: str) -> None:
    """Another source, parameter or place of a tensor, and the same range gives what is right now."""
    backend = ggml.CPU(threads=1) if device == "cpu" else REGISTRY.open(device).backend()
    context = ggml.Context()
    x, other = (context.new_tensor("f32", (8, 4), name=name) for name in ("x", "other"))
    graph = ggml.Graph()
    with graph:
        y = ops.scale(x, 2.0).named("y")
    graph.expand(y)
    context.add(y)
    context.alloc(backend.device)
    x.set_array(np.ones((4, 8)))
    other.set_array(np.full((4, 8), 5.0))
    view = graph.view(0, 1)

    def result() -> float:
        backend.graph_compute(view)
        backend.synchronize()
        return float(y.numpy().ravel()[0])

    assert result() == 2.0
    y.src[0] = other
    assert result() == 10.0
    y.op_params = ops.scale(x, 3.0).op_params
    assert result() == 15.0
    other.buffer = other.data = None
    context.alloc(backend.device)
    other.set_array(np.full((4, 8), 7.0))
    assert result() == 21.0


def test_a_graph_out_of_order_is_refused_before_it_is_allocated() -> None:
    """A node before its source is an error of the graph, which names both."""
    a = World()
    a.graph.nodes.reverse()
    with pytest.raises(ggml.errors.GraphError, match="node 0 'z' comes before its source 0 'y'"):
        a.sched.alloc_graph(a.graph)


def test_a_source_that_was_replaced_is_not_put_back() -> None:
    """Where the scheduler read a source from a copy, and somebody then replaced the source, the next allocation uses the new one."""
    gpu, cpu = ggml.Sim("rtx4090-pcie4"), ggml.CPU(threads=1)
    context = ggml.Context()
    first, second = (context.new_tensor("f32", (8, 4), name=name) for name in ("first", "second"))
    context.alloc(cpu)
    first.set_array(np.ones((4, 8)))
    second.set_array(np.full((4, 8), 5.0))
    graph = ggml.Graph()
    with graph:
        y = ops.scale(first, 2.0).named("y")
    graph.expand(y)
    sched = ggml.Scheduler([gpu, cpu])
    for source, want in ((first, 2.0), (second, 10.0)):
        if source is second:
            y.src[0] = second
            graph.leafs[:] = [second]
        sched.reset()
        sched.set_tensor_backend(y, gpu)
        sched.alloc_graph(graph)
        sched.compute(graph)
        assert (y.numpy() == want).all()
    y.src.clear()
    sched.reset()
    with pytest.raises(ggml.errors.UnsupportedOpError):
        sched.alloc_graph(graph)


def test_views_move_with_what_they_show() -> None:
    """A graph that is allocated again, in another buffer, has its views where their owners are now."""
    gpu, cpu = ggml.Sim("rtx4090-pcie4"), ggml.CPU(threads=1)

    def make(n: int) -> tuple[ggml.Graph, ggml.Tensor, ggml.Tensor, ggml.Tensor]:
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (64, n), name="x")
            y = ops.scale(x, 2.0).named("y")
            view = ops.view_2d(y, 32, n, y.nb[1], 128)
            z = ops.add(view, view).named("z")
        graph.expand(z)
        return graph, x, view, z

    sched = ggml.Scheduler([gpu, cpu])
    graph, x, view, z = make(4)
    for again in range(2):
        sched.alloc_graph(graph)
        assert view.view_src is not None
        assert view.view_src.data is not None
        assert (view.buffer, view.data) == (view.view_src.buffer, view.view_src.data + 128), again
        x.set_array(np.arange(256).reshape(4, 64))
        sched.compute(graph)
        assert (z.numpy().reshape(4, 32) == 4 * np.arange(256).reshape(4, 64)[:, 32:]).all()
        sched.reset()
        sched.alloc_graph(make(4000)[0])  # needs larger buffers
        sched.reset()
