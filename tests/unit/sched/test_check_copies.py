"""`PYGGML_CHECK`: copies that lack what is read of them, or hold other bytes than their source, are named before they do harm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backends.mock import (
    BackendAbilities,
    BufferTypeAbilities,
    MockBufferType,
    MockDevice,
    MockMemory,
    OffloadWish,
)
from pyggml.backends.sim import SimBackend
from pyggml.dialect import Repairs
from pyggml.graph import GraphView
from pyggml.sched import observed, plan
from pyggml.sched.ranges import Ranges

D, F, E, N_TOKEN = 32, 16, 8, 40
NAME = "blk.3.ffn_up_exps.weight"


@pytest.fixture(autouse=True)
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every scheduler of these tests check."""
    monkeypatch.setenv("PYGGML_CHECK", "1")


class _World:
    """A device, the CPU, one expert weight on the host, and a graph that uses it."""

    def __init__(self, gpu: ggml.Backend | None = None, cpu: ggml.Backend | None = None, **options: object) -> None:
        self.gpu = ggml.Sim(threads=1) if gpu is None else gpu
        self.cpu = ggml.CPU(threads=1) if cpu is None else cpu
        self.sched = ggml.Scheduler([self.gpu, self.cpu], **options)  # type: ignore[arg-type]
        self.graph = ggml.Graph()
        self.values: dict[ggml.Tensor, object] = {}
        self.pins: list[tuple[ggml.Tensor, ggml.Backend]] = []
        self.weights = ggml.Context()
        self.w = self.weights.new_tensor("f32", (D, F, E), name=NAME)
        self.weights.alloc(self.cpu, usage="weights")
        if not isinstance(self.cpu.device, MockDevice):
            self.w.set_array(np.random.default_rng(0).standard_normal((E, F, D)))

    def input(self, type: str, ne: Iterable[int], name: str, values: object) -> ggml.Tensor:
        tensor = self.graph.input(type, tuple(ne), name=name)
        self.values[tensor] = values
        return tensor

    def ids(self, experts: list[int], name: str = "ids") -> ggml.Tensor:
        return self.input("i32", (2, N_TOKEN), name, np.resize(experts, (N_TOKEN, 2)).astype("i4"))

    def x(self) -> ggml.Tensor:
        return self.input("f32", (D, 1, N_TOKEN), "x", np.ones((N_TOKEN, 1, D), "f4"))

    def run(self, *outputs: ggml.Tensor) -> None:
        for tensor in outputs:
            tensor.set_output()
        self.graph.expand(*outputs)
        self.sched.reset()
        for tensor, backend in self.pins:
            self.sched.set_tensor_backend(tensor, backend)
        self.sched.alloc_graph(self.graph)
        for tensor, values in self.values.items():
            if tensor.buffer is not None:
                tensor.set_array(values)
        self.sched.compute(self.graph)


def _one_user(world: _World, experts: list[int]) -> list[ggml.Tensor]:
    with world.graph:
        return [ggml.mul_mat_id(world.w, world.x(), world.ids(experts)).named("y")]


def _two_users(world: _World) -> list[ggml.Tensor]:
    with world.graph:
        x = world.x()
        first = ggml.mul_mat_id(world.w, x, world.ids([0, 1], "low")).named("first")
        return [first, ggml.mul_mat_id(world.w, x, world.ids([5, 7], "high")).named("second")]


def _rewritten_ids(world: _World) -> list[ggml.Tensor]:
    state = ggml.Context()
    kept = state.new_tensor("i32", (2, N_TOKEN), name="kept")
    state.alloc(world.gpu)
    kept.set_array(np.resize([0, 1], (N_TOKEN, 2)).astype("i4"))
    other = world.weights.new_tensor("f32", (D, F, E), name="blk.4.ffn_up_exps.weight")
    world.weights.alloc(world.cpu, usage="weights")
    other.set_array(np.ones((E, F, D)))
    with world.graph:
        x = world.x()
        first = ggml.mul_mat_id(world.w, x, kept).named("first")
        world.graph.expand(first, ggml.cpy(world.ids([2, 3], "new"), kept).named("write"))
        return [first, ggml.mul_mat_id(other, x, kept).named("second")]


def _rewritten_source(world: _World) -> list[ggml.Tensor]:
    state = ggml.Context()
    kept = state.new_tensor("f32", (D, 4), name="kept")
    state.alloc(world.gpu)
    kept.set_array(np.ones((4, D)))
    with world.graph:
        before = ggml.scale(kept, 2.0).named("before")
        new = world.input("f32", (D, 4), "new", np.full((4, D), 5.0))
        world.graph.expand(before, ggml.cpy(new, kept).named("write"))
        after = ggml.scale(kept, 2.0).named("after")
    world.pins = [(before, world.cpu), (after, world.cpu)]
    return [before, after]


# -- right copies ------------------------------------------------------------


@pytest.mark.parametrize("level", ["1", "2"])
@pytest.mark.parametrize("build", [_two_users, _rewritten_ids, lambda world: _one_user(world, [1, 5])])
@pytest.mark.parametrize("make", [ggml.UsedExpertCopier, ggml.FullCopier])
def test_right_copies_pass_unnoticed(
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    build: Callable[[_World], list[ggml.Tensor]],
    make: Callable[[], object],
) -> None:
    """Copiers that do right pass, and the device has the traffic, and the results, that it has without the check."""
    seen = []
    for value in ("0", level):
        monkeypatch.setenv("PYGGML_CHECK", value)
        world = _World(policy=make())
        outputs = build(world)
        world.run(*outputs)
        device = world.gpu.device
        assert isinstance(device, ggml.Sim().device.__class__)
        seen.append((str(device.traffic), str(world.sched.stats), [y.numpy().tobytes() for y in outputs]))
    assert seen[0] == seen[1]


def test_nothing_is_followed_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PYGGML_CHECK no copy is followed."""
    monkeypatch.delenv("PYGGML_CHECK")
    monkeypatch.setattr(observed, "CopyCheck", lambda *_: pytest.fail("followed"))
    world = _World()
    world.run(*_two_users(world))


def test_a_copy_is_made_again_for_later_users() -> None:
    """A tensor that was copied, then written where it lies, is copied again for who reads it after; not if strict."""
    for strict, expected in ((False, 10.0), (True, 2.0)):
        world = _World(strict=strict)
        before, after = _rewritten_source(world)
        world.run(before, after)
        assert (before.numpy()[0, 0], after.numpy()[0, 0]) == (2.0, expected)


# -- copiers that do wrong ---------------------------------------------------


class _Drops(ggml.UsedExpertCopier):
    """Forgets an expert."""

    def copy(self, transfer: ggml.Transfer) -> bool:
        if transfer.kind != "experts":
            return False
        transfer.send_experts(transfer.ids() - {5})
        return True


class _WrongRange(ggml.UsedExpertCopier):
    """Sends the expert before the one that it says it sends."""

    def copy(self, transfer: ggml.Transfer) -> bool:
        weight = transfer.source
        assert weight.data is not None
        weight.data -= weight.nb[2]
        try:
            return super().copy(transfer)
        finally:
            weight.data += weight.nb[2]


class _NoPadding(ggml.FullCopier):
    """Sends the used experts, and not a byte more."""

    def copy(self, transfer: ggml.Transfer) -> bool:
        if transfer.source.name != NAME:
            return False
        for e in (1, 5):
            transfer.send(e * transfer.expert_bytes, transfer.expert_bytes)
        return True


class _SaysOnly(ggml.FullCopier):
    """Says that it copied, and did not."""

    def copy(self, transfer: ggml.Transfer) -> bool:
        transfer.report_sent(0, transfer.source.nbytes, 0.0)
        return True


class _ForgetsAll(ggml.FullCopier):
    """Says done, and did nothing."""

    def copy(self, transfer: ggml.Transfer) -> bool:
        return True


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (_Drops(), "lacks expert 5"),
        (_WrongRange(), "is not as the source in experts 1, 5"),
        (_NoPadding(), "lacks the padding after experts 1, 5"),
        (_SaysOnly(), "is not as the source in experts 1, 5"),
        (_ForgetsAll(), "lacks experts 1, 5"),
    ],
)
def test_wrong_copies_are_named(policy: ggml.UsedExpertCopier, text: str) -> None:
    """The error says which node in which split and where reads which experts, of which layer, and what is wrong with them."""
    world = _World(policy=policy)
    outputs = _one_user(world, [1, 5])
    with pytest.raises(ggml.errors.SchedError) as caught:
        world.run(*outputs)
    message = str(caught.value)
    assert f"MUL_MAT_ID 'y' in split 0 on SIM0 reads '{NAME}' (layer 3) by 'SIM0#ids#0', but its copy {text}" in message
    assert type(policy).__name__ in message
    assert caught.value.causes == ("1.off",)


def test_the_scheduler_is_usable_after_a_wrong_copy() -> None:
    """The next graph computes with the same scheduler, once its policy does right."""
    world = _World(policy=_Drops())
    with pytest.raises(ggml.errors.SchedError, match="lacks expert 5"):
        world.run(*_one_user(world, [1, 5]))
    world.sched.policy = ggml.UsedExpertCopier()
    world.graph = ggml.Graph()
    (y,) = _one_user(world, [1, 5])
    world.run(y)
    assert np.isfinite(y.numpy()).all()


def test_a_forgotten_later_user_is_named() -> None:
    """A second user whose experts were not added is named with the experts that its copy lacks."""
    world = _World(policy=ggml.UsedExpertCopier(replace(Repairs(), shared_experts=False)))
    text = r"MUL_MAT_ID 'second' in split \d on SIM0 .* by 'SIM0#high#0', but its copy lacks experts 5, 7"
    with pytest.raises(ggml.errors.SchedError, match=text):
        world.run(*_two_users(world))


def test_a_forgotten_dense_user_is_named() -> None:
    """A node that reads the weight whole after MUL_MAT_ID had a part copied is named with the bytes that lack."""
    world = _World(policy=ggml.UsedExpertCopier(replace(Repairs(), shared_experts=False)))
    with world.graph:
        first = ggml.mul_mat_id(world.w, world.x(), world.ids([0, 1]))
        dense = world.input("f32", (D, N_TOKEN, E), "dense", np.ones((E, N_TOKEN, D)))
        outputs = [first, ggml.mul_mat(world.w, dense).named("whole")]
    lacking = 2 * D * F * 4 + 512
    with pytest.raises(
        ggml.errors.SchedError, match=f"MUL_MAT 'whole' .* lacks bytes {lacking:,}..{E * D * F * 4 - 1:,}"
    ):
        world.run(*outputs)


def test_ids_that_were_rewritten_are_looked_at_anew() -> None:
    """A policy that goes by ids as they were before a node rewrote them is named."""
    world = _World(policy=ggml.UsedExpertCopier(replace(Repairs(), stale_ids=False)))
    with pytest.raises(
        ggml.errors.SchedError, match=r"'second' .* \(layer 4\) by 'kept', but its copy lacks experts 2, 3"
    ):
        world.run(*_rewritten_ids(world))


def test_an_old_copy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy whose source was written since, and that was not made again, is named with who wrote."""
    monkeypatch.setattr(plan, "_overwritten_sources", lambda *_: {})
    world = _World()
    text = "SCALE 'after' in split 2 on CPU reads 'kept', but its copy is older than what 'write' wrote in split 1"
    with pytest.raises(ggml.errors.SchedError, match=text):
        world.run(*_rewritten_source(world))


def test_upstreams_mistakes_are_replayed_if_strict() -> None:
    """A strict scheduler, which computes the second user with what was never copied, is not checked."""
    world = _World(strict=True)
    outputs = _two_users(world)
    world.run(*outputs)
    assert np.isnan(outputs[1].numpy()).any()


# -- devices whose bytes cannot be seen --------------------------------------


def _mocks() -> tuple[ggml.Backend, ggml.Backend]:
    memory = MockMemory()
    bufts = {n: MockBufferType(BufferTypeAbilities(n, is_host=n == "CPU"), memory) for n in ("GPU", "CPU")}
    kinds = {"GPU": ggml.DeviceType.GPU, "CPU": ggml.DeviceType.CPU}
    made = [
        MockDevice(
            BackendAbilities(n, kinds[n], n, frozenset({n}), offload=OffloadWish(1) if n == "GPU" else None), bufts
        ).backend()
        for n in bufts
    ]
    return made[0], made[1]


def test_mocks_are_checked_by_their_ids() -> None:
    """Mock memory has no weights, but ids: what must be covered is known."""
    gpu, cpu = _mocks()
    world = _World(gpu, cpu, policy=_Drops())
    with pytest.raises(ggml.errors.SchedError, match=r"on GPU .* lacks expert 5"):
        world.run(*_one_user(world, [1, 5]))


@pytest.mark.parametrize(("policy", "is_noticed"), [(_Drops(), False), (_ForgetsAll(), True)])
def test_late_devices_are_not_looked_into(policy: ggml.UsedExpertCopier, is_noticed: bool) -> None:
    """In a device that works late ids are unknown, and only what is read whole must be covered."""
    device = ggml.Sim(seed=1, threads=1)
    world = _World(device, policy=policy)
    w = world.weights.new_tensor("f32", (D, D), name="dense.weight")
    world.weights.alloc(world.cpu, usage="weights")
    w.set_array(np.ones((D, D)))
    with world.graph:
        x = ggml.mul_mat(w, world.x())
        y = ggml.mul_mat_id(world.w, x, world.ids([1, 5]))
    world.pins = [(x, device)]
    if not is_noticed:
        world.run(y)
        return
    with pytest.raises(ggml.errors.SchedError, match=r"reads 'dense.weight', but its copy lacks bytes 0\.\."):
        world.run(y)


# -- results -----------------------------------------------------------------


class _ReadsAnother(SimBackend):
    """A device with a wrong kernel: a product with experts reads expert 0, whatever the ids are."""

    def graph_compute(self, graph: GraphView) -> None:
        super().graph_compute(graph)
        for node in graph.nodes:
            if node.op is ggml.Op.MUL_MAT_ID:
                weight = node.src[0]
                assert weight is not None
                assert weight.storage is not None
                assert node.storage is not None
                one, first = node.storage.peek(node, 0, 4), weight.storage.peek(weight, 0, 4)
                assert one is not None
                assert first is not None
                one[:] = first


def test_results_that_rest_on_what_was_not_copied_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """At level 2 a kernel that reads more than the used experts is found, as whole copies give another result; not at level 1."""
    for level in ("1", "2"):
        monkeypatch.setenv("PYGGML_CHECK", level)
        device = ggml.Sim(threads=1).device
        world = _World(_ReadsAnother(device, threads=1))
        outputs = _one_user(world, [1, 5])
        if level == "1":
            world.run(*outputs)
            continue
        with pytest.raises(
            ggml.errors.SchedError, match=r"\(layer 3\) .* is partial, and if it were whole 'y' would be another"
        ):
            world.run(*outputs)


def test_ranges_know_their_holes() -> None:
    """Ranges that touch are one; the first byte that lacks is found."""
    ranges = Ranges()
    assert ranges.first_hole(0, 1) == 0
    for start, end in ((10, 20), (30, 40), (20, 25), (0, 5), (4, 10)):
        ranges.add(start, end)
    assert (ranges.starts, ranges.ends) == ([0, 30], [25, 40])
    assert ranges.first_hole(0, 25) is None
    assert ranges.first_hole(3, 26) == 25
    assert ranges.first_hole(26, 27) == 26
    assert ranges.first_hole(40, 40) is None


def test_graph_inputs_with_pipeline_copies_are_followed() -> None:
    """With pipeline copies each graph's own copies are checked, in turn."""
    world = _World(parallel=True, policy=_Drops())
    outputs = _one_user(world, [1, 5])
    for _ in range(2):
        with pytest.raises(ggml.errors.SchedError, match="lacks expert 5"):
            world.run(*outputs)
    assert world.sched._checked is not None
