"""Prefetchers: those that are compiled guess what their objects guess, which run in the scheduler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyggml.errors import GraphError
from pyggml.lab import Trace
from pyggml.lab.policies import parse_policy
from pyggml.lab.pools import Capacity
from pyggml.lab.predict import PREFETCHERS, guesses, predict
from pyggml.lab.replay import Replayer, Setting, replayer
from pyggml.lab.trace import Phase, TraceBuilder

N_LAYER, N_EXPERT, N_USED = 3, 9, 2


def drawn(seed: int, n_step: int = 40, n_row: int = 1) -> Trace:
    """Return a request with experts that are used unevenly; with several rows, tokens that are computed together."""
    rng = np.random.default_rng(seed)
    builder = TraceBuilder("drawn")
    for step in range(n_step):
        for layer in range(N_LAYER):
            score = np.arange(N_EXPERT) / (2 + layer) + rng.gumbel(size=(n_row, N_EXPERT)) * 2
            builder.add(0, step, Phase.DECODE, layer, np.argsort(-score, axis=1)[:, :N_USED].tolist())
    return builder.finish(
        n_layer=N_LAYER, n_expert=N_EXPERT, n_used=N_USED, expert_bytes=np.full((N_LAYER, 1), 1 << 20), model="drawn"
    )


@pytest.fixture(scope="module", params=[1, 3])
def ready(request: pytest.FixtureRequest) -> Replayer:
    """Give three requests, of one token a step or of several."""
    return replayer(Trace.joined([drawn(seed, n_row=request.param) for seed in range(3)]), Setting("layer"))


@pytest.mark.parametrize("name", PREFETCHERS)
@pytest.mark.parametrize("n", [1, 4, 20])
def test_compiled_prefetchers_guess_as_objects(ready: Replayer, name: str, n: int) -> None:
    """Each guess of each event is that of the object, in the same order."""
    own = type("Own", (PREFETCHERS[name],), {})  # a class that is not known is asked event by event
    fast, slow = (guesses(made(), ready.runs, ready.pools, n) for made in (PREFETCHERS[name], own))
    assert all(map(np.array_equal, fast, slow))
    assert any((made >= 0).any() for made in fast)


@pytest.mark.parametrize("policy", ["lru", "lfu", "arc", "lfru+2of8", "slru+hotter", "lru+next", "llama-slru"])
def test_compiled_caches_hold_what_objects_hold(ready: Replayer, policy: str) -> None:
    """Before each event, the same experts are resident."""
    known, slots = parse_policy(policy), np.full(N_LAYER, 7)
    compiled, objects = (ready.resident(p, slots) for p in (known, replace(known, code=None)))
    assert all(map(np.array_equal, compiled, objects))
    assert 0 < np.mean(compiled[0]) < 1


def test_the_numbers_of_a_score() -> None:
    """Recall, precision on what is not resident, coverage and waste are those of a plain count."""
    trace = Trace.joined([drawn(5), drawn(6)])
    (score,) = predict(trace, ["previous"], [Capacity(slots=3)], parse_policy("lru"))
    used = right = absent = good = missed = 0
    for request in (5, 6):
        held: dict[int, list[int]] = {layer: [] for layer in range(N_LAYER)}
        one, other = drawn(request), drawn(11 - request)
        ids_of = [
            np.concatenate([other.rows(e).ravel() for e in range(i, other.n_event, N_LAYER)]) for i in range(N_LAYER)
        ]
        # nothing came before a request's first events: the experts that the other used most
        before = [np.argsort(-np.bincount(ids, minlength=N_EXPERT), kind="stable")[:N_USED].tolist() for ids in ids_of]
        for event in range(one.n_event):
            layer, ids = int(one.layer[event]), one.rows(event).ravel().tolist()
            guess, there = before[layer], held[layer]
            used, right = used + len(ids), right + len({*guess} & {*ids})
            missed += len({*ids} - {*there})
            absent += len({*guess} - {*there})
            good += len(({*guess} - {*there}) & {*ids})
            held[layer] = ([e for e in there if e not in ids] + ids)[-3:]
            before[layer] = ids
    assert score.recall == right / used
    assert score.precision_missing == (good / absent if absent else None)
    assert score.covered == good / missed
    assert score.wasted_bytes == (absent - good) * (1 << 20) / 80


def test_the_future_is_no_cache() -> None:
    """A policy that knows the future is refused in words."""
    with pytest.raises(GraphError, match="knows the future"):
        predict(Trace.joined([drawn(1), drawn(2)]), ["previous"], [Capacity(slots=4)], parse_policy("belady"))
