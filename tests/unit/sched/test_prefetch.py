"""Experts of the next layer sent ahead on a guess: results, bytes, what guesses were worth, waits; with a cache and without."""

from __future__ import annotations

import numpy as np
import pytest
from expert_worlds import N_LAYER, SLOT_BYTES, Layers, simulated_prompt

from pyggml.errors import ExpertIdError, GraphError
from pyggml.lab.running import RunningPredictor
from pyggml.moe_cache import LlamaCache
from pyggml.record import CopyRecord, Recording
from pyggml.sched.compute import SplitRun
from pyggml.sched.overlap import OverlappedExperts
from pyggml.sched.prefetch import ExpertPrefetch, PrefetchedExperts

CACHE = LlamaCache(2 * SLOT_BYTES * 7, "lru")


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify copies, and results against those of whole copies."""
    monkeypatch.setenv("PYGGML_CHECK", "2")


def _prefetch(name: str = "online", n_guess: int | None = None) -> PrefetchedExperts:
    return PrefetchedExperts(ExpertPrefetch(RunningPredictor(name), n_guess=n_guess))


@pytest.mark.parametrize("rule", [None, CACHE], ids=["no cache", "cache"])
@pytest.mark.parametrize(
    ("n_devices", "options"), [(1, {}), (2, {}), (1, {"parallel": True}), (1, {"host_ids": True})], ids=str
)
def test_results_are_those_without(rule, n_devices, options):
    """Bit for bit, at once and late in 20 orders; no hazard; over the link go the needed experts and the wasted guesses, no others."""
    n_token, n = (1, 5) if rule else (3, 3)
    recording = Recording()
    plain = Layers(rule, n_devices=n_devices, n_token=n_token, recorder=recording, **options)
    expected, needed = plain.run(n), _sent(recording)
    for seed in (None, *range(20)):
        policy, recording = _prefetch(), Recording()
        world = Layers(
            rule, n_devices=n_devices, n_token=n_token, seed=seed, policy=policy, recorder=recording, **options
        )
        np.testing.assert_array_equal(world.run(n), expected)
        assert not world.hazards
        assert _sent(recording) == needed + policy.prefetch.counters.wasted_bytes
        assert policy.prefetch.counters.right_sent > 0
        world.close()


def _sent(recording: Recording) -> int:
    """Return the bytes of experts that came over the link, without the padding that follows some."""
    copies = [r for r in recording.records if isinstance(r, CopyRecord) and r.reason == "experts" and r.src != r.dst]
    return sum(r.size_bytes - r.size_bytes % (SLOT_BYTES // 3) for r in copies)


@pytest.mark.parametrize("rule", [None, CACHE], ids=["no cache", "cache"])
def test_a_wait_taken_out_is_named(rule):
    """Without the wait for what the queue brings, the hazard names both streams."""

    class Without(SplitRun):
        __slots__ = ()

        def mark_wait(self, backend_id, queue, mark, at):
            if at != "own_written":
                super().mark_wait(backend_id, queue, mark, at)

    found = []
    for seed in range(5):
        world = Layers(rule, n_token=1 if rule else 3, seed=seed, parallel=True, policy=_prefetch())
        world.sched.run_type = Without
        world.run(5)
        found += world.hazards
    assert found
    assert all("does not wait for SIM0" in h.missing for h in found)


def test_the_cache_keeps_what_it_keeps_without():
    """Guesses do not change hits, misses and uploads of the cache: they only come sooner."""
    plain = Layers(CACHE)
    plain.run(20)
    world = Layers(CACHE, policy=_prefetch())
    world.run(20)
    assert world.cache.counters == plain.cache.counters
    assert world.sched.stats.bytes_in_device > 0


def test_an_error_between_guess_and_layer_leaves_no_wrong_experts():
    """Ids that are wrong end a computing; what was guessed before them is not taken for another layer's."""
    for rule in (None, CACHE):
        chosen = [np.array([[1, 2]], "i4") for _ in range(N_LAYER)]
        other = [np.array([[5, 3]], "i4") for _ in range(N_LAYER)]
        x = np.ones((1, 32), "f4")
        plain = Layers(rule)
        plain.compute(other, x)
        world = Layers(rule, policy=_prefetch())
        for _ in range(3):
            world.compute(chosen, x)
        with pytest.raises(ExpertIdError):
            world.compute([*chosen[:2], np.array([[1, 8]], "i4"), chosen[3]], x)
        world.compute(other, x)
        np.testing.assert_array_equal(world.y.numpy(), plain.y.numpy())


@pytest.mark.parametrize(
    ("name", "words"), [("oracle", "that can run"), ("popularity", "learns from other requests"), ("", "that can run")]
)
def test_predictors_that_cannot_run_are_refused(name, words):
    """With what to do."""
    with pytest.raises(GraphError, match=words):
        RunningPredictor(name)


def test_a_prompt_takes_less_time():
    """Experts of the next layer travel while a layer computes, from the second micro-batch on, when there is something to guess from."""
    policies = {"used": "used", "overlap": OverlappedExperts(), "prefetch": _prefetch()}
    found = {name: simulated_prompt(policy, n_ubatch=512, use_mmap=False) for name, policy in policies.items()}
    assert found["prefetch"].seconds < found["overlap"].seconds < found["used"].seconds
    counters = policies["prefetch"].prefetch.counters
    assert counters.n_late is not None
    assert counters.right_sent > 0.8 * counters.sent > 0
    more = found["prefetch"].bytes_by_reason["experts"] - found["used"].bytes_by_reason["experts"]
    assert counters.wasted_bytes <= more < 1.01 * counters.wasted_bytes  # more ranges have more padding
