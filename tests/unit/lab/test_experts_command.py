"""`pyggml experts` from outside."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from samples import bigmoeonedge, onnx_genai

from pyggml.cli import group
from pyggml.lab.policies import POLICIES as POLICIES_BY_NAME

POLICIES = "lru,lfu,lfru,belady,belady-bypass"


@pytest.fixture
def trace_path(tmp_path):
    """Give a trace of two requests, three layers of 16 experts of which a token uses 2, experts of two sizes."""
    rng = np.random.default_rng(4)
    lines = [{"format": "pyggml-routing", "version": 1, "model": "made", "n_layer": 3, "n_expert": 16, "n_used": 2,
              "projections": ["up", "down"], "expert_bytes": [[600, 400], [600, 400], [1200, 800]], "requests": ["a", "b"]}]  # fmt: skip
    favourites = rng.random((3, 16)) ** 3
    for request in ("a", "b"):
        for step in range(60):
            for layer in range(3):
                ids = np.argsort(-favourites[layer] * rng.random(16))[:2].tolist()
                lines.append({"request": request, "step": step, "layer": layer, "ids": [ids]})
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*words):
    """Return the exit status, and what went to stdout and stderr."""
    result = CliRunner().invoke(group, ["experts", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_policies_are_listed_with_what_they_do():
    """Every name that a comparison takes is in the list, and no trace is needed for it."""
    status, out, _ = run("compare", "--list-policies")
    assert status == 0
    for policy in POLICIES_BY_NAME.values():
        assert f"{policy.name:18} {policy.meaning}".split() == next(
            line.split() for line in out.splitlines() if line.split()[:1] == [policy.name]
        )


def test_rows_have_the_form_that_tools_read(trace_path):
    """`--json` has the reporting block, and a row for each policy and size with bytes that follow from the misses."""
    status, out, _ = run("compare", trace_path, "--json", "--policies", POLICIES, "--capacities", "25%,4,24KiB")
    assert status == 0
    made = json.loads(out)
    assert {"event_unit", "scope", "order", "split", "preload", "oracle"} <= set(made["report"])
    assert made["report"]["steps"] == 120
    assert made["report"]["requests"] == 2
    rows = made["rows"]
    assert [r["policy"] for r in rows] == [name for name in POLICIES.split(",") for _ in range(3)]
    assert [r["capacity"] for r in rows[:3]] == [{"fraction": 0.25}, {"slots": 4}, {"bytes": 24576}]
    for row in rows:
        assert row["scope"] == "layer"
        assert row["touches"] == 2 * 60 * 3 * 2
        misses = row["touches"] - row["hits"]
        assert 1000 * misses <= row["bytes_read"] <= 2000 * misses
        assert row["ms_per_token"] > 0
    assert rows[0]["hits"] == rows[1]["hits"]  # 25 % of 16 are 4 slots
    by = {(r["policy"], str(r["capacity"])): r["hits"] for r in rows}
    assert by["belady-bypass", "{'slots': 4}"] >= by["belady", "{'slots': 4}"] >= by["lru", "{'slots': 4}"]


@pytest.mark.parametrize("scope", ["layer", "global", "group"])
@pytest.mark.parametrize("phase", ["decode", "prefill", "all"])
@pytest.mark.parametrize("contract", ["event", "bigmoeonedge", "sequential"])
def test_every_choice_gives_rows(scope, phase, contract, tmp_path):
    """Every scope, phase and contract replays a trace of both phases."""
    options = ["--scope", scope, "--phase", phase, "--contract", contract, "--capacities", "100%"]
    status, out, err = run("compare", bigmoeonedge(tmp_path), "--json", *options)
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows) == 5
    assert {row["scope"] for row in rows} == {scope}
    assert ("sequential" in err) == (contract == "sequential")


def test_what_cannot_be_replayed_is_told(trace_path):
    """Too few slots are refused by name beside rows that can be; if nothing can, the command fails."""
    status, out, err = run("compare", trace_path, "--json", "--policies", "lru,belady-bypass", "--capacities", "1")
    assert status == 0
    made = json.loads(out)
    assert [row["policy"] for row in made["rows"]] == ["belady-bypass"]
    assert made["refused"][0]["policy"] == "lru"
    assert "2 experts of one event" in err.replace("\n", " ")
    status, _, err = run("compare", trace_path, "--json", "--policies", "lru", "--capacities", "1")
    assert status == 1
    assert "must admit" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--policies", "best"],
        ["--capacities", "110%"],
        ["--capacities", "x"],
        ["--machine", "abacus"],
        ["--policies", ","],
    ],
)
def test_wrong_words_are_one_line(words, trace_path):
    """What does not exist is refused without a traceback, with what exists."""
    status, _, err = run("compare", trace_path, *words)
    assert status in (1, 2)
    assert "Error" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("columns", [80, 140])
def test_tables_fit_a_terminal(columns, trace_path, monkeypatch):
    """Tables of the three commands have what they promise, and the resident layers of the same bytes."""
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run("compare", trace_path, "--capacities", "25%,50%")
    assert status == 0
    assert "belady-bypass" in out
    assert "as 0 of 3 layers" in out
    assert "LRU has hits from 2 slots per pool" in out
    status, out, _ = run("usage", trace_path)
    assert status == 0
    assert "uniform router" in out
    status, out, _ = run("predict", trace_path, "--capacities", "25%")
    assert status == 0
    assert "previous-layer" in out


def test_sizes_stay_in_the_order_in_which_they_were_given(trace_path):
    """A size that only the last policy can be replayed at keeps its place."""
    out = run("compare", trace_path, "--policies", "lru,belady-bypass", "--capacities", "1,4,8")[1]
    assert [line.split()[0] for line in out.splitlines() if " slots  " in line] == ["size", "1", "4", "8"]


def test_a_sweep_that_does_not_fit_is_warned_of(trace_path):
    """One pool for all layers below a token's sweep hits nothing, and the size where hits begin is told."""
    status, _, err = run("compare", trace_path, "--scope", "global", "--policies", "lru", "--capacities", "3,30")
    assert status == 0
    assert "hits begin at" in " ".join(err.split())


def test_bytes_can_be_stated(tmp_path):
    """A trace without bytes has hit rates only, until bytes are stated."""
    path = onnx_genai(tmp_path)
    rows = json.loads(run("compare", path, "--json", "--capacities", "100%")[1])["rows"]
    assert rows[0]["bytes_read"] is None
    rows = json.loads(run("compare", path, "--json", "--capacities", "100%", "--expert-bytes", "1MiB")[1])["rows"]
    assert rows[0]["bytes_read"] == (rows[0]["touches"] - rows[0]["hits"]) << 20


def test_usage_counts_what_is_used(trace_path):
    """Counts by layer and expert sum to the touches; unions grow with the tokens."""
    made = json.loads(run("usage", trace_path, "--json")[1])
    assert [sum(row) for row in made["counts"]] == [240, 240, 240]
    unions = {u["tokens"]: u for u in made["unions"]}
    assert unions[1]["consecutive"] == 2
    assert 2 < unions[2]["consecutive"] <= 4
    assert 2 < unions[2]["independent"] <= 4
    assert unions[2]["uniform"] == pytest.approx(16 * (1 - (1 - 2 / 16) ** 2))
    assert unions[4]["independent"] is None


def test_the_oracle_prefetcher_is_always_right(trace_path):
    """Perfect guesses cover every miss and waste nothing; others are between."""
    words = ["predict", trace_path, "--json", "--capacities", "25%", "--prefetchers", "oracle,both,popularity,previous"]
    rows = {r["prefetcher"]: r for r in json.loads(run(*words)[1])["rows"]}
    assert (rows["oracle"]["recall"], rows["oracle"]["precision_missing"], rows["oracle"]["covered"]) == (1, 1, 1)
    assert rows["oracle"]["wasted_bytes"] == 0
    for name in ("both", "popularity", "previous"):
        assert 0 <= rows[name]["recall"] < 1
    assert rows["previous"]["covered"] < rows["popularity"]["covered"]  # what was just used is there
    assert rows["popularity"]["wasted_bytes"] > 0


def test_an_own_prefetcher_is_plugged_in_by_name(trace_path, tmp_path, monkeypatch):
    """``module:Class`` of the current folder scores as the compiled one with the same rule; what is wrong with it is told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guess_mine.py").write_text(
        "import numpy as np\nfrom pyggml.lab.predict import Online, Prefetcher\n"
        "class Same(Online):\n    pass\n"
        "class Short(Online):\n    def scores(self, layer):\n        return np.zeros(3)\n"
        "class Deaf(Prefetcher):\n    def scores(self, layer):\n        return np.ones(self.n_expert)\n"
        "class Asks(Online):\n    def __init__(self, more):\n        pass\n"
    )
    words = ["predict", trace_path, "--capacities", "25%", "--prefetchers"]
    online, own = json.loads(run(*words, "online,guess_mine:Same", "--json")[1])["rows"]
    assert own == online | {"prefetcher": "guess_mine:Same"}
    for name, told in (
        ("Short", "Short.scores() returned an array of shape (3,); a layer has 16 experts"),
        ("Deaf", "Deaf lacks saw"),
        ("Asks", "must be made by Asks()"),
        ("Nothing", "has no class 'Nothing' that is a Prefetcher"),
    ):
        status, _, err = run(*words, f"guess_mine:{name}")
        assert (status, told in " ".join(err.split())) == (1, True), err
    assert "there is no prefetcher 'no_such:Class'" in run(*words, "no_such:Class")[2]


def _data(page):
    """Return the data in a page."""
    text = page.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_pages_have_the_numbers_of_the_json(trace_path, tmp_path):
    """`usage --html` and `predict --html` draw what `--json` prints in the same call."""
    page = tmp_path / "page.html"
    made = json.loads(run("usage", trace_path, "--json", "--html", page)[1])
    drawn = _data(page)["usage"]
    assert drawn["unions"] == made["unions"]
    shares = np.array(made["counts"]) / np.array(made["events"])[:, None]
    np.testing.assert_allclose(drawn["shares"], shares, atol=1e-4)
    made = json.loads(run("predict", trace_path, "--json", "--html", page)[1])
    assert _data(page)["scores"] == made["rows"]


@pytest.mark.parametrize("command", ["compare", "usage", "predict"])
def test_a_page_does_not_replace_a_trace(command, trace_path, tmp_path):
    """A page over the trace that it is of, or in a folder that is not there, is refused before anything is read."""
    before = trace_path.read_bytes()
    status, _, err = run(command, trace_path, "--html", trace_path)
    assert status == 2
    assert "overwritten" in err
    assert trace_path.read_bytes() == before
    assert run(command, trace_path, "--html", tmp_path / "no" / "page.html")[0] == 2


def test_a_prompt_needs_a_model(trace_path):
    """A trace has its own prompt."""
    status, _, err = run("usage", trace_path, "--prompt", "Why?")
    assert status == 2
    assert "MODEL.gguf" in err
