"""`pyggml experts compare|usage|predict MODEL.gguf`: the routing of a run on the CPU, then the same as with a trace."""

from __future__ import annotations

import json

import pytest

from pyggml import Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe

PROMPT = "Why is the sky blue?"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Give a mixture of experts with a vocabulary."""
    path = tmp_path_factory.mktemp("experts") / "moe.gguf"
    make_moe(path, Recipe("qwen3moe", Type.Q8_0, seed=3, sizes=Sizes(layers=2, experts=8, used=2)))
    return path


def _json(capsys, *words):
    assert cli.run(["experts", *map(str, words), "--json"]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), told.err


@pytest.mark.parametrize("command", ["compare", "usage", "predict"])
def test_a_model_gives_what_its_recorded_trace_gives(command, moe, tmp_path, capsys):
    """The numbers are those of `run --record-routing` with the same prompt, and one line says what was run."""
    trace = tmp_path / "t.jsonl"
    run = ["run", str(moe), "-p", PROMPT, "-n", "6", "--ignore-eos", "--quiet", "-dev", "cpu"]
    assert cli.run([*run, "--record-routing", str(trace)]) == 0
    capsys.readouterr()
    words = ["--phase", "all"] if command != "predict" else ["--prefetchers", "previous,oracle", "--capacities", "50%"]
    of_model, said = _json(capsys, command, moe, "--prompt", PROMPT, "-n", 6, *words)
    of_trace, _ = _json(capsys, command, trace, *words)
    for made in (of_model, of_trace):
        made.pop("trace", None)
    assert of_model == of_trace
    assert (
        said.splitlines()[0] == "moe.gguf: recording the routing of 1 prompt, each with 6 generated tokens, on the CPU"
    )


def test_the_default_prompts_are_requests(moe, tmp_path, capsys):
    """Without a prompt there are three requests, from which prefetchers learn; the page is written as for a trace."""
    page = tmp_path / "page.html"
    made, said = _json(capsys, "compare", moe, "-n", 5, "--html", page)
    assert "3 default prompts" in said
    assert (made["report"]["requests"], made["report"]["steps"]) == (3, 3 * 4)
    assert page.read_text().startswith("<!doctype html>")
    rows = _json(capsys, "predict", moe, "-n", 5)[0]["rows"]
    assert {row["prefetcher"] for row in rows} >= {"popularity", "previous-layer", "both"}


def test_a_model_without_a_vocabulary_runs_from_random_tokens(tmp_path, capsys):
    """Tokens are drawn, 16 for each of three requests, and the line says so; a prompt cannot be encoded."""
    path = tmp_path / "bare.gguf"
    make_moe(path, Recipe("llama", tokenizer="none", sizes=Sizes(layers=2, experts=8, used=2)))
    made, said = _json(capsys, "usage", path, "-n", 3)
    assert "random tokens" in said
    assert made["events"] == [3 * 2] * 2
    assert cli.run(["experts", "usage", str(path), "--prompt", "Why?"]) == 1
    assert "no vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"), [(["-n", "100000000"], "the model was trained with"), (["--prompt", " " * 3, "-n", "1"], "-n")]
)
def test_options_that_do_not_fit_the_model(words, told, moe, capsys):
    """Too many tokens, or too few to decode any, are one line."""
    assert cli.run(["experts", "usage", str(moe), *words]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert "Traceback" not in said


def test_a_model_without_experts_has_no_routing(tmp_path, capsys):
    """It is refused before it runs, as is a model that is not there."""
    path = tmp_path / "dense.gguf"
    make_moe(path, Recipe("llama-dense", sizes=Sizes(layers=1)))
    assert cli.run(["experts", "compare", str(path)]) == 1
    told = capsys.readouterr().err
    assert "has no experts" in told
    assert "recording" not in told
    assert cli.run(["experts", "usage", str(tmp_path / "none.gguf")]) == 1
