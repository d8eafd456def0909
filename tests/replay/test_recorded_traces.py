"""Replays of every recorded case, in each dialect, agree with the real scheduler in every section."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from oracle.compare import SECTIONS, Comparison, compare, load, outcome, recorded

from pyggml.dialect import DIALECTS
from pyggml.replay import read_case, replay

CASES = sorted((Path(__file__).parent / "cases").glob("*.case.json.gz"))
N_CHUNKS = 8

#: How many cases the real scheduler does not survive; a replay must go on or end with an error of ours.
BROKEN_UPSTREAM = {
    "0.20": {"improved": 19, "same": 2, "undefined": 2},
    "0.21": {"improved": 19, "same": 2, "undefined": 2},
    "0.26": {"improved": 20, "same": 2, "undefined": 1},
    "0.27": {"improved": 20, "same": 2, "undefined": 1},
}


@cache
def _compare(path: Path) -> dict[str, Comparison]:
    """Replay one case in each dialect and compare; traces pass through JSON, as those in files do."""
    case, raw = read_case(path), load(path)
    compared = {}
    for version, dialect in DIALECTS.items():
        got = json.loads(json.dumps(replay(case, dialect=dialect)))
        is_undefined = outcome(raw, version) == "undefined"
        compared[version] = compare(recorded(path, version), got, is_undefined=is_undefined)
    return compared


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_every_section_agrees(chunk: int) -> None:
    """Order, assignments, splits, copies, sizes, offsets and calls are those of the recorded version."""
    differing = {
        f"{path.name}, {version}": found.differences
        for path in CASES[chunk::N_CHUNKS]
        for version, found in _compare(path).items()
        if found.differences
    }
    assert differing == {}


@pytest.mark.parametrize("version", DIALECTS)
def test_replays_go_on_where_upstream_breaks(version: str) -> None:
    """Where upstream aborts or crashes the replay goes on, but for schedulers that cannot be made."""
    broken = [p for p in CASES if outcome(load(p), version) in ("abort", "crash", "undefined")]
    assert Counter(_compare(p)[version].ending for p in broken) == BROKEN_UPSTREAM[version]


def test_cases_are_all_there() -> None:
    """No recorded case was lost."""
    assert len(CASES) == 194


def test_comparison_sees_every_section() -> None:
    """A change of any compared value of a trace is reported in the section that it belongs to."""
    path = next(p for p in CASES if p.name.startswith("000-"))
    trace = recorded(path, "0.20")
    i_alloc = next(i for i, step in enumerate(trace["steps"]) if step["op"] == "alloc_graph")
    i_build = next(i for i, step in enumerate(trace["steps"]) if step["op"] == "build")

    def changed(i_step: int, change) -> set[str]:
        copy = json.loads(json.dumps(trace))
        change(copy["steps"][i_step])
        return set(compare(trace, copy).differences)

    assert changed(i_build, lambda s: s["nodes"].reverse()) == {"build"}
    state_keys = {
        "assign": "tensor_backend",
        "splits": "splits",
        "copies": "copies",
        "graph_copy": "copy_nodes",
        "sizes": "buffer_sizes",
        "offsets": "alloc",
    }
    for section, key in state_keys.items():
        assert changed(i_alloc, lambda s, key=key: s["state"].pop(key)) == {section}
    assert changed(i_alloc, lambda s: s.update(result=False)) == {"results"}
    assert changed(i_alloc, lambda s: s["calls"].append(["sync", 0])) == {"calls"}
    assert changed(i_alloc, lambda s: s["calls"].append(["free", "x", 1])) == {"memory_calls"}
    assert changed(i_alloc, lambda s: s.update(abort={})) == {"aborts"}
    assert {*state_keys, "build", "results", "calls", "memory_calls", "aborts"} == set(SECTIONS)
