"""Each kernel's share of what the machine can do, measured in the same run: memory's read rate, and the rate of its instruction.

    python tests/bench/bench_limits.py [--types Q8_0,Q4_K,F16] [--columns 1024] [--rounds 7] [--threads 1,2]

Products of one token read each weight once, so memory is their limit; from the cache it is the processor. Products of many tokens are held to
the rate of vpdpbusd (floats: of FMA). A line is of one kernel and number of threads: GB/s of weights read from memory, the share
of the read rate by as many threads; GB/s of weights that are in the second level's cache. Rates are the best of the rounds, in which
limits and kernels take turns, for a busy machine's limits change.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from arguments import count, counts, some_of
from pyggml.kernels.cpu import coded, matmul, panel
from pyggml.kernels.cpu.activations import quantised_row_bytes
from pyggml.kernels.cpu.emit import I64, F32x16, I32x16, U8x64, micro, types
from pyggml.kernels.cpu.kernel import entry
from pyggml.kernels.cpu.memory import call8

from pyggml.types import Type

#: Bytes of weights: more than any cache, and fewer than the second level has.
FAR, NEAR = 256 << 20, 256 << 10
#: Rows of a call, as in a plan.
JOB_ROWS = 256
#: Steps of 16 instructions in a turn.
STEPS = 20_000


@micro(types.int64, 2)
def _read(e, at, n):
    """Read n bytes in order."""
    b = e.b
    acc = [e.var(e.const(I32x16, 0)) for _ in range(4)]
    with e.loop(n, 256) as (i, _):
        for j, p in enumerate(acc):
            b.store(b.xor(b.load(p), e.load(I32x16, e.add(at, i), 64 * j)), p)
    for p in acc[1:]:
        b.store(b.xor(b.load(acc[0]), b.load(p)), acc[0])
    return b.zext(e.fold(b.load(acc[0]), b.xor), I64)


def _chains(step):
    """Return an intrinsic that runs 16 independent chains of an instruction."""

    def body(e, at, n):
        b, type = e.b, step(None)
        acc = [e.var(e.load(type, at, 64 * j)) for j in range(16)]
        with e.loop(n):
            for p in acc:
                b.store(step(e, b.load(p), at), p)
        total = b.load(acc[0])
        for p in acc[1:]:
            total = b.xor(e.cast(total, I32x16), e.cast(b.load(p), I32x16))
        return b.zext(e.fold(total, b.xor), I64)

    body.__name__ = step.__name__
    return micro(types.int64, 2)(body)


def _dot_step(e, acc=None, at=None):
    return I32x16 if e is None else e.dpbusd(acc, e.cast(acc, U8x64), e.load(U8x64, at))


def _fma_step(e, acc=None, at=None):
    return F32x16 if e is None else e.fma(acc, e.load(F32x16, at), acc)


_dots, _fmas = _chains(_dot_step), _chains(_fma_step)


@entry(2)
def read_bytes(at, n):
    """Read n bytes; see `_read`."""
    return _read(at, n)


@entry(2)
def dot_products(at, n):
    """Run 16 n vector dot products of bytes."""
    return _dots(at, n)


@entry(2)
def fused_products(at, n):
    """Run 16 n vector FMAs."""
    return _fmas(at, n)


@entry(8)
def all_rows(kernel, w, stride, n, times, lists, outs, n_rows):
    """Call a kernel of rows for as many as there are, as jobs of a plan do, so many times."""
    for _ in range(times):
        r = 0
        while r < n_rows:
            call8(kernel, w + r * stride, stride, min(JOB_ROWS, n_rows - r), n, 1, lists, outs, 4 * r)
            r += JOB_ROWS
    return 0


@entry(7)
def all_tiles(kernel, n_tokens, memory, n_blocks, xs, outs, times):
    """Call a kernel of tiles so many times."""
    for _ in range(times):
        call8(kernel, n_tokens, memory, n_blocks, xs, outs, 0, memory, 0)
    return 0


def together(works: list[Callable[[], object]]) -> float:
    """Return how long pieces of work take, one a thread."""
    gate = threading.Barrier(len(works))
    spans: list[tuple[float, float]] = []

    def run(work: Callable[[], object]) -> None:
        gate.wait()
        start_s = time.perf_counter()
        work()
        spans.append((start_s, time.perf_counter()))

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def aligned(n: int) -> np.ndarray:
    """Return zeros that begin a line of the cache."""
    raw = np.zeros(n + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:n]


class Weights:
    """Rows of a type and one token's activations, ready for its kernel."""

    def __init__(self, name: str, k: int, far: np.ndarray) -> None:
        self.type, self.far = Type.of(name), far
        self.k, self.stride = k, self.type.row_size(k)
        rng = np.random.default_rng(0)
        x = rng.standard_normal(k).astype(np.float32)
        is_float = self.type in matmul.FLOAT_TYPES
        self.n = k if is_float else k // 32
        self.x = x.view(np.uint8) if is_float else aligned(quantised_row_bytes(k))
        if not is_float:
            quantise = matmul.QUANTISE_KERNELS[self.type]
            quantise(x.ctypes.data, self.x.ctypes.data, k // 32, matmul.OFFSET[self.type])
        self.lists = np.array([self.x.ctypes.data])
        self.kernel = matmul.kernels_of(self.type)[0]

    def works(self, n_bytes: int, n_threads: int, times: int = 1) -> tuple[list[Callable[[], object]], int]:
        """Return the work of each thread, over weights of its own, and the bytes that all read."""
        rows = n_bytes // self.stride // n_threads
        out: list[Callable[[], object]] = []
        for i in range(n_threads):
            results = np.zeros(rows, np.float32)
            outs, at = np.array([results.ctypes.data]), self.far.ctypes.data + i * (len(self.far) // n_threads)

            def work(at: int = at, lists: int = self.lists.ctypes.data, to: int = outs.ctypes.data,
                     keep: object = (outs, results)) -> None:  # fmt: skip
                all_rows(self.kernel, at, self.stride, self.n, times, lists, to, rows)

            out.append(work)
        return out, rows * self.stride * n_threads * times


def many_tokens(weights: Weights) -> Callable[[], float]:
    """Return what measures 10^9 products a second of a panel's tile with 6 tokens; 0 for types without."""
    _, unpack, tile = matmul.kernels_of(weights.type)
    n_blocks, n_tokens, times = weights.k // 32, panel.TILE_TOKENS, 400
    if not unpack:
        return lambda: 0.0
    memory = aligned(n_blocks * panel.PANEL_BLOCK)
    xs = np.array([weights.x.ctypes.data] * n_tokens)
    results = np.zeros((n_tokens, panel.ROWS), np.float32)
    outs = np.array([row.ctypes.data for row in results])

    def measure(keep: object = results) -> float:
        start_s = time.perf_counter()
        all_tiles(tile, n_tokens, memory.ctypes.data, n_blocks, xs.ctypes.data, outs.ctypes.data, times)
        return times * n_tokens * panel.ROWS * weights.k / (time.perf_counter() - start_s) / 1e9

    return measure


def main() -> None:
    """Measure limits and kernels in turns, and print shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [Type(t).name for t in (*matmul.FLOAT_TYPES, *matmul.QUANTISED_TYPES, *coded.TYPES)]
    parser.add_argument("--types", type=some_of(every), default=",".join(every))
    parser.add_argument("--threads", type=counts, default="1,2")
    parser.add_argument("--columns", type=count, default=1024)
    parser.add_argument("--rounds", type=count, default=7)
    args = parser.parse_args()
    far = np.full(FAR, 0x38, np.uint8)  # of whatever type, no number is slow
    some = aligned(4096)
    peak = {"dot": 0.0, "fma": 0.0}
    n_bytes_read = FAR // 256 * 256
    print(f"{args.columns} columns a row; GB/s of weights, best of {args.rounds}")
    print("type     threads |  memory   limit  share |  cache | 10^9 products/s of 6 tokens, limit, share")
    for name in args.types:
        weights = Weights(name, args.columns, far)
        tiles = many_tokens(weights)
        for n_threads in args.threads:
            best = {"memory": 0.0, "limit": 0.0, "cache": 0.0, "tile": 0.0}
            part = n_bytes_read // n_threads // 256 * 256
            readers = [partial(read_bytes, far.ctypes.data + i * part, part) for i in range(n_threads)]
            from_memory, n_memory = weights.works(FAR, n_threads)
            from_cache, n_cache = weights.works(NEAR * n_threads, n_threads, 40)
            for _ in range(args.rounds):
                best["limit"] = max(best["limit"], part * n_threads / together(readers) / 1e9)
                best["memory"] = max(best["memory"], n_memory / together(from_memory) / 1e9)
                best["cache"] = max(best["cache"], n_cache / together(from_cache) / 1e9)
                if n_threads == 1:
                    best["tile"] = max(best["tile"], tiles())
                    for key, run, width in (("dot", dot_products, 64), ("fma", fused_products, 16)):
                        start_s = time.perf_counter()
                        run(some.ctypes.data, STEPS)
                        peak[key] = max(peak[key], 16 * STEPS * width / (time.perf_counter() - start_s) / 1e9)
            line = (f"{name:8} {n_threads:7} | {best['memory']:7.1f} {best['limit']:7.1f} {best['memory'] / best['limit']:6.2f} | "
                    f"{best['cache']:6.1f}")  # fmt: skip
            if best["tile"]:
                line += f" | {best['tile']:7.0f} {peak['dot']:7.0f} {best['tile'] / peak['dot']:6.2f}"
            print(line, flush=True)
    print(f"peaks of one core: {peak['dot']:.0f} 10^9 products of bytes a second, {peak['fma']:.0f} of floats (FMA)")


if __name__ == "__main__":
    main()
