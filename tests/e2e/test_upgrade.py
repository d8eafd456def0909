"""`pyggml splits --dialect OLD,NEW`: what an upgrade of ggml changes for a model, and by which rule."""

from __future__ import annotations

import json

import pytest

from pyggml import Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Give a small mixture of experts."""
    path = tmp_path_factory.mktemp("upgrade") / "moe.gguf"
    make_moe(path, Recipe("qwen3moe", Type.Q8_0, seed=7, sizes=Sizes(layers=3, experts=16, used=4)))
    return path


def _plan(model, capsys, *words):
    assert (
        cli.run(["splits", str(model), "--cpu-moe", "-dev", "sim:rtx4090-pcie4,cpu", "--batches", "64,1", *words]) == 0
    )
    return capsys.readouterr().out


def test_each_change_has_its_rule(model, capsys) -> None:
    """From 0.26 to 0.27 a prompt waits less, as no expert's weight is waited for; nothing else differs in this plan."""
    found = json.loads(_plan(model, capsys, "--dialect", "0.26,0.27", "--json"))["upgrades"]
    prompt, token = found
    assert [u["n_tokens"] for u in found] == [64, 1]
    assert [e["rule"] for e in prompt["effects"]] == ["wait_weight_backend"]
    assert prompt["after"]["waits"] < prompt["before"]["waits"] == prompt["effects"][0]["without"]["waits"]
    assert prompt["after"]["bytes"] == prompt["before"]["bytes"] > 0
    assert token["effects"] == []
    assert token["before"] == token["after"]
    assert set(prompt["silent"]) >= {"expert_copy", "host_weights_last", "realloc_callback"}


def test_the_table_tells_the_same(model, capsys) -> None:
    """A line for each version, one for each rule that shows, and the others named."""
    text = _plan(model, capsys, "--dialect", "0.20,0.26,0.27")
    lines = text.splitlines()
    assert sum("wait_weight_backend: yes to no" in line for line in lines) == 1
    assert all(any(v in line for line in lines) for v in ("0.20", "0.26", "0.27"))
    assert "host_weights_last" in text
    assert "lognormal" in text


def test_one_version_is_a_plan_in_its_rules(model, capsys) -> None:
    """The plan's virtual time is that of the version; a comparison of the same decode has it too."""
    upgrade = json.loads(_plan(model, capsys, "--dialect", "0.26,0.27", "--json"))["upgrades"][0]
    plan = json.loads(_plan(model, capsys, "--dialect", "0.26", "--json"))["batches"][0]
    assert plan["virtual"]["seconds"] == pytest.approx(upgrade["before"]["seconds"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--dialect", "0.25"], "not one of 0.20, 0.21, 0.26, 0.27"),
        (["--dialect", "0.26,0.26"], "twice"),
        (["--dialect", "0.26,0.27", "--format", "ggml"], "a table or JSON"),
    ],
)
def test_versions_that_are_none_are_refused(model, capsys, words, text) -> None:
    """A usage error says which there are."""
    assert cli.run(["splits", str(model), *words]) == 2
    assert text in capsys.readouterr().err
