"""Nobody reads memory that was given to something else: results, inputs, copies, and graphs of before."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml
from pyggml import ops
from pyggml.backend import REGISTRY

RNG = np.random.default_rng(7)
A, U, V = (RNG.standard_normal(shape).astype("f4") for shape in ((5, 6), (5, 4), (6, 4)))


def _loss(marked: bool, view: bool) -> tuple[ggml.Graph, dict[str, ggml.Tensor], ggml.Tensor, ggml.Tensor]:
    """Return ``sum((3 (U V^T - A))^2)`` as a graph, its inputs, the product and the sum; SUB takes the product's memory."""
    graph = ggml.Graph()
    with graph:
        inputs = {n: graph.input("f32", ne, name=n) for n, ne in (("a", (6, 5)), ("u", (4, 5)), ("v", (4, 6)))}
        product = ops.mul_mat(inputs["v"], inputs["u"]).named("product")
        kept = ops.reshape_1d(product, 30).named("flat") if view else product
        if marked:
            kept.set_output()
        left = ops.sub(product, inputs["a"]).named("difference")
        loss = ops.sum(ops.sqr(ops.scale(left, 3.0))).named("loss")
    graph.expand(kept, loss)
    return graph, inputs, kept, loss


def _set(inputs: dict[str, ggml.Tensor]) -> None:
    for name, values in (("a", A), ("u", U), ("v", V)):
        inputs[name].set_array(values)


def _machine(where: str) -> list[ggml.Backend]:
    cpu = ggml.CPU(threads=1)
    if where == "cpu":
        return [cpu]
    return [ggml.Sim("rtx4090-pcie4") if where == "sim" else REGISTRY.open(where).backend(), cpu]


@pytest.mark.parametrize("where", ["cpu", "sim", "libggml:CPU"])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_a_result_is_read_right_or_not_at_all(marked: bool, view: bool, where: str) -> None:
    """Marked as output, the tensor or a view of it, a result is kept; if its memory was given away, reading names to whom."""
    graph, inputs, kept, loss = _loss(marked, view)
    sched = ggml.Scheduler(_machine(where))
    if where != "cpu":
        for node in graph.nodes:
            if not node.op.is_view:
                sched.set_tensor_backend(node, sched.backends[0])
    for _ in range(2):
        sched.alloc_graph(graph)
        _set(inputs)
        sched.compute(graph)
        try:
            found = kept.numpy().reshape(5, 6)
        except ggml.errors.GraphError as error:
            assert not marked
            assert "its memory was given to SUB 'difference'" in str(error)  # noqa: PT017
            assert "mark it as output" in str(error)  # noqa: PT017
        else:
            np.testing.assert_allclose(found, U @ V.T, atol=1e-5)
        np.testing.assert_allclose(loss.numpy().ravel()[0], (9 * (U @ V.T - A) ** 2).sum(), rtol=1e-4)
        sched.reset()
        if where != "cpu":
            for node in graph.nodes:
                if not node.op.is_view:
                    sched.set_tensor_backend(node, sched.backends[0])


def _overwritten_input() -> tuple[ggml.Graph, ggml.Tensor, ggml.Tensor]:
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (64, 4), name="x")
        y = ops.scale(ops.scale(x, 2.0).named("first"), 2.0).named("y")
    graph.expand(y)
    return graph, x, y


def test_an_input_that_was_overwritten_cannot_be_read() -> None:
    """An input whose memory a node took over is not read as the node's result, unless it is written again."""
    graph, x, _ = _overwritten_input()
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    x.set_array(np.ones((4, 64)))
    assert (x.numpy() == 1).all()
    sched.compute(graph)
    with pytest.raises(ggml.errors.GraphError, match="'x' cannot be read: its memory was given to SCALE"):
        x.numpy()
    x.set_array(np.full((4, 64), 3.0))
    assert (x.numpy() == 3).all()


def test_computing_again_asks_for_inputs_that_were_overwritten() -> None:
    """A second compute without a new input is an error that names it, and right once it is set; one that kept its memory needs not."""
    graph, x, y = _overwritten_input()
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    x.set_array(np.ones((4, 64)))
    sched.compute(graph)
    for revive in (False, True):
        if revive:
            sched.reset()
            sched.alloc_graph(graph)
        with pytest.raises(ggml.errors.SchedError, match="'x' must be set again"):
            sched.compute(graph)
        x.set_array(np.ones((4, 64)))
        sched.compute(graph)
        assert (y.numpy() == 4).all()
    graph, x, y = _overwritten_input()
    x.set_output()
    sched.reset()
    sched.alloc_graph(graph)
    x.set_array(np.ones((4, 64)))
    for _ in range(3):
        sched.compute(graph)
        assert (y.numpy() == 4).all()


def test_results_of_a_graph_before_are_not_those_of_the_next() -> None:
    """Once another graph was computed in the same memory, tensors of the first cannot be read."""
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    graph, x, y = _overwritten_input()
    sched.alloc_graph(graph)
    x.set_array(np.ones((4, 64)))
    sched.compute(graph)
    sched.reset()
    assert (y.numpy() == 4).all()
    after, x2, y2 = _overwritten_input()
    sched.alloc_graph(after)
    x2.set_array(np.zeros((4, 64)))
    sched.compute(after)
    assert (y2.numpy() == 0).all()
    with pytest.raises(ggml.errors.GraphError, match="another graph was computed in its memory"):
        y.numpy()


def test_callbacks_read_what_was_just_computed() -> None:
    """While a graph is computed each node can be read when its time comes, whatever takes its memory later."""
    graph, inputs, kept, _ = _loss(marked=False, view=False)
    seen: dict[str, np.ndarray] = {}

    def look(node: ggml.Tensor, ask: bool) -> bool:
        if not ask:
            seen[node.name] = node.numpy()
        return True

    sched = ggml.Scheduler([ggml.CPU(threads=1)], eval_callback=look)
    sched.alloc_graph(graph)
    _set(inputs)
    sched.compute(graph)
    np.testing.assert_allclose(seen[kept.name], U @ V.T, atol=1e-5)


def test_a_strict_scheduler_reads_what_is_there() -> None:
    """With upstream's rules reading gives what the memory holds."""
    graph, inputs, kept, _ = _loss(marked=False, view=False)
    sched = ggml.Scheduler([ggml.CPU(threads=1)], strict=True)
    sched.alloc_graph(graph)
    _set(inputs)
    sched.compute(graph)
    assert not np.allclose(kept.numpy(), U @ V.T)


def test_an_input_that_nothing_computed_reads_need_not_be_set() -> None:
    """An input of a branch that was not selected may be overwritten: computing again does not ask for it."""
    graph = ggml.Graph()
    with graph:
        x, unused = (graph.input("f32", (64, 4), name=name) for name in ("x", "unused"))
        one, two = ops.scale(x, 2.0), ops.scale(unused, 3.0)
        graph.select([one, two], 0)
        y = ops.sqr(ops.scale(ops.scale(one, 2.0), 2.0)).named("y")
    x.set_output()
    graph.expand(y)
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    x.set_array(np.ones((4, 64)))
    for _ in range(3):
        sched.compute(graph)
        assert (y.numpy() == 64).all()
