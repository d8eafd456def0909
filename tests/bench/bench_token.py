"""Where the time of a generated token goes: kernels by kind, waits between threads, launches, Python; llama.cpp beside it.

    python tests/bench/bench_token.py [MODEL.gguf ...] [--threads 2] [--prompt 128] [--generate 64] [--rounds 5] [--kinds 14] [--device]

Without models: the example of `make run`, and a MoE of 8 layers, 32 experts of which 4 are used, and a width of 1024 in Q8_0, Q4_K
and MXFP4, which is made into the cache folder. Each library has a process of its own; they take turns. ``--device`` puts all but the
experts on a simulated device. The table is of our fastest round. A kernel's time is that of thread 0's part; "threads" is
what a stage takes beyond it: handing out parts and waiting for the other thread's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import bench_model
from arguments import count, file

#: Sizes of the made MoE; see `pyggml make-moe`.
MADE = "--arch qwen3moe --embd 1024 --layers 8 --experts 32 --used 4 --ff-exp 512 --heads 16 --kv-heads 4 --vocab 8192"


@dataclass
class Row:
    """One kind of work in all tokens of a round."""

    calls: int = 0
    seconds: float = 0.0
    n_bytes: int = 0  #: of weights that were read


@dataclass
class Profile:
    """What a round came to."""

    rows: dict[str, Row] = field(default_factory=dict)
    stages: int = 0
    shared_stages: int = 0

    def add(self, kind: str, calls: int, seconds: float, n_bytes: int = 0) -> None:
        """Add work of a kind."""
        row = self.rows.setdefault(kind, Row())
        row.calls += calls
        row.seconds += seconds
        row.n_bytes += n_bytes


def kind_of(node: Any, kernel: str, product_kernels: set[str]) -> tuple[str, int]:
    """Return the kind of a descriptor, and the bytes of weights that it reads."""
    if kernel not in product_kernels:
        return kernel, 0
    weights = node.src[0]
    if node.op.name == "MUL_MAT_ID":
        return "products: experts", weights.nb[2] * node.src[2].numel
    where = weights.name.split(".")[2] if weights.name.startswith("blk.") else weights.name.split(".")[0]
    where = "attention" if where.startswith("attn") else "router" if where == "ffn_gate_inp" else where
    return f"products: {where}", weights.nbytes


class Profiler:
    """Adds up what plans of a session take."""

    def __init__(self, session: Any) -> None:
        from pyggml.backends.host.plan import HostPlan

        self.session = session
        self.arrays: dict[Any, Any] = {}
        self.seen: Counter[Any] = Counter()
        self.plan_s = self.compute_s = 0.0
        plain, compute = HostPlan.run, session.sched.compute_async

        def run(plan: HostPlan, pool: Any) -> None:
            times = self.arrays.get(plan)
            if times is None:
                times = self.arrays[plan] = np.zeros((plan.n_descriptors, pool.n_threads + 1), np.int64)
            plan.times = times.ctypes.data
            start_s = time.perf_counter()
            plain(plan, pool)
            self.plan_s += time.perf_counter() - start_s
            self.seen[plan] += 1

        def compute_async(graph: Any) -> None:
            start_s = time.perf_counter()
            compute(graph)
            session.sched.synchronize()
            self.compute_s += time.perf_counter() - start_s

        patch.object(HostPlan, "run", run).start()  # for as long as this process runs
        session.sched.compute_async = compute_async

    def clear(self) -> None:
        """Begin a round."""
        self.arrays.clear()
        self.seen.clear()
        self.plan_s = self.compute_s = 0.0

    def profile(self, wall_s: float, cycles_per_s: float) -> Profile:
        """Return what the round was made of."""
        from pyggml.kernels.cpu.kernel import KERNELS

        out, kernels = Profile(), {k._address: k.name for k in KERNELS.values() if k._address}
        products = {name for name in kernels.values() if name.startswith("mul_mat")}
        inside_s = 0.0
        for plan, times in self.arrays.items():
            n = self.seen[plan]
            words, seconds = plan._words, times / cycles_per_s
            for i, (start, node) in enumerate(zip(plan._starts, plan._owners, strict=True)):
                kernel = kernels[words[start]]
                kind, n_bytes = kind_of(node, kernel, products)
                out.add(kind, n, seconds[i, 0], n * n_bytes)
            stages = np.asarray(plan._stages)
            shared = np.asarray([bool(words[plan._starts[s] + 7]) for s in stages])
            for s, end, is_shared in zip(stages, [*stages[1:], len(plan._starts)], shared, strict=True):
                out.add("threads: waits and hand-over" if is_shared else "stages of one thread: between calls", n,
                        seconds[s, -1] - seconds[s:end, 0].sum())  # fmt: skip
            out.stages += n * len(stages)
            out.shared_stages += n * int(shared.sum())
            inside_s += seconds[stages, -1].sum()
        out.add("Python: begin and end of plans", sum(self.seen.values()), self.plan_s - inside_s)
        out.add("Python: scheduler", 1, self.compute_s - self.plan_s)
        out.add("Python: session", 1, wall_s - self.compute_s)
        return out


def measure_cycles() -> float:
    """Return how fast the processor's counter goes, per second."""
    from pyggml.kernels.cpu.kernel import entry
    from pyggml.kernels.cpu.memory import cycles

    read = entry(1)(lambda _: cycles(0))
    start, start_s = read(0), time.perf_counter()
    time.sleep(0.2)
    return float(read(0) - start) / (time.perf_counter() - start_s)


def serve(contender: str, model: str, threads: int, n_kinds: int) -> None:
    """Take turns when told to: a line ``n_prompt n_generate`` in, seconds and a table out."""
    profiler = None
    if contender == "llama.cpp":
        decode, clear, n_vocab = bench_model.open_llama(model, threads)
    else:
        session = bench_model.open_session(model, threads, over_device=contender == "device")
        decode, clear, n_vocab = lambda tokens, pos: session.decode(tokens)[-1], session.reset, session.hparams.n_vocab
        profiler, cycles_per_s = Profiler(session), measure_cycles()
    for line in sys.stdin:
        n_prompt, n_generate = map(int, line.split())
        clear()
        last = decode([3 + (i * 37 + 11) % (min(n_vocab, 40000) - 64) for i in range(n_prompt)], 0)
        last = decode([int(last.argmax())], n_prompt)  # whose graph is used for the rest
        if profiler is not None:
            profiler.clear()
        start_s = time.perf_counter()
        for i in range(n_generate):
            last = decode([int(last.argmax())], n_prompt + 1 + i)
        wall_s = time.perf_counter() - start_s
        text = "" if profiler is None else table(profiler.profile(wall_s, cycles_per_s), wall_s, n_generate, n_kinds)
        print(json.dumps([wall_s, text]), flush=True)


def table(profile: Profile, wall_s: float, n_tokens: int, n_kinds: int) -> str:
    """Return a profile as a table, the most expensive first."""
    rows = sorted(profile.rows.items(), key=lambda item: -item[1].seconds)
    head, tail = rows[:n_kinds], rows[n_kinds:]
    if tail:
        head.append((f"{len(tail)} others", Row(sum(r.calls for _, r in tail), sum(r.seconds for _, r in tail))))
    lines = ["| what | calls | ms a token | share | GB/s |", "| --- | --- | --- | --- | --- |"]
    for kind, row in head:
        rate = f"{row.n_bytes / row.seconds / 1e9:.1f}" if row.n_bytes else ""
        ms = row.seconds * 1e3 / n_tokens
        lines.append(f"| {kind} | {row.calls / n_tokens:.0f} | {ms:.3f} | {row.seconds / wall_s:.1%} | {rate} |")
    n_bytes = sum(r.n_bytes for r in profile.rows.values())
    lines.append(f"| all | {profile.stages / n_tokens:.0f} stages, {profile.shared_stages / n_tokens:.0f} shared | "
                 f"{wall_s * 1e3 / n_tokens:.3f} | 100% | {n_bytes / wall_s / 1e9:.1f} |")  # fmt: skip
    return "\n".join(lines)


def models(given: list[str]) -> Iterator[Path]:
    """Yield the models, made if they are not there."""
    if given:
        yield from map(Path, given)
        return
    yield bench_model.example()
    from pyggml.cli import main as pyggml
    from pyggml.commands._fetch import cache_folder

    for typ in ("Q8_0", "Q4_K", "MXFP4"):
        path = cache_folder() / f"bench-moe-32x4-1024.{typ}.gguf"
        if not path.exists():
            pyggml(["make-moe", *MADE.split(), "--type", typ, str(path)], standalone_mode=False)
        yield path


def main() -> None:
    """Profile the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=file)
    for name, value in (("threads", 2), ("prompt", 128), ("generate", 64), ("rounds", 5), ("kinds", 14)):
        parser.add_argument(f"--{name}", type=count, default=value)
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.models[0], args.threads, args.kinds)
        return
    ours = "device" if args.device else "ours"
    for model in models(args.models):
        children = {}
        for c in ("llama.cpp", ours):
            options = ["--threads", str(args.threads), "--kinds", str(args.kinds), "--serve", c]
            children[c] = subprocess.Popen(
                [sys.executable, __file__, str(model), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=dict(os.environ, OMP_NUM_THREADS=str(args.threads)),
            )  # fmt: skip
        best: dict[str, tuple[float, str]] = {}
        for i in range(args.rounds + 1):
            for name, child in children.items():
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write(f"{args.prompt} {args.generate}\n")
                child.stdin.flush()
                result = tuple(json.loads(child.stdout.readline()))
                if i:
                    best[name] = min(best.get(name, result), result)
        for child in children.values():
            child.communicate()
        (llama_s, _), (ours_s, text) = best["llama.cpp"], best[ours]
        where = "over [sim, cpu]" if args.device else "on the CPU"
        print(f"{model.name}, {where}, {args.threads} threads: {ours_s * 1e3 / args.generate:.3f} ms a token; "
              f"llama.cpp {llama_s * 1e3 / args.generate:.3f} ms, {llama_s / ours_s:.2f} x\n\n{text}\n")  # fmt: skip


if __name__ == "__main__":
    main()
