"""The lab's policies in a cache that runs: results bit for bit, and the same hits, copies and bytes as a replay and as a plan."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml import Sim, Type
from pyggml.backend import REGISTRY
from pyggml.errors import GraphError
from pyggml.gguf import GGUFFile
from pyggml.lab import Phase
from pyggml.lab.policies import parse_policy
from pyggml.lab.pools import Capacity
from pyggml.lab.predict import predict
from pyggml.lab.recording import RoutingRecorder
from pyggml.lab.replay import Result, Setting, replay
from pyggml.lab.running import LabRule, RunningPredictor, TraceRouting, counts_of, parse_rule
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner, virtual_clock
from pyggml.sched.prefetch import ExpertPrefetch, PrefetchedExperts
from pyggml.session import Session
from pyggml.simulation import simulate_batch

LAYERS, EXPERTS, USED, STEPS = 3, 16, 4, 40
TOKENS = [(7 * i * i + 3 * i) % 200 for i in range(STEPS)]
DEVICE = "sim:rtx4090-pcie4"
RUNNING = [
    ("lru", "6", "layer"), ("lfu", "40%", "layer"), ("lfru", "20%", "group"), ("slru", "50%", "layer"), ("clock", "7", "layer"),
    ("arc", "25%", "global"), ("fifo", "5", "layer"), ("lfu-decay:16", "4MiB", "layer"), ("least-stale", "30%", "group"),
    ("lru+hotter", "3", "layer"), ("lfru+2of8", "20%", "group"), ("lru+atmost:1", "4", "layer"), ("llama-lru", "50%", "group"),
    ("llama-slru", "3MiB", "group"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Give a small mixture of experts."""
    path = tmp_path_factory.mktemp("running") / "moe.gguf"
    make_moe(path, Recipe("qwen3moe", Type.Q8_0, seed=7, sizes=Sizes(layers=LAYERS, experts=EXPERTS, used=USED)))
    return path


def _run(model, rule, *, recorder=None, device=DEVICE, tokens=TOKENS, prefetch="used", cpu_moe=True):
    flags = PlacementFlags(cpu_moe=cpu_moe)
    with Session.open(
        model,
        devices=[device],
        placement=flags,
        expert_cache=rule,
        policy=prefetch,
    ) as session:
        session.watcher = recorder
        logits = np.concatenate([session.decode([token]) for token in tokens])
        cache, stats = session.expert_cache, session.sched.stats
        banks = (
            {}
            if cache is None or not hasattr(cache.banks[0][1].storage, "traffic")
            else {b.storage: b.storage.traffic for _, b in cache.banks}
        )
        counted = None if cache is None else (cache.counters, sum(t.bytes_in for t in banks.values()))
        return logits, counted, dict(stats.bytes_by_reason), stats.n_copies


@pytest.fixture(scope="module")
def plain(model):
    """Give the logits without a cache, and the trace of their routing."""
    with GGUFFile.open(model) as file, Planner.open(model, data=False) as planner:
        recorder = RoutingRecorder(str(model), planner.hparams, file)
        recorder.phase = Phase.DECODE
        logits, *_ = _run(model, None, recorder=recorder)
        return logits, recorder.trace()


@pytest.mark.parametrize(
    ("policy", "size", "scope", "misses"),
    [
        *((*case, "copy") for case in RUNNING),
        *((*case, "cpu") for case in RUNNING[::3] if not case[0].startswith("llama")),
    ],
)
def test_a_run_a_plan_and_a_replay_agree(model, plain, policy, size, scope, misses):
    """The same logits as without a cache; hits and bytes as replayed; hits, bytes and copies as planned without data."""
    logits, trace = plain
    rule = LabRule(policy, Capacity.parse(size), scope, misses=misses)
    found, (counters, arrived), reasons, n_copies = _run(model, rule)
    np.testing.assert_array_equal(found, logits)
    (result,) = replay(trace, [policy], [Capacity.parse(size)], Setting("group" if scope == "global" else scope))
    assert isinstance(result, Result), result
    assert (counters.hits, counters.hits + counters.misses) == (result.hits, result.touches)
    assert counters.uploaded_bytes == arrived == reasons["experts"] > 0
    declines = misses == "cpu" and "+" in policy  # then what the cache does not keep is not copied
    assert (reasons["experts"] < result.bytes_read) if declines else reasons["experts"] == result.bytes_read
    backends = [d.backend() for d in REGISTRY.open_all([DEVICE, "cpu"], data=False)]
    with Planner.open(
        model, devices=backends[:1], cpu=backends[1], placement=PlacementFlags(cpu_moe=True), data=False,
        expert_cache=LabRule(policy, Capacity.parse(size), scope, misses=misses), clock=virtual_clock(backends),
    ) as planner:  # fmt: skip
        planned = simulate_batch(planner, STEPS, routing=TraceRouting(trace), is_generated=True)
        assert planner.expert_cache.counters == counters
        assert planned.bytes_by_reason == reasons
        assert planner.sched.stats.n_copies == n_copies
        assert planned.seconds > 0


@pytest.mark.parametrize(("policy", "size"), [("lru", "6"), ("lfu+2of8", "40%")])
@pytest.mark.parametrize("name", ["online", "average", "previous"])
def test_guesses_of_a_run_are_judged_as_in_a_replay(model, plain, policy, size, name):
    """Prefetch changes neither logits nor hits, and recall, precision and waste are those that `predict` says of the trace."""
    logits, trace = plain
    ahead = ExpertPrefetch(RunningPredictor(name))
    found, (counters, _), reasons, _ = _run(
        model, LabRule(policy, Capacity.parse(size)), prefetch=PrefetchedExperts(ahead)
    )
    np.testing.assert_array_equal(found, logits)
    (result,) = replay(trace, [policy], [Capacity.parse(size)])
    assert (counters.hits, counters.misses) == (result.hits, result.touches - result.hits)
    told = ahead.as_dict()
    (score,) = predict(trace, [name], [Capacity.parse(size)], parse_policy(policy))
    assert (told["recall"], told["precision_missing"], told["covered"]) == (
        score.recall, score.precision_missing, score.covered,
    )  # fmt: skip
    assert told["wasted_bytes"] == score.wasted_bytes * STEPS
    waiting = reasons["experts"] - counters.uploaded_bytes - told["wasted_bytes"]  # the guess after the last event
    assert 0 <= waiting <= USED * int(trace.bytes_of_layer[0])


def test_a_fitted_prefetcher_runs(model, plain):
    """It guesses from what it learned of other requests; a trace of another model is refused."""
    logits, trace = plain
    ahead = ExpertPrefetch(RunningPredictor("previous-layer", trace), n_guess=6)
    found, *_ = _run(model, LabRule("lru", Capacity(slots=5)), prefetch=PrefetchedExperts(ahead))
    np.testing.assert_array_equal(found, logits)
    assert ahead.counters.right_sent > 0
    with pytest.raises(GraphError, match=f"has 3 layers of {EXPERTS} experts, the run has layers 0 to 7"):
        RunningPredictor("popularity", trace).begin(range(8), EXPERTS)


def test_static_sets_are_loaded_once_and_charged(model, plain):
    """A set of other requests stays: its bytes arrive once, all else passes through, and logits are those without."""
    logits, trace = plain
    first = trace.select(trace.step < STEPS // 2)
    rule = LabRule("static", Capacity(slots=5), counts=counts_of(first))
    found, (counters, arrived), reasons, _ = _run(model, rule)
    np.testing.assert_array_equal(found, logits)
    per_expert = int(trace.bytes_of_layer[0])
    assert arrived == reasons["experts"] == (LAYERS * 5 + counters.misses) * per_expert
    assert counters.hits > 0


def test_what_is_published_in_the_next_step_is_right(model, plain):
    """An admission that fills slots behind the step's back gives the same logits, and the hits of a replay."""
    logits, trace = plain
    found, (counters, _), *_ = _run(model, LabRule("lru+next", Capacity(slots=5)))
    np.testing.assert_array_equal(found, logits)
    (result,) = replay(trace, ["lru+next"], [Capacity(slots=5)])
    assert counters.hits == result.hits > 0


@pytest.mark.parametrize(
    ("text", "scope", "words"),
    [
        ("belady:20%", "layer", "knows the future"),
        ("llama-lru:20%", "layer", "shares slots"),
        ("static:20%", "layer", "fitted on other requests"),
        ("lru+next:20%", "group", "fills slots of other layers"),
        ("lru", "layer", "is not POLICY:SIZE"),
        ("lru:20%", "rack", "there is no scope"),
        ("lru:x", "layer", "is no capacity"),
    ],
)
def test_rules_that_cannot_run_are_refused(text, scope, words):
    """With what to do."""
    with pytest.raises(GraphError, match=words):
        parse_rule(text, scope)


def test_too_few_slots_for_a_token_are_refused(model):
    """A policy that must admit needs a slot for each expert of a token; one that may decline does not."""
    with pytest.raises(GraphError, match="a pool has 3 slots, and a token uses 4"):
        _run(model, LabRule("lru", Capacity(slots=3)))


@pytest.mark.parametrize(("policy", "size", "scope"), [("lfru", "5", "layer"), ("lru+hotter", "30%", "group")])
def test_late_devices_in_any_order(model, plain, policy, size, scope):
    """20 seeds, with experts that pass through and without: the logits are those without a cache, and there is no hazard."""
    tokens = TOKENS[:6]
    for seed in range(20):
        device = Sim("rtx4090-pcie4", threads=1, seed=seed)
        found, *_ = _run(model, LabRule(policy, Capacity.parse(size), scope), device=device, tokens=tokens)
        np.testing.assert_array_equal(found, plain[0][: len(found)])
        assert not device.device.hazards


@pytest.mark.parametrize(("policy", "size", "scope"), [("lru", "6", "layer"), ("lfru+hotter", "30%", "group")])
@pytest.mark.parametrize("prefetch", [None, "average"])
def test_a_device_of_the_real_library_has_a_cache(model, plain, policy, size, scope, prefetch):
    """`libggml:CPU` beside our CPU: bit for bit what the library computes with all experts in its own memory; hits as replayed."""
    _, trace = plain
    whole, *_ = _run(
        model, None, device=_library(), cpu_moe=False
    )  # else our CPU computes the experts, with its own rounding
    ahead = "used" if prefetch is None else PrefetchedExperts(ExpertPrefetch(RunningPredictor(prefetch)))
    rule = LabRule(policy, Capacity.parse(size), scope)
    found, (counters, _), reasons, _ = _run(model, rule, device=_library(), prefetch=ahead)
    np.testing.assert_array_equal(found, whole)
    (result,) = replay(trace, [policy], [Capacity.parse(size)], Setting(scope))
    assert counters.hits == result.hits > 0
    assert reasons["experts"] >= counters.uploaded_bytes > 0


def _library():
    return REGISTRY.open("libggml:CPU").backend(threads=1)
