"""What llama.cpp on a simulated device costs outside kernels: ms of a decode, of one token.

    python tests/bench/bench_llama.py [MODEL.gguf] [--cpu-moe] [--tokens 40]

Time of the one thread on its core, so that other programs do not count. The engine runs in this process, so that the time in kernels (pyggml's plans, ggml's CPU) can be taken away from a decode's; the
way to the child and back, which a `LlamaModel` adds, is measured beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pyggml.backends.host.plan import HostPlan
from pyggml.llama import LlamaModel
from pyggml.llama.computing import ComputingCPU
from pyggml.llama.engine import Engine
from pyggml.llama.library import find_llama
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

_spent_s = 0.0


def _timed(function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        global _spent_s
        start_s = time.thread_time()
        try:
            return function(*arguments)
        finally:
            _spent_s += time.thread_time() - start_s

    return call


def main() -> None:
    """Measure and print."""
    global _spent_s
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--cpu-moe", action="store_true")
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    path = given.model
    if path is None:
        path = Path(tempfile.mkdtemp()) / "qwen3moe.gguf"
        make_moe(path, Recipe(arch="qwen3moe", sizes=Sizes(layers=4)))
    context, placement = ContextFlags(n_ctx=512), PlacementFlags(cpu_moe=given.cpu_moe)
    sent: dict[str, Any] = {}
    with LlamaModel(path, context=context, placement=placement, threads=1) as model:
        sent = model.opened_with
        model.decode(range(40))
        whole = []
        for _ in range(given.tokens):
            start_s = time.perf_counter()
            model.decode([1])
            whole.append(time.perf_counter() - start_s)
    with (
        patch.object(HostPlan, "run", _timed(HostPlan.run)),
        patch.object(ComputingCPU, "run", staticmethod(_timed(ComputingCPU.run))),
    ):
        engine = Engine(find_llama())
        engine.open(sent)
        engine.decode(list(range(40)), "last", 0)
        outside, inside = [], []
        for _ in range(given.tokens):
            _spent_s, start_s = 0.0, time.thread_time()
            engine.decode([1], "last", 0)
            took_s = time.thread_time() - start_s
            outside.append(took_s - _spent_s)
            inside.append(_spent_s)
    print(f"{path.name}: ms of a decode of one token, minimum and median of {given.tokens}")
    for name, values in (("kernels", inside), ("outside kernels", outside), ("with the child, wall", whole)):
        print(f"  {name:20} {min(values) * 1e3:8.3f} {statistics.median(values) * 1e3:8.3f}")


if __name__ == "__main__":
    main()
