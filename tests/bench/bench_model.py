"""Tokens per second of a whole model on the CPU: ours against real llama.cpp (xllamacpp), and over a device.

    python tests/bench/bench_model.py [MODEL.gguf] [--threads 2] [--prompt 128] [--generate 32] [--rounds 5]

Without a model: the example of `make run`. Each library has a process of its own; they take turns, so that a busy machine harms
both alike. A turn clears the cache, decodes the prompt in one batch with one output, then tokens one by one (greedy). Prints
the best and the median of the rounds after one that is not counted, and ratios to llama.cpp (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import count, file

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

CONTENDERS = ("llama.cpp", "ours", "ours over [sim, cpu]")
Decode = Callable[[list[int], int], np.ndarray]


def open_session(model: str, threads: int, *, over_device: bool) -> Any:
    """Return a session on the CPU, or over a simulated device with the experts in host memory."""
    import pyggml as ggml
    from pyggml.session import ContextFlags, PlacementFlags, Session

    devices = [ggml.Sim(threads=threads)] if over_device else []
    return Session.open(
        model, devices=devices, cpu=ggml.CPU(threads), context=ContextFlags(n_ctx=512),
        placement=PlacementFlags(cpu_moe=over_device),
    )  # fmt: skip


def open_ours(model: str, threads: int, *, over_device: bool) -> tuple[Decode, Callable[[], None], int]:
    """Return decode, clear and the size of the vocabulary."""
    session = open_session(model, threads, over_device=over_device)
    return lambda tokens, pos: session.decode(tokens)[-1], session.reset, session.hparams.n_vocab


def open_llama(model: str, threads: int) -> tuple[Decode, Callable[[], None], int]:
    """Return decode, clear and the size of the vocabulary."""
    from llama_cpp import Llama

    llama = Llama(model, 512, 512, "F16", True, threads=threads, repack=True)
    decode: Decode = lambda tokens, pos: llama.decode(np.asarray(tokens, np.int32), pos, only_last=True)[-1]
    return decode, llama.clear, llama.n_vocab


def serve(contender: str, model: str, threads: int) -> None:
    """Take turns when told to: a line ``n_prompt n_generate`` in, two rates out."""
    if contender == "llama.cpp":
        decode, clear, n_vocab = open_llama(model, threads)
    else:
        decode, clear, n_vocab = open_ours(model, threads, over_device="sim" in contender)
    for line in sys.stdin:
        n_prompt, n_generate = map(int, line.split())
        clear()
        tokens = [3 + (i * 37 + 11) % (min(n_vocab, 40000) - 64) for i in range(n_prompt)]
        start_s = time.perf_counter()
        last = decode(tokens, 0)
        middle_s = time.perf_counter()
        for i in range(n_generate):
            last = decode([int(last.argmax())], n_prompt + i)
        end_s = time.perf_counter()
        print(json.dumps([n_prompt / (middle_s - start_s), n_generate / (end_s - middle_s)]), flush=True)


def main() -> None:
    """Run the contenders and print their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=file)
    for name, value in (("threads", 2), ("prompt", 128), ("generate", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=count, default=value)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.model, args.threads)
        return
    model = args.model or str(example())
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    command = [sys.executable, __file__, model, "--threads", str(args.threads), "--serve"]
    children = {
        c: subprocess.Popen([*command, c], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for c in CONTENDERS
    }
    rates: dict[str, list[tuple[float, float]]] = {c: [] for c in CONTENDERS}
    for _ in range(args.rounds + 1):
        for name, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(f"{args.prompt} {args.generate}\n")
            child.stdin.flush()
            rates[name].append(tuple(json.loads(child.stdout.readline())))
    for child in children.values():
        child.communicate()
    print(f"{Path(model).name}: prompt of {args.prompt}, {args.generate} generated, {args.threads} threads, tokens/s")
    baseline = None
    for name, rows in rates.items():
        columns = list(zip(*rows[1:], strict=True))
        best, median = [max(c) for c in columns], [statistics.median(c) for c in columns]
        baseline = baseline or best
        print(
            f"{name:22} prompt {best[0]:7.1f} (median {median[0]:7.1f}), {best[0] / baseline[0]:5.2f} x;   "
            f"generate {best[1]:7.1f} (median {median[1]:7.1f}), {best[1] / baseline[1]:5.2f} x"
        )


def example() -> Path:
    """Return the model of `make run`, made if it is not there."""
    from pyggml.commands._fetch import cache_folder, example_model

    return example_model(cache_folder(), lambda what, done, total: None)


if __name__ == "__main__":
    main()
