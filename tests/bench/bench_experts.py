"""Replay of expert caches: touches per second of every policy and prefetcher of pyggml, and their ratio to 5 million.

    python tests/bench/bench_experts.py [--steps 2000] [--rounds 3] [--scope layer]

A drawn trace of 24 layers with 4 of 32 experts, 10 slots of each 32. ``replay`` is what `pyggml experts compare` calls for one
policy and one size, with all that it does around the compiled code (`next_uses` is computed once for all policies, and is not
in it); ``all sizes`` is one pass that gives every size. Evictions are also combined with each admission: the slowest is told.
``object`` asks an `Eviction`, as a plug-in is asked, and ``running`` decides and keeps the slot map of `moe_cache` as
`run --expert-cache` does, without bytes. Each number is the best of some rounds, in processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace as changed

import numpy as np
from arguments import count

from pyggml.lab import Capacity
from pyggml.lab.policies import POLICIES, Policy, parse_policy
from pyggml.lab.pools import Pools, request_keys
from pyggml.lab.predict import PREFETCHERS, guesses
from pyggml.lab.replay import Refusal, Setting, replayer
from pyggml.lab.running import LabRule
from pyggml.lab.trace import Phase, Trace, TraceBuilder
from pyggml.moe_cache import ExpertTensor, HostLayer

BAR = 5e6
ADMISSIONS = ("2of8", "hotter", "atmost:2", "next")
N_LAYER, N_EXPERT, N_USED, N_SLOT = 24, 32, 4, 10


def _trace(n_step: int, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 1.2, (1, N_LAYER, N_EXPERT)) + rng.gumbel(size=(n_step, N_LAYER, N_EXPERT))
    ids = np.argsort(-score, axis=2)[:, :, :N_USED]
    builder = TraceBuilder("drawn")
    for step in range(n_step):
        for layer in range(N_LAYER):
            builder.add(0, step, Phase.DECODE, layer, [ids[step, layer].tolist()])
    sizes = np.full((N_LAYER, 1), 1 << 20)
    return builder.finish(n_layer=N_LAYER, n_expert=N_EXPERT, n_used=N_USED, expert_bytes=sizes, model="drawn")


def _best(rounds: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(rounds):
        start_s = time.thread_time()
        work()
        times.append(time.thread_time() - start_s)
    return min(times)


def _run(policy: Policy, trace: Trace) -> Callable[[], object]:
    """Return what decides every event as a cache that runs does."""
    events = [(int(trace.step[e]), int(trace.layer[e]), trace.rows(e).ravel().tolist()) for e in range(trace.n_event)]

    def running() -> None:
        tensor = ExpertTensor("ffn_up_exps", (), N_EXPERT, 1 << 20)
        layers = [HostLayer(il, 0, (tensor,)) for il in range(N_LAYER)]
        rule = LabRule(policy, Capacity(slots=N_SLOT))
        (group,) = rule.groups(layers, n_used=N_USED, alignments=[128], weights=[1.0])
        table = rule.table(group)
        before = -1
        for step, layer, keys in events:
            if step != before:
                table.begin()
                before = step
            table.lookup(layer, keys)

    return running


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=2000)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--scope", default="layer", choices=("layer", "global", "group"))
    options = parser.parse_args()
    # two requests, so that static sets can be fitted
    trace = Trace.joined([_trace(options.steps // 2, seed) for seed in (1, 2)])
    pools = Pools.of(trace, options.scope)
    runs = list(request_keys(trace, pools))
    n = sum(len(run.keys) for run in runs)
    capacity = Capacity(fraction=N_SLOT / N_EXPERT)
    print(f"{n:,} touches, scope {options.scope}; million touches a second, and the ratio to {BAR / 1e6:g}")
    slowest = ("", float("inf"))
    ready = {is_llama: replayer(trace, Setting(options.scope), by_first=is_llama) for is_llama in (False, True)}

    def replayed(policy: Policy) -> float:
        def once() -> None:
            (result,) = ready[policy.llama is not None].results(policy, [capacity])
            assert not isinstance(result, Refusal), result.reason

        once()  # compiles
        return n / _best(options.rounds, once)

    for policy in POLICIES.values():
        rate = replayed(changed(policy, has_stack=False))
        told = f"{policy.name:18} replay {rate / 1e6:6.1f} {rate / BAR:5.1f} x"
        slowest = min(slowest, (policy.name, rate), key=lambda pair: pair[1])
        if policy.code is not None and policy.has_stack:
            some = replayed(policy)
            told += f"   all sizes {some / 1e6:6.1f} {some / BAR:5.1f} x"
        if policy.make is not None:
            rate, rule = min((replayed(parse_policy(f"{policy.name}+{rule}")), rule) for rule in ADMISSIONS)
            told += f"   with an admission at least {rate / 1e6:6.1f} {rate / BAR:5.1f} x (+{rule})"
            slowest = min(slowest, (f"{policy.name}+{rule}", rate), key=lambda pair: pair[1])
        print(told)
    if options.scope == "layer":
        for name, made in PREFETCHERS.items():
            guesses(made(), runs, pools, N_USED)  # compiles
            rate = n / _best(options.rounds, lambda made=made: guesses(made(), runs, pools, N_USED))
            print(f"{name:18} guesses {rate / 1e6:5.1f} {rate / BAR:5.1f} x")
            slowest = min(slowest, (name, rate), key=lambda pair: pair[1])
    print(f"slowest: {slowest[0]} {slowest[1] / 1e6:.1f} million, {slowest[1] / BAR:.1f} x the bar")
    for name in ("lru", "lfru", "arc", "lru+hotter"):
        policy = parse_policy(name)
        as_object = replayed(changed(policy, code=None))
        running = trace.ids.size / _best(options.rounds, _run(policy, trace))
        print(f"{name:18} object {as_object / 1e6:6.2f}   running {running / 1e6:6.2f}")


if __name__ == "__main__":
    main()
