"""Five copy policies, by public names alone: right on devices that work late, without a hazard, and obeyed in runs and plans."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import pyggml as ggml
from pyggml.record import CopyRecord, Recording, WaitRecord
from pyggml.sched.compute import SplitRun

# -- the policies ------------------------------------------------------------


class AlwaysWhole(ggml.CopyPolicy):
    """Copies every input whole."""

    def copy(self, transfer):
        """Make a transfer."""
        return False


class OneCallIfSmall(ggml.UsedExpertCopier):
    """Copies small weights in one call, of large ones the used experts."""

    def copy(self, transfer):
        """Make a transfer."""
        if transfer.source.nbytes < 32 << 10:
            return False
        return super().copy(transfer)


class ExpertCache(ggml.CopyPolicy):
    """Keeps the experts of each weight that were used last in device memory."""

    def __init__(self, n_slots: int = 3) -> None:
        self.n_slots = n_slots
        self.slots: dict[str, OrderedDict[int, int]] = {}  # by weight: expert -> slot, the oldest use first

    def reserve(self, plan):
        """Take memory or a queue."""
        self.memory = {
            t.source.name: plan.memory(t.backend, self.n_slots * (t.expert_bytes + 512), f"cache of {t.source.name}")
            for t in plan.expert_transfers()
        }

    def copy(self, transfer):
        """Make a transfer."""
        if transfer.kind != "experts":
            return False
        memory = self.memory[transfer.source.name]
        slots = self.slots.setdefault(transfer.source.name, OrderedDict())
        for expert in sorted(transfer.ids(), key=lambda e: e not in slots):  # hits first: a miss may evict them
            offset, size = transfer.expert_range(expert)
            hit = slots.pop(expert, None)
            slot = hit if hit is not None else len(slots) if len(slots) < self.n_slots else slots.popitem(last=False)[1]
            slots[expert] = slot
            at = slot * (transfer.expert_bytes + 512)
            if hit is None:
                transfer.send(offset, size, into=memory, at=at)
            transfer.send_from(memory, at, offset, size)
        return True


class SendAhead(ggml.CopyPolicy):
    """While a layer computes, sends the experts that it used of the next layer into memory of its own."""

    def reserve(self, plan):
        """Take memory or a queue."""
        experts = plan.expert_transfers()
        self.next = {a.split: b for a, b in pairwise(experts)}
        self.memory = {t: plan.memory(t.backend, t.source.nbytes, f"ahead {t.source.name}") for t in experts}
        self.queue = plan.queue(experts[0].backend)
        self.ahead: dict[ggml.Transfer, set[int]] = {}

    def copy(self, transfer):
        """Make a transfer."""
        if transfer.kind != "experts":
            return False
        self.used = transfer.ids()
        there = self.ahead.pop(transfer, set())
        transfer.send_experts(self.used - there)
        for expert in self.used & there:
            offset, size = transfer.expert_range(expert)
            transfer.send_from(self.memory[transfer], offset, offset, size)
        return True

    def after_split(self, i_split):
        """Send ahead."""
        following = self.next.get(i_split)
        if following is not None:
            self.ahead[following] = set(self.used)
            for expert in self.used:
                offset, size = following.expert_range(expert)
                following.send(offset, size, into=self.memory[following], at=offset, queue=self.queue)


class SecondQueue(ggml.CopyPolicy):
    """Sends used experts by a second queue of the device."""

    def reserve(self, plan):
        """Take memory or a queue."""
        self.queues = {backend.name: plan.queue(backend) for backend in plan.backends[:-1]}

    def copy(self, transfer):
        """Make a transfer."""
        if transfer.kind != "experts":
            return False
        transfer.send_experts(transfer.ids(), queue=self.queues[transfer.backend.name])
        return True


POLICIES: list[Callable[[], ggml.CopyPolicy]] = [AlwaysWhole, OneCallIfSmall, ExpertCache, SendAhead, SecondQueue]
N, N_EXPERT, N_TOKEN, N_LAYER = 24, 8, 3, 4

# -- a model of layers with experts ------------------------------------------


class World:
    """Layers of experts in host memory, over a simulated device and the CPU."""

    def __init__(self, policy: Any, *, seed: int | None = None, **options: Any) -> None:
        rng = np.random.default_rng(5)
        self.gpu, self.cpu = ggml.Sim("rtx4090-pcie4", threads=1, seed=seed), ggml.CPU(threads=1)
        self.recording = Recording()
        self.sched = ggml.Scheduler(
            [self.gpu, self.cpu], policy=policy, recorder=self.recording, debug=0,
            offload_rule=lambda _, op: op.op is ggml.Op.MUL_MAT_ID, **options,
        )  # fmt: skip
        self.weights = ggml.Context()
        rows = [N, N, 4 * N, N]  # the third is larger
        ups = [
            self.weights.new_tensor("f32", (N, rows[i], N_EXPERT), name=f"blk.{i}.ffn_up_exps.weight")
            for i in range(N_LAYER)
        ]
        self.weights.alloc(self.cpu, usage="weights")
        for up in ups:
            up.set_array(rng.standard_normal(up.shape).astype("f4") * 0.3)
        self.graph = ggml.Graph()
        with self.graph:
            x = self.graph.input("f32", (N, 1, N_TOKEN), name="x")
            ids = self.graph.input("i32", (2, N_TOKEN), name="ids")
            y = x
            for i, up in enumerate(ups):
                y = ggml.mul_mat_id(up, y, ids)
                if i == 2:
                    y = ggml.cont(ggml.view_3d(y, N, 2, N_TOKEN, y.nb[1], y.nb[2], 0))
            self.y = y.named("y").set_output()
        self.graph.expand(self.y)

    def run(self, n: int = 6) -> list[Any]:
        """Return the results of some batches, each of other experts."""
        found = []
        rng = np.random.default_rng(7)
        self.sched.alloc_graph(self.graph)
        for _ in range(n):
            self.graph["x"].set_array(rng.standard_normal((N_TOKEN, 1, N)))
            self.graph["ids"].set_array(rng.integers(0, N_EXPERT, (N_TOKEN, 2)).astype("i4"))
            self.sched.compute(self.graph)
            found.append(self.y.numpy())
        return found


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify copies, and results against those of whole copies."""
    monkeypatch.setenv("PYGGML_CHECK", "2")


@pytest.mark.parametrize("make", POLICIES)
def test_a_policy_gives_what_whole_copies_give(make):
    """Bit for bit, checked copy by copy; late devices in any order too, and there is no hazard to name."""
    expected = World(AlwaysWhole()).run()
    np.testing.assert_array_equal(World(make()).run(), expected)
    for seed in range(20):
        world = World(make(), seed=seed)
        np.testing.assert_array_equal(world.run(), expected)
        assert not world.gpu.device.hazards
        world.sched.close()


@pytest.mark.parametrize("parallel", [False, True])
def test_the_copies_are_those_of_the_policy(parallel):
    """Which weights go whole, what comes from the device's own memory, and what was sent ahead shows in the records."""
    whole, small, cache, ahead = (World(make(), parallel=parallel) for make in POLICIES[:4])
    for world in (whole, small, cache, ahead):
        world.run(3)

    def reasons(world: World, layer: int) -> set[str]:
        copies = [r for r in world.recording.records if isinstance(r, CopyRecord)]
        return {r.reason for r in copies if r.tensor == f"blk.{layer}.ffn_up_exps.weight"}

    assert reasons(whole, 0) == reasons(whole, 2) == {"weight"}
    assert (reasons(small, 0), reasons(small, 2)) == ({"weight"}, {"experts"})
    assert cache.sched.stats.bytes_in_device > 0
    assert cache.sched.stats.bytes_copied < small.sched.stats.bytes_copied
    assert cache.sched.stats.bytes_full == whole.sched.stats.bytes_full
    assert any(isinstance(r, WaitRecord) and r.what == "event_wait" for r in ahead.recording.records)


class OnePlaceAhead(ggml.CopyPolicy):
    """Sends the next layer's weight ahead, each into the same memory."""

    def reserve(self, plan):
        """Take memory and a queue."""
        experts = plan.expert_transfers()
        self.next = {a.split: b for a, b in pairwise(experts)}
        self.memory = plan.memory(experts[0].backend, max(t.source.nbytes for t in experts), "next")
        self.queue = plan.queue(experts[0].backend)
        self.first = experts[0]

    def copy(self, transfer):
        """Make a transfer."""
        if transfer.kind != "experts" or transfer is self.first:
            return False
        transfer.send_from(self.memory)
        return True

    def after_split(self, i_split):
        """Send ahead."""
        if i_split in self.next:
            self.next[i_split].send(into=self.memory, queue=self.queue)


@pytest.mark.parametrize(
    ("place", "make"),
    [
        ("join", SecondQueue),
        ("own_written", SendAhead),
        ("own_written", OnePlaceAhead),
        ("own_read", OnePlaceAhead),
    ],
)
def test_a_wait_of_a_queue_taken_out_is_named(place, make):
    """Without one of the waits between streams, the memory and the missing wait are named."""

    class Without(SplitRun):
        __slots__ = ()

        def mark_wait(self, backend_id, queue, mark, at):
            if at != place:
                super().mark_wait(backend_id, queue, mark, at)

    world = World(make(), seed=0)
    world.run()
    assert not world.gpu.device.hazards
    world.sched.reset()
    world.sched.run_type = Without
    world.run()
    hazards = world.gpu.device.hazards
    assert hazards
    assert all("does not wait for SIM0" in h.missing for h in hazards)


def test_sending_into_a_copy_before_its_turn_is_refused():
    """The allocator gives the memory of a copy to earlier tensors of the graph, so a policy cannot fill it ahead of time."""

    class Racing(ggml.UsedExpertCopier):
        def reserve(self, plan):
            self.last = plan.expert_transfers()[-1]

        def before_split(self, i_split):
            if i_split == 0:
                self.last.send()

    with pytest.raises(ggml.errors.SchedError, match="it is not offered now") as caught:
        World(Racing()).run(1)
    assert "send ahead with `into=`" in str(caught.value)


def test_memory_of_a_policy_belongs_to_the_scheduler():
    """It is the same for a name from graph to graph, is recorded as it is taken and given back, and goes with the scheduler."""
    world = World(ExpertCache())
    world.run(1)
    held = world.sched.resources.sizes()
    n_bytes = sum(held.values())
    assert n_bytes >= 3 * N_LAYER * (4 * N * N + 512)
    world.sched.reset()
    world.run(1)
    assert world.sched.resources.sizes() == held
    taken = [r for r in world.recording.records if type(r).__name__ == "AllocRecord" and r.purpose == "policy"]
    assert max(r.size_bytes for r in taken) == n_bytes
    world.sched.close()
    assert not world.sched.resources.sizes()
    last = [r for r in world.recording.records if type(r).__name__ == "AllocRecord" and r.purpose == "policy"][-1]
    assert last.size_bytes == 0


def test_observers_are_told_only_what_they_override():
    """Each method of an observer gets its kind of record; objects with `record` get all."""

    class Copies(ggml.Observer):
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def on_copy(self, record: CopyRecord) -> None:
            self.sizes.append(record.size_bytes)

    own, every = Copies(), Recording()
    world = World("used", observers=[own, every])
    world.run(1)
    assert own.sizes == [r.size_bytes for r in every.records if isinstance(r, CopyRecord)]
    assert every.records == world.recording.records
    with pytest.raises(TypeError, match="is not an observer"):
        World("used", observers=[object()])


class Mistaken(ggml.CopyPolicy):
    """Makes one mistake with each weight."""

    def __init__(self, mistake: Callable[[Any], Any]) -> None:
        self.mistake = mistake

    def copy(self, transfer):
        """Make a transfer."""
        return self.mistake(transfer) if transfer.kind == "experts" else False


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda t: t.send(), "returned nothing .*return True after sending"),
        (lambda t: t.send_experts([0, 99]), "there is no expert 99; they are 0 .. "),
        (lambda t: t.send_experts([-1]), "there is no expert -1"),
        (lambda t: t.send(*t.expert_range(1000)), "there is no expert 1000"),
        (lambda t: t.send(0, t.source.nbytes + 64), "bytes, not .* from byte 0"),
        (lambda t: t.send(0, t.source.nbytes / 2), "no integer"),
    ],
)
def test_mistakes_of_a_policy_are_named(mistake: Callable[[Any], Any], says: str) -> None:
    """An error of our tree says what the policy did; with another policy the scheduler goes on."""
    world = World(Mistaken(mistake))
    with pytest.raises(ggml.errors.SchedError, match=says):
        world.run(1)
    world.sched.reset()
    world.sched.policy = AlwaysWhole()
    np.testing.assert_array_equal(world.run(2), World(AlwaysWhole()).run(2))


def test_numpys_integers_are_numbers_of_experts() -> None:
    """Ids of a numpy array can be sent as they are."""
    world = World(Mistaken(lambda t: t.send_experts(np.unique(list(t.ids()))) or True))
    np.testing.assert_array_equal(world.run(2), World(AlwaysWhole()).run(2))


@pytest.mark.parametrize("given", [lambda transfer: False, ggml.FullCopier, "usd"])
def test_what_is_no_policy_is_refused(given: Any) -> None:
    """A function, a class and a misspelled name are no policies."""
    with pytest.raises(ggml.errors.SchedError, match=r"is not a copy policy .*copy_callback"):
        ggml.Scheduler([ggml.CPU()], policy=given)
