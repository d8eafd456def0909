"""Replays by contract, against a plain simulator written here and against each other."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import cli
from pyggml.errors import FormatError, GraphError
from pyggml.lab import Trace, open_trace, save_trace
from pyggml.lab.cache import Cache, Eviction
from pyggml.lab.policies import POLICIES, parse_policy
from pyggml.lab.pools import Capacity, Pools, parse_capacities
from pyggml.lab.replay import Refusal, Result, Setting, lru_begins, replay
from pyggml.lab.trace import TraceBuilder

CAUSAL = [name for name, p in POLICIES.items() if p.make is not None and not p.fit]
LLAMA = ("llama-lru", "llama-slru")
ADMISSIONS = ("+always", "+2of3", "+hotter:2", "+atmost:1", "+next")
#: Those whose compiled replay in bytes lets an event exceed the budget, as the engine does; objects refuse it.
SIZED = ("lru", "lfu", "lfu-decay", "lfru", "fifo", "least-stale")


def make(steps, *, n_layer=2, n_expert=6, n_used=2, sizes=None, requests=1, phase=1):
    """Return a trace of steps: by layer, the ids of one row or several."""
    builder = TraceBuilder("made")
    for request in range(requests):
        for step, layers in enumerate(steps if requests == 1 else steps[request]):
            for layer, rows in enumerate(layers):
                builder.add(request, step, phase, layer, rows if isinstance(rows[0], (list, tuple)) else [rows])
    table = None if sizes is None else np.array(sizes, np.int64).reshape(n_layer, -1)
    return builder.finish(n_layer=n_layer, n_expert=n_expert, n_used=n_used, expert_bytes=table)


@st.composite
def traces(draw, *, most_rows=2, even=True):
    """Draw a trace of at most two layers with few experts, so that caches of every size are met."""
    n_layer, n_expert, n_used = draw(st.integers(1, 2)), draw(st.integers(3, 7)), draw(st.integers(1, 2))
    row = st.permutations(range(n_expert)).map(lambda ids: list(ids[:n_used]))
    rows = st.lists(row, min_size=1, max_size=most_rows)
    steps = draw(st.lists(st.tuples(*[rows] * n_layer), min_size=1, max_size=14))
    sizes = [[3]] * n_layer if even else [[3], [5]][:n_layer]
    return make(steps, n_layer=n_layer, n_expert=n_expert, n_used=n_used, sizes=sizes)


def plain(trace, policy, slots, scope):
    """Return hits by the contract's words, as slowly as they are said."""
    keyed = []
    for event in range(trace.n_event):
        layer = int(trace.layer[event])
        ids = [i for i in trace.rows(event).ravel().tolist() if i >= 0]
        ordered = list(dict.fromkeys(reversed(ids)))[::-1]
        keyed.append(("all" if scope == "global" else layer, [(layer, i) for i in ordered]))
    hits = 0
    for pool in dict.fromkeys(p for p, _ in keyed):
        events = [keys for p, keys in keyed if p == pool]
        cache: set = set()
        count: dict = {}
        last: dict = {}
        stamp: dict = {}
        clock = 0
        for t, keys in enumerate(events):
            hits += sum(key in cache for key in keys)
            for key in keys:
                clock += 1
                count[key], last[key], stamp[key] = count.get(key, 0) + 1, t, clock
            cache |= set(keys)

            def worth(key, t=t, events=events, count=count, last=last, stamp=stamp):
                after = next((i for i in range(t + 1, len(events)) if key in events[i]), 1 << 60)
                value = {"lru": 0, "lfu": count[key], "lfru": count[key] / (t - last[key] + 1)}.get(policy, -after)
                return (value, stamp[key])

            while len(cache) > slots:
                cache.remove(min(cache - set(keys) if policy != "belady-bypass" else cache, key=worth))
    return hits


@settings(max_examples=60, deadline=None)
@given(traces(), st.sampled_from(["layer", "global"]), st.data())
def test_replays_say_what_the_contract_says(trace, scope, data):
    """All policies and sizes of the compiled replays equal a plain simulator of the contract's words."""
    least = max(len(set(trace.rows(e).ravel().tolist())) for e in range(trace.n_event))
    slots = data.draw(st.integers(least, trace.n_expert * (2 if scope == "global" else 1)))
    names = ["lru", "lfu", "lfru", "belady", "belady-bypass"]
    for result in replay(trace, names, [Capacity(slots=slots)], Setting(scope, "all")):
        assert isinstance(result, Result)
        assert result.hits == plain(trace, result.policy.name, slots, scope), result.policy.name


def check_objects(trace, names, capacity, setting):
    """Compare the compiled replays of policies with those of their objects, which can run: hits, bytes, preload, refusals."""
    for name in names:
        policy = parse_policy(name)
        assert policy.code is not None
        fast, slow = (next(iter(replay(trace, [p], [capacity], setting))) for p in (policy, changed(policy, code=None)))
        if isinstance(fast, Result) and isinstance(slow, Result):
            assert (fast.requests, fast.preload_bytes) == (slow.requests, slow.preload_bytes), (name, capacity, setting)
        else:
            assert (type(fast), fast.reason) == (type(slow), slow.reason), (name, capacity, setting)


def with_admissions(names):
    """Return policies with each admission."""
    return [f"{name}{rule}" for name in names for rule in ADMISSIONS]


@settings(max_examples=60, deadline=None)
@given(traces(most_rows=3), st.sampled_from(["layer", "global"]), st.data())
def test_objects_replay_what_compiled_code_replays(trace, scope, data):
    """Every eviction with every admission decides as its objects do, and llama.cpp's two in its groups, too."""
    capacity = Capacity(slots=data.draw(st.integers(1, trace.n_expert)))
    check_objects(trace, [*CAUSAL, *with_admissions(CAUSAL), *LLAMA], capacity, Setting(scope, "all"))
    check_objects(trace, LLAMA, capacity, Setting("group", "all"))


@settings(max_examples=40, deadline=None)
@given(traces(most_rows=3), traces(most_rows=3), st.sampled_from(["layer", "global"]), st.data())
def test_fitted_objects_replay_what_compiled_code_replays(trace, other, scope, data):
    """Static and half pinned sets of another request, or of the same, decide as objects do, and load as many bytes before."""
    try:
        both = Trace.joined([trace, other])
    except FormatError:
        both = Trace.joined([trace, trace])
    names = ("static", "static-same-trace", "half-pinned")
    capacity = Capacity(slots=data.draw(st.integers(1, trace.n_expert)))
    check_objects(both, [*names, *with_admissions(names)], capacity, Setting(scope, "all"))


@settings(max_examples=40, deadline=None)
@given(traces(most_rows=3, even=False), st.integers(3, 60))
def test_objects_share_bytes_as_compiled_code_does(trace, budget):
    """With experts of 3 and 5 bytes in one pool, and in the engine's contract, compiled code decides as objects do."""
    names = [*(n for n in CAUSAL if n not in SIZED), *with_admissions(CAUSAL)]
    check_objects(trace, names, Capacity(n_bytes=budget), Setting("global", "all"))
    check_objects(trace, names, Capacity(n_bytes=budget), Setting("global", contract="bigmoeonedge"))


def test_long_traces_replay_as_objects_do():
    """Over hundreds of events, in which lists of ARC and CLOCK turn over many times, each touch is judged as by the object."""
    rng = np.random.default_rng(8)
    score = rng.normal(0, 1.2, (1, 2, 24)) + rng.gumbel(size=(400, 2, 24))
    steps = [[ids.tolist() for ids in np.argsort(-layers, axis=1)[:, :4]] for layers in score]
    trace = make(steps, n_layer=2, n_expert=24, n_used=4, sizes=[[3], [3]])
    names = [*CAUSAL, *LLAMA, *with_admissions(("lru", "lfu-decay", "clock", "arc", "slru"))]
    for scope in ("layer", "global"):
        for slots in (5, 20):
            check_objects(trace, names, Capacity(slots=slots), Setting(scope, "all"))
    (result,) = replay(trace, ["arc+hotter"], [Capacity(slots=11)], Setting("layer", "all"))
    assert 0 < result.hits < result.touches


@settings(max_examples=60, deadline=None)
@given(traces(even=False), st.integers(6, 60))
def test_experts_of_unequal_bytes_share_a_budget(trace, budget):
    """With experts of 3 and 5 bytes in one pool no cache holds more than its bytes after an event, whichever policy chose."""
    for name in ("lru", "lfu", "fifo", "lfru", "slru", "arc", "clock"):
        pools = Pools.of(trace, "global")
        cache = Cache(
            budget,
            parse_policy(name).eviction(budget // int(pools.sizes.max()), pools.n_key),
            sizes=pools.sizes[0].tolist(),
        )
        hits = 0
        try:
            for event in range(trace.n_event):
                ids = [i for i in trace.rows(event).ravel().tolist() if i >= 0]
                keys = [int(trace.layer[event]) * trace.n_expert + i for i in list(dict.fromkeys(reversed(ids)))[::-1]]
                hits += len(cache.event(int(trace.step[event]), int(trace.layer[event]), keys).hits)
                assert sum(cache.sizes[key] for key in cache.slot_of) == cache.used <= budget
        except GraphError:
            continue  # an event above the budget
        (result,) = replay(trace, [name], [Capacity(n_bytes=budget)], Setting("global", "all"))
        if isinstance(result, Result):
            assert result.hits == hits


@settings(max_examples=80, deadline=None)
@given(traces(), st.sampled_from(["layer", "global"]), st.data())
def test_no_policy_beats_the_belady_of_its_admission(trace, scope, data):
    """Whatever must admit has at most belady's hits, whatever may decline at most belady-bypass's."""
    slots = data.draw(st.integers(1, trace.n_expert))
    names = [*CAUSAL, "static-same-trace", "lru+hotter", "lru+2of4", "slru+atmost:1", "lfru+next", "belady"]
    best = {}
    for result in replay(trace, ["belady", "belady-bypass"], [Capacity(slots=slots)], Setting(scope, "all")):
        if isinstance(result, Result):
            best[result.policy.must_admit] = result.hits
    for result in replay(trace, names, [Capacity(slots=slots)], Setting(scope, "all")):
        if isinstance(result, Result):
            declining = (result.touches - best[False]) * 3
            assert result.bytes_read >= declining, result.policy.name  # the preload of a static set is read, too
            if result.policy.must_admit:
                assert result.hits <= best[True], result.policy.name


def test_bypass_is_the_best_there_is():
    """On small traces `belady-bypass` has the hits of the best of all ways to keep keys, found by trying them."""
    rng = np.random.default_rng(5)
    for _ in range(15):
        steps = [[rng.permutation(4)[:2].tolist()] for _ in range(6)]
        trace = make(steps, n_layer=1, n_expert=4)
        states = {frozenset(): 0}
        for (keys,) in steps:
            after: dict = {}
            for held, hits in states.items():
                now = hits + len(held & set(keys))
                for kept in itertools.combinations(held | set(keys), 2):
                    after[frozenset(kept)] = max(after.get(frozenset(kept), 0), now)
            states = after
        (result,) = replay(trace, ["belady-bypass"], [Capacity(slots=2)])
        assert result.hits == max(states.values())


@settings(max_examples=40, deadline=None)
@given(traces(), st.sampled_from(["layer", "global"]), st.data())
def test_least_stale_without_prefetch_is_lru(trace, scope, data):
    """Least-Stale differs from LRU by prefetch only."""
    slots = data.draw(st.integers(1, trace.n_expert))
    a, b = replay(trace, ["lru", "least-stale+always"], [Capacity(slots=slots)], Setting(scope, "all"))
    assert (a.requests if isinstance(a, Result) else type(a)) == (b.requests if isinstance(b, Result) else type(b))


def test_a_pool_smaller_than_a_sweep_hits_nothing():
    """One LRU for all layers has no hit up to (layers - 1) x used slots in decode of single tokens, and the size where hits begin is told."""
    rng = np.random.default_rng(3)
    steps = [[[int(e) for e in (0, 1, *rng.permutation(range(2, 8))[:1])] for _ in range(5)] for _ in range(40)]
    trace = make(steps, n_layer=5, n_expert=8, n_used=3)
    setting = Setting("global")
    for slots in range(3, 4 * 3 + 1):
        (result,) = replay(trace, ["lru"], [Capacity(slots=slots)], setting)
        assert result.hits == 0
    begins = lru_begins(trace, setting)["slots"]
    (result,) = replay(trace, ["lru"], [Capacity(slots=begins)], setting)
    assert result.hits > 0
    assert begins > 12


def test_too_few_slots_are_refused_with_their_number():
    """A policy that must admit is refused below one event's experts; one that may decline is not."""
    trace = make([[[0, 1], [2, 3]], [[1, 0], [3, 2]]])
    refused, taken = replay(trace, ["lru", "belady-bypass"], [Capacity(slots=1)])
    assert isinstance(refused, Refusal)
    assert "2 experts of one event" in refused.reason
    assert isinstance(taken, Result)
    assert taken.hits == 2


def test_requests_start_empty_and_static_sets_are_fitted_on_others():
    """Each request starts with an empty cache; a static set is counted on the other requests, and its preload is read."""
    steps = [[[0, 1]], [[0, 1]]]
    other = [[[0, 2]], [[2, 0]]]
    trace = make([steps, other], n_layer=1, requests=2, sizes=[[10]])
    lru, static, same = replay(trace, ["lru", "static", "static-same-trace"], [Capacity(slots=2)])
    assert [r.hits for r in lru.requests] == [2, 2]
    assert lru.bytes_read == 40
    assert [r.hits for r in static.requests] == [2, 2]  # expert 0 twice each
    assert static.preload_bytes == 40
    assert static.bytes_read == 40 + 40
    assert same.hits == 8
    (refused,) = replay(make(steps, n_layer=1), ["static"], [Capacity(slots=2)])
    assert isinstance(refused, Refusal)


def test_requests_that_take_turns_share_a_cache():
    """Where steps of requests alternate, they are one run."""
    builder = TraceBuilder("made")
    for step in range(4):
        builder.add(step % 2, step, 1, 0, [[0, 1]])
    (result,) = replay(builder.finish(n_expert=4), ["lru"], [Capacity(slots=2)])
    assert result.hits == 6


def test_groups_have_banks_with_a_spare_slot():
    """Scope group pools layers of equal projections; a budget in bytes is divided as llama.cpp does it."""
    trace = make([[[0, 1]] * 3] * 2, n_layer=3, sizes=[[256, 512], [256, 512], [512, 512]])
    pools = Pools.of(trace, "group")
    assert pools.layers == [[0, 1], [2]]
    slots = pools.slots(Capacity(n_bytes=10_000))
    # shares by bytes: 2 x 768 and 1024 of 2560; banks of slots + 1
    assert slots.tolist() == [6000 // 768 - 1, min(4000 // 1024 - 1, 6)]


def test_bytes_need_sizes():
    """A capacity in bytes without sizes of experts says what to state."""
    with pytest.raises(GraphError, match="expert-bytes"):
        list(replay(make([[[0, 1], [0, 1]]]), ["lru"], [Capacity(n_bytes=100)]))


def test_the_sequential_contract_takes_ids_one_by_one():
    """Without protection an event's own experts push each other out."""
    trace = make([[[0, 1, 2]], [[0, 1, 2]]], n_layer=1, n_used=3)
    hits = [
        next(iter(replay(trace, ["lru"], parse_capacities("3"), Setting(contract=c)))).hits
        for c in ("event", "sequential")
    ]
    assert hits == [3, 3]
    trace = make([[[0, 1]], [[2, 0]]], n_layer=1)
    event, sequential = (
        next(iter(replay(trace, ["lru"], parse_capacities("2"), Setting(contract=c)))).hits
        for c in ("event", "sequential")
    )
    assert (event, sequential) == (1, 0)


def test_the_engine_contract_refuses_what_stays_above_the_budget(tmp_path):
    """In contract bigmoeonedge one event may stand above the budget, and pools by layer that hold more than it are refused."""
    trace = make([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], sizes=[[10], [10]])
    (result,) = replay(trace, ["lru"], [Capacity(n_bytes=15)], Setting("global", contract="bigmoeonedge"))
    assert isinstance(result, Result)
    (refused,) = replay(trace, ["lru"], [Capacity(n_bytes=15)], Setting("layer", contract="bigmoeonedge"))
    assert isinstance(refused, Refusal)
    assert "above the budget" in refused.reason


def test_objects_count_bytes_in_the_engine_contract():
    """A budget in bytes holds as many experts for a policy's object as for its compiled replay, also where all are of one size."""
    rng = np.random.default_rng(2)
    steps = [[rng.permutation(12)[:2].tolist()] for _ in range(60)]
    trace = make(steps, n_layer=1, n_expert=12, sizes=[[10]])
    setting = Setting("global", contract="bigmoeonedge")
    fast, slow, slru = replay(
        trace, ["lru", changed(parse_policy("lru"), code=None), "slru"], [Capacity(n_bytes=59)], setting
    )
    assert isinstance(fast, Result)
    assert fast.requests == slow.requests
    assert slru.hits < 0.8 * slru.touches


def test_own_policies_are_plugged_in_by_name(tmp_path, monkeypatch):
    """``module:Class`` replays an eviction of one's own."""
    (tmp_path / "mine.py").write_text("from pyggml.lab.evictions import FIFO\nclass Mine(FIFO):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    trace = make([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[0, 1], [2, 3]]])
    mine, fifo = replay(trace, ["mine:Mine", "fifo"], [Capacity(slots=3)])
    assert mine.hits == fifo.hits
    with pytest.raises(GraphError, match="no policy 'nothing'"):
        parse_policy("nothing")


@pytest.mark.parametrize(
    ("module", "text", "told"),
    [
        ("failing", "class P(LRU):\n    def used(self, key, is_hit):\n        1 / 0\n", r"policy failing:P failed in P\.used, .*failing\.py:4: ZeroDivisionError: "),
        ("inherited", "class P(LRU):\n    def __init__(self, n_slot, n_key):\n        pass\n", r"policy inherited:P failed in LRU\.used, .*: AttributeError: .*'_order'"),
        ("batch", "class P(LRU):\n    replay_events = staticmethod(lambda e: e.nothing)\n", r"your own policy failed in P\.<lambda>, .*batch\.py:3: "),
        ("short", "class P(Eviction):\n    def used(self, key, is_hit):\n        pass\n", "P lacks victim"),
        ("unmade", "class P(LRU):\n    def __init__(self):\n        pass\n", r"must be made by P\(n_slot, n_key\)"),
        ("absent", "class Q(LRU):\n    pass\n", "absent.py has no class 'P' that is an Eviction"),
        ("unread", "import no_such_module\n", "unread cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("unparsed", "class (\n", "unparsed cannot be imported: SyntaxError: .*unparsed.py, line 2"),
    ],
)  # fmt: skip
def test_an_error_of_an_own_policy_is_its_own(
    module: str,
    text: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A module of the current folder is found; what fails in it is said by class, file and line, and not as an error of pyggml."""
    monkeypatch.chdir(tmp_path)
    Path(f"{module}.py").write_text(f"from pyggml.lab.evictions import LRU, Eviction\n{text}")
    save_trace(make([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[0, 1], [2, 3]]]), Path("t.jsonl"))
    path = list(sys.path)
    assert cli.run(["experts", "compare", "t.jsonl", "--capacities", "3", "--policies", f"{module}:P"]) == 1
    error = capsys.readouterr().err
    assert re.search(told, " ".join(error.split()))
    assert "error in pyggml" not in error
    assert sys.path == path


def test_own_policies_may_take_all_events_at_once(tmp_path, monkeypatch):
    """`replay_events` gets the arrays and gives the hits, and is used only where its misses all enter; what is no mask is refused."""
    (tmp_path / "atonce.py").write_text(
        "import numpy as np\nfrom pyggml.lab import replay\nfrom pyggml.lab.evictions import FIFO\n"
        "class Mine(FIFO):\n"
        "    calls = []\n"
        "    @staticmethod\n"
        "    def replay_events(e):\n"
        "        Mine.calls.append(e)\n"
        "        held, hit = {}, np.zeros(len(e.keys), bool)\n"
        "        for i, p in enumerate(e.pool):\n"
        "            own, keys = held.setdefault(p, []), e.keys[e.offsets[i]:e.offsets[i + 1]].tolist()\n"
        "            hit[e.offsets[i]:e.offsets[i + 1]] = [k in own for k in keys]\n"
        "            for k in [k for k in keys if k not in own]:\n"
        "                if len(own) == e.slots[p]:\n"
        "                    own.remove(next(x for x in own if x not in keys))\n"
        "                own.append(k)\n"
        "        return hit\n"
        "class Wrong(FIFO):\n"
        "    @staticmethod\n"
        "    def replay_events(e):\n"
        "        return np.zeros(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(3)
    trace = make(
        [[rng.choice(8, 2, replace=False).tolist() for _ in range(3)] for _ in range(60)], n_layer=3, n_expert=8
    )
    mine, fifo = replay(trace, ["atonce:Mine", "fifo"], [Capacity(slots=4)])
    assert mine.requests == fifo.requests
    policy = parse_policy("atonce:Mine")
    assert len(policy.make.calls) == 1
    assert policy.make.calls[0].slots.tolist() == [4, 4, 4]
    objects, fifo = replay(trace, ["atonce:Mine+2of8", "fifo+2of8"], [Capacity(slots=4)])
    assert objects.requests == fifo.requests
    assert len(policy.make.calls) == 1
    with pytest.raises(GraphError, match="replay_events of atonce:Wrong returns float64"):
        list(replay(trace, ["atonce:Wrong"], [Capacity(slots=4)]))


def test_misleading_events_are_not_replayed(tmp_path):
    """What a validator refuses cannot be replayed, whatever asks for it."""
    rng = np.random.default_rng(0)
    path = tmp_path / "t.jsonl"
    rows = [[rng.permutation(8)[:8].reshape(4, 2).tolist()] for _ in range(9)]
    lines = [
        {"format": "pyggml-routing", "version": 1, "n_expert": 8, "n_used": 2},
        *({"layer": 0, "step": i, "ids": r[0]} for i, r in enumerate(rows)),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = open_trace(path)
    assert isinstance(trace, Trace)
    with pytest.raises(FormatError, match="strided"):
        list(replay(trace, ["lru"], [Capacity(slots=8)], Setting(phase="prefill")))


@settings(max_examples=40, deadline=None)
@given(traces(), st.sampled_from(["layer", "global"]), st.data())
def test_llama_cpps_lru_differs_in_the_order_within_an_event_only(trace, scope, data):
    """llama.cpp's LRU misses by ascending id; over pools that hold all keys it hits as often as LRU, and never more than belady."""
    slots = data.draw(st.integers(1, trace.n_expert))
    names = ["belady", "llama-lru", "llama-slru"]
    best, *found = replay(trace, names, [Capacity(slots=slots)], Setting(scope, "all"))
    for result in found:
        assert type(result) is type(best)
        if isinstance(result, Result) and isinstance(best, Result):
            assert result.hits <= best.hits
    lru, llama = replay(trace, ["lru", "llama-lru"], [Capacity(fraction=1.0)], Setting(scope, "all"))
    assert lru.hits == llama.hits


@pytest.mark.parametrize(
    ("victim", "says"),
    [
        (lambda resident, protected: 999, "returned 999, which is not resident"),
        (lambda resident, protected: next(iter(protected)), "which is (protected|not resident)"),
        (lambda resident, protected: "a", "returned 'a', which is not resident"),
    ],
)
def test_a_victim_that_cannot_leave_is_named(victim: Callable[..., Any], says: str) -> None:
    """An own eviction that answers wrongly is told what it returned."""

    class Mine(Eviction):
        def used(self, key: int, is_hit: bool) -> None:
            """Nothing is kept."""

        def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
            """Return a wrong one."""
            return victim(resident, protected)

    cache = Cache(2, Mine(2, 8))
    cache.event(0, 0, [0, 1])
    with pytest.raises(GraphError, match=rf"Mine\.victim\(\) .*{says}"):
        cache.event(1, 0, [1, 2])
