"""The scheduler, call for call, against the real `ggml_backend_sched` on random and on realistic graphs.

Cases are drawn by Hypothesis, so that a difference shrinks to a small counterexample. The real library (0.20.2) runs
in a child process; pyggml replays in dialect 0.20.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from oracle.live_sched import LiveScheduler, compile_mock
from oracle.traces import differences

from pyggml.dialect import DIALECTS
from pyggml.replay import parse_case, replay
from pyggml.testing.case_graph import Json
from pyggml.testing.strategies import cases, moe_cases

ALWAYS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
RECORDED = Path(__file__).parent.parent / "replay" / "cases"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveScheduler]:
    """The real scheduler, in a process of its own."""
    with LiveScheduler() as live:
        yield live


def _replay(case: Json) -> list[Json]:
    """Replay in the library's dialect; the records pass through JSON, as the library's do."""
    records: list[Json] = json.loads(json.dumps(replay(parse_case(dict(case)), dialect=DIALECTS["0.20"])["steps"]))
    return records


def _assert_same(live: LiveScheduler, case: Json) -> None:
    assert differences(live.trace(case), _replay(case)) == []


@settings(ALWAYS, max_examples=150)
@given(case=cases())
def test_random_graphs(live: LiveScheduler, case: Json) -> None:
    """On random graphs and machines every decision and every call is the real scheduler's."""
    _assert_same(live, case)


@settings(ALWAYS, max_examples=100)
@given(case=cases(may_fail=False))
def test_random_graphs_without_failures(live: LiveScheduler, case: Json) -> None:
    """The same where nothing fails, so that cases run to their end."""
    _assert_same(live, case)


@settings(ALWAYS, max_examples=12)
@given(case=moe_cases(names=("tiny", "tiny-odd")))
def test_small_moe_graphs(live: LiveScheduler, case: Json) -> None:
    """On small mixtures of experts, over one to three devices, every decision and every call is the real scheduler's."""
    _assert_same(live, case)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gpt-oss"])
def test_realistic_moe_graphs(live: LiveScheduler, name: str) -> None:
    """On the graphs of published models, experts of full size, every decision and every call is the real scheduler's."""

    @settings(ALWAYS, max_examples=8)
    @given(case=moe_cases(names=(name,)))
    def check(case: Json) -> None:
        _assert_same(live, case)

    check()


@pytest.mark.parametrize("name", ["000-random", "060-moe", "126-special", "135-special", "167-special", "192-special"])
def test_library_reproduces_its_recorded_traces(live: LiveScheduler, name: str) -> None:
    """The library, asked here and now, gives the traces that were recorded from it: the kit asks it rightly."""
    path = next(p for p in sorted(RECORDED.glob("*.case.json.gz")) if p.name.startswith(name))
    case = json.loads(gzip.decompress(path.read_bytes()))
    recorded = path.with_name(path.name.replace(".case.", ".trace."))
    assert differences(json.loads(gzip.decompress(recorded.read_bytes()))["steps"], live.trace(case)) == []


def test_an_abort_ends_a_trace_and_not_the_child(live: LiveScheduler) -> None:
    """After a case that the library aborts on, the same child answers the next."""
    path = next(RECORDED.glob("104-*.case.json.gz"))
    case = json.loads(gzip.decompress(path.read_bytes()))
    for _ in range(2):
        last = live.trace(case)[-1]
        assert last["op"] == "compute"
        assert "id >= 0 && id < n_expert" in last["abort"]["message"]


def test_without_a_compiler_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no C compiler is found the kit refuses with what it looked for; nothing is skipped silently."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        compile_mock()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_soak(live: LiveScheduler, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand random graphs (PYGGML_SOAK_GRAPHS), new ones each time, without a difference.

    The seed is printed; PYGGML_SOAK_SEED repeats a run.
    """
    n_graphs = int(os.environ.get("PYGGML_SOAK_GRAPHS", "10000"))
    first_seed = int(os.environ.get("PYGGML_SOAK_SEED") or random.SystemRandom().randrange(2**32))
    done = 0
    with capsys.disabled():
        print(f"\nsoak: seed {first_seed}, {n_graphs} graphs")
    for round_ in range(1_000_000):

        @seed(first_seed + round_)
        @settings(ALWAYS, derandomize=False, max_examples=200, phases=[Phase.generate, Phase.shrink])
        @given(case=moe_cases() if round_ % 5 == 4 else cases(may_fail=round_ % 2 == 0))
        def check(case: Json) -> None:
            nonlocal done
            done += len(case["graphs"])
            _assert_same(live, case)

        check()
        with capsys.disabled():
            print(f"soak: {done} graphs agree, seeds {first_seed} to {first_seed + round_}")
        if done >= n_graphs:
            break
