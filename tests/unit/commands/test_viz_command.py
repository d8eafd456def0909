"""`pyggml viz`, and the pages of `run` and `splits`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pyggml import cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.types import Type

WORDS = ["--device", "sim:rtx4090-pcie4,cpu", "--cpu-moe", "-t", "1"]
#: The same token again and again: each layer uses two experts.
PROMPT = ["--tokens", ",".join(["7"] * 40), "-n", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tiny mixture of experts."""
    path = tmp_path_factory.mktemp("viz") / "tiny.gguf"
    make_moe(path, Recipe("llama", Type.Q8_0, seed=3, sizes=Sizes(layers=2, experts=8, used=2, ctx=256)))
    return path


def views_of(path: Path) -> list[dict[str, Any]]:
    """Return what a page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    views: list[dict[str, Any]] = json.loads(found[1])["views"]
    return views


def bytes_of(view: dict[str, Any], *reasons: str) -> int:
    """Return the bytes that the events of a view copied for some reasons."""
    e = view["events"]
    return sum(n for kind, n in zip(e["kind"], e["amount"], strict=True) if view["kinds"][kind] in reasons)


def test_run_writes_a_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`run --html` shows the bytes that its report tells, batch by batch, and with which options."""
    html = tmp_path / "run.html"
    assert cli.run(["run", str(model), *WORDS, *PROMPT, "--ignore-eos", "--json", "--html", str(html)]) == 0
    told = json.loads(capsys.readouterr().out)
    (view,) = views_of(html)
    assert bytes_of(view, "experts") == told["experts"]["total"]["bytes_copied"] > 0
    assert sum(e["whole"] for e in view["experts"]) == told["experts"]["total"]["bytes_full"]
    assert [r["n_tokens"] for r in view["runs"]] == [40, 1, 1]
    assert sum(b["bytes_copied"] for b in told["batches"]) == bytes_of(view, "experts", "weight", "activation", "input")
    assert view["about"]["options"] == "--cpu-moe --device sim:rtx4090-pcie4,cpu --threads 1"
    assert view["about"]["model"]["n_expert"] == 8
    assert {step["purpose"] for step in view["memory"]} == {"weights", "kv_cache", "compute"}


def test_two_timelines_side_by_side(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`viz` makes one page of the timelines of two runs; the one of whole copies copied more."""
    paths = [tmp_path / "used.json", tmp_path / "full.json"]
    for path in paths:
        words = ["run", str(model), *WORDS, *PROMPT, "--quiet", "--expert-copy", path.stem, "--timeline", str(path)]
        assert cli.run(words) == 0
    capsys.readouterr()
    assert cli.run(["viz", *map(str, paths), "--name", "A", "--title", "two"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "used.html")
    used, full = views_of(tmp_path / "used.html")
    assert (used["name"], full["name"]) == ("A", "full")
    assert bytes_of(used, "experts") < bytes_of(full, "weight")
    assert bytes_of(full, "experts") == 0
    assert bytes_of(full, "weight") == sum(e["whole"] for e in used["experts"])


def test_splits_writes_a_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`splits --html` shows what its plan would do on the simulated machine, batch after batch."""
    html, timeline = tmp_path / "splits.html", tmp_path / "splits.json"
    words = ["splits", str(model), *WORDS, "--batches", "64,1", "--json", "--routing", "uniform"]
    assert cli.run([*words, "--html", str(html), "--timeline", str(timeline)]) == 0
    told = json.loads(capsys.readouterr().out)
    (view,) = views_of(html)
    assert [r["n_tokens"] for r in view["runs"]] == [64, 1]
    simulated = [b["virtual"] for b in told["batches"]]
    assert bytes_of(view, "experts", "weight", "activation", "input") == sum(s["bytes_copied"] for s in simulated)
    whole = next(p for p in view["phases"] if p["clock"] == "virtual" and p["phase"] == "all")
    assert whole["length"] == pytest.approx(1e9 * sum(s["seconds"] for s in simulated), rel=1e-6)
    assert view["about"]["assumed"].endswith("routing: uniform")
    assert list(view["times"]) == ["virtual"], "wall times of a plan are those of planning"
    assert cli.run(["viz", str(timeline), "-o", str(tmp_path / "again.html")]) == 0
    (again,) = views_of(tmp_path / "again.html")
    assert {**again, "name": ""} == {**view, "name": ""}


def test_a_plan_that_does_not_fit_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device that is too small is named in JSON, in red, on the page's data, and by status 3."""
    html = tmp_path / "page.html"
    words = ["splits", str(model), "-dev", "sim:custom:1MiB,400GB/s,12GB/s,cpu", "--batches", "4"]
    assert cli.run([*words, "--json", "--html", str(html)]) == 3
    told = json.loads(capsys.readouterr().out)
    device = told["memory"][0]
    assert told["fits"] is False
    assert device["fits"] is False
    assert device["missing_bytes"] == device["total"] - 1024**2 > 0
    (view,) = views_of(html)
    assert view["about"]["devices"][0]["memory_bytes"] == 1024**2
    assert "are missing" in view["about"]["too_large"][0]
    assert cli.run(words) == 3
    assert "Does not fit: SIM0 has 1.0 MiB" in capsys.readouterr().out


def test_micro_batches_with_the_same_splits_are_one_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches of one size and with the same splits and inputs share a table."""
    assert cli.run(["splits", str(model), *WORDS, "--batches", "96", "-ub", "32"]) == 0
    out = capsys.readouterr().out
    assert out.count("Splits of a micro-batch") == 1
    assert re.search(r"\([23] micro-batches; copies of the one with most bytes\)", out)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is none, a folder that is none, and too many names are said in a line."""
    other = tmp_path / "other.json"
    other.write_text('{"traceEvents": []}')
    assert cli.run(["viz", str(other)]) == 1
    assert "record it again with --timeline" in capsys.readouterr().err
    assert cli.run(["viz", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    assert cli.run(["viz", str(other), "-o", str(tmp_path / "no" / "x.html")]) == 2
    assert cli.run(["viz", str(other), "--name", "a", "--name", "b"]) == 2
    assert "for 1 timelines" in capsys.readouterr().err


def test_options_that_place_weights_keep_their_order(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """-ot before --cpu-moe moves a layer to the device, behind it does not; the page shows them as they were given."""
    name, override = "blk.0.ffn_up_exps.weight", r"blk\.0\.ffn_.*_exps=SIM0"
    html = tmp_path / "plan.html"
    for words, buft in ((["-ot", override, "-cmoe"], "SIM0"), (["-cmoe", "-ot", override, "-ncmoe", "1"], "CPU")):
        args = ["splits", str(model), "--batches", "4", *words]
        assert cli.run([*args, "--html", str(html)]) == 0
        capsys.readouterr()
        assert cli.run([*args, "--json"]) == 0
        told = {w["name"]: w["buft"] for w in json.loads(capsys.readouterr().out)["weights"]}
        assert told[name] == buft
    assert views_of(html)[0]["about"]["options"] == f"--cpu-moe --override-tensor {override} --n-cpu-moe 1"
