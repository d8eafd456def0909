"""What a tape does not stand for is carried out: faults, slow links, observers, policies and eval callbacks see every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyggml.backend import REGISTRY
from pyggml.backends.sim.device import SimDevice
from pyggml.catalog import MODELS, write_header
from pyggml.errors import PyggmlError
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.record import CopyRecord, Recording
from pyggml.sched import tape
from pyggml.sched.policies import UsedExpertCopier
from pyggml.sched.transfer import Transfer
from pyggml.simulation import simulate_batch
from pyggml.tensor import Tensor


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planner]:
    """A planner that has simulated a batch, so that a tape stands for the next."""
    monkeypatch.delenv("PYGGML_CHECK", raising=False)
    path = tmp_path / "model.gguf"
    write_header(replace(MODELS["qwen2.5-7b"], n_layer=2), "Q4_K_M", path)
    context, placement = ContextFlags(n_ctx=512, n_ubatch=64), PlacementFlags(n_gpu_layers=1)
    backends = [d.backend() for d in REGISTRY.open_all(["sim:rtx4090-pcie4", "cpu"], data=False)]
    with Planner.open(
        path, devices=backends[:1], cpu=backends[1], context=context, placement=placement, data=False,
        clock=virtual_clock(backends),
    ) as planner:  # fmt: skip
        simulate_batch(planner, 64)
        yield planner


def _device(planner: Planner) -> SimDevice:
    device = planner.backends[0].device
    assert isinstance(device, SimDevice)
    return device


def test_a_batch_that_repeats_is_played(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nothing here tests anything."""
    first = simulate_batch(planner, 64)
    monkeypatch.setattr(tape, "compute_splits", None)
    assert simulate_batch(planner, 64).bytes_copied == first.bytes_copied > 0


def test_faults_come_although_a_tape_is_there(planner: Planner) -> None:
    """A copy, a launch, and a link that is slow from now on."""
    for moment in ("copy", "compute"):
        _device(planner).fail_at(moment, after=1)
        with pytest.raises(PyggmlError, match="asked for"):
            simulate_batch(planner, 64)
    usual = simulate_batch(planner, 64).seconds
    _device(planner).slow_link(4.0, after=1)
    slow = simulate_batch(planner, 64).seconds
    _device(planner).clear_faults()
    again = simulate_batch(planner, 64).seconds
    assert usual is not None
    assert slow is not None
    assert slow > 1.1 * usual
    assert again == pytest.approx(usual, rel=1e-12)


def test_an_observer_sees_every_copy(planner: Planner) -> None:
    """A recorder that comes later has a record for each copy that is counted."""
    stats, recording = planner.sched.stats, Recording()
    before = stats.n_copies
    simulate_batch(planner, 64)
    played = stats.n_copies - before
    planner.sched.recorder = recording
    simulate_batch(planner, 64)
    assert len([r for r in recording.records if isinstance(r, CopyRecord)]) == played > 0


def test_a_policy_of_ones_own_is_asked(planner: Planner) -> None:
    """Also if it is a subclass of one whose copies are on a tape."""

    class Asked(UsedExpertCopier):
        def copy(self, transfer: Transfer) -> bool:
            names.append(transfer.source.name)
            return super().copy(transfer)

    names: list[str] = []
    planner.sched.policy = Asked(planner.sched.repairs)
    for _ in range(2):
        names.clear()
        simulate_batch(planner, 64)
        assert len(names) > 5


def test_an_eval_callback_sees_every_node(planner: Planner) -> None:
    """It is asked about each node that is computed, in every batch."""
    seen: list[str] = []

    def see(node: Tensor, ask: bool) -> bool:
        seen.append(node.name)
        return False

    planner.sched.set_eval_callback(see)
    simulate_batch(planner, 64)
    assert len(seen) == sum(len(split.graph) for split in planner.sched.plan.splits)
