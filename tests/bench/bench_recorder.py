"""What the recorder costs: computing a graph of many small splits without a log at all, with it switched off, and on.

    python tests/bench/bench_recorder.py [--splits 100] [--rounds 300]

A chain of small products that goes to and fro between a simulated device and the CPU, so that copies, waits and launches
are as large a part of the time as they can be. The baseline is a scheduler whose log does nothing, not even count. The
three take turns. Prints the median in microseconds, and the ratio to the baseline.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
from arguments import count

import pyggml as ggml
from pyggml.clock import VirtualClock
from pyggml.cost import CPU_PROFILE, PROFILES
from pyggml.sched.log import RunLog


class NoLog(RunLog):
    """A log that does nothing at all."""

    def copied(self, *args: Any, **options: Any) -> None:
        """Do nothing."""

    def waited(self, *args: Any, **options: Any) -> None:
        """Do nothing."""

    def launched(self, *args: Any, **options: Any) -> None:
        """Do nothing."""

    def recorded_event(self, *args: Any, **options: Any) -> None:
        """Do nothing."""


class Bare(ggml.Scheduler):
    """A scheduler without a log."""

    def new_log(self, observers: Any = None, of: Any = None) -> RunLog:
        """Return the log that does nothing."""
        return NoLog(self.machine, self.stats, None, None)


def make(kind: type[ggml.Scheduler], n_splits: int, **options: Any) -> tuple[ggml.Scheduler, ggml.Graph]:
    """Return a scheduler and its allocated graph."""
    gpu, cpu = ggml.Sim("rtx4090-pcie4", threads=1), ggml.CPU(threads=1)
    sched = kind([gpu, cpu], **options)
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (32, 4), name="x").set_output()  # computed again and again with what is set once
        nodes = [x]
        for _ in range(n_splits):
            nodes.append(ggml.scale(nodes[-1], 1.0))
    graph.expand(nodes[-1])
    for i, node in enumerate(nodes[1:]):
        sched.set_tensor_backend(node, (gpu, cpu)[i % 2])
    sched.alloc_graph(graph)
    x.set_array(np.zeros((4, 32)))
    return sched, graph


def main() -> None:
    """Time all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=count, default=100)
    parser.add_argument("--rounds", type=count, default=300)
    args = parser.parse_args()
    recording = ggml.Recording()
    clock = VirtualClock([PROFILES["rtx4090-pcie4"], CPU_PROFILE])
    made = {
        "no log": make(Bare, args.splits),
        "switched off": make(ggml.Scheduler, args.splits),
        "recording": make(ggml.Scheduler, args.splits, recorder=recording),
        "recording, with a clock": make(ggml.Scheduler, args.splits, recorder=recording, clock=clock),
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(args.rounds):
        for name, (sched, graph) in made.items():
            recording.clear()
            start_s = time.perf_counter()
            sched.compute(graph)
            times[name].append(time.perf_counter() - start_s)
    print(f"{made['no log'][0].n_splits} splits; us, median of {args.rounds}")
    base_s = statistics.median(times["no log"])
    for name, own in times.items():
        median_s = statistics.median(own)
        each_us = (median_s - base_s) * 1e6 / args.splits
        print(f"{name:24} {median_s * 1e6:8.0f}   {median_s / base_s:5.2f} x   {each_us:6.2f} us more for each split")


if __name__ == "__main__":
    main()
