"""Memory that may not be written, is closed too early, or belongs to nodes that no builder made: errors, never a crash."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pyggml as ggml
from pyggml import ops
from pyggml.types import Op

INTO: dict[str, Callable[[ggml.Tensor], ggml.Tensor]] = {
    "scale_inplace": lambda w: ops.scale_inplace(w, 2.0),
    "add_inplace": lambda w: ops.add_inplace(w, w),
    "cpy": lambda w: ops.cpy(ggml.Tensor("f32", w.ne, name="x", flags=1), w),
    "set_rows": lambda w: ops.set_rows(
        w, ggml.Tensor("f32", w.ne, name="x", flags=1), ggml.Tensor("i64", (w.ne[1],), name="i", flags=1)
    ),
    "a view of it": lambda w: ops.scale_inplace(ops.view_1d(w, 8, 0), 2.0),
    "acc_inplace": lambda w: ops.acc_inplace(w, ggml.Tensor("f32", (4,), name="x", flags=1), 256, 256, 256, 0),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", INTO)
def test_read_only_memory_is_not_written(name: str, strict: bool, tmp_path: Path) -> None:
    """An op that writes into memory of a read-only mapping is refused, when it is allocated or at the latest by the kernels."""
    cpu = ggml.CPU(threads=1)
    raw = np.ones((4, 64), "f4")
    path = tmp_path / "weights"
    path.write_bytes(raw.tobytes())
    with path.open("rb") as file:
        page = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    address = np.frombuffer(page, np.uint8).ctypes.data
    buffer = cpu.device.buffer_from_host(address, len(page), page)
    assert buffer is not None
    assert not buffer.is_writable
    w = ggml.Tensor("f32", (64, 4), name="w")
    w.buffer, w.data = buffer, address
    graph = ggml.Graph()
    with graph:
        y = INTO[name](w)
    graph.expand(y)
    sched = ggml.Scheduler([cpu], strict=strict)
    with pytest.raises(ggml.errors.UnsupportedOpError, match="'w', which is in read-only memory"):
        sched.compute(graph)
    assert path.read_bytes() == raw.tobytes()


def test_a_buffer_is_not_closed_under_a_computation() -> None:
    """Closing a context in another thread waits for nobody and takes nothing away: it is refused, and works afterwards."""
    cpu = ggml.CPU(threads=1)
    context = ggml.Context()
    w = context.new_tensor("f32", (2048, 2048), name="w")
    context.alloc(cpu, usage="weights")
    w.set_array(np.ones((2048, 2048)))
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (2048, 512), name="x")
        y = ops.mul_mat(w, x)
    x.set_output()
    graph.expand(y)
    sched = ggml.Scheduler([cpu])
    sched.alloc_graph(graph)
    x.set_array(np.ones((512, 2048)))
    sched.compute(graph)
    refused = 0
    deadline = time.monotonic() + 20
    while not refused and time.monotonic() < deadline:
        worker = threading.Thread(target=sched.compute, args=(graph,))
        worker.start()
        while worker.is_alive() and not refused:
            if w.buffer.n_users:
                try:
                    context.close()
                except ggml.errors.BackendError as error:
                    assert "another thread computes in it" in str(error)  # noqa: PT017
                    refused += 1
                else:
                    pytest.skip("the computation ended between the look and the closing")
        worker.join()
    assert refused
    assert (y.numpy() == 2048).all()
    context.close()
    with pytest.raises(ggml.PyggmlError):
        sched.compute(graph)


def _by_hand(op: Op, ne: tuple[int, ...], *src: ggml.Tensor | None) -> ggml.Tensor:
    return ggml.Tensor("f32", ne, name="y", op=op, src=src, flags=16)


def _x(*ne: int) -> ggml.Tensor:
    return ggml.Tensor("f32", ne, name="x")


MALFORMED: dict[str, Callable[[], ggml.Tensor]] = {
    **{f"{op.name} without a source": lambda op=op: _by_hand(op, (8, 4)) for op in Op if not op.is_empty and op is not Op.ARANGE},
    **{
        f"{op.name} larger than its source": lambda op=op: _by_hand(op, (64, 64), _x(8, 4), _x(8, 4))
        for op in (Op.ADD, Op.MUL, Op.SQR, Op.SCALE, Op.RMS_NORM, Op.SOFT_MAX, Op.CONT, Op.DUP, Op.CUMSUM, Op.SUM_ROWS, Op.GLU, Op.MUL_MAT)
    },
    "ADD of rows that do not repeat": lambda: _by_hand(Op.ADD, (8, 4), _x(8, 4), _x(5, 4)),
    "MUL_MAT of other lengths": lambda: _by_hand(Op.MUL_MAT, (4, 4), _x(8, 4), _x(16, 4)),
    "MUL_MAT without its second source": lambda: _by_hand(Op.MUL_MAT, (4, 4), _x(8, 4), None),
    "REPEAT to no multiple": lambda: _by_hand(Op.REPEAT, (9, 4), _x(8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_nodes_that_no_builder_made_are_refused(name: str) -> None:
    """A node without its sources, or with a shape that does not follow from them, takes no kernel."""
    cpu = ggml.CPU(threads=1)
    y = MALFORMED[name]()
    graph = ggml.Graph()
    graph.expand(y)
    with ggml.Context() as context:
        for tensor in (*graph.leafs, *graph.nodes):
            context.add(tensor)
        context.alloc(cpu)
        with pytest.raises(ggml.errors.UnsupportedOpError, match="CPU cannot run"):
            cpu.graph_compute(graph.view(0, 1))
