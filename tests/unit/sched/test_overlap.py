"""Used-expert copies on a second queue while the layer's first product is computed: right, selective, and faster."""

from __future__ import annotations

import numpy as np
import pytest
from expert_worlds import Layers, simulated_prompt

from pyggml.record import CopyRecord, Recording
from pyggml.sched.compute import SplitRun
from pyggml.sched.overlap import OverlappedExperts


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify copies, and results against those of whole copies."""
    monkeypatch.setenv("PYGGML_CHECK", "2")


@pytest.mark.parametrize(
    ("n_devices", "options"), [(1, {}), (2, {}), (1, {"parallel": True}), (1, {"host_ids": True})], ids=str
)
def test_results_and_bytes_are_those_of_used_experts(n_devices, options):
    """Bit for bit, at once and late in 20 orders; no hazard; over the link exactly the bytes of the used experts."""
    plain = Layers(n_devices=n_devices, n_token=3, **options)
    expected = plain.run(5)
    for seed in (None, *range(20)):
        world = Layers(n_devices=n_devices, n_token=3, seed=seed, policy=OverlappedExperts(), **options)
        np.testing.assert_array_equal(world.run(5), expected)
        assert not world.hazards
        assert world.sched.stats.bytes_by_reason == plain.sched.stats.bytes_by_reason
        assert world.sched.stats.bytes_in_device > 0
        world.close()


def test_a_wait_taken_out_is_named():
    """Without the wait for what the queue brings, the hazard names both streams."""

    class Without(SplitRun):
        __slots__ = ()

        def mark_wait(self, backend_id, queue, mark, at):
            if at != "own_written":
                super().mark_wait(backend_id, queue, mark, at)

    world = Layers(n_token=3, seed=0, parallel=True, policy=OverlappedExperts())
    world.sched.run_type = Without
    world.run(5)
    assert world.hazards
    assert all("does not wait for SIM0" in h.missing for h in world.hazards)


def test_copies_overlap_with_products_and_a_prompt_takes_less_time():
    """From pinned memory later weights of a layer travel while its first product is computed: the same bytes, sooner. Pageable memory
    blocks the host, so that nothing overlaps.
    """
    times = {use_mmap: _seconds(use_mmap) for use_mmap in (False, True)}
    assert times[False]["overlap"] < 0.9 * times[False]["used"]
    assert times[True]["overlap"] > times[True]["used"]


def _seconds(use_mmap: bool) -> dict[str, float]:  # one flag
    policies = {"used": "used", "overlap": OverlappedExperts()}
    found = {name: simulated_prompt(policy, n_ubatch=2048, use_mmap=use_mmap) for name, policy in policies.items()}
    assert found["overlap"].bytes_copied == found["used"].bytes_copied
    return {name: batch.seconds for name, batch in found.items()}


def test_what_was_sent_ahead_is_not_sent_again():
    """Of each layer the first weight is sent to its copy, the others to memory of the policy."""
    recording = Recording()
    world = Layers(n_token=3, policy=OverlappedExperts(), recorder=recording)
    world.run(1)
    copies = [r for r in recording.records if isinstance(r, CopyRecord) and r.reason == "experts"]
    within = {r.tensor for r in copies if r.src == r.dst}
    assert len(within) == 2 * 4
    assert {r.tensor for r in copies if r.src != r.dst} == {w.name for w in world.weights.tensors}
