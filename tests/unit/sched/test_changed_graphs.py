"""A graph that changed after it was allocated is an error or planned again; graphs that take turns or run again are right each time."""

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


def _sched_and_tensor(device: str, name: str) -> tuple[ggml.Scheduler, ggml.Tensor]:
    """Return a scheduler over the CPU, or a simulated device and it, and a tensor in the first one's memory."""
    cpu = ggml.CPU(threads=1)
    backends = [ggml.Sim("rtx4090-pcie4", threads=1), cpu] if device == "sim" else [cpu]
    context = ggml.Context()
    tensor = context.new_tensor("f32", (8, 4), name=name)
    context.alloc(backends[0])
    return ggml.Scheduler(backends), tensor


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_graphs_that_share_a_leaf_take_turns(device: str) -> None:
    """One scheduler computes two graphs over one leaf in turn, whether the leaf has memory of its own or is placed each time."""
    sched, fixed = _sched_and_tensor(device, "leaf")
    first, second = ggml.Graph(), ggml.Graph()
    with first:
        placed = first.input("f32", (8, 4), name="leaf")
        doubled = {leaf: ops.scale(leaf, 2.0) for leaf in (placed, fixed)}
    with second:
        tail = {leaf: ops.view_2d(leaf, 8, 2, leaf.nb[1], 2 * leaf.nb[1]) for leaf in (placed, fixed)}
        summed = {leaf: ops.sum_rows(tail[leaf]) for leaf in (placed, fixed)}
    first.expand(*doubled.values())
    second.expand(*summed.values())
    rng = np.random.default_rng(3)
    for turn in range(3):
        values = {leaf: rng.standard_normal((4, 8), np.float32) for leaf in (placed, fixed)}
        fixed.set_array(values[fixed])  # both graphs of a turn read what is written once
        for graph, results in ((first, doubled), (second, summed)):
            sched.reset()
            sched.alloc_graph(graph)
            placed.set_array(values[placed])
            sched.compute(graph)
            for leaf, x in values.items():
                want = 2 * x if graph is first else x[2:].sum(1, keepdims=True)
                np.testing.assert_allclose(results[leaf].numpy(), want, rtol=1e-4, atol=1e-5, err_msg=f"turn {turn}")


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_what_one_graph_wrote_is_a_leaf_of_the_next(device: str) -> None:
    """A tensor with memory of its own is written by one graph and, by a view, read by another, again and again."""
    sched, state = _sched_and_tensor(device, "state")
    writer, reader = ggml.Graph(), ggml.Graph()
    with writer:
        x = writer.input("f32", (8, 4), name="x")
        written = ops.cpy(ops.scale(x, 3.0), state)
    writer.expand(written)
    with reader:
        total = ops.sum_rows(ops.view_2d(state, 8, 2, state.nb[1], 2 * state.nb[1]))
    reader.expand(total)
    for turn in range(1, 4):
        values = np.arange(32, dtype=np.float32).reshape(4, 8) * turn
        sched.reset()
        sched.alloc_graph(writer)
        x.set_array(values)
        sched.compute(writer)
        sched.reset()
        sched.alloc_graph(reader)
        sched.compute(reader)
        np.testing.assert_array_equal(total.numpy().ravel(), 3 * values[2:].sum(1))


@pytest.mark.parametrize(("is_anew", "is_waiting"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_pipeline_copies_are_right_each_time(seed: int | None, is_anew: bool, is_waiting: bool) -> None:
    """One graph over two devices, with new inputs each time: kept or allocated anew, waited for each or every third time, late or not.

    A kept graph has to be waited for before its inputs are written again, as llama.cpp does.
    """
    gpus = [ggml.Sim("custom:16MiB,1000GB/s,25GB/s", index=i, seed=seed, threads=1) for i in (0, 1)]
    rng = np.random.default_rng(5)
    contexts = [ggml.Context() for _ in gpus]
    weights = [context.new_tensor("f32", (16, 16), name=f"w{i}") for i, context in enumerate(contexts)]
    matrices = rng.standard_normal((2, 16, 16), np.float32)
    for context, w, gpu, matrix in zip(contexts, weights, gpus, matrices, strict=True):
        context.alloc(gpu, usage="weights")
        w.set_array(matrix)
    graph = ggml.Graph()
    with graph:
        x, bias = (graph.input("f32", (16, 3), name=name) for name in ("x", "bias"))
        middle = ops.add(ops.mul_mat(weights[0], x), bias)
        y = ops.add(ops.mul_mat(weights[1], middle), bias).set_output()
    graph.expand(y)
    sched = ggml.Scheduler([*gpus, ggml.CPU(threads=1)], parallel=True)
    assert sched.n_copies > 1
    copies = set()
    for i in range(9):
        if is_anew or i == 0:
            sched.reset()
            sched.alloc_graph(graph)
        values, added = rng.standard_normal((2, 3, 16), np.float32)
        x.set_array(values)
        bias.set_array(added)
        sched.compute_async(graph)
        copies.add(sched.cur_copy)
        if is_waiting or i % 3 == 2:
            sched.synchronize()
            want = (values @ matrices[0].T + added) @ matrices[1].T + added
            np.testing.assert_allclose(y.numpy(), want, rtol=1e-4, atol=1e-4, err_msg=f"time {i}")
    assert len(copies) == (sched.n_copies if is_anew else 1)
    assert not any(gpu.device.hazards for gpu in gpus)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_chunks_grow_where_a_later_graph_needs_more_of_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small largest buffer, a graph that needs more of one chunk and no more in all gets it, and is right."""
    cpu = ggml.CPU(threads=1)
    backends = [ggml.Sim("custom:16MiB,100GB/s,10GB/s", threads=1), cpu] if device == "sim" else [cpu]
    for backend in backends:
        monkeypatch.setattr(backend.buffer_type, "max_size", 1 << 16)
    sched = ggml.Scheduler(backends)
    rng = np.random.default_rng(4)
    seen = []
    for sizes in ([15000, 3000, 9000], [9000, 9000, 9000], [3000, 15000, 9000], [1000] * 20, [16000, 16000]):
        graph = ggml.Graph()
        with graph:
            inputs = [graph.input("f32", (n,), name=f"x{i}") for i, n in enumerate(sizes)]
            totals = [ops.sum(ops.sqr(x)) for x in inputs]
        graph.expand(*totals)
        sched.reset()
        if device == "sim":
            for total in totals:
                sched.set_tensor_backend(total, backends[0])
        sched.alloc_graph(graph)
        arrays = [rng.standard_normal(n, np.float32) for n in sizes]
        for x, array in zip(inputs, arrays, strict=True):
            x.set_array(array)
        sched.compute(graph)
        for total, array in zip(totals, arrays, strict=True):
            np.testing.assert_allclose(total.numpy().ravel(), np.square(array, dtype=np.float64).sum(), rtol=1e-4)
        seen.append(sched.chunk_sizes(backends[0]))
    before, after = seen[1:3]
    assert max(after) > max(before)
    assert sum(after) <= sum(before)
    assert all(len(chunks) > 1 and max(chunks) <= 1 << 16 for chunks in seen)
