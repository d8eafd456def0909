"""Python of a generated token: the processor time of a decode whose plans do nothing, with warm caches and with cold ones.

    python tests/bench/bench_token_python.py MODEL.gguf [--device] [--threads 2]

With cold caches each token reads 54 MB in place of its plans, as much as the weights of a token; the time of that is not counted.
``--device`` puts all but the experts on a simulated device. Prints the 5th and 25th percentile of 200 tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import bench_model
from arguments import count, file

BYTES = 54 << 20


def measure(session: Any, reads: Any) -> np.ndarray:
    """Return the microseconds of 200 tokens, of which ``reads.seconds`` do not count."""
    taken = []
    for i in range(200):
        if i % 100 == 0:
            session.rewind(129)
            session.decode([5])
        reads.begin()
        start_s = time.thread_time()
        int(session.decode([5])[-1].argmax())
        taken.append(time.thread_time() - start_s - reads.seconds)
    return np.percentile(np.asarray(taken) * 1e6, [5, 25])


class Reads:
    """What stands for plans: nothing, or one read of memory a token."""

    def __init__(self, n_bytes: int) -> None:
        self._memory = np.ones(n_bytes // 8, np.int64)
        self._is_due, self.seconds = False, 0.0

    def begin(self) -> None:
        """Begin a token."""
        self._is_due, self.seconds = len(self._memory) > 0, 0.0

    def run(self, *args: Any) -> None:
        """Read, once a token."""
        if self._is_due:
            self._is_due = False
            start_s = time.thread_time()
            self._memory.sum()
            self.seconds += time.thread_time() - start_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=file)
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--device", action="store_true")
    args = parser.parse_args()
    session = bench_model.open_session(args.model, args.threads, over_device=args.device)
    session.decode([5] * 128)
    for _ in range(3):
        session.decode([5])
    from pyggml.kernels.cpu.pool import Pool

    for name, n_bytes in (("warm", 0), ("cold", BYTES)):
        reads = Reads(n_bytes)
        with patch.object(Pool, "run", reads.run):
            low, middle = measure(session, reads)
        print(f"{name}: {low:.0f} µs a token, 25th percentile {middle:.0f}")


if __name__ == "__main__":
    main()
