"""SET_ROWS into every type, and ROPE in every mode: our kernels against libggml's CPU backend.

    python tests/bench/bench_rows.py [--rows 1,512] [--rounds 5]

One thread each, in one process, in turns of a tenth of a second. A graph has 32 such nodes, as a model has one a layer:
SET_ROWS writes rows of 1024 floats into a cache of 4096 rows, ROPE turns 16 heads of 128 a token, their angles made
once a graph by us, once a node by libggml. Prints the 10th percentile in microseconds a node, and the ratio (above 1:
ours is faster).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from arguments import count, counts, some_of
from bench_mul_mat_id import libggml

N_NODES, N_COLUMNS, N_CACHE, N_EMBD_HEAD, N_HEAD = 32, 1024, 4096, 128, 16
TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "mxfp4": 39, "iq4_nl": 20,
    "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
}  # fmt: skip
MODES = {"normal": 0, "neox": 2, "mrope": 8, "imrope": 40, "vision": 24}
SECTIONS = (24, 20, 20, 0)
TURN_S = 0.1

Run = Callable[[], Any]


class Ours:
    """Our kernels: a plan of 32 nodes and one thread."""

    def __init__(self) -> None:
        from pyggml.kernels.cpu.pool import Pool

        self.pool = Pool(1)
        self.kept: list[Any] = []

    def _graph(self, leafs: list[tuple[Any, np.ndarray]], make: Callable[..., Any]) -> Run:
        from pyggml.backends.host.plan import HostPlan
        from pyggml.types import TensorFlag

        tensors = [t for t, _ in leafs]
        for t, array in leafs:
            t.data = array.ctypes.data
        nodes = [make(*tensors) for _ in range(N_NODES)]
        for node in nodes:
            node.flags |= TensorFlag.COMPUTE
            if node.view_src is None:
                out = np.empty(node.nbytes, np.uint8)
                node.data = out.ctypes.data
                self.kept.append(out)
            else:
                node.data = node.view_src.data
        plan = HostPlan(nodes, lambda t: t.data or 0)
        self.kept.append((leafs, plan))
        return lambda: plan.run(self.pool)

    def set_rows(self, name: str, x: np.ndarray, ids: np.ndarray) -> Run:
        """Return what computes SET_ROWS into a type."""
        from pyggml import ops
        from pyggml.tensor import Tensor
        from pyggml.types import Type

        cache = Tensor(Type.of(name), (N_COLUMNS, N_CACHE))
        memory = np.zeros(cache.nbytes, np.uint8)
        leafs = [(cache, memory), (Tensor("f32", x.shape[::-1]), x), (Tensor("i64", ids.shape), ids)]
        return self._graph(leafs, ops.set_rows)

    def rope(self, name: str, x: np.ndarray, positions: np.ndarray) -> Run:
        """Return what computes ROPE in a mode."""
        from pyggml import ops
        from pyggml.tensor import Tensor

        leafs = [(Tensor("f32", x.shape[::-1]), x), (Tensor("i32", positions.shape), positions)]
        n_dims = N_EMBD_HEAD // 2 if name == "vision" else N_EMBD_HEAD
        rest = (0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
        return self._graph(leafs, lambda a, b: ops.rope_multi(a, b, None, n_dims, SECTIONS, MODES[name], *rest))


class Theirs:
    """The library: a graph of 32 nodes and one thread."""

    def __init__(self) -> None:
        import ctypes as c

        self.c, pointer = c, c.c_void_p
        base, cpu = (c.CDLL(str(libggml(name)), c.RTLD_GLOBAL) for name in ("base", "cpu"))

        class InitParams(c.Structure):
            _fields_ = (("size", c.c_size_t), ("buffer", pointer), ("no_alloc", c.c_bool))

        def function(lib: c.CDLL, name: str, result: Any, *args: Any) -> Any:
            f = getattr(lib, f"ggml_{name}")
            f.restype, f.argtypes = result, args
            return f

        init = function(base, "init", pointer, InitParams)
        self.context = lambda: init(InitParams(1 << 22, None, True))
        self.new = function(base, "new_tensor", pointer, pointer, c.c_int, c.c_int, pointer)
        self.make_set_rows = function(base, "set_rows", pointer, *[pointer] * 4)
        ints, floats = [c.c_int] * 2, [c.c_float] * 6
        self.make_rope = function(base, "rope_multi", pointer, *[pointer] * 4, c.c_int, pointer, *ints, *floats)
        self.new_graph = function(base, "new_graph", pointer, pointer)
        self.expand = function(base, "build_forward_expand", None, pointer, pointer)
        self.backend = function(cpu, "backend_cpu_init", pointer)()
        function(cpu, "backend_cpu_set_n_threads", None, pointer, c.c_int)(self.backend, 1)
        self.alloc = function(base, "backend_alloc_ctx_tensors", pointer, pointer, pointer)
        self.write = function(base, "backend_tensor_set", None, pointer, pointer, c.c_size_t, c.c_size_t)
        self.compute = function(base, "backend_graph_compute", c.c_int, pointer, pointer)

    def _graph(self, leafs: list[tuple[int, tuple[int, ...], np.ndarray | None]], make: Callable[..., Any]) -> Run:
        context = self.context()
        tensors = [self.new(context, kind, len(ne), (self.c.c_int64 * len(ne))(*ne)) for kind, ne, _ in leafs]
        graph = self.new_graph(context)
        for _ in range(N_NODES):
            self.expand(graph, make(context, *tensors))
        self.alloc(context, self.backend)
        for t, (_, _, array) in zip(tensors, leafs, strict=True):
            if array is not None:
                self.write(t, array.ctypes.data, 0, array.nbytes)
        return lambda: self.compute(self.backend, graph)

    def set_rows(self, name: str, x: np.ndarray, ids: np.ndarray) -> Run:
        """Return what computes SET_ROWS into a type."""
        leafs = [(TYPES[name], (N_COLUMNS, N_CACHE), None), (0, x.shape[::-1], x), (27, ids.shape, ids)]
        return self._graph(leafs, self.make_set_rows)

    def rope(self, name: str, x: np.ndarray, positions: np.ndarray) -> Run:
        """Return what computes ROPE in a mode."""
        sections = (self.c.c_int * 4)(*SECTIONS)
        n_dims = N_EMBD_HEAD // 2 if name == "vision" else N_EMBD_HEAD
        rest = (0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
        return self._graph(
            [(0, x.shape[::-1], x), (26, positions.shape, positions)],
            lambda context, a, b: self.make_rope(context, a, b, None, n_dims, sections, MODES[name], *rest),
        )


def time_both(runs: list[Run], rounds: int) -> list[float]:
    """Return the 10th percentile of each run's seconds a node, the runs taking turns."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for run, found in zip(runs, times, strict=True):
            end, n = time.perf_counter() + TURN_S, 0
            while time.perf_counter() < end or n < 3:
                start = time.perf_counter()
                run()
                found.append((time.perf_counter() - start) / N_NODES)
                n += 1
    return [float(np.quantile(t, 0.1)) for t in times]


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=counts, default="1,512")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--types", type=some_of(TYPES), default=",".join(TYPES))
    parser.add_argument("--modes", type=some_of(MODES), default=",".join(MODES))
    args = parser.parse_args()
    ours, theirs, rng = Ours(), Theirs(), np.random.default_rng(0)
    for n in args.rows:
        x = rng.standard_normal((n, N_COLUMNS), dtype="f4")
        ids = rng.permutation(N_CACHE)[:n].astype("i8")
        heads = rng.standard_normal((n, N_HEAD, N_EMBD_HEAD), dtype="f4")
        cases = [(f"SET_ROWS {name}", name, "set_rows", x, ids) for name in args.types]
        for name in args.modes:
            positions = np.tile(np.arange(n, dtype="i4"), 4 if MODES[name] & 8 else 1)
            cases.append((f"ROPE {name}", name, "rope", heads, positions))
        for label, name, kind, *arrays in cases:
            mine, other = time_both([getattr(lib, kind)(name, *arrays) for lib in (ours, theirs)], args.rounds)
            print(
                f"{label:15} {n:4} rows | ours {mine * 1e6:9.2f} | libggml {other * 1e6:9.2f} | {other / mine:5.2f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
