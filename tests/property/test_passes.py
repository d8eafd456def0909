"""The passes, and all that follows from them, against the literal port on random cases."""

from __future__ import annotations

import json

import pytest
from cases.graph import Json
from cases.strategies import cases, moe_cases
from hypothesis import HealthCheck, given, settings
from oracle.port import Port
from oracle.port_alloc import is_view_op
from oracle.port_trace import port_trace
from oracle.traces import DECISIONS, differences

from pyggml.dialect import DIALECTS
from pyggml.replay import parse_case, replay

ALWAYS = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _replay(case: Json, version: str) -> list[Json]:
    """Replay a case; the records pass through JSON, as those of a file do."""
    return json.loads(json.dumps(replay(parse_case(dict(case)), dialect=DIALECTS[version])["steps"]))


def _assert_agrees(case: Json, version: str) -> None:
    case = json.loads(json.dumps(case))
    got = _replay(case, version)
    for record in got:
        if record["op"] == "compute":
            record.pop("result", None)  # the port computes nothing
    assert differences(port_trace(case, version), got, DECISIONS) == []


@pytest.mark.parametrize("version", DIALECTS)
@ALWAYS
@given(case=cases())
def test_random_graphs_are_decided_as_the_port_decides(version: str, case: Json) -> None:
    """Assignments, splits, copies, the allocator's graph, sizes and offsets are the port's on random graphs."""
    _assert_agrees(case, version)


@pytest.mark.parametrize("version", DIALECTS)
@settings(ALWAYS, max_examples=12)
@given(case=moe_cases())
def test_moe_graphs_are_decided_as_the_port_decides(version: str, case: Json) -> None:
    """Assignments, splits, copies, the allocator's graph, sizes and offsets are the port's on real models' graphs."""
    _assert_agrees(case, version)


@ALWAYS
@given(case=cases(may_fail=False))
def test_each_node_is_assigned_where_it_can_run(case: Json) -> None:
    """Each computed node lies in a split of its own backend, which supports its op unless the user pinned it there."""
    port = Port(case)
    tensors = {key: {t["id"]: t for t in graph["tensors"]} for key, graph in case["graphs"].items()}
    pinned: set[str] = set()
    for step, record in zip([{"op": "sched_new"}, *case["steps"]], _replay(case, "0.26"), strict=False):
        if step["op"] in ("reset", "reserve"):
            pinned.clear()
        if step["op"] == "pin":
            pinned.add(step["tensor"])
        if step["op"] == "build":
            port.build(step["graph"])
        state = record.get("state")
        if state is None or "tensor_backend" not in state:
            continue
        copies = [t for by_backend in state["copies"].values() for made in by_backend.values() for t in made]
        described = tensors[step["graph"]]
        own = [(n, b) for n, b in state["copy_nodes"] if n not in copies and n in described]
        computed = [(n, b) for n, b in own if not is_view_op(described[n].get("op", "NONE"))]
        ranges = [s for s in state["splits"] for _ in range(s["i_start"], s["i_end"])]
        assert len(ranges) == len(own)
        for name, backend in computed:
            assert state["tensor_backend"][name] == backend
            tensor = port.graphs[step["graph"]].tensors[name]
            assert name in pinned or port.supports_op(backend, tensor), name
        for split, (name, backend) in zip(ranges, own, strict=True):
            assert is_view_op(described[name]["op"]) or split["backend"] == backend
