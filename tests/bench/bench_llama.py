"""What llama.cpp on a simulated device costs outside kernels: ms of a decode of one token.

    python tests/bench/bench_llama.py [MODEL.gguf ...] [--tokens 60]

Each model decodes with llama.cpp's own CPU, with everything on a device, and with experts on the host, one thread each. Time in
kernels is counted around pyggml's plans and ggml's CPU by the processor's counter; what is left of the time of a decode is llama.cpp's
own work, the device's calls, statistics and virtual time. The last column also has the way to the child process and back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import count, file
from bench_token import measure_cycles

from pyggml.llama import LlamaModel
from pyggml.llama.engine import Engine
from pyggml.llama.library import find_llama
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

#: Devices and placement of each way to decode.
WAYS = {
    "llama.cpp's CPU": ((), PlacementFlags()),
    "all on the device": (("sim:rtx4090-pcie4",), PlacementFlags()),
    "experts on the host": (("sim:rtx4090-pcie4",), PlacementFlags(cpu_moe=True)),
}


def measure(decode: Callable[[], Any], kernels_s: Callable[[], float], n: int) -> list[tuple[float, float]]:
    """Return the seconds of decodes outside kernels and in them, in ascending order."""
    found = []
    for _ in range(n):
        before_s, start_s = kernels_s(), time.perf_counter()
        decode()
        took_s, inside_s = time.perf_counter() - start_s, kernels_s() - before_s
        found.append((took_s - inside_s, inside_s))
    return sorted(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=file)
    parser.add_argument("--tokens", type=count, default=60)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    paths = [Path(model) for model in given.models]
    for layers in () if paths else (4, 24):
        paths.append(folder / f"qwen3moe-{layers}.gguf")
        make_moe(paths[-1], Recipe(arch="qwen3moe", sizes=Sizes(layers=layers)))
    print(f"ms of a decode of one token: minimum, and median of {given.tokens}")
    print(f"{'':24} {'':20} splits   kernels   outside kernels     by LlamaModel")
    for path in paths:
        for name in WAYS:
            # a process has one engine
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                line = pool.apply(one, (path, name, given.tokens))
            print(f"{path.stem[:24]:24} {name:20} {line}", flush=True)


def one(path: Path, way: str, n: int) -> str:
    """Return a line of the table."""
    context, (devices, placement) = ContextFlags(n_ctx=512), WAYS[way]
    with LlamaModel(path, devices=devices, context=context, placement=placement, threads=1, timeout_s=None) as model:
        sent = model.opened_with
        model.decode(range(40))
        for _ in range(3):  # graphs are known from the second time on
            model.decode([1])
        whole = measure(lambda: model.decode([1]), lambda: 0.0, n)
    engine, per_s = Engine(find_llama()), measure_cycles()
    engine.open(sent)
    engine.decode(list(range(40)), "last", 0)
    for _ in range(3):
        engine.decode([1], "last", 0)
    known = engine.machine.known
    found = measure(lambda: engine.decode([1], "last", 0), lambda: known.cycles / per_s, n)
    splits = sum(engine.machine.ledger.batches[-1].splits.values())
    middle = n // 2
    return (
        f"{splits:6} {min(inside for _, inside in found) * 1e3:9.2f} {found[0][0] * 1e3:8.2f} "
        f"{found[middle][0] * 1e3:8.2f} {whole[0][0] * 1e3:8.2f} {whole[middle][0] * 1e3:8.2f}"
    )


if __name__ == "__main__":
    main()
