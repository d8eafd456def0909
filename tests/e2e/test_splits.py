"""`pyggml splits --format ggml` prints what real llama.cpp printed for the same decode, line for line."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyggml import Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe

LOGS = sorted((Path(__file__).parents[1] / "data" / "splits").glob("*.txt.gz"))
SIZES = Sizes(layers=3, experts=16, used=4)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Give the models of the logs, written once."""
    folder = tmp_path_factory.mktemp("split-models")
    found = {}
    types = {"llama": Type.F32, "qwen3moe": Type.Q8_0, "gpt-oss": Type.MXFP4, "glm4moe": Type.Q4_K}
    for arch, type in types.items():
        found[arch] = folder / f"{arch}.gguf"
        make_moe(found[arch], Recipe(arch, type, seed=7, sizes=SIZES))
    return found


def read_log(path: Path) -> tuple[dict[str, Any], dict[int, list[str]]]:
    """Return the settings of a log, and what was printed for the first graph of each batch size."""
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    return json.loads(lines[0][2:]), printed("\n".join(lines[1:]))


def printed(text: str) -> dict[int, list[str]]:
    """Return the lines for each batch size; empty ones, which the logs lack, left out."""
    found: dict[int, list[str]] = {}
    into: list[str] | None = None
    for line in text.split("\n"):
        batch = re.fullmatch(r"# batch (\d+)(?:, graph 0)?", line)
        if batch:
            into = found.setdefault(int(batch[1]), [])
        elif line.startswith("# "):
            into = None
        elif into is not None and line:
            into.append(line)
    return found


def flags(settings: dict[str, Any]) -> list[str]:
    """Return the options that give a log's settings."""
    offload = settings["offload_op"]
    device = "mock:CUDA0" + (f":offload={offload['min_batch']}" if offload else "")
    words = ["--device", f"{device},cpu", "-ngl", str(settings["n_gpu_layers"]), "--outputs", settings["outputs"]]
    for option, key in (
        ("-c", "n_ctx"),
        ("-b", "n_batch"),
        ("-ub", "n_ubatch"),
        ("-ctk", "type_k"),
        ("-ctv", "type_v"),
    ):
        words += [option, str(settings[key])]
    words += ["-fa", "on" if settings["flash_attn"] else "off"]
    for override in settings["override_tensor"] or ():
        words += ["-ot", override]
    return words


@pytest.mark.parametrize("path", LOGS, ids=lambda p: p.name.removesuffix(".txt.gz"))
def test_text_equals_the_recorded_log(path, models, capsys):
    """Splits, inputs, sizes, nodes, use counts and sources: every line."""
    settings, expected = read_log(path)
    batches = ",".join(str(n) for n in settings["batches"])
    words = ["splits", str(models[settings["arch"]]), *flags(settings), "--format", "ggml", "--batches", batches]
    words += ["--dialect", "0.26"]  # as the logs are of b11434
    assert cli.run(words) == 0
    got = printed(capsys.readouterr().out)
    for n in settings["batches"]:
        assert got[n] == expected[n]


def test_numba_is_not_imported(models):
    """A plan is made without the kernels' compiler, and without a weight being read."""
    code = (
        "import sys; from pyggml import cli; status = cli.run(sys.argv[1:]); "
        "assert 'numba' not in sys.modules; sys.exit(status)"
    )
    words = ["splits", str(models["qwen3moe"]), "--cpu-moe", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [b["n_tokens"] for b in plan["batches"]] == [512, 1]


def test_plan_says_what_is_copied(models, capsys):
    """At 512 tokens each expert weight is copied, at most whole and with the stated routing less; at 1 token none is."""
    assert cli.run(["splits", str(models["qwen3moe"]), "--cpu-moe", "--batches", "128,1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    prompt, token = (batch["graphs"][0] for batch in plan["batches"])
    experts = [i for s in prompt["splits"] for i in s["inputs"] if i["kind"] == "experts"]
    assert len(experts) >= 6  # gate, up and down of the layers that run for all tokens
    for i in experts:
        assert 0 < i["bytes_expected"] < i["bytes_max"] == 1114112
        assert 0 < i["experts_expected"] < i["n_expert"] == 16
    assert prompt["bytes_expected"] < prompt["bytes_max"]
    assert not [i for s in token["splits"] for i in s["inputs"] if i["kind"] == "experts"]
    assert any(s["causes"].get("1.off") for s in prompt["splits"])
    assert {m["buft"] for m in plan["memory"]} >= {"SIM0", "CPU"}


def test_table_puts_alike_splits_together(models, capsys):
    """The table for people has one line for splits that differ by their layer only, unless all are wanted."""
    words = ["splits", str(models["qwen3moe"]), "--device", "mock:CUDA0,cpu", "--cpu-moe", "--batches", "8"]
    assert cli.run(words) == 0
    short = capsys.readouterr().out
    assert cli.run([*words, "--all-splits"]) == 0
    long = capsys.readouterr().out
    assert "(×" in short
    assert " (×2)" not in long
    assert len(long.splitlines()) > len(short.splitlines())
