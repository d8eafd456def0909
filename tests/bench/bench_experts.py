"""Replay of expert caches: touches per second of the compiled passes and of policies as objects, and events of a cache that runs.

    python tests/bench/bench_experts.py [--steps 2000] [--rounds 3]

A drawn trace of 24 layers with 4 of 32 experts. ``one pass`` gives all sizes at once, ``one size`` is the compiled replay of one, ``object``
asks an `Eviction`, as a plug-in is asked, and ``running`` decides and keeps the slot map of `moe_cache` as `run --expert-cache` does,
without bytes. Each number is the best of some rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from pyggml.kernels.lab import listed, sized, stack

from pyggml.lab import Capacity
from pyggml.lab.policies import POLICIES
from pyggml.lab.pools import Pools, request_keys
from pyggml.lab.running import LabRule
from pyggml.lab.trace import Phase, Trace, TraceBuilder
from pyggml.moe_cache import ExpertTensor, HostLayer

N_LAYER, N_EXPERT, N_USED, N_SLOT = 24, 32, 4, 10


def _trace(n_step: int) -> Trace:
    rng = np.random.default_rng(1)
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
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    trace = _trace(options.steps)
    pools = Pools.of(trace, "layer")
    (run,) = request_keys(trace, pools)
    after = stack.next_uses(run.offsets, run.keys, run.pool, pools.n_pool, pools.n_key)
    n = len(run.keys)
    slots = np.full(pools.n_pool, N_SLOT, np.int64)
    # of SLRU's slots, half; half pinned and static sets begin empty
    half, first, none = slots // 2, np.zeros_like(pools.sizes), np.zeros_like(slots)
    ones, hit = np.ones_like(pools.sizes), np.zeros(n, np.bool_)
    print(f"{n:,} touches, {len(run.pool):,} events; million touches a second")
    events = list(zip(run.pool.tolist(), run.step.tolist(), run.layer.tolist(), strict=True))
    keys, offsets = run.keys.tolist(), run.offsets.tolist()
    common = (run.offsets, run.keys, run.pool)
    for policy in POLICIES.values():
        told = {}
        if policy.code is not None and policy.has_stack:
            told["one pass"] = _best(
                options.rounds + 1,
                lambda p=policy: stack.stack_hits(*common, pools.n_pool, pools.n_key, p.code, after, p.half_life),
            )
        if policy.code is not None and policy.code >= listed.SLRU:
            told["one size"] = _best(
                options.rounds + 1,
                lambda p=policy: listed.listed_hits(
                    *common, slots, pools.n_pool, pools.n_key, p.code, first, none, half, hit
                ),
            )
        elif policy.code is not None:
            told["one size"] = _best(
                options.rounds + 1,
                lambda p=policy: sized.sized_hits(
                    *common, ones, slots, pools.n_pool, pools.n_key, p.code, after, p.half_life, hit
                ),
            )
        if policy.make is not None and not policy.fit:

            def as_objects(p=policy) -> None:
                caches = [p.cache(N_SLOT, pools) for _ in range(pools.n_pool)]
                for i, (pool, step, layer) in enumerate(events):
                    caches[pool].event(step, layer, keys[offsets[i] : offsets[i + 1]])

            told["object"] = _best(options.rounds, as_objects)

            def running(p=policy) -> None:
                tensor = ExpertTensor("ffn_up_exps", (), N_EXPERT, 1 << 20)
                layers = [HostLayer(il, 0, (tensor,)) for il in range(N_LAYER)]
                rule = LabRule(p, Capacity(slots=N_SLOT))
                (group,) = rule.groups(layers, n_used=N_USED, alignments=[128], weights=[1.0])
                table = rule.table(group)
                for i, (_, step, layer) in enumerate(events):
                    if step != (events[i - 1][1] if i else -1):
                        table.begin()
                    table.lookup(layer, keys[offsets[i] : offsets[i + 1]])

            told["running"] = _best(options.rounds, running)
        if told:
            print(f"{policy.name:16}" + "".join(f"{k}: {n / s / 1e6:7.2f}   " for k, s in told.items()))


if __name__ == "__main__":
    main()
