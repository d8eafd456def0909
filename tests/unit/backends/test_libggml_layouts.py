"""`libggml:CPU` over tensors laid out in every way: what it says it supports is computed, right, and does not end the process."""

from __future__ import annotations

import math
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import pyggml as ggml
from pyggml import ops
from pyggml.backend import REGISTRY
from pyggml.errors import ShapeError
from pyggml.tensor import Tensor
from pyggml.testing.conformance import Status, run_case
from pyggml.testing.op_cases import COMPUTED, FEW, OPS, SETTER, Case
from pyggml.types import Type

#: Axes of a permutation, or what a leaf has more of in each dimension.
PERMUTED = {"permuted": (0, 2, 1, 3), "transposed": (1, 0, 2, 3), "turned": (1, 2, 0, 3), "turned back": (2, 0, 1, 3)}
LARGER = {"dense": (0, 0, 0, 0), "rows with gaps": (3, 0, 0, 0), "matrices with gaps": (0, 1, 0, 0)}
#: Rows of one element keep what stride they have: transposed columns.
SHAPES = ([8, 6, 4, 1], [1, 6, 4, 1], [8, 1, 4, 1], [6, 6, 4, 1])
#: Parameters at which the library's kernels end the process.
PARAMETERS: dict[str, list[Any]] = {
    **{f"{name} of {eps}": [name, eps] for name in ("norm", "rms_norm", "l2_norm") for eps in (-1.0, -1e-30, math.nan)},
    "diag_mask_inf of -1": ["diag_mask_inf", -1],
    "diag_mask_zero of -1": ["diag_mask_zero", -1],
    "argsort of 3": ["argsort", 3],
    "soft_max of a bias": ["soft_max_ext", None, 1.0, 8.0],
}


class Laid(Case):
    """A case of one shape, whose floats lie in memory in a given way, whether that fits the op or not."""

    def __init__(self, name: str, layout: str, ne: list[int]) -> None:
        super().__init__(zlib.crc32(name.encode()))
        self.layout, self.shape = layout, ne

    def ne(self) -> list[int]:
        """Return the given shape."""
        return [*self.shape]

    def tensor(self, ne: list[int], type: str = "f32", *, plain: bool = False, **values: float) -> dict[str, int]:
        """Return a view of a leaf."""
        ne = [*ne, *[1] * (4 - len(ne))]
        if Type.of(type).block_size > 1:
            return super().tensor(ne, type, plain=True, **values)
        if axes := PERMUTED.get(self.layout):
            return self.add("permute", super().tensor([ne[axis] for axis in axes], type, plain=True, **values), *axes)
        big = [n + more for n, more in zip(ne, LARGER[self.layout], strict=True)]
        leaf = super().tensor(big, type, plain=True, **values)
        return self.add("view_4d", leaf, *ne, *Tensor(type, big).nb[1:], 0)


def _cases() -> Iterator[tuple[str, Case]]:
    for op in COMPUTED:
        for layout in [] if SETTER.search(op) or FEW.fullmatch(op) else [*LARGER, *PERMUTED]:
            for ne in SHAPES:
                case = Laid(name := f"{op}, {layout}, {ne}", layout, ne)
                case.result = case.add(op, *OPS[op](case))["t"]
                yield name, case
    for name, (op, *parameters) in PARAMETERS.items():
        case = Laid(name, "dense", [8, 6, 4, 1])
        case.result = case.add(op, case.tensor([8, 6, 4, 1]), *parameters)["t"]
        yield name, case


def _compute() -> None:
    """Run all cases, naming each first: the last line says at which the process ended."""
    library, n = REGISTRY.open("libggml:CPU").backend(), 0
    for name, case in _cases():
        try:
            case.build()
        except ShapeError:  # a layout that the op does not take
            continue
        print(name, flush=True)
        result = run_case(library, name, lambda case=case: case)
        assert result.status in (Status.PASSED, Status.UNSUPPORTED), result
        n += result.status is Status.PASSED
    print(f"{n} passed")


def test_the_librarys_cpu_survives_every_layout() -> None:
    """No op over any layout, and no parameter, ends the process that asks first, and each result is as defined."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200, check=False)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"{last}: {done.stderr[-500:]}"
    assert int(last.split()[0]) > 1000


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
    _compute()
