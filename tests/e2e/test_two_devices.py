"""A model over a device and host memory gives what the CPU alone gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edited_models import write_edited

import pyggml as ggml
from pyggml import cli
from pyggml.makers.make_moe import Sizes
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


#: Layers 30 to 39 to one device and 40 to 49 to the other.
TO_BOTH = (r"\.(3[0-9])\.*=SIM0", r"\.(4[0-9])\.*=SIM1")
RTX = "sim:rtx4090-pcie4"


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """Give a narrow model of 50 layers."""
    sizes = Sizes(layers=50, embd=32, heads=2, kv_heads=1, head_dim=16, ff=32, ff_exp=32, experts=2, used=1)
    return write_edited(tmp_path_factory.mktemp("deep") / "m.gguf", "llama", sizes=sizes)


def layers_by_device(capsys, model: Path, *words: str, part: str = "") -> dict[str, set[int]]:
    """Return which layers have weights on each buffer type, by `splits` over two devices."""
    common = ["--json", "--device", f"{RTX},{RTX},cpu", "--batches", "1"]
    assert cli.run(["splits", str(model), *common, *words]) == 0
    found: dict[str, set[int]] = {}
    for w in json.loads(capsys.readouterr().out)["weights"]:
        if w["name"].startswith("blk.") and part in w["name"]:
            found.setdefault(w["buft"], set()).add(int(w["name"].split(".")[1]))
    return found


@pytest.mark.parametrize(
    "words", [("-ot", ",".join(TO_BOTH)), ("-ot", TO_BOTH[0], "-ot", TO_BOTH[1])], ids=["one", "two"]
)
def test_overrides_to_two_devices_all_hold(words, deep, capsys):
    """-ot in one value or in two, to devices that have no other layer: neither displaces the other."""
    expected = {"CPU": set(range(30)), "SIM0": set(range(30, 40)), "SIM1": set(range(40, 50))}
    assert layers_by_device(capsys, deep, "-ngl", "0", *words) == expected


@pytest.mark.parametrize("flash", ["on", "off"])
def test_overrides_to_two_devices_do_not_change_logits(flash, deep):
    """Layers that -ot alone puts on two devices give the CPU's logits bit for bit.

    Flash attention is set, since by itself it is off where the cache lies elsewhere than attention runs.
    """
    context = ContextFlags(n_ctx=256, flash_attn=flash)
    with Session.open(deep, context=context) as alone:
        expected = alone.decode(TOKENS, outputs="all")
    placement = PlacementFlags(n_gpu_layers=0, overrides=(",".join(TO_BOTH),))
    with Session.open(deep, devices=[RTX, RTX], placement=placement, context=context) as session:
        got = session.decode(TOKENS, outputs="all")
    assert np.array_equal(got, expected)


def test_a_tensor_split_holds_beside_overrides(deep, capsys):
    """-ts 3,1 shares the layers out as without -ot, which takes only what it names to the CPU."""
    split = ("-ts", "3,1")
    queries = layers_by_device(capsys, deep, *split, part=".attn_q.")
    assert set(queries) == {"SIM0", "SIM1"}
    assert 36 <= len(queries["SIM0"]) <= 39
    override = ("-ot", r"blk\.([0-9]|1[0-9])\.ffn=CPU")
    assert layers_by_device(capsys, deep, *split, *override, part=".attn_q.") == queries
    assert layers_by_device(capsys, deep, *split, *override, part=".ffn_")["CPU"] == set(range(20))
