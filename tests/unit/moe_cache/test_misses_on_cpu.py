"""Experts that a cache lacks are computed on the CPU while the device computes the others: results, waits, bytes, overlap."""

from __future__ import annotations

import numpy as np
import pytest
from edited_models import write_edited
from expert_worlds import N_EXPERT, SLOT_BYTES, Layers, batches

from pyggml import cli
from pyggml.backend import REGISTRY
from pyggml.dialect import DIALECTS
from pyggml.errors import ComputeError, ExpertIdError, SchedError
from pyggml.lab import Capacity
from pyggml.lab.running import LabRule, RunningPredictor
from pyggml.models.placement import PlacementFlags
from pyggml.moe_cache import EVICTIONS, LlamaCache
from pyggml.planning import Planner, virtual_clock
from pyggml.record import ComputeRecord, CopyRecord, Recording
from pyggml.sched.compute import SplitRun
from pyggml.sched.prefetch import ExpertPrefetch, PrefetchedExperts
from pyggml.session import ContextFlags, Session
from pyggml.simulation import simulate_batch


def _cache(n_slots: int, n_devices: int = 1, eviction: str = "lru") -> LlamaCache:
    return LlamaCache(n_devices * SLOT_BYTES * (n_slots + 1), eviction, "cpu")


@pytest.mark.parametrize("eviction", list(EVICTIONS))
@pytest.mark.parametrize(("n_slots", "n_devices", "n_token"), [(2, 1, 1), (9, 1, 1), (7, 2, 1), (32, 1, 1), (8, 1, 5)])
def test_results_are_those_without_a_cache(eviction, n_slots, n_devices, n_token):
    """Bit for bit, with hardly any slot and with all; only what the cache admits is copied."""
    expected = Layers(n_token=n_token, n_devices=n_devices).run()
    world = Layers(_cache(n_slots, n_devices, eviction), n_devices=n_devices, n_token=n_token)
    np.testing.assert_array_equal(world.run(), expected)
    counters = world.cache.counters
    assert counters.uploaded_bytes == counters.misses * SLOT_BYTES == world.sched.stats.bytes_by_reason["experts"]


@pytest.mark.parametrize(
    ("n_devices", "n_seeds", "options"),
    [
        (1, 20, {}),
        (2, 5, {}),
        (1, 5, {"host_ids": True}),
        (2, 20, {"parallel": True}),
        (1, 5, {"dialect": DIALECTS["0.26"]}),
    ],
    ids=lambda v: str(v if isinstance(v, int) else list(v)),
)
def test_late_devices_in_any_order(n_devices, n_seeds, options):
    """20 seeds, pipeline copies and several devices: the same results, and no hazard."""
    expected = Layers(n_devices=n_devices).run(6)
    for seed in range(n_seeds):
        world = Layers(_cache(5, n_devices), n_devices=n_devices, seed=seed, **options)
        np.testing.assert_array_equal(world.run(6), expected)
        assert not world.hazards
        world.close()


@pytest.mark.parametrize(
    ("method", "place", "text"),
    [
        ("mark_wait", "own_written", "SIM0 reads 'moe_cache.blk."),
        ("synchronize", "fetch", "the host reads host memory for 'CPU#"),
    ],
)
def test_a_wait_taken_out_is_named(method, place, text):
    """Of an expert that is still on its way to its slot, and of rows for the host that are not read yet."""

    def leave_out(self, *arguments):
        return None if place in arguments else getattr(SplitRun, method)(self, *arguments)

    run_type, found = type("Without", (SplitRun,), {"__slots__": (), method: leave_out}), []
    for seed in range(5):
        world = Layers(_cache(8), seed=seed, parallel=True)
        world.sched.run_type = run_type
        for chosen, x in batches(5, 1):
            world.compute(chosen, x, wait=False)
        world.sched.synchronize()
        found += [str(h) for h in world.hazards]
        world.close()
    assert any(text in hazard for hazard in found), found


def _session(model, rule, overrides=("--cpu-moe",), recorder=None):
    return Session.open(
        model, devices="sim:rtx4090-pcie4", placement=PlacementFlags(overrides=overrides), context=ContextFlags(n_ctx=256),
        expert_cache=rule, recorder=recorder,
    )  # fmt: skip


def test_large_micro_batches_read_the_cache(tmp_path):
    """A prompt of 40 tokens takes experts from the slots that small micro-batches filled on the queue: the same logits."""
    model, found = write_edited(tmp_path / "m.gguf", "qwen3moe"), []
    for rule in (None, LlamaCache(1 << 20, "lru", "cpu")):
        with _session(model, rule) as session:
            parts = [session.decode([t]) for t in (3, 1, 4, 3, 1, 4)]
            found.append(np.concatenate([*parts, session.decode(list(range(10, 50)), outputs="all")]))
            assert rule is None or session.expert_cache.counters.copied > 0
    np.testing.assert_array_equal(found[1], found[0])


def test_wrong_ids_are_an_error_and_the_cache_goes_on():
    """An id that is no expert is named; the next batches are right."""
    world = Layers(_cache(9))
    chosen, x = batches(1, 1)[0]
    bad = [ids.copy() for ids in chosen]
    bad[2][0, 1] = N_EXPERT
    with pytest.raises(ExpertIdError):
        world.compute(bad, x)
    np.testing.assert_array_equal(world.run(), Layers().run())


def test_a_device_that_fails_leaves_no_wrong_experts(monkeypatch):
    """Uploads of a compute that failed do not count as there, and rows that were read for it are not used."""
    world = Layers(_cache(9))
    world.run(2)

    def fail(self, graph):
        raise ComputeError(self.name, "the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(type(world.gpus[0]), "graph_compute", fail)
        with pytest.raises(ComputeError, match="is gone"):
            world.run(1)
    np.testing.assert_array_equal(world.run(), Layers().run())


@pytest.mark.parametrize("flag", ["--cpu-moe", r"exps\.weight=CPU"])
def test_biases_are_on_both_sides(flag, tmp_path):
    """Wherever a model's biases of experts are, device and host have them, and no token copies them: the same logits."""
    model, found = write_edited(tmp_path / "m.gguf", "gpt-oss"), []
    for rule in (None, LlamaCache(1 << 18, "lru", "cpu")):
        recording = Recording()
        with _session(model, rule, (flag,), recording) as session:
            found.append(np.concatenate([session.decode([t]) for t in (3, 1, 4, 1, 5)]))
        copied = {r.tensor for r in recording.records if isinstance(r, CopyRecord)}
        assert not any("exps.bias" in name for name in copied)
        assert rule is None or any(name.startswith("moe_cache.slot_map") for name in copied)
    np.testing.assert_array_equal(found[1], found[0])


def _simulated(rule, recorder=None):
    backends = [d.backend() for d in REGISTRY.open_all(["sim:rtx4090-pcie4", "cpu"], data=False)]
    with Planner.open(
        "gpt-oss-20b", devices=backends[:1], cpu=backends[1], clock=virtual_clock(backends), data=False, expert_cache=rule,
        placement=PlacementFlags(cpu_moe=True, use_mmap=False), context=ContextFlags(n_ctx=256), recorder=recorder,
    ) as planner:  # fmt: skip
        return simulate_batch(planner, 12, is_generated=True)


def test_host_device_and_link_work_at_once():
    """The host computes misses while the device computes hits and the queue uploads; it pays if the cache admits few."""
    recording = Recording()
    times = {
        (policy, misses): _simulated(
            LabRule(policy, Capacity(fraction=0.3), misses=misses), recording if misses == "cpu" else None
        ).seconds
        for policy, misses in (("lru+2of8", "cpu"), ("lru+2of8", "copy"))
    }
    alone = _simulated(None).seconds
    assert times["lru+2of8", "cpu"] < 0.8 * min(alone, times["lru+2of8", "copy"])
    spans = {
        name: [r.virtual for r in recording.records if isinstance(r, ComputeRecord) and r.backend == name]
        for name in ("CPU", "SIM0")
    }
    at_once = sum(
        max(0.0, min(a.end_s, b.end_s) - max(a.start_s, b.start_s)) for a in spans["CPU"] for b in spans["SIM0"]
    )
    missed = [s for s in spans["CPU"] if s.seconds > 1e-5]
    assert missed
    assert at_once > 0


def test_what_does_not_fit_together_is_refused(capsys, tmp_path):
    """Guesses of misses that no one awaits, and the option without a cache: an error that says what to choose."""
    guesses = PrefetchedExperts(ExpertPrefetch(RunningPredictor("online")))
    with pytest.raises(SchedError, match="no expert is awaited"):
        Layers(_cache(5), policy=guesses)
    assert cli.run(["splits", "qwen3-30b-a3b", "--cpu-moe", "--moe-cache-misses", "cpu"]) == 2
    assert "needs a cache" in capsys.readouterr().err
