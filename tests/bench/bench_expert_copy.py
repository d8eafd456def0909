"""The used-expert copy from host to host memory: against one memcpy of as many bytes.

    python tests/bench/bench_expert_copy.py [--rounds 50]

A weight of 128 experts of 1.6 MB (Q8_0, 2048 x 768), of which random batches use 8, 32, 64 or 120. One memcpy of as
many bytes, from anywhere in the weight, takes turns with it. Prints the median and 10th percentile of each, and the
ratio of the medians (above 1: the used-expert copy is slower).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time

import numpy as np
from arguments import count

import pyggml as ggml
from pyggml.sched.experts import expert_copy_ranges

N_EXPERT, N_COLUMNS, N_ROWS = 128, 2048, 768


def main() -> None:
    """Time both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=50)
    rounds = parser.parse_args().rounds
    cpu, gpu = ggml.CPU(), ggml.Sim()
    host, device = ggml.Context(), ggml.Context()
    weight = host.new_tensor("q8_0", (N_COLUMNS, N_ROWS, N_EXPERT), name="blk.0.ffn_up_exps.weight")
    copy = device.new_tensor("q8_0", (N_COLUMNS, N_ROWS, N_EXPERT), name="copy")
    host.alloc(cpu, usage="weights")
    device.alloc(gpu)
    rng = np.random.default_rng(1)
    weight.buffer.clear(1)
    copy.buffer.clear(1)
    whole = np.zeros(weight.nbytes, np.uint8)
    for n_used in (8, 32, 64, 120):
        times: dict[str, list[float]] = {"experts": [], "memcpy": []}
        n_bytes = n_ranges = 0
        for _ in range(rounds):
            used = set(rng.choice(N_EXPERT, n_used, replace=False).tolist())
            start_s = time.perf_counter()
            ranges = expert_copy_ranges(used, N_EXPERT, weight.nb[2], tensor_bytes=weight.nbytes)
            for r in ranges:
                gpu.set_tensor_async(copy, weight.data + r.offset_bytes, r.offset_bytes, r.size_bytes)
            gpu.synchronize()
            times["experts"].append(time.perf_counter() - start_s)
            n_bytes, n_ranges = sum(r.size_bytes for r in ranges), len(ranges)
            # from anywhere: the same bytes each time would lie in a cache
            at = int(rng.integers(weight.nbytes - n_bytes + 1))
            start_s = time.perf_counter()
            ctypes.memmove(whole.ctypes.data + at, weight.data + at, n_bytes)
            times["memcpy"].append(time.perf_counter() - start_s)
        median = {k: statistics.median(v) for k, v in times.items()}
        low = {k: float(np.quantile(v, 0.1)) for k, v in times.items()}
        print(
            f"{n_used:4} of {N_EXPERT} experts, {n_ranges:3} ranges, {n_bytes / 1e6:6.1f} MB: used-expert copy "
            f"{median['experts'] * 1e3:7.3f} ms (p10 {low['experts'] * 1e3:.3f}), memcpy {median['memcpy'] * 1e3:7.3f} ms "
            f"(p10 {low['memcpy'] * 1e3:.3f}), ratio {median['experts'] / median['memcpy']:.3f}"
        )


if __name__ == "__main__":
    main()
