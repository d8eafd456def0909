"""`libggml:CPU` over tensors laid out in every way: what it says it supports is computed, right, and does not end the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

import pyggml as ggml
from pyggml import ops
from pyggml.backend import REGISTRY

Build = Callable[[ggml.Tensor], ggml.Tensor]
LAYOUTS: dict[str, Build] = {
    "dense": lambda x: x,
    "rows with gaps": lambda x: ops.view_3d(x, x.ne[0] // 2 or 1, x.ne[1], x.ne[2], x.nb[1], x.nb[2], 0),
    "matrices with gaps": lambda x: ops.view_3d(x, x.ne[0], x.ne[1] - 1, x.ne[2], x.nb[1], x.nb[2], 0),
    "permuted": lambda x: ops.permute(x, 0, 2, 1, 3),
    "transposed": ops.transpose,
    "turned": lambda x: ops.permute(x, 1, 2, 0, 3),
    "rows of one, far apart": lambda x: ops.view_3d(ops.transpose(x), 1, x.ne[0], x.ne[2], x.nb[0], x.nb[2], 0),
}
#: Rows of one element keep what stride they have: transposed columns.
SHAPES = ((8, 6, 4), (1, 6, 4), (8, 1, 4), (6, 6, 4))
OPS: dict[str, Build] = {
    **{name: getattr(ops, name) for name in (
        "sqr", "sqrt", "log", "sin", "cos", "silu", "gelu", "relu", "sigmoid", "exp", "neg", "swiglu", "geglu", "soft_max",
        "sum_rows", "mean", "cumsum", "sum", "argmax", "cont",
    )},
    "scale": lambda x: ops.scale(x, 2.0),
    "clamp": lambda x: ops.clamp(x, 0.0, 1.0),
    "leaky_relu": lambda x: ops.leaky_relu(x, 0.1, False),
    "rms_norm": lambda x: ops.rms_norm(x, 1e-5),
    "norm": lambda x: ops.norm(x, 1e-5),
    "l2_norm": lambda x: ops.l2_norm(x, 1e-5),
    "diag_mask_inf": lambda x: ops.diag_mask_inf(x, 1),
    "diag_mask_inf_inplace": lambda x: ops.diag_mask_inf_inplace(x, 1),
    "scale_inplace": lambda x: ops.scale_inplace(x, 2.0),
    "add": lambda x: ops.add(x, x),
    "sub": lambda x: ops.sub(x, x),
    "mul": lambda x: ops.mul(x, x),
    "div": lambda x: ops.div(x, x),
    "add_inplace": lambda x: ops.add_inplace(x, x),
    "concat": lambda x: ops.concat(x, x, 0),
    "repeat": lambda x: ops.repeat_4d(x, *(2 * n for n in x.ne[:3]), 1),
    "argsort": lambda x: ops.argsort(x, 0),
    "top_k": lambda x: ops.top_k(x, 1),
    "cast": lambda x: ops.cast(x, "f16"),
    "mul_mat": lambda x: ops.mul_mat(x, x),
}  # fmt: skip
#: Parameters at which the library's kernels end the process.
PARAMETERS: dict[str, Build] = {
    **{f"{name} of {eps}": lambda x, name=name, eps=eps: getattr(ops, name)(x, eps)
       for name in ("norm", "rms_norm", "l2_norm") for eps in (-1.0, -1e-30, float("nan"))},
    "diag_mask_inf of -1": lambda x: ops.diag_mask_inf(x, -1),
    "diag_mask_zero of -1": lambda x: ops.diag_mask_zero(x, -1),
    "argsort of 3": lambda x: ops.argsort(x, 3),
    "soft_max of a bias": lambda x: ops.soft_max_ext(x, None, 1.0, 8.0),
}  # fmt: skip


def _cases() -> Iterator[tuple[str, Build, tuple[int, ...]]]:
    for op, build in OPS.items():
        for layout, lay in LAYOUTS.items():
            for ne in SHAPES:
                yield f"{op}, {layout}, {ne}", lambda x, build=build, lay=lay: build(lay(x)), ne
    for name, build in PARAMETERS.items():
        yield name, build, (8, 6, 4)


def _result(backend: ggml.Backend, build: Build, ne: tuple[int, ...], values: np.ndarray) -> np.ndarray | None:
    """Compute on a backend by hand; None if a builder refuses, or if the backend says that it does not support it."""
    with ggml.Context() as context:
        x = context.new_tensor("f32", ne, name="x")
        graph = ggml.Graph()
        try:
            y = build(x)
        except ggml.errors.ShapeError:
            return None
        graph.expand(y)
        if not all(backend.supports_op(node) for node in graph.nodes):
            return None
        for node in graph.nodes:
            context.add(node)
        context.alloc(backend.device)
        x.set_array(values)
        backend.graph_compute(graph.view(0, len(graph.nodes)))
        backend.synchronize()
        return y.numpy()


def _compare() -> None:
    """Run all cases, naming each first: the last line says at which the process ended."""
    library, cpu = REGISTRY.open("libggml:CPU").backend(), ggml.CPU(threads=1)
    rng, n = np.random.default_rng(3), 0
    wrong: list[str] = []
    for name, build, ne in _cases():
        print(name, flush=True)
        values = rng.uniform(0.1, 2.0, ne[::-1])
        theirs = _result(library, build, ne, values)
        if theirs is None:
            continue
        ours = _result(cpu, build, ne, values)
        assert ours is not None, name
        if not np.allclose(theirs, ours, rtol=2e-3, atol=1e-5):
            wrong.append(name)
        n += 1
    assert not wrong, wrong
    print(f"{n} compared")


def test_the_librarys_cpu_survives_every_layout() -> None:
    """No op over any layout, and no parameter, ends the process that asks first, and each result is our kernels'."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200, check=False)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"{last}: {done.stderr[-500:]}"
    assert int(last.split()[0]) > 350


def test_rows_with_gaps_are_computed_there() -> None:
    """A part of the columns of an input is copied to the library's memory with its gaps, and its squares are right."""
    backend = REGISTRY.open("libggml:CPU").backend()
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (64, 8), name="x")
        y = ops.sqr(ops.view_2d(x, 32, 8, x.nb[1], 0))
    graph.expand(y)
    sched = ggml.Scheduler([backend, ggml.CPU(threads=1)])
    sched.set_tensor_backend(y, backend)
    sched.alloc_graph(graph)
    values = np.random.default_rng(0).standard_normal((8, 64)).astype("f4")
    x.set_array(values)
    sched.compute(graph)
    np.testing.assert_allclose(y.numpy(), values[:, :32] ** 2, rtol=1e-6)


if __name__ == "__main__":
    _compare()
