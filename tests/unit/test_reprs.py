"""Objects explain themselves in a line, and as a table in a notebook."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

import pyggml as ggml
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.notebook import MAX_ROWS, Bar, html_table
from pyggml.plan_report import plan_batches
from pyggml.planning import Planner
from pyggml.record import AllocRecord, CopyRecord, UsedExpertsRecord
from pyggml.report import CopyAccount
from pyggml.routing import parse_routing

#: A whole weight that was copied; its name tells no layer.
WEIGHT = CopyRecord(0, "w", "CPU", "SIM0", 0, 1000, 1000, "weight", 0.0, 0.1)


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
    assert cells(html) == [
        ["type", "f32"], ["ne", "8×4"], ["nb", "4 32"], ["bytes", "128"], ["memory", "SIM0, weights"]
    ]  # fmt: skip
    rows = dict(cells(node._repr_html_()))
    assert rows["op"] == "MUL_MAT"
    assert rows["sources"] == "w<0>, SIM0#x#0"
    assert rows["memory"] == "none yet"


def test_view_without_a_name() -> None:
    """A view tells what it shows; a tensor without a name says so."""
    tensor = ggml.Tensor("f32", (4, 3), name="whole")
    view = ggml.view_1d(tensor, 4, offset=16)
    assert dict(cells(view._repr_html_()))["view"] == "of whole, from byte 16"
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
    """A scheduler lists its splits: backend, nodes, why they are there, inputs, and what copies of those move."""
    assert repr(sched) == "<Scheduler over SIM0, CPU: nothing allocated, 1 pipeline copies>"
    assert cells(sched._repr_html_())[1:] == [
        ["0", "SIM0", "0..0", "MUL_MAT a & b", "its source 0 is a weight there", "x", "64"],
        ["1", "CPU", "1..1", "EXP y", "the user pinned it there", "a & b", "32"],
    ]


def test_statistics() -> None:
    """Statistics tell bytes by reason, what was copied in all, and what whole copies would have moved."""
    stats = ggml.Statistics()
    stats.count_copy(1000, 4000, "experts")
    stats.count_experts(4000)
    stats.count_copy(24, 24, "input")
    assert repr(stats) == "<Statistics: 1,024 bytes in 2 copies, 4,024 if whole, 0 launches>"
    assert cells(stats._repr_html_())[1:] == [
        ["input", "24", " 1%"],
        ["activation", "0", " 0%"],
        ["weight", "0", " 0%"],
        ["experts", "1,000", " 25%"],
        ["all", "1,024", " 25%"],
        ["if whole", "4,024", " 100%"],
    ]
    assert [row[2] for row in cells(ggml.Statistics()._repr_html_())[1:]] == [""] * 6


def test_part_of_a_graph(sched: ggml.Scheduler) -> None:
    """A range of a graph lists its nodes by their numbers in the graph."""
    view = sched.splits[1].graph
    assert repr(view) == "<GraphView of nodes 1..1 of <Graph of 2 nodes, 2 leafs>>"
    assert cells(view._repr_html_())[1:] == [["1", "y", "EXP", "f32", "4×2", "CPU#a & b#0"]]


def test_recording() -> None:
    """A recording counts its records by kind."""
    recording = ggml.Recording([AllocRecord("g", "CPU", "CPU", 64), AllocRecord("g", "CPU", "CPU", 128), WEIGHT])
    assert repr(recording) == "<Recording of 3 records: 2 Alloc, 1 Copy>"
    assert cells(recording._repr_html_())[1:] == [["Alloc", "2"], ["Copy", "1"]]
    assert repr(ggml.Recording()) == "<Recording of 0 records>"


def test_copies_by_layer() -> None:
    """An account of copies lists its layers after their sum, with the share that was copied."""
    account = CopyAccount()
    account.record(UsedExpertsRecord(0, "blk.1.ffn_up_exps.weight", "ids", (0, 2), 8, 100, 800))
    account.record(replace(WEIGHT, tensor="blk.1.ffn_up_exps.weight", size_bytes=200, reason="experts"))
    account.record(WEIGHT)
    assert repr(account) == "<CopyAccount: 1,200 bytes of weights, 1,800 if whole>"
    assert cells(account._repr_html_())[1:] == [
        ["all", "2.0 of 8", "1,200", "1,800", " 67%"],
        ["-", "all", "1,000", "1,000", " 100%"],
        ["1", "2.0 of 8", "200", "800", " 25%"],
    ]


def test_bars() -> None:
    """A bar is as long as its share, and never longer than its track."""
    assert "width:37.0%" in Bar(0.37).html()
    assert "width:100.0%" in Bar(1.5).html()
    assert Bar(1.5).html().endswith(" 150%")


def test_long_tables_are_cut() -> None:
    """Of a long table the first rows are shown, and the number of the rest."""
    rows = cells(html_table("t", ("n", "m"), ((i, i) for i in range(60)), n_rows=60))
    assert len(rows) == 1 + MAX_ROWS + 1
    assert rows[-1] == ["and 10 more"]


def test_planner_and_plans() -> None:
    """A planner shows what its devices hold and whether that fits; memory and plans are tables, too."""
    small = "sim:custom:8GiB,400GB/s,12GB/s"
    with Planner.open(
        "gpt-oss-20b", devices=[small], data=False, placement=PlacementFlags(), context=ContextFlags(n_ctx=512)
    ) as planner:
        rows = cells(planner._repr_html_())
        assert rows[0][:2] == ["buffer type", "weights"]
        assert rows[1][0] == "SIM0"
        assert "does not fit" in rows[1][-1]
        assert int(rows[1][4].replace(",", "")) == planner.memory()[0].total
        assert [row[0] for row in cells(planner.memory()._repr_html_())[1:]] == ["SIM0", "CPU"]
        plans = plan_batches(planner, [4, 1], routing=parse_routing("uniform"))
        assert [row[:2] for row in cells(plans._repr_html_())[1:]] == [["4", "4"], ["1", "1"]]
