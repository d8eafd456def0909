"""Graphs that follow a precedent are decided as if there were none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cases.graph import Json
from cases.strategies import cases, moe_cases
from hypothesis import HealthCheck, given, settings

from pyggml.dialect import DIALECTS
from pyggml.replay import Replay, parse_case
from pyggml.replay.case import Step
from pyggml.sched import precedent

SETTINGS = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
N_KEPT = precedent.N_KEPT


class Followed:
    """Counts the graphs that followed a precedent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        follow = precedent._follow

        def counting(*arguments: Any) -> None:
            self.n += 1
            follow(*arguments)

        monkeypatch.setattr(precedent, "_follow", counting)


def _run(case: Json, version: str, n_kept: int) -> list[Any]:
    """Return all calls, states and causes of a case whose steps are made three times."""
    parsed = parse_case(case)
    run = Replay(parsed, DIALECTS[version])
    records: list[Any] = []
    before, precedent.N_KEPT = precedent.N_KEPT, n_kept
    try:
        for step in (Step("sched_new"), *parsed.steps, *parsed.steps, *parsed.steps):
            record = run.step(step)
            sched = run.sched
            causes = [(t.name, c.value) for t, c in sched.assignment.causes.items()] if sched is not None else []
            places = [] if sched is None else [(t.name, t.data, t.buffer is None) for t in sched.sched_graph.nodes]
            records.append([step.op, record, run.take_calls(), sorted(causes), places])
            if "error" in record:
                break
    finally:
        precedent.N_KEPT = before
    return json.loads(json.dumps(records))


@pytest.mark.parametrize("version", ["0.20", "0.27"])
def test_random_graphs_follow_precedents_to_the_same_end(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, splits, copies, offsets and causes of repeated random graphs are those of a scheduler that keeps nothing."""
    followed = Followed(monkeypatch)

    @SETTINGS
    @given(case=cases(may_fail=False))
    def check(case: Json) -> None:
        case = json.loads(json.dumps(case))
        assert _run(case, version, N_KEPT) == _run(case, version, 0)

    @settings(SETTINGS, max_examples=3)
    @given(case=moe_cases())
    def check_moe(case: Json) -> None:
        case = json.loads(json.dumps(case))
        assert _run(case, version, N_KEPT) == _run(case, version, 0)

    check()
    check_moe()
    assert followed.n > 20  # Hypothesis draws other graphs when other modules are loaded
