"""`pyggml savings`: small batches move few experts, and never more than whole copies."""

from __future__ import annotations

import json

import pytest

from pyggml import Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Give a tiny model of 16 experts, 2 used, with a skewed router."""
    path = tmp_path_factory.mktemp("savings") / "moe.gguf"
    sizes = Sizes(layers=2, embd=256, experts=16, used=2, ff_exp=256)
    make_moe(path, Recipe("llama", Type.Q8_0, seed=1, sizes=sizes, skew=1.5))
    return str(path)


def test_larger_batches_save_less(model, capsys):
    """One token moves as many experts as it uses; the ratio grows with the batch and stays at most 1."""
    assert cli.run(["savings", model, "--batches", "1,4,16,64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["n_tokens"] for row in rows] == [1, 4, 16, 64]
    assert rows[0]["used_mean"] == 2
    ratios = [row["ratio"] for row in rows]
    assert ratios == sorted(ratios)
    assert ratios[0] < 0.2 < ratios[-1] <= 1
    assert len({row["bytes_full"] for row in rows}) == 1


def test_whole_copies_save_nothing(model, capsys):
    """With --expert-copy full every row is a whole copy."""
    assert cli.run(["savings", model, "--batches", "1,8", "--expert-copy", "full", "--json"]) == 0
    assert [row["ratio"] for row in json.loads(capsys.readouterr().out)] == [1, 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--device", "cpu"], "no device"), (["--prompt", "short"], "longer"), (["--batches", "0"], "--batches")],
)
def test_what_cannot_be_compared_is_said(model, words, says, capsys):
    """No device, a text that is too short, a batch of nothing."""
    assert cli.run(["savings", model, *words]) != 0
    assert says in capsys.readouterr().err
