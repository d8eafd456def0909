"""A model over a device and host memory gives what the CPU alone gives."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml
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


@pytest.mark.parametrize("placement", [ON_HOST, PlacementFlags()], ids=["cpu-moe", "all layers"])
def test_devices_that_work_late_give_the_same_logits(model, placement):
    """Two devices that do their work in any allowed order, with pipeline copies where all layers are on them."""
    _, path = model

    def logits(seed: int | None) -> list[np.ndarray]:
        devices = [ggml.Sim(index=i, seed=seed, threads=1) for i in (0, 1)]
        context = ContextFlags(n_ubatch=8)
        with Session.open(path, devices=devices, cpu=ggml.CPU(1), placement=placement, context=context) as session:
            assert (session.sched.n_copies > 1) == (placement is not ON_HOST)
            decoded = [session.decode(TOKENS, outputs="all"), session.decode([5]), session.decode([6])]
        assert not any(device.device.hazards for device in devices)
        return decoded

    expected = logits(None)
    for seed in range(3):
        for got, wanted in zip(logits(seed), expected, strict=True):
            assert np.array_equal(got, wanted)
