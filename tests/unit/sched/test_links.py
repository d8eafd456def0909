"""Used experts over two links: results, bytes by link, waits, times, and what cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from edited_models import write_edited
from expert_worlds import N_EXPERT, Layers

import pyggml as ggml
from pyggml import cli
from pyggml.backend import REGISTRY
from pyggml.clock import VirtualClock
from pyggml.cost import CPU_PROFILE, parse_profile
from pyggml.errors import DeviceUnavailableError, SchedError
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.routing import LogNormal
from pyggml.sched.compute import SplitRun
from pyggml.sched.links import TwoLinkExperts
from pyggml.session import Session
from pyggml.simulation import simulate_batch

BRIDGED = "rtx3090-pcie4-nvlink"


class Bridged(Layers):
    """Layers over two devices with a link between them."""

    def __init__(self, **options):
        real = ggml.Sim
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ggml, "Sim", lambda _, **more: real(BRIDGED, **more))
            super().__init__(n_devices=2, **options)


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify copies, and results against those of whole copies."""
    monkeypatch.setenv("PYGGML_CHECK", "2")


@pytest.mark.parametrize(
    ("options", "seeds"), [({}, (None, *range(10))), ({"parallel": True}, range(10, 20))], ids=["plain", "parallel"]
)
def test_results_are_those_of_one_link(options, seeds):
    """Bit for bit, at once and late in 20 orders, without a hazard; each expert comes over one link, once."""
    expected, n = Bridged(n_token=5, **options), 3
    results = expected.run(n)
    for seed in seeds:
        policy = TwoLinkExperts()
        world = Bridged(n_token=5, seed=seed, policy=policy, **options)
        loaded = [gpu.device.traffic.bytes_in for gpu in world.gpus]
        np.testing.assert_array_equal(world.run(n), results)
        assert not world.hazards
        assert policy.shares[0] == pytest.approx(56.25 / (56.25 + 26.165), abs=0.01)
        from_peer = sum(gpu.device.traffic.bytes_out for gpu in world.gpus)
        assert from_peer > 0.5 * (sum(gpu.device.traffic.bytes_in for gpu in world.gpus) - sum(loaded) - from_peer)
        one, two = (w.sched.stats.bytes_by_reason["experts"] for w in (expected, world))
        assert 0.9 * one < two <= one + N_EXPERT * 512 * 12 * n  # padding differs
        world.close()


@pytest.mark.parametrize("place", ["join"])
def test_a_wait_taken_out_is_named(place):
    """Without the wait for both queues the device computes with experts that are still on their way, from either side."""

    class Without(SplitRun):
        __slots__ = ()

        def mark_wait(self, backend_id, queue, mark, at):
            if at != place:
                super().mark_wait(backend_id, queue, mark, at)

    found = []
    for seed in range(4):
        world = Bridged(n_token=5, seed=seed, parallel=True, policy=TwoLinkExperts())
        world.sched.run_type = Without
        world.run(3)
        found += [h.missing for h in world.hazards]
    assert {"SIM0 does not wait for SIM1", "SIM0 does not wait for SIM0 (stream 1)"} <= set(found), set(found)


def test_a_model_gives_the_same_logits(tmp_path, capsys):
    """With a device that only holds experts, and with layers on both; memory and bytes by link are reported."""
    model = write_edited(tmp_path / "m.gguf", "qwen3moe")
    found = []
    for policy, shares in (("used", (1.0, 0.0)), (TwoLinkExperts(), (1.0, 0.0)), (TwoLinkExperts(1 << 17), (1.0, 1.0))):
        with Session.open(
            model, devices=[f"sim:{BRIDGED}"] * 2, context=ContextFlags(n_ctx=256), policy=policy,
            placement=PlacementFlags(cpu_moe=True, tensor_split=shares),
        ) as session:  # fmt: skip
            found.append(np.concatenate([session.decode(list(range(10, 50)), outputs="all"), session.decode([7])]))
            held = {row.buft: row.policy for row in session.memory()}
            assert (held["SIM1"] > 0) == (policy != "used")
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    words = [
        "run",
        str(model),
        "--tokens",
        ",".join(map(str, range(10, 50))),
        "-n",
        "1",
        "--cpu-moe",
        "-ts",
        "1,0",
        "-dev",
    ]
    words += [f"{BRIDGED},{BRIDGED},cpu", "--expert-copy", "two-links"]
    assert cli.run(words) == 0
    assert "Links: CPU to SIM0 " in capsys.readouterr().out
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["virtual"]["link_bytes"]["SIM1 to SIM0"] > 0


def _prompt(policy, n_ubatch=512):
    backends = [d.backend() for d in REGISTRY.open_all([f"sim:{BRIDGED}"] * 2 + ["cpu"], data=False)]
    with Planner.open(
        "qwen3-30b-a3b", devices=backends[:2], cpu=backends[2], data=False, policy=policy, clock=virtual_clock(backends),
        placement=PlacementFlags(cpu_moe=True, use_mmap=False, tensor_split=(1.0, 0.0)),
        context=ContextFlags(n_ctx=2048, n_ubatch=n_ubatch),
    ) as planner:  # fmt: skip
        return simulate_batch(planner, 1024, routing=LogNormal(2.4))


def test_both_links_end_together():
    """A prompt takes less time; the clock counts the same experts by link, about in the proportion of the links' rates."""
    one, two = _prompt("used"), _prompt(TwoLinkExperts())
    assert two.seconds < 0.7 * one.seconds
    host, peer = two.link_bytes["CPU to SIM0"], two.link_bytes["SIM1 to SIM0"]
    assert host + peer == pytest.approx(one.link_bytes["CPU to SIM0"], rel=0.01)
    assert 0.75 < (peer / host) / (56.25 / 26.165) <= 1  # less, because each expert of the device is a copy of its own
    assert "SIM1 to SIM0" not in one.link_bytes


def test_a_clock_knows_links_of_pairs():
    """Copies between devices with a link of their own run beside copies from the host; others pass through both of theirs."""
    for name, is_apart in ((BRIDGED, True), ("rtx3090-pcie4", False)):
        clock = VirtualClock([parse_profile(name), parse_profile(name), CPU_PROFILE])
        host = clock.copy(2, 0, 1 << 28, is_async=True, is_pinned=True, queue=1)
        peer = clock.copy(1, 0, 1 << 28, is_async=True, is_pinned=True, queue=2)
        assert (peer.start_s < host.end_s) == is_apart
        assert clock.link_bytes == {(2, 0): 1 << 28, (1, 0): 1 << 28}
    assert parse_profile("custom:8GiB,400GB/s,12GB/s,pinned,peer=50GB/s").peer.bytes_per_s == 50e9
    with pytest.raises(DeviceUnavailableError, match="no such profile"):
        parse_profile("rtx4090-pcie4-nvlink")


def test_devices_without_a_link_are_refused(capsys):
    """One device, or two that meet only at the host: an error that says what to give; the option belongs to the policy."""
    with pytest.raises(SchedError, match="no other device has a link to SIM0"):
        Layers(n_devices=2, n_token=5, policy=TwoLinkExperts()).run(1)
    words = ["splits", "qwen3-30b-a3b", "--cpu-moe", "--batches", "64", "-dev"]
    assert cli.run([*words, f"{BRIDGED},cpu", "--expert-copy", "two-links"]) == 1
    assert "beside the host's" in " ".join(capsys.readouterr().err.split())
    assert cli.run([*words, f"{BRIDGED},cpu", "--peer-mib", "5"]) == 2
    capsys.readouterr()
    both = [
        *words,
        f"{BRIDGED},{BRIDGED},cpu",
        "-ts",
        "1,0",
        "--no-mmap",
        "--expert-copy",
        "two-links",
        "--peer-mib",
        "2000",
    ]
    assert cli.run([*both, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (held,) = (m["policy"] for m in plan["memory"] if m["buft"] == "SIM1")
    assert 0 < held < 2000 << 20
    assert cli.run(both) == 0
    assert "Links, 64 tokens: " in capsys.readouterr().out
