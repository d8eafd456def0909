"""Nodes over numpy memory, and a pool for the tests of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from pyggml.kernels.cpu.pool import Pool

from pyggml.backends.host.plan import HostPlan
from pyggml.tensor import Tensor
from pyggml.testing import ref
from pyggml.types import Op, TensorFlag, Type
from pyggml.values import decode_array, encode_array


class Memory:
    """Tensors whose bytes lie in numpy arrays, and nodes that are run at once."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.arrays: list[np.ndarray] = []

    def place(self, tensor: Tensor, raw: np.ndarray | None = None, *, fill: int = 0xFF) -> Tensor:
        """Give a tensor memory: its bytes, or a pattern that is NaN in every float type."""
        if raw is None:
            raw = np.full(max(1, tensor.nbytes), fill, np.uint8)
        raw = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
        self.arrays.append(raw)
        tensor.data = raw.ctypes.data
        return tensor

    def tensor(self, array: Any, type: str | Type | None = None, name: str = "") -> Tensor:
        """Return a tensor with an array's values, in numpy's order."""
        array = np.asarray(array)
        kind = (
            Type.of(type) if type is not None else {"i4": Type.I32, "i8": Type.I64}.get(array.dtype.str[1:], Type.F32)
        )
        t = Tensor(kind, array.shape[::-1] or (1,), name=name)
        return self.place(t, encode_array(t, array).copy())

    def view(self, base: Tensor, ne: Sequence[int], nb: Sequence[int], offset: int = 0) -> Tensor:
        """Return a view with strides of its own."""
        nb = (*nb, *[nb[-1] * ne[-1]] * (4 - len(nb)))
        return Tensor(base.type, ne, nb, name=f"{base.name} (view)", view_src=base, view_offs=offset, op=Op.VIEW)

    def permute(self, base: Tensor, *axes: int) -> Tensor:
        """Return a view whose dimension axes[i] is dimension i of the base."""
        ne, nb = [0] * 4, [0] * 4
        for i, axis in enumerate((*axes, *range(len(axes), 4))):
            ne[axis], nb[axis] = base.ne[i], base.nb[i]
        return self.view(base, ne, nb)

    def node(
        self, op: Op, ne: Sequence[int], *src: Tensor | None, params: tuple[int, ...] = (), type: Type = Type.F32,
        into: Tensor | None = None, name: str = "node",
    ) -> Tensor:  # fmt: skip
        """Return a node, in memory of its own or exactly in that of another tensor."""
        t = Tensor(type, ne, into.nb if into is not None and into.ne == tuple(ne) else None, name=name, op=op, src=src,
                   op_params=params, flags=TensorFlag.COMPUTE)  # fmt: skip
        if into is None:
            return self.place(t)
        t.data = into.data
        return t

    def run(self, *nodes: Tensor, pool: Pool | None = None) -> np.ndarray:
        """Compute nodes; return the values of the last."""
        HostPlan(nodes, lambda t: t.data).run(pool or self.pool)
        return self.values(nodes[-1])

    def values(self, t: Tensor) -> np.ndarray:
        """Return a tensor's values."""
        return decode_array(t, self.bytes(t)).copy()

    def bytes(self, t: Tensor) -> bytes:
        """Return a tensor's bytes."""
        import ctypes

        return ctypes.string_at(t.data, t.nbytes)

    def define(self, op: Op, ne: Sequence[int], *src: Tensor | None, **options: Any) -> np.ndarray:
        """Return what a node is defined as, of what is in its sources now."""
        values = [None if t is None else self.values(t).astype("f8") for t in src]
        return ref.compute(self.node(op, ne, *src, **options), values)

    def compute(self, op: Op, ne: Sequence[int], *src: Tensor | None, **options: Any) -> np.ndarray:
        """Make a node, compute it with one thread and with two, and return its values, which must be the same."""
        nodes = [self.node(op, ne, *src, **options) for _ in range(2)]
        with_two = self.run(nodes[0])
        with_one = self.run(nodes[1], pool=ONE)
        assert with_two.tobytes() == with_one.tobytes(), f"{op.name} depends on the number of threads"
        return with_two


ONE: Pool = Pool(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two threads for all tests of a process."""
    made = Pool(2)
    yield made
    made.close()


@pytest.fixture
def memory(pool: Pool) -> Memory:
    """Fresh tensors."""
    return Memory(pool)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Return the mean square of errors over that of what is wanted."""
    want = np.asarray(want, np.float64)
    return float(((got.astype(np.float64) - want) ** 2).sum() / max((want**2).sum(), 1e-300))
