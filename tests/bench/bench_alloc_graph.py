"""Assigning, splitting and allocating a graph: ours against the real `ggml_backend_sched`, on the same case.

    python tests/bench/bench_alloc_graph.py [--layers 48] [--rounds 15]

A Mixtral-like model over one mock device, experts in host memory. Both make the same splits. Timed is `alloc_graph` after a `reset`: of a new
graph of the same sizes, of the graph before, unchanged (whose sources in C are copies already, so that it finds few splits), and of a graph of
another number of tokens and another length of the cache than the five before. The library runs in a child process, before ours. Prints the median and the lowest tenth of the
processor time in milliseconds, and the ratios to C (below 1: ours is faster); on a machine that is not quiet the lowest tenth is what to go by.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the oracle is one of the tests

FUNCTIONS: tuple[str, ...] = ()
GRAPH = "batch0"
RESERVED = "reserve_pp"  #: as long as any
N_OTHER = 6
KINDS = (("new", "a new graph"), ("same", "the same graph"), ("other", "another size"))


def make_case(n_layer: int) -> dict[str, Any]:
    """Return the case: a graph of 64 tokens, and others of fewer tokens and of longer caches."""
    from cases.moe import ARCHITECTURES, make_machine, moe_case

    return moe_case(
        "bench", ARCHITECTURES["mixtral"], make_machine(1), [64 - i for i in range(1 + N_OTHER)], random.Random(1), n_layer=n_layer,
        is_pinned=False,
    )  # fmt: skip


# -- the child: the real library ---------------------------------------------


def prepare(library: Any) -> None:
    """Declare the scheduler's functions; called by `oracle.child`."""
    from oracle.live_run import prepare as declare

    declare(library)


def _time_alloc(library: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return seconds of allocating a new graph and the same graph, and the number of nodes and splits."""
    from oracle.live_run import LiveRun

    run = LiveRun(library, request["case"], request["mock"])
    run.new_sched()
    run.build(RESERVED)
    base, sched = run.base, run.sched
    base.ggml_backend_sched_reserve(sched, run.instances[RESERVED].graph)
    new, same, other, n_splits = [], [], [], 0
    for i in range(request["rounds"]):
        for into in (new, same, other):
            name = f"batch{1 + i % N_OTHER}" if into is other else GRAPH
            if into is not same:
                run.build(name)
            graph = run.instances[name].graph
            start_s = time.process_time()
            base.ggml_backend_sched_reset(sched)
            base.ggml_backend_sched_alloc_graph(sched, graph)
            into.append(time.process_time() - start_s)
            n_splits = n_splits or sched.n_splits
    return {"new": new, "same": same, "other": other, "n_nodes": graph.n_nodes, "n_splits": n_splits}


HANDLERS = {"time": _time_alloc}


# -- the parent: ours --------------------------------------------------------


def time_ours(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Return the same of our scheduler, with 0.20's rules as the library has them."""
    import gc

    from pyggml import DIALECTS, Scheduler
    from pyggml.replay import Replay, parse_case

    parsed = parse_case(case)
    replay = Replay(parsed, DIALECTS["0.20"])
    sched = Scheduler(replay.backends, dialect=DIALECTS["0.20"])

    def graph(name: str) -> Any:
        replay.step(next(s for s in parsed.steps if s.op == "build" and s.graph == name))
        return replay._instances[name].graph

    made = graph(RESERVED)
    sched.reserve(made)
    new, same, other = [], [], []
    for i in range(rounds):
        for into in (new, same, other):
            before = made  # its owner's, and not freed while the clock runs
            if into is not same:
                made = graph(f"batch{1 + i % N_OTHER}" if into is other else GRAPH)
                gc.collect()
            start_s = time.process_time()
            sched.reset()
            sched.alloc_graph(made)
            into.append(time.process_time() - start_s)
            del before
    return {"new": new, "same": same, "other": other, "n_nodes": len(made.nodes), "n_splits": sched.n_splits}


def main() -> None:
    """Time both and print."""
    from arguments import count
    from oracle.child import Child
    from oracle.live_sched import compile_mock

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=count, default=48)
    parser.add_argument("--rounds", type=count, default=15)
    args = parser.parse_args()
    case = make_case(args.layers)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    child = Child(Path(__file__).stem)
    try:
        c: dict[str, Any] = child.ask("time", case=case, mock=str(compile_mock()), rounds=args.rounds)
        if "new" not in c:
            sys.exit(f"the library did not do it: {c}")
        ours = time_ours(case, args.rounds)
    finally:
        child.close()
    assert (c["n_nodes"], c["n_splits"]) == (ours["n_nodes"], ours["n_splits"]), (c["n_splits"], ours["n_splits"])
    print(f"{c['n_nodes']} nodes, {c['n_splits']} splits; ms of {args.rounds}")
    for kind, text in KINDS:
        for name, pick in (("median", statistics.median), ("lowest tenth", _lowest_tenth)):
            theirs_s, ours_s = pick(c[kind]), pick(ours[kind])
            ratio = ours_s / theirs_s
            print(
                f"alloc_graph, {text:15} {name:13} ours {ours_s * 1e3:8.3f}   C {theirs_s * 1e3:7.3f}   {ratio:6.2f} x"
            )


def _lowest_tenth(times_s: list[float]) -> float:
    return sorted(times_s)[len(times_s) // 10]


if __name__ == "__main__":
    main()
