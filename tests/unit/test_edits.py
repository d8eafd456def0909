"""Changes of tensors by hand are counted, and building a graph is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyggml as ggml
from pyggml import ops
from pyggml.edits import EDITS


def made() -> ggml.Graph:
    """Return ``y = 2 x``."""
    with ggml.Graph() as graph:
        graph.expand(ops.scale(graph.input("f32", (4,), name="x"), 2.0).named("y"))
    return graph


CHANGES: dict[str, Callable[[ggml.Tensor], object]] = {
    "replace a source": lambda y: y.src.__setitem__(0, y.src[0]),
    "append a source": lambda y: y.src.append(None),
    "extend sources": lambda y: y.src.extend([None]),
    "insert a source": lambda y: y.src.insert(0, None),
    "delete a source": lambda y: y.src.__delitem__(0),
    "take a source": lambda y: y.src.pop(),
    "remove a source": lambda y: y.src.remove(y.src[0]),
    "clear sources": lambda y: y.src.clear(),
    "reverse sources": lambda y: y.src.reverse(),
    "set parameters": lambda y: setattr(y, "op_params", (1,)),
    "mark an output": lambda y: y.set_output(),
    "mark an input": lambda y: y.set_input(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_counted(name: str) -> None:
    """Each way to change a node changes the number, to one that was never there before."""
    y = made()["y"]
    before = EDITS.latest
    CHANGES[name](y)
    assert EDITS.latest > before


def test_memory_of_a_context_is_counted() -> None:
    """A context that gives memory, or takes it back, may move tensors of graphs."""
    context = ggml.Context()
    context.new_tensor("f32", (4,))
    before = EDITS.latest
    context.alloc(ggml.CPU(threads=1))
    given = EDITS.latest
    context.close()
    assert before < given < EDITS.latest


def test_computing_counts_nothing() -> None:
    """A graph that is computed again and again is compared no more."""
    graph, cpu = made(), ggml.CPU(threads=1)
    graph["x"].set_output()
    sched = ggml.Scheduler([cpu])
    sched.alloc_graph(graph)
    graph["x"].set_array([1, 2, 3, 4])
    sched.compute(graph)
    before = EDITS.latest
    for _ in range(3):
        sched.compute(graph)
    assert EDITS.latest == before
    cpu.close()
