"""Splits as records: what each needs from elsewhere, who reads it, and why."""

from __future__ import annotations

import pyggml as ggml
from pyggml.record import AssignRecord, Recording, SplitInput, SplitRecord


class World:
    """A simulated device before the CPU, weights in host memory, and a graph to be cut."""

    def __init__(self) -> None:
        self.cpu, self.gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4")
        self.weights = ggml.Context()
        self.graph = ggml.Graph()
        self.recording = Recording()
        self.sched = ggml.Scheduler([self.gpu, self.cpu], recorder=self.recording)

    def cut(self) -> list[SplitRecord]:
        """Cut the graph, and return what was recorded of its splits."""
        self.sched.split_graph(self.graph)
        return [r for r in self.recording.records if isinstance(r, SplitRecord)]


def test_experts_inputs_and_results() -> None:
    """An input tells what kind it is, where it lies, who reads it first, and why both are where they are."""
    world = World()
    experts = world.weights.new_tensor("f32", (8, 4, 3), name="blk.0.ffn_up_exps.weight")
    plain = world.weights.new_tensor("f32", (4, 5), name="blk.0.out.weight")
    world.weights.alloc(world.cpu, usage="weights")
    with world.graph as graph:
        x, ids = graph.input("f32", (8, 1, 40), name="x"), graph.input("i32", (1, 40), name="ids")
        y = ggml.mul_mat_id(experts, x, ids).named("y")
        z = ggml.mul_mat(plain, y).named("z")  # one row a batch: the device does not offer to take it
    graph.expand(z)
    first, second = world.cut()
    assert (first.split, first.backend, first.first, first.op, first.cause) == (0, "SIM0", "y", "MUL_MAT_ID", "1.off")
    assert (first.causes, second.causes) == ((("1.off", 1),), (("1.wgt0", 1),))
    assert first.inputs[0] == SplitInput(
        tensor="blk.0.ffn_up_exps.weight", kind="experts", src="CPU", cause="1.dst", buft="CPU", type="f32",
        ne=(8, 4, 3, 1), size_bytes=384, user="y", user_op="MUL_MAT_ID", user_cause="1.off", n_users=1,
        ids_ne=(1, 40, 1, 1),
    )  # fmt: skip
    assert [(i.tensor, i.kind, i.cause) for i in first.inputs[1:]] == [
        ("x", "input", "1.inp"),
        ("ids", "input", "1.inp"),
    ]
    assert (second.backend, second.cause) == ("CPU", "1.wgt0")
    assert [(i.tensor, i.kind, i.src, i.cause) for i in second.inputs] == [("y", "activation", "SIM0", "1.off")]


def test_all_readers_count_where_the_copy_is_listed() -> None:
    """A copy that nodes of two splits read is an input of the first of them, with all its readers."""
    world = World()
    a = world.weights.new_tensor("f32", (8, 4), name="a.weight")
    b = world.weights.new_tensor("f32", (8, 4), name="b.weight")
    world.weights.alloc(world.cpu, usage="weights")
    with world.graph as graph:
        x = graph.input("f32", (8, 40), name="x")
        y = ggml.mul_mat(a, x).named("y")
        z = ggml.mul_mat(b, x).named("z")
    graph.expand(y, z)
    first, second = world.cut()
    assert [(i.tensor, i.kind, i.user, i.n_users) for i in first.inputs] == [
        ("a.weight", "weight", "y", 1), ("x", "input", "y", 2),
    ]  # fmt: skip
    assert [(i.tensor, i.user) for i in second.inputs] == [("b.weight", "z")]


def test_splits_hold_the_nodes_that_are_assigned() -> None:
    """The computed nodes of all splits are those whose assignments were recorded before; views count for none."""
    world = World()
    with world.graph as graph:
        x = graph.input("f32", (8, 40), name="x")
        y = ggml.scale(ggml.reshape_1d(ggml.scale(x, 2.0), 320), 3.0)
    graph.expand(y)
    splits = world.cut()
    kinds = [type(r) for r in world.recording.records if isinstance(r, SplitRecord | AssignRecord)]
    assert kinds == [AssignRecord] * sum(s.n_nodes for s in splits) + [SplitRecord] * len(splits)
    assert sum(s.n_nodes for s in splits) == 2
    assert (splits[0].i_start, splits[-1].i_end) == (0, 3)
