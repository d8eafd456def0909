"""Plans of models of the catalogue beside the memory, splits and nodes that logs of llama.cpp give for the same files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyggml.catalog import MODELS, write_header
from pyggml.cli import run
from pyggml.gguf import GGUFFile

MIB = 1 << 20
#: A device that holds any of these models.
BIG = "sim:custom:400GiB,1000GB/s,25GB/s"
#: Experts and norms of a layer to the CPU, from layer 14 on.
FROM_14 = ("-ot", r"blk\.1[4-9]\.ffn.*=CPU", "-ot", r"blk\.[2-9][0-9]\.ffn.*=CPU")
Q8_CACHE = ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")


class Told:
    """What `splits --json` says, in MiB."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.weights, self.cache, self.compute = (
            {m["buft"]: m[part] / MIB for m in report["memory"]} for part in ("weights", "cache", "compute")
        )
        self.placed: Counter[str] = Counter()
        for w in report["weights"]:
            self.placed[w["buft"]] += w["bytes"]
        self.names = {buft: [w["name"] for w in report["weights"] if w["buft"] == buft] for buft in self.placed}
        graphs = {batch["n_tokens"]: batch["graphs"] for batch in report["batches"]}
        self.n_nodes = {n: [g["n_nodes"] for g in found] for n, found in graphs.items()}
        self.n_splits = {n: [len(g["splits"]) for g in found] for n, found in graphs.items()}


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Give a function that plans a prompt of 512 tokens and one token."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))

    def made(model: str | Path, *words: str, devices: int = 1, batches: str = "512,1") -> Told:
        common = ["--json", "--device", ",".join([BIG] * devices + ["cpu"]), "--batches", batches]
        assert run(["splits", str(model), *common, *words]) == 0
        return Told(json.loads(capsys.readouterr().out))

    return made


def logged(mib: float, tolerance: float = 0.011) -> Any:
    """Return a number of a log, which rounds to hundredths."""
    return pytest.approx(mib, rel=0, abs=tolerance)


def test_qwen3_235b_with_experts_on_the_cpu(plan):
    """A log of May 2025: Q8_0 with layers 14 to 93's experts in host memory and 32768 cells in q8_0.

    One token gives the log's 162 splits. 512 tokens give its 402 within three, since graphs had 5741 nodes then.
    """
    told = plan("qwen3-235b-a22b:Q8_0", *FROM_14, "-c", "32768", *Q8_CACHE)
    assert told.weights["SIM0"] == logged(41723.89)
    assert told.placed["CPU"] / MIB == logged(196001.25 + 630.59, 0.02)
    assert told.cache["SIM0"] == logged(3196.0)
    assert told.n_splits[1] == [162]
    assert told.n_splits[512] == [pytest.approx(402, abs=3)]


def test_gpt_oss_20b_with_experts_on_the_cpu(plan):
    """A log of b6123: all experts and their biases in host memory, 131072 cells, a small cache for sliding windows.

    What is mapped depends on the order of tensors in the file, so that is held to 30 MiB.
    """
    told = plan("gpt-oss-20b:MXFP4", "-ot", ".ffn_.*_exps.=CPU", "-c", "131072", "-fa", "on")
    assert told.weights["SIM0"] == logged(1242.03)
    assert told.weights["CPU"] == logged(10949.33, 30)
    assert told.cache["SIM0"] == logged(3072 + 18)
    assert (told.n_splits[512], told.n_splits[1]) == ([146], [50])
    assert told.n_nodes[1] == [1352]


def test_llama_32_3b_on_one_device(plan):
    """A log of 2026: Q5_K_M, whole on a device, with the embedding in host memory as well.

    Graphs of later builds take mixed embeddings, too: two nodes more than the log's 875, and up to five rows of
    6 MiB in the device's compute buffer, two in the host's.
    """
    told = plan("llama-3.2-3b:Q5_K_M", "-c", "8192", "-fa", "on")
    assert told.weights["SIM0"] == logged(2207.10, 0.05)
    assert told.weights["CPU"] == logged(308.23)
    assert told.cache["SIM0"] == logged(896.0)
    assert 256.50 <= told.compute["SIM0"] <= 256.50 + 5 * 6 + 1
    assert 20 <= told.compute["CPU"] <= 28.01 + 2 * 6
    assert (told.n_nodes[512], told.n_splits[512]) == ([877], [2])


def test_qwen25_05b_with_a_head_of_its_own(plan, tmp_path):
    """The second model of that log: Q4_K_M, in which rows of 896 take other types than blocks of 256.

    The catalogue's header ties the output to the embedding as the maker's file does; the log's file has both, so
    a header with both is written. Its types are the log's, tensor by tensor in number.
    """
    path = tmp_path / "own-head.gguf"
    write_header(replace(MODELS["qwen2.5-0.5b"], tied=False), "Q4_K_M", path)
    with GGUFFile.open(path) as file:
        types = Counter(info.type.ggml_name for info in file.tensors.values())
    assert types == {"f32": 121, "q5_0": 133, "q8_0": 13, "q4_K": 12, "q6_K": 12}
    told = plan(path, "-c", "2048", "-fa", "on")
    assert told.weights["SIM0"] + told.weights["CPU"] == logged(462.96, 0.3)
    assert told.weights["CPU"] == logged(89.26)
    assert told.cache["SIM0"] == logged(24.0)
    assert 298.50 <= told.compute["SIM0"] <= 298.50 + 5 * 1.75 + 1
    assert 4 <= told.compute["CPU"] <= 7.51 + 2 * 1.75
    assert (told.n_nodes[512], told.n_splits[512]) == ([825], [2])  # two nodes more than the log's, as above


def test_qwen3_235b_over_two_devices(plan):
    """A log of May 2025: Q6_K with -ot to both devices and the CPU; 512 tokens give its 463 splits within twelve."""
    to_devices = ("-ot", r"blk\.(0|1|2|3|4|5|6)\.ffn.*=SIM0", "-ot", r"blk\.(7|8|9|10|11|12|13)\.ffn.*=SIM1")
    told = plan("qwen3-235b-a22b:Q6_K", *to_devices, *FROM_14, "-c", "16384", *Q8_CACHE, devices=2)
    assert [told.weights[d] for d in ("SIM0", "SIM1")] == [logged(15922.41), logged(16297.68)]
    assert [told.cache[d] for d in ("SIM0", "SIM1")] == [logged(816.0), logged(782.0)]
    assert told.n_splits[1] == [176]
    assert told.n_splits[512] == [pytest.approx(463, abs=12)]


def test_qwen3_235b_in_q6_k_on_one_device(plan):
    """The same user's log of one device, which holds the experts of layers 0 to 4."""
    overrides = [r"blk\.(0|1|2|3|4)\.ffn.*=SIM0", r"blk\.(5|6|7|8|9)\.ffn.*=CPU"]
    overrides += [r"blk\.1[0-9]\.ffn.*=CPU", r"blk\.[2-9][0-9]\.ffn.*=CPU"]
    words = [word for override in overrides for word in ("-ot", override)]
    told = plan("qwen3-235b-a22b:Q6_K", *words, "-c", "16384", *Q8_CACHE, batches="1")
    assert (told.weights["SIM0"], told.cache["SIM0"]) == (logged(15191.95), logged(1598.0))
    assert told.n_splits[1] == [180]


@pytest.mark.parametrize(("words", "mib", "tolerance"), [((), 2196.0, 0.011), (Q8_CACHE[:4], 1166.65, 0.05)])
def test_deepseek_keeps_latents(words, mib, tolerance, plan):
    """Logs of DeepSeek-R1 with 32768 cells, in f16 and q8_0: 576 numbers a cell and layer.

    exps=CPU moves the routed experts alone: no shared one, and no exp_probs_b.
    """
    told = plan("deepseek-r1:Q8_0", "-c", "32768", "-ot", "exps=CPU", "-fa", "on", *words, batches="1")
    assert told.cache["SIM0"] == logged(mib, tolerance)
    moved = {name.split(".")[-2] for name in told.names["CPU"]}
    assert moved == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "token_embd"}


@pytest.mark.parametrize(
    ("devices", "override", "copies"), [(1, (), 1), (2, (), 4), (2, ("-ot", r"blk\.35\.ffn_up=CPU"), 1)]
)
def test_pipeline_copies_multiply_the_mask(devices, override, copies, plan):
    """Per cell a device's compute buffer grows by a mask of 512 halves, four times over where batches are pipelined.

    An override switches pipelining off; the last device's peak is then its logits, whatever the cells.
    """
    few, many = (
        plan("qwen2.5-3b:Q4_K_M", "-c", str(n), "-fa", "on", *override, devices=devices, batches="1").compute
        for n in (8192, 32768)
    )
    grown = [(many[d] - few[d]) * MIB / (32768 - 8192) for d in ("SIM0", "SIM1")[:devices]]
    assert max(grown) == pytest.approx(1024 * copies, rel=0.04)
    if not override:
        assert min(grown) == pytest.approx(1024 * copies, rel=0.04)
