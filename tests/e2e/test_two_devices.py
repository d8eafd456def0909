"""A model over a device and host memory: the same numbers, nothing read across the border, bytes that add up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backends.sim import counted
from pyggml.report import CopyAccount
from pyggml.sched.policies import UsedExpertCopier
from pyggml.session import ContextFlags, PlacementFlags, Session

TOKENS = list(range(3, 43))  # 40: from 32 on the device takes ops whose experts lie in host memory
ON_HOST = PlacementFlags(cpu_moe=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_ubatch", [7, 40])
def test_result_over_device_and_host_equals_that_of_the_cpu_alone(model, threads, n_ubatch):
    """The logits are the same bit for bit, whatever the threads and micro-batches."""
    _, path = model
    context = ContextFlags(n_ubatch=n_ubatch)
    with Session.open(path, cpu=ggml.CPU(2), context=context) as alone:
        expected = alone.decode(TOKENS, outputs="all")
    cpu = ggml.CPU(threads)
    with Session.open(path, devices=[ggml.Sim()], cpu=cpu, placement=ON_HOST, context=context) as session:
        got = session.decode(TOKENS, outputs="all")
        assert session.sched.n_splits > 3
    assert np.array_equal(got, expected)


def test_device_split_reads_no_host_memory(llama):
    """With all host buffers unreadable while the device computes, the result is still that of the CPU alone."""
    script = Path(__file__).with_name("isolated_child.py")
    done = subprocess.run([sys.executable, script, llama], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == 0.0


class ForgetfulCopier(UsedExpertCopier):
    """Leaves out one used expert of one weight."""

    def __init__(self, weight: str) -> None:
        super().__init__()
        self.weight = weight
        self.forgotten: int | None = None

    @staticmethod
    def middle(experts: set[int]) -> int:
        """Return an expert whose bytes no padding of a neighbour covers in full."""
        return sorted(experts)[len(experts) // 2]

    def _send(self, run, i_split, weight, copy, experts, ids_name, *, is_added=False):
        if weight.name == self.weight:
            self.forgotten = self.middle(experts)
            experts = experts - {self.forgotten}
        super()._send(run, i_split, weight, copy, experts, ids_name, is_added=is_added)


def test_one_expert_left_out_shows_as_nan(llama):
    """Fresh device memory is NaN, so a used expert that was not copied cannot go unseen."""
    copier = ForgetfulCopier("blk.0.ffn_gate_exps.weight")
    with Session.open(llama, devices=[ggml.Sim()], cpu=ggml.CPU(2), placement=ON_HOST, copier=copier) as session:
        logits = session.decode(TOKENS, outputs="all")
    assert copier.forgotten is not None
    assert np.isnan(logits).any()


@pytest.mark.parametrize("kind", ["used", "full"])
def test_bytes_reported_are_the_bytes_that_reached_the_device(llama, kind, monkeypatch):
    """The account made from records equals what the device's memory counted by itself."""
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "1")
    account = CopyAccount()
    gpu = ggml.Sim()
    copier = ggml.FullCopier() if kind == "full" else None
    with (
        Session.open(
            llama, devices=[gpu], cpu=ggml.CPU(2), placement=ON_HOST, copier=copier, recorder=account
        ) as session,
        counted(gpu.device) as seen,
    ):
        session.decode(TOKENS[:2])
        for token in (5, 6, 7):
            session.decode([token])
    assert sum(account.bytes_to("SIM0").values()) == seen.bytes_in
    total = account.total()
    assert total.bytes_full > 0
    assert (total.bytes_copied < total.bytes_full) == (kind == "used")


def test_used_and_full_copies_give_the_same_logits(model):
    """What the used-expert copy leaves out is not needed."""
    _, path = model
    got = []
    for copier in (None, ggml.FullCopier()):
        with Session.open(path, devices=[ggml.Sim()], cpu=ggml.CPU(2), placement=ON_HOST, copier=copier) as session:
            got.append(session.decode(TOKENS, outputs="all"))
    assert np.array_equal(*got)
