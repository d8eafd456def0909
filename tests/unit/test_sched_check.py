"""`PYGGML_CHECK=1`: wrong decisions are noticed when they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pyggml.backends.mock import (
    BackendAbilities,
    BufferTypeAbilities,
    Capabilities,
    MockBufferType,
    MockDevice,
    MockMemory,
    OpSupport,
    Optimize,
)
from pyggml.errors import SchedError
from pyggml.graph import Graph
from pyggml.sched import passes, scheduler
from pyggml.sched.check import check_allocation, check_assignment, check_splits
from pyggml.sched.scheduler import Scheduler
from pyggml.sched.state import Cause
from pyggml.tensor import Tensor
from pyggml.types import DeviceType, Op, TensorFlag


def _device(name: str, bufts: dict[str, MockBufferType], kind: DeviceType, **more: object) -> MockDevice:
    abilities = BackendAbilities(name, kind, name, frozenset({name}), caps=Capabilities(), **more)  # type: ignore[arg-type]
    return MockDevice(abilities, bufts)


def _scheduler(*, strict: bool = False, **gpu: object) -> Scheduler:
    memory = MockMemory()
    bufts = {
        name: MockBufferType(BufferTypeAbilities(name, alignment=64, is_host=name == "CPU"), memory)
        for name in ("GPU", "CPU")
    }
    devices = [_device("GPU", bufts, DeviceType.GPU, **gpu), _device("CPU", bufts, DeviceType.CPU)]
    return Scheduler([d.backend() for d in devices], strict=strict)


def _chain() -> tuple[Graph, list[Tensor]]:
    """``x -> a -> b -> c``, none in place, b pinned by the tests to another backend."""
    x = Tensor("f32", (64,), name="x", flags=TensorFlag.INPUT)
    nodes = [x]
    for name in "abc":
        nodes.append(Tensor("f32", (64,), name=name, op=Op.CONT, src=[nodes[-1]]))
    graph = Graph()
    graph.expand(nodes[-1])
    return graph, nodes[1:]


def _decided() -> tuple[Scheduler, Graph, list[Tensor]]:
    sched = _scheduler()
    graph, nodes = _chain()
    for node, b in zip(nodes, (1, 0, 1), strict=True):
        sched.set_tensor_backend(node, sched.backends[b])
    sched.alloc_graph(graph)
    return sched, graph, nodes


def test_right_decisions_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable set, splitting and allocating a good graph raises nothing and calls each check."""
    monkeypatch.setenv("PYGGML_CHECK", "1")
    called: list[str] = []
    for check in (check_assignment, check_splits, check_allocation):

        def noted(*args: object, check: Callable[..., None] = check) -> None:
            called.append(check.__name__)
            check(*args)

        monkeypatch.setattr(scheduler if check is check_allocation else passes, check.__name__, noted)
    _decided()
    assert called == ["check_assignment", "check_splits", "check_allocation"]


def test_without_the_variable_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PYGGML_CHECK no check runs."""
    monkeypatch.delenv("PYGGML_CHECK", raising=False)
    monkeypatch.setattr(passes, "check_assignment", lambda *_: pytest.fail("checked"))
    _decided()


def test_a_node_without_backend_is_noticed() -> None:
    """A node that no pass assigned is an error that names it."""
    sched, _, nodes = _decided()
    plan = sched.plan
    del plan.assignment.ids[nodes[0]]
    with pytest.raises(SchedError, match="CONT 'a' has no backend"):
        check_assignment(plan)


def test_a_node_where_it_cannot_run_is_noticed() -> None:
    """A node on a backend that does not support its op is an error with its cause; a pin of a strict scheduler is not."""
    sched = _scheduler(strict=True, ops=OpSupport(deny=frozenset({Op.CONT})))
    graph, nodes = _chain()
    sched.set_tensor_backend(nodes[1], sched.backends[0])
    sched.alloc_graph(graph)
    check_assignment(sched.plan)
    sched.assignment.set(nodes[0], 0, Cause.EXPANDED)
    with pytest.raises(SchedError, match="'a' is on GPU, which cannot run it") as caught:
        check_assignment(sched.plan)
    assert caught.value.causes == ("2.sup",)


def test_a_missing_input_is_noticed() -> None:
    """A split that reads what no split copied to its backend is an error that names reader and source."""
    sched, _, nodes = _decided()
    plan = sched.plan
    check_splits(plan)
    without = replace(plan, splits=[s._replace(inputs=()) if s.backend_id == 0 else s for s in plan.splits])
    with pytest.raises(SchedError, match="'b' in split 1 reads 'GPU#a#0', which GPU cannot reach"):
        check_splits(without)
    nodes[1].src[0] = nodes[0]
    with pytest.raises(SchedError, match="'b' in split 1 reads 'a', which GPU cannot reach"):
        check_splits(without)


def test_a_gap_between_splits_is_noticed() -> None:
    """Splits that leave nodes out are an error."""
    sched, _, _ = _decided()
    *splits, last = sched.plan.splits
    short = replace(sched.plan, splits=[*splits, last._replace(i_end=last.i_end - 1)])
    with pytest.raises(SchedError, match="the splits end before node 2 of 3"):
        check_splits(short)


def test_a_wrong_reordering_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that puts a node before its source is named."""
    monkeypatch.setenv("PYGGML_CHECK", "1")
    sched = _scheduler(optimize=Optimize(order=("b", "a"), keep=()))
    graph, nodes = _chain()
    for node in nodes:
        sched.set_tensor_backend(node, sched.backends[0])
    with pytest.raises(SchedError, match="GPU's graph_optimize put 'b' before its source 'a'"):
        sched.alloc_graph(graph)


def test_shared_memory_is_noticed() -> None:
    """Two tensors that are needed at the same time and share a byte are an error that names both."""
    sched, _, nodes = _decided()
    check_allocation(sched.sched_graph, sched.galloc)
    a, b, c = nodes
    x = a.src[0]
    assert x is not None
    assert x.data is not None
    a.data = x.data + 32
    with pytest.raises(SchedError, match=r"'a' \(bytes 32..287\) overwrites 'x' \(bytes 0..255\)"):
        check_allocation(sched.sched_graph, sched.galloc)
    assert b.data is not None
    assert c.data is not None
    c.data = None
    with pytest.raises(SchedError, match="'c' has no memory"):
        check_allocation(sched.sched_graph, sched.galloc)


def test_memory_outside_a_buffer_is_noticed() -> None:
    """A tensor that reaches past its buffer's end is an error."""
    sched, _, nodes = _decided()
    buffer = nodes[0].buffer
    assert buffer is not None
    nodes[0].data = buffer.base + buffer.size - 4
    with pytest.raises(SchedError, match="'a' lies outside its buffer"):
        check_allocation(sched.sched_graph, sched.galloc)
