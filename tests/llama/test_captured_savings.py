"""`pyggml savings` of models whose graphs come from llama.cpp: bytes by a stated routing, without weights."""

from __future__ import annotations

import json

import pytest
from headers import write_known

from pyggml import Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe


def _rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    assert cli.run(["savings", *words, "--json"]) == 0
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.0", "counts:3,5"])
def test_a_captured_graph_saves_as_the_built_one(routing, tmp_path, capsys):
    """Bytes copied and bytes of whole copies are the same, whoever builds the graph; both say by what routing."""
    path = tmp_path / "m.gguf"
    make_moe(path, Recipe("qwen3moe", Type.Q8_0, sizes=Sizes(layers=2, embd=256, experts=16, used=2, ff_exp=256)))
    words = (str(path), "--batches", "1,8,40", "--routing", routing)
    built, captured = (_rows(capsys, *words, "--graph", graph) for graph in ("built", "llama"))
    assert built == captured
    assert {row["routing"] for row in built} == {built[0]["routing"]}
    assert str(built[0]["routing"]).startswith(routing.split(":")[0])


@pytest.mark.parametrize("arch", ["bailingmoe2", "hunyuan-moe"])
def test_a_family_that_is_not_built(arch, tmp_path, capsys):
    """A header of any family with experts is planned; larger batches save less, and never less than nothing."""
    rows = _rows(capsys, str(write_known(arch, tmp_path)), "--batches", "1,64")
    assert 0 < float(str(rows[0]["ratio"])) < float(str(rows[1]["ratio"])) <= 1
    assert rows[0]["routing"]


def test_what_cannot_be_planned_is_said(tmp_path, capsys):
    """A family without experts, a text for a plan, and a routing that there is not are errors of one line."""
    dense = str(write_known("starcoder2", tmp_path))
    for words, says in (
        ([dense], "no experts"),
        ([dense, "--prompt", "hello"], "a plan has no text"),
        ([dense, "--routing", "odd"], "'odd'"),
    ):
        assert cli.run(["savings", *words]) != 0
        assert says in capsys.readouterr().err
