"""Precedents: what a scheduler does not ask again about a graph like one before, and what it does."""

from __future__ import annotations

from typing import Any

import pytest

import pyggml as ggml
from pyggml.backend import Backend, Device, answers_by_kind
from pyggml.backends.sim import SimDevice
from pyggml.cost import parse_profile
from pyggml.sched import precedent


class Bench:
    """A simulated device and the CPU, a weight on each, and how often backends were asked and passes run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: Device | None = None, **options: Any) -> None:
        self.gpu = ggml.Sim() if device is None else device.backend()
        cpu = ggml.CPU(1)
        self.sched = ggml.Scheduler([self.gpu, cpu], **options)
        self.weights = []
        for backend in (self.gpu, cpu):
            context = ggml.Context()
            self.weights.append(context.new_tensor("f32", (8, 8), name=f"w{len(self.weights)}"))
            context.alloc(backend, usage="weights")
        self.n_passes = 0
        passes = precedent.assign

        def counted(*arguments: Any) -> None:
            self.n_passes += 1
            passes(*arguments)

        monkeypatch.setattr(precedent, "assign", counted)

    def graph(self, n_token: int, *, name: str = "last", scales: bool = False) -> ggml.Graph:
        """Return a new graph: a product on the device, one whose weight is on the CPU."""
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (8, n_token), name="x")
            y = ggml.mul_mat(self.weights[0], x).named("first")
            y = ggml.scale(y, 2.0).named("scaled") if scales else ggml.silu(y).named("active")
            graph.expand(ggml.mul_mat(self.weights[1], y).named(name).set_output())
        return graph

    def causes(self, graph: ggml.Graph) -> list[tuple[str, str]]:
        """Allocate a graph and return where its nodes are, and why."""
        self.sched.reset()
        self.sched.alloc_graph(graph)
        found = [(self.sched.tensor_backend(n), self.sched.cause(n)) for n in graph.nodes]
        return [(b.name, c.value) for b, c in found if b is not None and c is not None]


def test_a_graph_like_one_before_runs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sizes again, and other sizes with the same answers, are assigned as before."""
    bench = Bench(monkeypatch)
    first = bench.causes(bench.graph(4))
    assert bench.n_passes == 1
    assert bench.causes(bench.graph(4)) == first
    assert bench.causes(bench.graph(7)) == first
    assert bench.n_passes == 1
    assert bench.causes(bench.graph(4, scales=True)) == first
    assert bench.n_passes == 2


def test_what_came_between_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph follows the one like it also after a graph that starts on the other backend."""
    bench = Bench(monkeypatch)
    first = bench.causes(bench.graph(4))
    other = ggml.Graph()
    with other:
        x = other.input("f32", (8, 4), name="x")
        other.expand(ggml.mul_mat(bench.weights[1], x).named("on the CPU"))
    assert bench.causes(other) == [("CPU", "1.wgt0")]
    assert bench.n_passes == 2
    assert bench.causes(bench.graph(4)) == first
    assert bench.n_passes == 2


def test_other_memory_of_the_same_backends_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight in pinned memory, which the same backends use, changes no pass; in the device's memory it does, and so does another answer."""
    bench = Bench(monkeypatch)
    first = bench.causes(bench.graph(4))

    def move(buft: ggml.BufferType | None) -> None:
        context = ggml.Context()
        bench.weights[1] = context.new_tensor("f32", (8, 8), name="w1")
        assert buft is not None
        context.alloc(buft, usage="weights")

    pinned = bench.gpu.device.host_buffer_type
    move(pinned)
    assert bench.causes(bench.graph(4)) == first
    assert bench.n_passes == 1
    move(bench.gpu.buffer_type)
    assert [name for name, _ in bench.causes(bench.graph(4))] == [bench.gpu.name] * 3
    assert bench.n_passes == 2
    supports_op = SimDevice.supports_op

    @answers_by_kind
    def refusing(device: SimDevice, op: ggml.Tensor) -> bool:
        return all(t is None or t.buffer is None or t.buffer.buft is not pinned for t in op.src) and supports_op(
            device, op
        )

    monkeypatch.setattr(SimDevice, "supports_op", refusing)
    bench = Bench(monkeypatch)
    large = bench.causes(bench.graph(32))
    assert large[-1] == (bench.gpu.name, "1.off")
    pinned = bench.gpu.device.host_buffer_type
    move(pinned)
    assert bench.causes(bench.graph(32))[-1] == ("CPU", "1.wgt0")
    assert bench.n_passes >= 2


def test_another_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 32 tokens on the device wants the second product, too; the graph before does not decide."""
    bench = Bench(monkeypatch)
    small = bench.causes(bench.graph(31))
    large = bench.causes(bench.graph(32))
    assert [c for _, c in small] == ["1.wgt0", "2.sup", "1.wgt0"]
    assert [c for _, c in large] == ["1.wgt0", "2.sup", "1.off"]
    assert bench.n_passes == 2
    assert bench.causes(bench.graph(31)) == small  # both are kept
    assert bench.causes(bench.graph(40)) == large
    assert bench.n_passes == 2


def test_results_of_graphs_that_follow_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph computes with its own tensors and copies."""
    bench = Bench(monkeypatch)
    for weight in bench.weights:
        weight.set_array([[float(i == j) * 3 for i in range(8)] for j in range(8)])
    for value in (1.0, 2.0, 5.0):
        graph = bench.graph(2, scales=True)
        bench.causes(graph)
        graph["x"].set_array([[value] * 8] * 2)
        bench.sched.compute(graph)
        assert graph["last"].numpy().tolist() == [[value * 18] * 8] * 2
    assert bench.n_passes == 1


def test_a_rule_of_offloading_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's rule may go by names or change its mind: it is asked although nothing about the graph changed."""
    wanted: list[str] = ["last"]

    def rule(backend: Backend, op: ggml.Tensor) -> bool:
        return op.name in wanted

    bench = Bench(monkeypatch, offload_rule=rule)
    assert bench.causes(bench.graph(4))[-1][1] == "1.off"
    assert bench.causes(bench.graph(4, name="other"))[-1][1] == "1.wgt0"
    wanted.clear()
    assert bench.causes(bench.graph(4))[-1][1] == "1.wgt0"


class ByName(SimDevice):
    """A device that cannot run what is named so."""

    def supports_op(self, op: ggml.Tensor) -> bool:
        """Whether the node has another name."""
        return op.name != "not here" and super().supports_op(op)


def test_a_device_that_goes_by_names_is_asked_about_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only devices that say so are taken to answer by kind."""
    bench = Bench(monkeypatch, ByName(parse_profile("rtx4090-pcie4")))
    assert bench.causes(bench.graph(64))[-1][1] == "1.off"
    assert bench.causes(bench.graph(64, name="not here"))[-1][1] == "1.wgt0"


def test_a_graph_follows_one_with_the_same_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins are part of what a graph has: only one with the same pins follows, and each pin is for one graph."""
    bench = Bench(monkeypatch)
    pinned: list[tuple[str, int]] = []

    def causes(*pins: tuple[str, int], n_token: int = 4) -> list[tuple[str, str]]:
        graph = bench.graph(n_token)
        bench.sched.reset()
        for name, b in pins:
            bench.sched.set_tensor_backend(graph[name], bench.sched.backends[b])
        bench.sched.alloc_graph(graph)
        found = [(bench.sched.tensor_backend(n), bench.sched.cause(n)) for n in graph.nodes]
        pinned[:] = [
            (n.name, b.name) for n, (b, c) in zip(graph.nodes, found, strict=True) if b and c is ggml.Cause.USER
        ]
        return [(b.name, c.value) for b, c in found if b is not None and c is not None]

    free = bench.causes(bench.graph(4))
    on_cpu = causes(("active", 1))
    assert pinned == [("active", "CPU")]
    assert on_cpu != free
    assert bench.n_passes == 2
    assert causes(("active", 1), n_token=6) == on_cpu
    assert pinned == [("active", "CPU")]
    assert bench.n_passes == 2
    assert causes(("active", 0)) != on_cpu
    assert causes(("active", 1), ("first", 0)) != on_cpu
    assert bench.n_passes == 4
    assert bench.causes(bench.graph(4)) == free
    assert bench.n_passes == 4


def test_a_graph_with_pipeline_copies_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four pipeline copies a graph follows one like it, also at the next copy, and computes with its own tensors."""
    bench = Bench(monkeypatch, parallel=True)
    for weight in bench.weights:
        weight.set_array([[float(i == j) * 3 for i in range(8)] for j in range(8)])
    for value in (1.0, 2.0, 5.0, 6.0, 7.0):
        graph = bench.graph(2, scales=True)
        bench.causes(graph)
        graph["x"].set_array([[value] * 8] * 2)
        bench.sched.compute(graph)
        assert graph["last"].numpy().tolist() == [[value * 18] * 8] * 2
        assert [c.value for c in map(bench.sched.cause, bench.sched.copies[graph["scaled"]][1]) if c] == ["4.cpy"] * 4
    assert bench.n_passes == 1


def test_a_larger_graph_is_laid_out_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that follows a smaller one gets the memory that it needs, and the smaller one its own places again."""
    bench = Bench(monkeypatch)
    sizes = []
    for n_token in (2, 9, 2, 9):
        bench.causes(bench.graph(n_token))
        sizes.append(bench.sched.buffer_size(bench.gpu))
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    assert bench.n_passes == 1


def test_an_order_by_hand_is_still_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node before its source is an error, whatever graph came before."""
    bench = Bench(monkeypatch)
    bench.causes(bench.graph(4))
    graph = bench.graph(4)
    graph.nodes.reverse()
    with pytest.raises(ggml.errors.GraphError, match="comes before its source"):
        bench.causes(graph)


def test_one_node_of_each_kind_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal layers of a graph of another size are asked about once; a layer that has become another, for itself."""
    bench = Bench(monkeypatch)
    asked: list[str] = []
    supports = SimDevice.supports_op

    def noted(self: SimDevice, op: ggml.Tensor) -> bool:
        asked.append(op.name)
        return supports(self, op)

    def graph(*n_tokens: int) -> ggml.Graph:
        graph = ggml.Graph()
        with graph:
            for i, n_token in enumerate(n_tokens):
                x = graph.input("f32", (8, n_token), name=f"x{i}")
                graph.expand(ggml.mul_mat(bench.weights[1], x).named(f"y{i}").set_output())
        return graph

    monkeypatch.setattr(SimDevice, "supports_op", answers_by_kind(noted))
    assert [c for _, c in bench.causes(graph(31, 31, 31))] == ["1.wgt0"] * 3
    asked.clear()
    assert [c for _, c in bench.causes(graph(20, 20, 20))] == ["1.wgt0"] * 3
    assert bench.n_passes == 1
    assert asked == ["y0"]
    assert [c for _, c in bench.causes(graph(20, 40, 20))] == ["1.wgt0", "1.off", "1.wgt0"]
    assert [c for _, c in bench.causes(graph(7, 40, 20))] == ["1.wgt0", "1.off", "1.wgt0"]
    assert [c for _, c in bench.causes(graph(7, 20, 20))] == ["1.wgt0"] * 3
