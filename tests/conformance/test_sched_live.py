"""The scheduler, call for call, against the real `ggml_backend_sched` on random and on realistic graphs.

Cases are drawn by Hypothesis, so that a difference shrinks to a small counterexample. Real libraries run in child
processes: ggml 0.20.2 of the package libggml-python, and llama.cpp b11549 of xllamacpp with its own copy callback; pyggml
replays in the dialect that each is found to go by. ``make soak`` takes any other that PYGGML_NEWER_GGML names: a shared
object, or a folder with ``libggml-base.so`` and ``libllama.so``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cases.graph import Json
from cases.strategies import cases, moe_cases
from hypothesis import HealthCheck, Phase, given, seed, settings
from oracle.compare import load, recorded
from oracle.live_sched import LiveScheduler, compile_mock
from oracle.traces import differences

from pyggml.dialect import DIALECTS, Dialect
from pyggml.replay import parse_case, replay

ALWAYS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
RECORDED = Path(__file__).parent.parent / "replay" / "cases"


def b11549() -> str:
    """Return the shared object of xllamacpp, which is of the test extra."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None, "xllamacpp is not installed: pip install -e '.[test]'"
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("*.so")))


@pytest.fixture(scope="module", params=["0.20.2", "b11549"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveScheduler]:
    """The real scheduler, in a process of its own."""
    with LiveScheduler(None if request.param == "0.20.2" else b11549()) as live:
        yield live


def _replay(case: Json, dialect: Dialect) -> list[Json]:
    """Replay; the records pass through JSON, as the library's do."""
    records: list[Json] = json.loads(json.dumps(replay(parse_case(dict(case)), dialect=dialect)["steps"]))
    return records


def _assert_same(live: LiveScheduler, case: Json) -> None:
    assert differences(live.trace(case), _replay(case, live.dialect)) == []


def test_rules_are_found_by_what_is_exported(live: LiveScheduler) -> None:
    """B11549 says that its ggml is 0.26.0; it has a copy callback and no realloc callback, which makes it 0.27's."""
    expected = {
        "0.20.2": DIALECTS["0.20"],
        "0.26.0": replace(DIALECTS["0.27"], realloc_callback=False),
    }
    assert live.dialect == expected[live.says]


@settings(ALWAYS, max_examples=100)
@given(case=cases())
def test_random_graphs(live: LiveScheduler, case: Json) -> None:
    """On random graphs and machines every decision and every call is the real scheduler's."""
    _assert_same(live, case)


@settings(ALWAYS, max_examples=60)
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
    """The library, asked here and now, gives the traces that were recorded from its version: the kit asks it rightly."""
    path = next(p for p in sorted(RECORDED.glob("*.case.json.gz")) if p.name.startswith(name))
    trace = recorded(path, live.dialect.version)
    assert differences(trace["steps"], live.trace(load(path))) == []


def test_an_abort_ends_a_trace_and_not_the_child(live: LiveScheduler) -> None:
    """After a case that the library aborts on, the same child answers the next."""
    path = next(RECORDED.glob("104-*.case.json.gz"))
    for _ in range(2):
        last = live.trace(load(path))[-1]
        assert last["op"] == "compute"
        assert "id >= 0 && id < n_expert" in last["abort"]["message"]


@pytest.mark.parametrize("second", [["x x", "a a", "b b", "c a"], ["x x", "x x", "a b", "c c"]])
def test_a_graph_in_the_layout_of_another(
    second: list[str], live: LiveScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of the same sizes with other sources lies where the one before lay, although `c` overwrites `a` or `b`."""
    monkeypatch.setenv("PYGGML_CHECK", "1")
    graphs: dict[str, Json] = {}
    steps: list[Json] = []
    x = {"id": "x", "type": "f32", "ne": [64, 1, 1, 1], "flags": ["input"]}
    for name, sums in (("g0", ["x x", "a a", "b b", "c c"]), ("g1", second)):
        nodes = [{**x, "id": i, "op": "ADD", "src": s.split(), "flags": []} for i, s in zip("abcd", sums, strict=True)]
        graphs[name] = {"tensors": [x, *nodes], "expand": ["d"]}
        steps += [{"op": op, "graph": name} for op in ("reset", "build", "alloc_graph", "compute")]
    case: Json = {
        "format": "pyggml-sched-case/1",
        "name": "other sources",
        "buffer_types": [{"name": "CPU", "host": True, "alignment": 64}],
        "backends": [{"name": "CPU", "device": "CPU", "buft": "CPU", "bufts": ["CPU"], "ops": "all", "caps": {}}],
        "tensors": [],
        "buffers": [],
        "graphs": graphs,
        "sched": {"graph_size": 64, "parallel": False, "op_offload": False},
        "steps": steps,
    }
    _assert_same(live, case)
    first, then = (r["state"]["alloc"] for r in live.trace(case) if r["op"] == "alloc_graph")
    assert {name: then[name] for name in "abcd"} == {name: first[name] for name in "abcd"}
    assert then["a"] == then["c"]


def test_ids_that_are_a_host_weight_choose_wrong_experts_upstream(live: LiveScheduler) -> None:
    """An i32 table in host memory: 0.27 reads its copy before it is made, and so does our replay; earlier ones do not."""
    case = load(next(RECORDED.glob("106-*.case.json.gz")))
    ids = next(t for t in case["graphs"]["g"]["tensors"] if t["id"] == "ids")
    table = {**ids, "flags": []}
    case["graphs"]["g"]["tensors"].remove(ids)
    case["tensors"].append(table)
    case["buffers"][0]["tensors"].append("ids")
    for step in case["steps"]:
        if step.get("tensor") == "ids":
            step["graph"], step["i32"] = None, [3, 5] * 64
    trace = live.trace(case)
    assert differences(trace, _replay(case, live.dialect)) == []
    copied = [call[3] for record in trace for call in record["calls"] if call[0] == "set_async" and "w0" in call[2]]
    size = 64 * 64 // 32 * 34
    # the memory of the copy is zero still
    assert copied == ([0] if live.dialect.ids_from == "copy" else [3 * size, 5 * size])


def test_without_a_compiler_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no C compiler is found the kit refuses with what it looked for; nothing is skipped silently."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        compile_mock()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("library", ["0.20.2", "b11549", "PYGGML_NEWER_GGML"])
def test_soak(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand random graphs (PYGGML_SOAK_GRAPHS) for each library, new ones each time, without a difference.

    The seed is printed; PYGGML_SOAK_SEED repeats a run.
    """
    n_graphs = int(os.environ.get("PYGGML_SOAK_GRAPHS", "10000"))
    first_seed = int(os.environ.get("PYGGML_SOAK_SEED") or random.SystemRandom().randrange(2**32))
    done = 0
    path = {"0.20.2": None, "b11549": b11549()}.get(library, os.environ.get(library))
    if library == "PYGGML_NEWER_GGML" and path is None:
        pytest.skip("PYGGML_NEWER_GGML names no library")
    live = LiveScheduler(path)
    with capsys.disabled():
        print(f"\nsoak: {library}, which says {live.says}: seed {first_seed}, {n_graphs} graphs")
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
    live.close()
