"""A whole model on the real library's CPU, alone and beside ours with the experts in host memory: equal logits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pyggml.backend import op_batch_size
from pyggml.backends.libggml import open_device
from pyggml.cli import run
from pyggml.record import Statistics
from pyggml.session import ContextFlags, PlacementFlags, Session

TOKENS = [(i * 53 + 32) % 259 for i in range(40)]
#: As between llama.cpp and our CPU; attention over an F16 cache takes the most of it.
BOUND = 1e-6


def logits(model, flash, **options) -> tuple[np.ndarray, set[str], Statistics]:
    """Return the logits of a prompt and of three tokens after it, the backends of the splits, and what was copied."""
    with Session.open(model, context=ContextFlags(n_ctx=256, flash_attn=flash), **options) as session:
        rows = [session.decode(TOKENS, outputs="all"), *(session.decode([i]) for i in (5, 9, 7))]
        names = {session.backends[split.backend_id].name for split in session.sched.splits}
        return np.concatenate(rows), names, session.sched.stats


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Return the squared error over the squares."""
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("flash", ["off", "on"])
def test_a_model_on_the_real_library(recorded_models, flash):
    """As the only device, as one of two, and with host experts copied into its memory, logits are our CPU's."""
    model = recorded_models["qwen3moe"]
    backend = open_device("CPU").backend(threads=1)
    want, _, _ = logits(model, flash)
    alone, names, _ = logits(model, flash, cpu=backend)
    assert names == {"libggml:CPU"}
    assert nmse(alone, want) < BOUND
    beside, names, _ = logits(model, flash, devices=[backend], placement=PlacementFlags(cpu_moe=True))
    assert names == {"libggml:CPU", "CPU"}
    assert nmse(beside, want) < BOUND
    copied, names, stats = logits(
        model,
        flash,
        devices=[backend],
        placement=PlacementFlags(cpu_moe=True),
        offload_rule=lambda b, op: b is backend and op_batch_size(op) < 8,
    )
    assert nmse(copied, want) < BOUND
    assert "libggml:CPU" in names
    assert 0 < stats.bytes_copied < 0.5 * stats.bytes_full  # 2 of 8 experts for each of the single tokens
    backend.close()


def test_the_run_command_takes_it(recorded_models, capsys):
    """`pyggml run --device libggml:CPU,cpu --cpu-moe` reports splits on both and what was copied."""
    words = ["run", str(recorded_models["qwen3moe"]), "--tokens", "1,2,3,4", "-n", "2", "--json"]
    assert run([*words, "--device", "libggml:CPU,cpu", "--cpu-moe"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [d["name"] for d in report["devices"]] == ["libggml:CPU", "CPU"]


def test_a_plan_on_the_real_library(recorded_models):
    """A session without data plans over the library's device, with its sizes, and allocates nothing there."""
    with Session.open(recorded_models["qwen3moe"], devices=["libggml:CPU"], data=False) as session:
        planned = session.plan_batch(20)
        assert planned[0].compute_bytes[0] > 0
        assert {m.buft for m in session.memory()} == {"libggml:CPU", "CPU"}
