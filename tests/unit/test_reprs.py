"""Objects explain themselves in a line, and as a table in a notebook."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

import pyggml as ggml
from pyggml.notebook import MAX_ROWS, html_table


@pytest.fixture(scope="module")
def sched() -> ggml.Scheduler:
    """A scheduler over a device that only plans and the CPU, with a graph of two splits."""
    cpu, gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4", data=False)
    weights = ggml.Context()
    w = weights.new_tensor("f32", (8, 4), name="w<0>")
    weights.alloc(gpu, usage="weights")
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (8, 2), name="x")
        first = ggml.mul_mat(w, x).named("a & b")
        second = ggml.exp(first).named("y")
    graph.expand(second)
    made = ggml.Scheduler([gpu, cpu])
    made.set_tensor_backend(second, cpu)
    made.split_graph(graph)
    return made


def cells(html: str) -> list[list[str]]:
    """Return the rows of a table, which must be well-formed."""
    return [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(html).iter("tr")]


def graph_of(sched: ggml.Scheduler) -> ggml.Graph:
    """Return the graph that was split."""
    return sched.splits[0].graph.graph


def test_tensor(sched: ggml.Scheduler) -> None:
    """A tensor tells type, layout, memory and where it comes from; names are escaped."""
    node = graph_of(sched)["a & b"]
    weight = node.src[0]
    assert weight is not None
    assert repr(weight) == "<f32 'w<0>' [8×4] in SIM0>"
    assert repr(node) == "<f32 'a & b' [4×2] = MUL_MAT('w<0>', 'SIM0#x#0')>"
    html = weight._repr_html_()
    assert "w&lt;0&gt;" in html
    assert cells(html)[1:] == [
        ["type", "f32"], ["ne", "8×4"], ["nb", "4 32"], ["bytes", "128"], ["memory", "SIM0, weights"]
    ]  # fmt: skip
    rows = dict(cells(node._repr_html_())[1:])
    assert rows["op"] == "MUL_MAT"
    assert rows["sources"] == "w<0>, SIM0#x#0"
    assert rows["memory"] == "none yet"


def test_view_without_a_name() -> None:
    """A view tells what it shows; a tensor without a name says so."""
    tensor = ggml.Tensor("f32", (4, 3), name="whole")
    view = ggml.view_1d(tensor, 4, offset=16)
    assert dict(cells(view._repr_html_())[1:])["view"] == "of whole, from byte 16"
    assert "(no name)" in ggml.Tensor("f32", (4,))._repr_html_()


def test_graph(sched: ggml.Scheduler) -> None:
    """A graph lists its nodes in order, with op, type, shape and sources."""
    graph = graph_of(sched)
    assert repr(graph) == "<Graph of 2 nodes, 2 leafs>"
    assert cells(graph._repr_html_())[1:] == [
        ["0", "a & b", "MUL_MAT", "f32", "4×2", "w<0>, SIM0#x#0"],
        ["1", "y", "EXP", "f32", "4×2", "CPU#a & b#0"],
    ]


def test_split(sched: ggml.Scheduler) -> None:
    """A split lists its inputs with their bytes."""
    split = sched.splits[1]
    assert repr(split) == "<Split of nodes 1..1 on backend 1, inputs [a & b]>"
    assert cells(split._repr_html_())[1:] == [["a & b", "f32", "4×2", "32"]]


def test_scheduler(sched: ggml.Scheduler) -> None:
    """A scheduler lists its splits: backend, nodes, inputs, and what copies of those move."""
    assert repr(sched) == "<Scheduler over SIM0, CPU: nothing allocated, 1 pipeline copies>"
    assert cells(sched._repr_html_())[1:] == [["0", "SIM0", "0..0", "x", "64"], ["1", "CPU", "1..1", "a & b", "32"]]


def test_statistics() -> None:
    """Statistics tell bytes by reason, what was copied in all, and what whole copies would have moved."""
    stats = ggml.Statistics()
    stats.count_copy(1000, 4000, "experts")
    stats.count_experts(4000)
    stats.count_copy(24, 24, "input")
    assert repr(stats) == "<Statistics: 1,024 bytes in 2 copies, 4,024 if whole, 0 launches>"
    rows = dict(cells(stats._repr_html_())[1:])
    assert rows == {
        "input": "24", "activation": "0", "weight": "0", "experts": "1,000", "all": "1,024", "if whole": "4,024"
    }  # fmt: skip


def test_long_tables_are_cut() -> None:
    """Of a long table the first rows are shown, and the number of the rest."""
    rows = cells(html_table("t", ("n", "m"), ((i, i) for i in range(60)), n_rows=60))
    assert len(rows) == 1 + MAX_ROWS + 1
    assert rows[-1] == ["and 10 more"]
