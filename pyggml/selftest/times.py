"""How fast a device is, in its own measure: memory and products, each kernel beside the best, and the ways of copies."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .. import ops
from ..alloc.linear import Context
from ..backend import Backend
from ..errors import OutOfMemoryError
from ..graph import Graph
from ..sched.experts import expert_copy_ranges
from ..tensor import Tensor
from ..types import TensorFlag, Type
from .report import Rate

__all__ = ["Sizes", "copy_rates", "kernel_rates", "slow_kernels", "with_shares"]

#: Runs of one piece of work: at least this many, and for at least this long.
MIN_RUNS, MIN_SECONDS = 3, 0.02
#: A kernel below this part of the best rate of its kind is called slow.
SLOW_SHARE = 0.05
WEIGHT_TYPES = ("f16", "q8_0", "q4_0", "q4_K", "q6_K", "mxfp4")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the timed work is: more than the device's caches hold, and small enough for the test to be short."""

    memory_bytes: int = 64 << 20  #: of one operand of the memory test
    row: int = 2048  #: elements of a weight's row
    n_row: int = 768
    n_expert: int = 64
    n_used: int = 8
    tokens: tuple[int, ...] = (1, 32, 512)
    copy_bytes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)


def kernel_rates(backend: Backend, sizes: Sizes) -> Iterator[Rate]:
    """Time additions of large tensors (memory), and products of each type of weights at several numbers of tokens.

    Yields
    ------
    Rate
        In bytes a second for the memory test and for products of one token, else in operations a second.
    """
    n = sizes.memory_bytes // 4
    yield from _timed(backend, "ADD f32", ops.add(Tensor("f32", (n,)), Tensor("f32", (n,))), 12 * n, "B/s")
    for type in WEIGHT_TYPES:
        for tokens in sizes.tokens:
            weight = Tensor(type, (sizes.row, sizes.n_row, sizes.n_expert))
            ids = Tensor("i32", (sizes.n_used, tokens))
            node = ops.mul_mat_id(weight, Tensor("f32", (sizes.row, 1, tokens)), ids)
            what = f"MUL_MAT_ID {type}, {tokens} token{'s' if tokens > 1 else ''}"
            if tokens == 1:  # what counts is reading the used experts
                yield from _timed(backend, what, node, weight.nbytes * sizes.n_used // sizes.n_expert, "B/s")
            else:
                yield from _timed(backend, what, node, 2 * sizes.row * node.numel, "op/s")


def _timed(backend: Backend, what: str, node: Tensor, amount: int, unit: str) -> Iterator[Rate]:
    if not backend.supports_op(node):
        return
    context = Context()
    for tensor in (*node.src, node):
        if tensor is not None:
            context.add(tensor)
    graph = Graph()
    graph.nodes.append(node)
    node.flags |= TensorFlag.COMPUTE
    view = graph.view(0, 1)
    try:
        context.alloc(backend)
        rng = np.random.default_rng(0)
        for src in node.src:
            if src is not None:
                _fill(src, rng, weight.ne[2] if (weight := node.src[0]) is not None else 0)
        seconds = _least(lambda: backend.graph_compute(view), backend.synchronize)
        yield Rate(what, seconds, amount / seconds, unit)
    except OutOfMemoryError:
        return  # too small for this work: nothing is reported
    finally:
        backend.synchronize()
        context.close()


def _fill(tensor: Tensor, rng: np.random.Generator, n_expert: int) -> None:
    """Fill a source: ids that differ within a token, zeros for quantised weights, else small numbers."""
    buffer = tensor.buffer
    assert buffer is not None
    if tensor.type is Type.I32:
        n_used, n_token = tensor.ne[:2]
        tensor.set_array(np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_token)]))
    elif tensor.type is Type.F32 and tensor.nbytes < 1 << 24:
        tensor.set_array(rng.standard_normal(tensor.shape, dtype="f4"))
    else:
        buffer.memset_tensor(tensor, 0, 0, tensor.nbytes)


def _least(start: Callable[[], object], wait: Callable[[], object]) -> float:
    """Return the least time of several runs, after one that is not counted."""
    start()
    wait()
    least, spent, n = float("inf"), 0.0, 0
    while n < MIN_RUNS or spent < MIN_SECONDS:
        begin = time.perf_counter()
        start()
        wait()
        seconds = time.perf_counter() - begin
        least, spent, n = min(least, seconds), spent + seconds, n + 1
    return least


@contextmanager
def _copied(backend: Backend, tensor: Tensor) -> Iterator[list[tuple[str, int]]]:
    """Give a tensor memory on a device, and addresses of as much host memory, pageable and pinned if the device has it.

    Yields
    ------
    list of (str, int)
        The kind of host memory and its address; none if the device is too small.
    """
    size, context, pinned = tensor.nbytes, Context(), None
    context.add(tensor)
    try:
        context.alloc(backend)
    except OutOfMemoryError:
        yield []
        return
    pageable = np.zeros(size, np.uint8)
    sources = [("pageable", pageable.ctypes.data)]
    if backend.device.host_buffer_type is not None:
        pinned = backend.device.host_buffer_type.alloc_buffer(size)
        ctypes.memset(pinned.base, 0, size)
        sources.append(("pinned", pinned.base))
    try:
        yield sources
    finally:
        backend.synchronize()
        context.close()
        if pinned is not None:
            pinned.close()


def copy_rates(backend: Backend, sizes: Sizes) -> Iterator[Rate]:
    """Time copies between host and device, from pageable and pinned memory: by size, and of the used experts of a weight."""
    for size in sizes.copy_bytes:
        tensor = Tensor("i8", (size,), name="selftest")
        with _copied(backend, tensor) as sources:
            for kind, address in sources:
                for way, call in (("to", backend.set_tensor_async), ("from", backend.get_tensor_async)):
                    seconds = _least(partial(call, tensor, address, 0, size), backend.synchronize)
                    yield Rate(f"copy {way} the device, {kind}, {_size(size)}", seconds, size / seconds, "B/s")
    weight = Tensor("q8_0", (sizes.row, sizes.n_row, sizes.n_expert), name="selftest")
    apart = range(
        0, sizes.n_expert, max(sizes.n_expert // sizes.n_used, 1)
    )  # no two are neighbours, which share a copy
    ranges = expert_copy_ranges(apart, sizes.n_expert, weight.nb[2], tensor_bytes=weight.nbytes)
    n_bytes = sum(r.size_bytes for r in ranges)
    with _copied(backend, weight) as sources:
        for kind, address in sources:

            def send(address: int = address) -> None:
                for r in ranges:
                    backend.set_tensor_async(weight, address + r.offset_bytes, r.offset_bytes, r.size_bytes)

            seconds = _least(send, backend.synchronize)
            what = f"copy {len(ranges)} used of {sizes.n_expert} experts, {kind}, {_size(n_bytes)}"
            yield Rate(what, seconds, n_bytes / seconds, "B/s")


def _size(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


def with_shares(rates: list[Rate]) -> tuple[list[Rate], dict[str, float]]:
    """Return kernels' rates with their part of the best of the same unit, and these bests."""
    peaks: dict[str, float] = {}
    for rate in rates:
        peaks[rate.unit] = max(peaks.get(rate.unit, 0.0), rate.per_s)
    return [replace(rate, share=rate.per_s / peaks[rate.unit]) for rate in rates], peaks


def slow_kernels(rates: list[Rate]) -> list[str]:
    """Return what is far below the best of its unit."""
    return [rate.what for rate in rates if rate.share is not None and rate.share < SLOW_SHARE]
