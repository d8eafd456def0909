"""Planning's inner step: another flag of a model that is open, against opening the model anew with it.

    python tests/bench/bench_planning.py [MODEL] [--device sim:rtx3090-pcie4] [--rounds 3]

Without a model: gpt-oss-120b by name, 36 layers. Each step changes one flag, as a sweep does: ``-ncmoe`` downwards, then ``-ub`` between three
values. Timed is what a search asks of a setting (its memory by the scheduler's reserve), and what a sweep asks (the virtual
times of a prompt and a token besides). Prints the median and the lowest processor time, in milliseconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

from arguments import count

from pyggml.backend import REGISTRY
from pyggml.planning import ContextFlags, PlacementFlags, Planner, virtual_clock
from pyggml.simulation import simulate_batch

N_CTX = 8192


def main() -> None:
    """Time both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="gpt-oss-120b")
    parser.add_argument("--device", default="sim:rtx3090-pcie4")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--prompt", type=count, default=2048)
    args = parser.parse_args()
    gpu, cpu = (REGISTRY.open_all([name], data=False)[0].backend() for name in (args.device, "cpu"))

    def flags(n_cpu_moe: int, n_ubatch: int) -> tuple[PlacementFlags, ContextFlags]:
        return PlacementFlags(n_cpu_moe=n_cpu_moe), ContextFlags(n_ctx=N_CTX, n_ubatch=n_ubatch)

    def opened(*setting: int) -> Planner:
        placement, context = flags(*setting)
        return Planner.open(
            args.model, devices=[gpu], cpu=cpu, placement=placement, context=context, data=False,
            clock=virtual_clock([gpu, cpu]),
        )  # fmt: skip

    def speeds(planner: Planner) -> list[float]:
        return [simulate_batch(planner, n).seconds or 0.0 for n in (args.prompt, 1)]

    kept = opened(36, 512)
    speeds(kept)
    steps = {
        "-ncmoe": [(n, 512) for n in range(35, 35 - 2 * args.rounds, -1)],
        "-ub": [(20, n) for _ in range(args.rounds) for n in (256, 1024, 512)],
    }
    for flag, settings in steps.items():
        times: dict[str, list[float]] = {}
        for setting in settings:
            start_s = time.process_time()
            new = opened(*setting)
            opened_s = time.process_time()
            kept.change(*flags(*setting))
            changed_s = time.process_time()
            found = speeds(kept)
            timed_s = time.process_time()
            assert list(kept.memory()) == list(new.memory())
            assert all(map(math.isclose, found, speeds(new)))  # sums of one clock, begun at another time
            new.close()
            for name, took_s in (
                ("opened anew", opened_s - start_s),
                ("changed", changed_s - opened_s),
                ("virtual times", timed_s - changed_s),
            ):
                times.setdefault(name, []).append(took_s)
        for name, seconds in times.items():
            print(
                f"{flag:7} {name:15} median {statistics.median(seconds) * 1e3:7.1f} ms   lowest {min(seconds) * 1e3:7.1f} ms"
            )


if __name__ == "__main__":
    main()
