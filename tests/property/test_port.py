"""The literal port itself, against traces recorded from the real scheduler: what vouches for pyggml is vouched for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from cases.graph import Json
from oracle.port_trace import port_trace
from oracle.traces import DECISIONS, differences

from pyggml.dialect import DIALECTS

CASES = sorted((Path(__file__).parent.parent / "replay" / "cases").glob("*.case.json.gz"))
SUFFIXES = {
    "0.20": ".trace.json.gz",
    "0.21": ".trace021.json.gz",
    "0.26": ".trace026.json.gz",
    "0.27": ".trace027.json.gz",
}
#: Upstream goes on with sources that name freed copies; the port does not guess what it reads there.
UNDEFINED = {"145-special-alloc-fails"}


def _load(path: Path) -> Json:
    return json.loads(gzip.decompress(path.read_bytes()))


def _recorded(case: Path, version: str) -> list[Json]:
    """The records of a version, or of the last before it that differs; without results of computing."""
    versions = list(SUFFIXES)[: list(SUFFIXES).index(version) + 1]
    paths = [case.with_name(case.name.replace(".case.json.gz", SUFFIXES[v])) for v in versions]
    records = _load([p for p in paths if p.exists()][-1])["steps"]
    return [{k: v for k, v in r.items() if not (r["op"] == "compute" and k == "result")} for r in records]


@pytest.mark.parametrize(
    ("version", "part"),
    [*((v, len(SUFFIXES)) for v in DIALECTS), *(pytest.param(v, 1, marks=pytest.mark.slow) for v in DIALECTS)],
)
def test_port_decides_as_recorded(version: str, part: int) -> None:
    """On every recorded case the port's decisions are the real scheduler's, in every version; `make test` shares the cases out."""
    differing = {}
    for path in CASES[list(DIALECTS).index(version) % part :: part]:
        if any(name in path.name for name in UNDEFINED):
            continue
        found = differences(_recorded(path, version), port_trace(_load(path), version), DECISIONS)
        if found:
            differing[path.name] = found
    assert len(CASES) > 150
    assert differing == {}
