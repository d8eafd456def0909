"""Callbacks, policies and observers that call their own scheduler while it is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as ggml
from pyggml.record import Observer
from pyggml.sched.policies import UsedExpertCopier

N, F, E, T = 32, 16, 8, 40
USED = np.resize([3, 5], (T, 2)).astype("i4")

Hook = Callable[[], None]


def _policy(method: str) -> Callable[[Hook], dict[str, Any]]:
    def options(hook: Hook) -> dict[str, Any]:
        def call(self: UsedExpertCopier, *args: Any) -> Any:
            hook()
            return getattr(UsedExpertCopier, method)(self, *args)

        return {"policy": type("Calling", (UsedExpertCopier,), {method: call})()}

    return options


def _observer(method: str) -> Callable[[Hook], dict[str, Any]]:
    def options(hook: Hook) -> dict[str, Any]:
        return {"observers": [type("Calling", (Observer,), {method: lambda self, *args: hook()})()]}

    return options


def _answering(name: str, answer: bool) -> Callable[[Hook], dict[str, Any]]:
    def options(hook: Hook) -> dict[str, Any]:
        def call(*args: Any) -> bool:
            hook()
            return answer

        return {name: call}

    return options


def _recorder(hook: Hook) -> dict[str, Any]:
    return {"recorder": type("Calling", (), {"record": lambda self, record: hook()})()}


HOOKS: dict[str, Callable[[Hook], dict[str, Any]]] = {
    "eval callback": _answering("eval_callback", True),
    "copy callback": _answering("copy_callback", False),
    "realloc callback": _answering("realloc_callback", True),
    "offload rule": _answering("offload_rule", True),
    "recorder": _recorder,
    **{f"policy.{m}": _policy(m) for m in ("copy", "reserve", "before_split", "after_split")},
    **{
        f"observer.{m}": _observer(m)
        for m in (
            "on_copy", "on_experts", "on_read", "on_launch", "on_wait", "on_callback", "on_assign", "on_split", "on_alloc",
            "on_begin", "on_sent", "before_launch", "after_launch",
        )
    },
}  # fmt: skip

CALLS: dict[str, Callable[[ggml.Scheduler, ggml.Graph], object]] = {
    "reset": lambda s, g: s.reset(),
    "alloc_graph": lambda s, g: s.alloc_graph(g),
    "reserve": lambda s, g: s.reserve(g),
    "reserve_size": lambda s, g: s.reserve_size(g),
    "split_graph": lambda s, g: s.split_graph(g),
    "compute": lambda s, g: s.compute(g),
    "compute_async": lambda s, g: s.compute_async(g),
    "synchronize": lambda s, g: s.synchronize(),
    "set_tensor_backend": lambda s, g: s.set_tensor_backend(g.nodes[0], s.backends[-1]),
    "close": lambda s, g: s.close(),
}


class World:
    """A product with experts in host memory, over a simulated device and the CPU, whose hooks call the scheduler."""

    def __init__(self, hook: str, calls: list[str], *, catches: bool = False) -> None:
        self.errors: list[ggml.errors.SchedError] = []
        self.is_calling, self.catches = True, catches
        self.calls = [CALLS[call] for call in calls]
        gpu, cpu = ggml.Sim(threads=1), ggml.CPU(threads=1)
        options = HOOKS[hook](self.call_back)
        if hook == "observer.on_callback":
            options["eval_callback"] = lambda tensor, ask: True
        self.sched = ggml.Scheduler([gpu, cpu], **options)
        weights = ggml.Context()
        self.experts = weights.new_tensor("f32", (N, F, E), name="blk.0.ffn_up_exps.weight")
        weights.alloc(cpu, usage="weights")
        rng = np.random.default_rng(3)
        self.values = rng.standard_normal((E, F, N)).astype("f4")
        self.experts.set_array(self.values)
        self.x = rng.standard_normal((T, 1, N)).astype("f4")
        self.graph = ggml.Graph()
        with self.graph:
            self.at_x = self.graph.input("f32", (N, 1, T), name="x")
            self.ids = self.graph.input("i32", (2, T), name="ids")
            self.y = ggml.mul_mat_id(self.experts, self.at_x, self.ids).named("y").set_output()
        self.graph.expand(self.y)

    def call_back(self) -> None:
        """Make the calls, once."""
        if not self.is_calling:
            return
        self.is_calling = False  # once; the error itself may be observed
        for call in self.calls:
            try:
                call(self.sched, self.graph)
            except ggml.errors.SchedError as error:
                self.errors.append(error)
                if not self.catches:
                    raise

    def run(self) -> None:
        """Allocate, set the inputs, compute, and verify the product."""
        self.sched.alloc_graph(self.graph)
        self.at_x.set_array(self.x)
        self.ids.set_array(USED)
        self.sched.compute(self.graph)
        want = np.einsum("tkfn,tn->tkf", self.values[USED], self.x[:, 0])
        np.testing.assert_allclose(self.y.numpy(), want, atol=1e-4)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("call", CALLS)
def test_a_hook_may_not_call_its_scheduler(call: str, hook: str) -> None:
    """A call from a hook is an error, which passes through the call that is in progress; the scheduler works afterwards."""
    world = World(hook, [call])
    with pytest.raises(ggml.errors.SchedError, match="called by its own callback, policy or observer"):
        world.run()
    assert len(world.errors) == 1, "the hook was not called"
    world.sched.reset()
    world.run()
    world.sched.close()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_catches_the_error_spoils_nothing(hook: str) -> None:
    """Where a hook tries all calls and goes on, the product is right: a refused call changes nothing."""
    world = World(hook, list(CALLS), catches=True)
    world.run()
    assert len(world.errors) == len(CALLS)


def test_a_hook_may_use_another_scheduler() -> None:
    """A hook may compute a graph of its own with a scheduler of its own."""
    inner, outer = World("eval callback", []), World("observer.on_launch", [])
    outer.calls = [lambda sched, graph: inner.run()]
    outer.run()
    assert not outer.errors


def test_an_observer_may_call_between_two_calls() -> None:
    """An announced micro-batch is recorded while no call is in progress, so an observer may use the scheduler there."""
    world = World("observer.on_copy", ["reset", "reserve"])
    world.sched.observers = [type("Calling", (Observer,), {"on_micro_batch": lambda self, record: world.call_back()})()]
    world.sched.announce(T, 0, 1)
    assert not world.is_calling
    world.run()
    assert not world.errors
