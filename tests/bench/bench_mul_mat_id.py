"""MUL_MAT_ID of [2048 x 768 x 128 experts], 8 used: our kernels against libggml's CPU backend.

    python tests/bench/bench_mul_mat_id.py [--types q8_0,f16] [--tokens 1,8,64,512] [--threads 2] [--rounds 5]

Each library has a process of its own; they take turns of a quarter of a second, so that a busy machine harms both
alike. Ids are random and change with each call. Prints the 10th percentile (and the median) in milliseconds, the
ratio of the former (above 1: ours is faster), and the error of each against float64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import count, counts, some_of

N_COLUMNS, N_ROWS, N_EXPERTS, N_USED = 2048, 768, 128, 8
TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q4_k": 12, "q5_k": 13,
    "q6_k": 14, "mxfp4": 39, "q2_k": 10, "q3_k": 11, "iq4_nl": 20, "iq4_xs": 23, "iq3_s": 21, "iq3_xxs": 18, "iq2_s": 22,
    "iq2_xs": 17, "iq2_xxs": 16, "iq1_m": 29, "iq1_s": 19, "tq1_0": 34, "tq2_0": 35, "nvfp4": 40, "q1_0": 41, "q2_0": 42,
}  # fmt: skip
TURN_S = 0.25
N_ID_SETS = 16
LIBRARIES = ("ours", "libggml")


def libggml(name: str) -> Path:
    """Return the path of one of libggml-python's shared objects."""
    import importlib.util

    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        raise SystemExit("libggml-python is not installed: pip install -e '.[libggml]'")
    return Path(spec.origin).parent / "lib64" / f"libggml-{name}.so"


def one_expert(type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of an expert, and its float values."""
    import ctypes

    from pyggml.tensor import Tensor
    from pyggml.values import decode_array

    values = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS), dtype="f4") / np.float32(N_COLUMNS**0.5)
    raw, even = np.empty(values.nbytes, np.uint8), np.ones(N_COLUMNS, "f4")  # some types need to know what matters
    quantise = ctypes.CDLL(str(libggml("base"))).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    n = quantise(TYPES[type_name], values.ctypes.data, raw.ctypes.data, 0, N_ROWS, N_COLUMNS, even.ctypes.data)
    raw = raw[:n].copy()
    if type_name == "f32":
        return raw, values
    return raw, decode_array(Tensor(type_name, (N_COLUMNS, N_ROWS)), raw.tobytes())


def id_sets(n_tokens: int) -> list[np.ndarray]:
    """Return several choices of experts."""
    return [
        np.stack([np.random.default_rng([7, v, i]).permutation(N_EXPERTS)[:N_USED] for i in range(n_tokens)]).astype(
            "i4"
        )
        for v in range(N_ID_SETS)
    ]


def activations(n_tokens: int) -> np.ndarray:
    """Return the same inputs for all."""
    return np.random.default_rng(5).standard_normal((n_tokens, N_COLUMNS), dtype="f4")


class Case:
    """One product, ready to run: ``choose`` sets its ids, ``run`` computes it, ``out`` is the result."""

    def __init__(
        self, choose: Callable[[np.ndarray], None], run: Callable[[], Any], out: Callable[[], np.ndarray]
    ) -> None:
        self.choose, self.run, self.out = choose, run, out


def make_ours(threads: int) -> Callable[[str, int], Case]:
    """Return what makes cases of our kernels."""
    from pyggml.kernels.cpu.pool import Pool

    from pyggml.backends.host.plan import HostPlan
    from pyggml.tensor import Tensor
    from pyggml.types import Op, TensorFlag, Type

    pool = Pool(threads)
    weights: dict[str, np.ndarray] = {}

    def case(type_name: str, n_tokens: int) -> Case:
        if type_name not in weights:
            weights.clear()
            weights[type_name] = np.tile(one_expert(type_name)[0], (N_EXPERTS, 1))
        x, ids = activations(n_tokens), id_sets(n_tokens)[0].copy()
        out = np.empty((n_tokens, N_USED, N_ROWS), "f4")
        w = Tensor(Type.of(type_name), (N_COLUMNS, N_ROWS, N_EXPERTS))
        src1, src2 = Tensor("f32", (N_COLUMNS, 1, n_tokens)), Tensor("i32", (N_USED, n_tokens))
        dst = Tensor("f32", (N_ROWS, N_USED, n_tokens), op=Op.MUL_MAT_ID, src=(w, src1, src2), flags=TensorFlag.COMPUTE)
        for t, a in ((w, weights[type_name]), (src1, x), (src2, ids), (dst, out)):
            t.data = a.ctypes.data
        plan = HostPlan([dst], lambda t: t.data or 0)
        return Case(lambda v: np.copyto(ids, v), lambda: (plan.run(pool), x), lambda: out)

    return case


def make_libggml(threads: int) -> Callable[[str, int], Case]:
    """Return what makes cases of libggml's CPU backend."""
    import ctypes as c

    base, cpu = (c.CDLL(str(libggml(name)), c.RTLD_GLOBAL) for name in ("base", "cpu"))
    pointer, size = c.c_void_p, c.c_size_t

    class InitParams(c.Structure):
        _fields_ = (("size", size), ("buffer", pointer), ("no_alloc", c.c_bool))

    def function(lib: c.CDLL, name: str, result: Any, *args: Any) -> Any:
        f = getattr(lib, f"ggml_{name}")
        f.restype, f.argtypes = result, args
        return f

    init = function(base, "init", pointer, InitParams)
    new_3d = function(base, "new_tensor_3d", pointer, pointer, c.c_int, *[c.c_int64] * 3)
    new_2d = function(base, "new_tensor_2d", pointer, pointer, c.c_int, *[c.c_int64] * 2)
    mul_mat_id = function(base, "mul_mat_id", pointer, *[pointer] * 4)
    new_graph = function(base, "new_graph", pointer, pointer)
    expand = function(base, "build_forward_expand", None, pointer, pointer)
    backend = function(cpu, "backend_cpu_init", pointer)()
    function(cpu, "backend_cpu_set_n_threads", None, pointer, c.c_int)(backend, threads)
    alloc = function(base, "backend_alloc_ctx_tensors", pointer, pointer, pointer)
    write = function(base, "backend_tensor_set", None, pointer, pointer, size, size)
    read = function(base, "backend_tensor_get", None, pointer, pointer, size, size)
    compute = function(base, "backend_graph_compute", c.c_int, pointer, pointer)
    free = function(base, "backend_buffer_free", None, pointer)
    loaded: dict[str, tuple[Any, Any]] = {}

    def weights(type_name: str) -> Any:
        if type_name not in loaded:
            for _, buffer in loaded.values():
                free(buffer)
            loaded.clear()
            context = init(InitParams(1 << 20, None, True))
            tensor = new_3d(context, TYPES[type_name], N_COLUMNS, N_ROWS, N_EXPERTS)
            loaded[type_name] = tensor, alloc(context, backend)
            raw = one_expert(type_name)[0]
            for e in range(N_EXPERTS):
                write(tensor, raw.ctypes.data, e * raw.nbytes, raw.nbytes)
        return loaded[type_name][0]

    def case(type_name: str, n_tokens: int) -> Case:
        w, context = weights(type_name), init(InitParams(1 << 24, None, True))
        src1, ids = new_3d(context, 0, N_COLUMNS, 1, n_tokens), new_2d(context, 26, N_USED, n_tokens)
        dst, graph = mul_mat_id(context, w, src1, ids), new_graph(context)
        expand(graph, dst)
        alloc(context, backend)
        x = activations(n_tokens)
        write(src1, x.ctypes.data, 0, x.nbytes)

        def out() -> np.ndarray:
            result = np.empty((n_tokens, N_USED, N_ROWS), "f4")
            read(dst, result.ctypes.data, 0, result.nbytes)
            return result

        return Case(lambda v: write(ids, v.ctypes.data, 0, v.nbytes), lambda: compute(backend, graph), out)

    return case


def work(library: str, threads: int) -> None:
    """Answer requests on stdin: ``case TYPE TOKENS`` gives its error, ``run SECONDS`` the times of calls."""
    make = make_ours(threads) if library == "ours" else make_libggml(threads)
    case, sets, turn = None, [], 0
    for line in sys.stdin:
        verb, *args = line.split()
        if verb == "case":
            n_tokens = int(args[1])
            case, sets = make(args[0], n_tokens), id_sets(n_tokens)
            case.choose(sets[0])
            case.run()
            case.run()
            want = activations(n_tokens).astype("f8") @ one_expert(args[0])[1].T.astype("f8")
            error = (case.out() - want[:, None]).astype("f8")
            answer: Any = float((error**2).sum() / (N_USED * (want**2).sum()))
        else:
            assert case is not None
            answer, end = [], time.perf_counter() + float(args[0])
            while time.perf_counter() < end or len(answer) < 4:
                turn = (turn + 1) % N_ID_SETS
                case.choose(sets[turn])
                start = time.perf_counter()
                case.run()
                answer.append(time.perf_counter() - start)
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=some_of(TYPES), default="q8_0,q4_1,q4_0,q4_k,mxfp4,f16,f32,bf16")
    parser.add_argument("--tokens", type=counts, default="1,8,64,512")
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.threads)
        return
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    workers = {
        library: subprocess.Popen(
            [sys.executable, __file__, "--worker", library, "--threads", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for library in LIBRARIES
    }

    def ask(library: str, request: str) -> Any:
        worker = workers[library]
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(request + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {library} ended during {request!r}")
        return json.loads(line)

    print(f"MUL_MAT_ID [{N_COLUMNS} x {N_ROWS} x {N_EXPERTS}], {N_USED} used, {args.threads} threads; ms: p10 (median)")
    for type_name in args.types:
        for n_tokens in args.tokens:
            errors = {library: ask(library, f"case {type_name} {n_tokens}") for library in LIBRARIES}
            times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
            for _ in range(args.rounds):
                for library in LIBRARIES:
                    times[library] += ask(library, f"run {TURN_S}")
            p10 = {library: float(np.quantile(t, 0.1)) * 1e3 for library, t in times.items()}
            median = {library: float(np.median(t)) * 1e3 for library, t in times.items()}
            cells = " | ".join(
                f"{lib} {p10[lib]:8.3f} ({median[lib]:8.3f}) nmse {errors[lib]:.1e}" for lib in LIBRARIES
            )
            print(f"{type_name:6} {n_tokens:4} tokens | {cells} | {p10['libggml'] / p10['ours']:5.2f} x", flush=True)
    for worker in workers.values():
        worker.communicate()


if __name__ == "__main__":
    main()
