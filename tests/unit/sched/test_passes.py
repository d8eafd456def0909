"""Single passes over a small graph and two mock backends: what each decides, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import pyggml as ggml
from pyggml.backends.mock import (
    BackendAbilities,
    BufferTypeAbilities,
    MockBufferType,
    MockDevice,
    MockMemory,
)
from pyggml.dialect import DEFAULT_DIALECT, Repairs
from pyggml.sched.assign import assign_from_location, expand, inherit, upgrade
from pyggml.sched.resources import Resources
from pyggml.sched.split import CutMemory, Cutter
from pyggml.sched.state import Assignment, Cause, Machine

GPU, CPU = 0, 1


class Bench:
    """A machine of a device and a CPU, each with its own memory, and a graph: two products with a scale between."""

    def __init__(self) -> None:
        memory = MockMemory()
        bufts = {n: MockBufferType(BufferTypeAbilities(n, is_host=n == "CPU"), memory) for n in ("GPU", "CPU")}
        kinds = {"GPU": ggml.DeviceType.GPU, "CPU": ggml.DeviceType.CPU}
        backends = [MockDevice(BackendAbilities(n, kinds[n], n, frozenset({n})), bufts).backend() for n in bufts]
        self.machine = Machine(backends, [b.buffer_type for b in backends], DEFAULT_DIALECT, Repairs())
        self.asg = Assignment()
        w = {name: ggml.Context() for name in ("w1", "w2")}
        tensors = {name: context.new_tensor("f32", (8, 8), name=name) for name, context in w.items()}
        w["w1"].alloc(backends[GPU], usage="weights")
        w["w2"].alloc(backends[CPU], usage="weights")
        self.graph = ggml.Graph()
        with self.graph:
            x = self.graph.input("f32", (8, 2), name="x")
            first = ggml.mul_mat(tensors["w1"], x).named("first")
            between = ggml.scale(first, 2.0).named("between")
            seen = ggml.reshape_1d(between, 16).named("seen")
            last = ggml.mul_mat(tensors["w2"], ggml.reshape_2d(seen, 8, 2).named("back")).named("last")
        self.graph.expand(last)

    def assigned(self) -> Mapping[str, tuple[int, str]]:
        """Return the backend and the cause of each node that has one."""
        nodes = [n for n in (*self.graph.leafs, *self.graph.nodes) if n in self.asg.ids]
        return {n.name: (self.asg.ids[n], self.asg.causes[n].value) for n in nodes if not n.name.startswith("w")}

    def give(self, **backends: int) -> None:
        """Assign nodes by name, as an earlier pass would."""
        for node in (*self.graph.leafs, *self.graph.nodes):
            if node.name in backends:
                self.asg.set(node, backends[node.name], Cause.USER)


def test_pass_1_goes_by_weights_and_inputs() -> None:
    """Products go where their weight is, a user's input to the CPU; what has neither is left."""
    bench = Bench()
    assign_from_location(bench.graph, bench.asg, bench.machine, None)
    assert bench.assigned() == {"x": (CPU, "1.inp"), "first": (GPU, "1.wgt0"), "last": (CPU, "1.wgt0")}


def test_pass_1_offloads_where_the_rule_says() -> None:
    """A product with a weight in host memory goes to the device that asks for it."""
    bench = Bench()
    assign_from_location(bench.graph, bench.asg, bench.machine, lambda backend, op: op.name == "last")
    assert bench.assigned()["last"] == (GPU, "1.off")


def test_pass_2_spreads_the_device_before_the_cpu() -> None:
    """A node between device and CPU goes to the device; views are not touched."""
    bench = Bench()
    bench.give(first=GPU, last=CPU)
    expand(bench.graph.nodes, bench.asg, bench.machine)
    assert bench.assigned()["between"] == (GPU, "2.sup")
    assert "seen" not in bench.assigned()


def test_pass_3_gives_the_rest_to_whoever_uses_most_sources() -> None:
    """A node that no neighbour reached goes where its source can be used."""
    bench = Bench()
    bench.give(first=CPU, last=GPU)
    upgrade(bench.graph.nodes, bench.asg, bench.machine)
    assert bench.assigned()["between"] == (CPU, "3.best")


def test_pass_4_takes_views_and_sources_along() -> None:
    """A view is where its memory is; a source without a place is where its reader is."""
    bench = Bench()
    bench.give(first=GPU, between=GPU, last=CPU)
    inherit(bench.graph.nodes, bench.asg, bench.machine)
    found = bench.assigned()
    assert found["seen"] == found["back"] == (GPU, "4.vsrc")
    assert found["x"][0] == GPU


@pytest.mark.parametrize("host_weight", [False, True])
def test_pass_5_cuts_where_the_backend_changes(host_weight: bool) -> None:
    """Each change of backend is a split; what is elsewhere is an input of it, and of the right kind."""
    bench = Bench()
    places = {"x": CPU, "w1": GPU, "w2": CPU, "first": GPU, "between": GPU, "seen": GPU, "back": GPU}
    places["last"] = GPU if host_weight else CPU
    bench.give(**places)
    inherit(bench.graph.nodes, bench.asg, bench.machine)
    cutter = Cutter(bench.asg, bench.machine, CutMemory(), n_copies=1, cur_copy=0)
    cutter.cut(bench.graph)
    plan = cutter.plan(bench.graph, Resources(bench.machine.backends, lambda: None))
    kinds = [
        (split.backend_id, [(t.source.name, t.kind) for t in transfers])
        for split, transfers in zip(plan.splits, plan.transfers, strict=True)
    ]
    if host_weight:
        assert kinds[-1][0] == GPU
        assert ("w2", "weight") in kinds[-1][1]
    else:
        assert kinds == [(GPU, [("x", "input")]), (CPU, [("back", "activation")])]
