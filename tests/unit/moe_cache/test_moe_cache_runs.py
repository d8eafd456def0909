"""The expert cache that runs: results, bytes, waits, errors, over simulated devices with data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expert_worlds import N_EXPERT, N_LAYER, N_USED, SLOT_BYTES, Layers, N, batches

import pyggml as ggml
from pyggml.dialect import DIALECTS
from pyggml.moe_cache import EVICTIONS, Counters, ExpertCache, LlamaCache, MoeCachePolicy, SlotTable
from pyggml.opset import node_work
from pyggml.sched.compute import SplitRun


def _mib(n_slots: int, n_devices: int = 1) -> int:
    return n_devices * SLOT_BYTES * (n_slots + 1)


@pytest.mark.parametrize("eviction", list(EVICTIONS))
@pytest.mark.parametrize(("n_slots", "n_devices", "n_token"), [(2, 1, 1), (9, 1, 1), (7, 2, 1), (32, 1, 1), (8, 1, 5)])
def test_results_are_those_without_a_cache(eviction, n_slots, n_devices, n_token):
    """Bit for bit, with hardly any slot and with all, on one device and on two, of one token and of several."""
    expected = Layers(n_token=n_token, n_devices=n_devices).run()
    world = Layers(LlamaCache(_mib(n_slots, n_devices), eviction), n_devices=n_devices, n_token=n_token)
    np.testing.assert_array_equal(world.run(), expected)
    assert [g.n_slots for g in world.cache.groups] == [min(n_slots, N_LAYER * N_EXPERT)] * n_devices


@pytest.mark.parametrize("eviction", list(EVICTIONS))
@pytest.mark.parametrize("n_devices", [1, 2])
def test_the_device_counts_the_bytes_of_the_cache(eviction, n_devices):
    """What arrived in the banks is what the counters say, and what replaying the ids alone gives; maps go up once a layer."""
    n, n_slots = 30, 9
    world = Layers(LlamaCache(_mib(n_slots, n_devices), eviction), n_devices=n_devices)
    world.run(n)
    arrived = sum(b.storage.traffic.bytes_in for b in {bank.storage: bank for _, bank in world.cache.banks}.values())
    caches = {
        tuple(g.layers): ExpertCache(EVICTIONS[eviction](n_slots, N_EXPERT), [4 * N * N] * 3, n_used=N_USED)
        for g in world.cache.groups
    }
    n_copies = 0
    for chosen, _ in batches(n, 1):
        for layers, cache in caches.items():
            for il in layers:
                _, transfers = cache.update(il, chosen[il].ravel().tolist())
                n_copies += 3 * len(transfers)
    replayed = Counters.sum(c.counters for c in caches.values())
    assert world.cache.counters == replayed
    assert arrived == replayed.uploaded_bytes == world.sched.stats.bytes_by_reason["experts"] > 0
    assert world.cache.counters.hits > 0
    assert world.sched.stats.bytes_by_reason["weight"] == n * N_LAYER * 4 * N_EXPERT
    for layers, cache in caches.items():
        for il in layers:
            assert world.cache._maps[il].numpy().ravel().tolist() == cache.policy.slot_map(il)


def test_large_micro_batches_read_the_cache_and_leave_it_as_it_is():
    """Past 32 tokens experts come out of the slots where they are there; nothing is admitted, and counters tell of it."""
    small = Layers(LlamaCache(_mib(9)))
    small.run(4)
    before = [small.cache._maps[il].numpy().tolist() for il in range(N_LAYER)]
    expected = Layers(n_token=40).run(2)
    other = _LargeOf(small)
    np.testing.assert_array_equal(other.run(2), expected)
    assert [small.cache._maps[il].numpy().tolist() for il in range(N_LAYER)] == before
    counters = small.cache.counters
    assert other.sched.stats.bytes_in_device == counters.copied_bytes > 0
    assert counters.lines()[-1].startswith(f"llama_moe_cache: large batches: {counters.copied} experts copied")


class _LargeOf(Layers):
    """Micro-batches of 40 tokens over the devices and the cache of another world."""

    def __init__(self, other: Layers) -> None:
        self.gpus, self.cpu, self.cache = other.gpus, other.cpu, other.cache
        self.layers, self.homes, self.n_token, self.lookups = other.layers, other.homes, 40, {}
        self.sched = ggml.Scheduler(
            [*self.gpus, self.cpu], policy=MoeCachePolicy(other.cache), debug=0,
            offload_rule=lambda _, op: op.op is ggml.Op.MUL_MAT_ID,
        )  # fmt: skip
        self.graph = ggml.Graph()
        with self.graph:
            x = self.graph.input("f32", (N, 40), name="x")
            self.ids = self.inputs = [self.graph.input("i32", (N_USED, 40), name=f"i-{il}") for il in range(N_LAYER)]
            for il in range(N_LAYER):
                x = self._layer(il, x)
            self.y = x.named("y").set_output()
        self.graph.expand(self.y)


@pytest.mark.parametrize(
    ("n_devices", "options"),
    [
        (1, {}),
        (2, {}),
        (1, {"host_ids": True}),
        (1, {"parallel": True}),
        (2, {"parallel": True}),
        (2, {"parallel": True, "host_ids": True}),
        (1, {"dialect": DIALECTS["0.26"]}),
        (2, {"dialect": DIALECTS["0.26"], "host_ids": True}),
    ],
    ids=lambda v: str(v if isinstance(v, int) else list(v)),
)
def test_late_devices_in_any_order(n_devices, options):
    """20 seeds, pipeline copies and several devices: the same results, and no hazard."""
    expected = Layers(n_devices=n_devices).run(6)
    for seed in range(20):
        world = Layers(LlamaCache(_mib(5, n_devices), "lru"), n_devices=n_devices, seed=seed, **options)
        np.testing.assert_array_equal(world.run(6), expected)
        assert not world.hazards
        world.close()


def test_a_wait_taken_out_is_named():
    """Without the wait for the ids the host writes a slot map that the device still reads, and the text says so."""

    class Without(SplitRun):
        __slots__ = ()

        def read_wait(self, backend_id):
            kept.append(self.ids._words)

    kept: list[Any] = []
    zeros = [np.zeros((1, N_USED), "i4")] * N_LAYER  # as memory is that nobody has read into
    found = []
    for run_type in (SplitRun, Without):
        world = Layers(LlamaCache(_mib(2), "lru"), seed=0, parallel=True)
        world.sched.run_type = run_type
        world.compute(zeros, np.ones((1, N), "f4"))
        found.append([str(h) for h in world.hazards])
    assert found[0] == []
    assert any("the host writes 'moe_cache.slot_map-0', but SIM0 reads" in text for text in found[1]), found[1]
    assert all("the host does not wait for SIM0" in text for text in found[1])


def test_wrong_ids_are_an_error_and_the_cache_goes_on():
    """An id that is no expert is named with layer and token; the next batch is right, with what was there before."""
    world = Layers(LlamaCache(_mib(9), "lru"))
    chosen, x = batches(1, 1)[0]
    bad = [ids.copy() for ids in chosen]
    bad[2][0, 1] = N_EXPERT
    with pytest.raises(ggml.errors.ExpertIdError) as caught:
        world.compute(bad, x)
    assert (caught.value.layer, caught.value.token, caught.value.slot, caught.value.id) == (2, 0, 1, N_EXPERT)
    np.testing.assert_array_equal(world.run(), Layers().run())


def test_a_device_that_fails_leaves_no_wrong_experts(monkeypatch):
    """Uploads of a computing that failed do not count as there: the cache starts anew."""
    world = Layers(LlamaCache(_mib(9), "lru"))
    world.run(2)
    real, calls = type(world.gpus[0]).set_tensor_async, []

    def fail(self, tensor, address, offset, size):
        if tensor.name.startswith("moe_cache.0"):
            calls.append(tensor)
            raise ggml.errors.ComputeError(self.name, "the link is gone")
        real(self, tensor, address, offset, size)

    with monkeypatch.context() as patched:
        patched.setattr(type(world.gpus[0]), "set_tensor_async", fail)
        with pytest.raises(ggml.errors.ComputeError, match="the link is gone"):
            world.run(20)
    assert calls
    np.testing.assert_array_equal(world.run(), Layers().run())


def test_slots_are_not_used_where_they_are_too_few():
    """More experts than slots, or more than 32 tokens: the layer reads its weights."""
    world = Layers(LlamaCache(_mib(3), "lru"))
    slots = world.cache.slots(0, ggml.Tensor("i32", (N_USED, 1)), world.layers[0])
    assert slots is not None
    for n_token in (2, 33):
        assert world.cache.slots(0, ggml.Tensor("i32", (N_USED, n_token)), world.layers[0]) is None
    large = Layers(LlamaCache(_mib(8), "lru"))
    assert large.cache.slots(0, ggml.Tensor("i32", (N_USED, 32)), large.layers[0]) is not None
    assert large.cache.slots(0, ggml.Tensor("i32", (N_USED, 33)), large.layers[0]) is None


def test_ids_made_in_the_split_of_their_lookup_are_refused():
    """Nobody could read them before the experts are needed; upstream aborts."""
    world = Layers(LlamaCache(_mib(9), "lru"))
    own = ggml.Context()
    router, row = own.new_tensor("f32", (N_EXPERT, 1), name="router"), own.new_tensor("f32", (N, 1, 1), name="row")
    own.alloc(world.gpus[0], usage="weights")
    graph = ggml.Graph()
    with graph:
        ids = ggml.cont(ggml.argsort_top_k(router, N_USED))
        found = world.cache.slots(0, ids, world.layers[0])
        assert found is not None
        y = ggml.mul_mat_id(world.cache.bank(world.layers[0][0]), row, found[0])
    graph.expand(y)
    world.sched.set_tensor_backend(found[1], world.gpus[0])
    with pytest.raises(ggml.errors.SchedError, match="chosen in the split that looks up"):
        world.sched.alloc_graph(graph)


def test_a_table_of_ones_own_runs():
    """Any `SlotTable` serves: here one that never keeps anything, all experts passing through."""

    class Nothing(SlotTable):
        n_slots, n_expert, n_transit, most = 0, N_EXPERT, N_EXPERT, N_EXPERT

        def lookup(self, layer, ids):
            from pyggml.moe_cache import Lookup, Upload

            chosen = list(dict.fromkeys(ids))
            uploads = tuple(Upload(e, i) for i, e in enumerate(chosen))
            return Lookup({u.expert: u.slot for u in uploads}, (), tuple(chosen), uploads, ())

        def slot_of(self, layer, expert):
            return None

    class Rule(LlamaCache):
        def table(self, group):
            return Nothing()

    world = Layers(Rule(_mib(2), "lru"))
    np.testing.assert_array_equal(world.run(), Layers().run())
    assert world.cache.counters.hits == 0


def test_a_product_out_of_the_bank_costs_what_one_with_the_weight_does():
    """The same experts are read, so the work is the same."""
    world = Layers(LlamaCache(_mib(N_EXPERT), "lru"))
    weight = world.layers[0][0]
    row, ids = ggml.Tensor("f32", (N, 1, 1)), ggml.Tensor("i32", (N_USED, 1))
    works = [node_work(ggml.mul_mat_id(w, row, ids), lambda _: N_USED) for w in (weight, world.cache.bank(weight))]
    assert works[0] == works[1]
    assert works[0].flops > 0
