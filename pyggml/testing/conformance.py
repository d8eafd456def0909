"""Tests any backend against the definitions of the ops, for authors of backends.

::

    from pyggml.testing import conformance

    results = conformance.run(my_backend)
    wrong = [r for r in results if r.status is Status.WRONG]

Each case is one node with random sources (`op_cases`). The sources are put into the backend's own memory, the backend
computes the node, and the result is compared with the numpy definition (`ref`) within upstream's bound for the op. A
node that the backend does not support counts as unsupported, not as passed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alloc.linear import Context
from ..backend import REGISTRY, Backend
from ..buffer import tensor_set
from ..errors import PyggmlError
from ..graph import Graph
from ..sched.scheduler import Scheduler
from ..tensor import Tensor
from ..types import Op, TensorFlag, Type
from ..values import decode_array
from . import op_cases, ref

__all__ = ["CaseResult", "Status", "cases", "compute", "n_cases", "products", "run", "run_case"]

#: Types of weights for the products, and tokens: one, a full small batch, and more than a tile of 32.
PRODUCT_TYPES = tuple(
    Type.of(name)
    for name in [
        "f32",
        "f16",
        "bf16",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "q2_K",
        "q3_K",
        "q4_K",
        "q5_K",
        "q6_K",
        "iq4_nl",
        "mxfp4",
    ]
)
PRODUCT_TOKENS = (1, 8, 33)
#: Allowed NMSE for devices that compute the function with a table of f16, as ggml's CPU backend does.
BY_TABLE = {"GELU": 5e-7, "GELU_QUICK": 5e-7, "GEGLU": 5e-7, "GEGLU_QUICK": 5e-7}


class Status(Enum):
    """The result of one case."""

    PASSED = "passed"
    WRONG = "wrong"  #: the error is above the bound
    UNSUPPORTED = "unsupported"  #: the backend says that it cannot run the node
    FAILED = "failed"  #: the backend says that it can, and raised an error


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One node computed by one backend.

    Attributes
    ----------
    name : str
        Builder and number of the case, or the product's type and number of tokens.
    op : str
        Op of the node, as `Tensor.op_desc`.
    node : str
        Types and shapes of the sources, ``ne`` in ggml order.
    error, bound : float or None
        Normalised mean squared error against the definition, and its bound; None if nothing was computed.
    seconds : float
        Wall time of computing the node once, including launch and wait.
    message : str
        The backend's error, if it raised one.
    """

    name: str
    op: str
    node: str
    status: Status
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    message: str = ""


def run(
    backend: Backend,
    *,
    ops: Iterable[str] | None = None,
    n_case: int = 3,
    with_products: bool = True,
    on_result: Callable[[CaseResult], None] | None = None,
) -> list[CaseResult]:
    """Compute random cases of every op that has a definition, and return the results.

    Parameters
    ----------
    backend : Backend
        Any backend; the host need not be able to read its memory.
    ops : iterable of str, optional
        Names of builders (``"mul_mat_id"``, ``"rope_ext"``); by default all of `op_cases.COMPUTED`.
    n_case : int
        Cases of each op; more or fewer by the number of the op's kinds of arguments (`op_cases.cases_of`).
    with_products : bool
        Also run `products`.
    on_result : callable, optional
        Called with each result, for progress.

    Returns
    -------
    list of CaseResult
        In a fixed order; cases are equal in every run.
    """
    results = []
    for name, case in cases(ops, n_case=n_case, with_products=with_products):
        result = run_case(backend, name, case)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def n_cases(ops: Iterable[str] | None = None, *, n_case: int = 3, with_products: bool = True) -> int:
    """Return the number of results of `run` with the same arguments."""
    return sum(1 for _ in cases(ops, n_case=n_case, with_products=with_products))


def cases(
    ops: Iterable[str] | None = None, *, n_case: int = 3, with_products: bool = True
) -> Iterator[tuple[str, Callable[[], op_cases.Case]]]:
    """Yield the cases of `run`, each as its name and a function that makes it."""
    for op in op_cases.COMPUTED if ops is None else ops:
        for i in op_cases.cases_of(op, n_case):
            yield f"{op} {i}", partial(op_cases.of_op, op, i)
    if with_products:
        yield from products()


def products() -> Iterator[tuple[str, Callable[[], op_cases.Case]]]:
    """Yield MUL_MAT_ID and MUL_MAT of every common type of weights at 1, 8 and 33 tokens."""
    for op in ("mul_mat_id", "mul_mat"):
        for type in PRODUCT_TYPES:
            for n_token in PRODUCT_TOKENS:
                yield f"{op} {type.ggml_name} {n_token} tokens", partial(op_cases.product, op, type, n_token)


def run_case(backend: Backend, name: str, make: Callable[[], op_cases.Case]) -> CaseResult:
    """Compute one case and compare it with the definition."""
    case = make()
    values = case.build()
    result = values[case.result]
    assert result is not None
    node = ", ".join(f"{s.type.ggml_name}{[*s.ne]}" for s in result.src if s is not None)
    if not backend.supports_op(result):
        return CaseResult(name, result.op_desc, node, Status.UNSUPPORTED)
    try:
        found, sources, seconds = compute(backend, case)
    except PyggmlError as raised:
        return CaseResult(name, result.op_desc, node, Status.FAILED, message=str(raised))
    expected = ref.compute(result, sources)
    found = found.reshape(expected.shape)
    if result.op is Op.TOP_K:  # upstream does not promise an order
        expected, found = np.sort(expected, axis=3), np.sort(found, axis=3)
    error = ref.nmse(expected, found)
    bound = max(ref.nmse_bound(result), BY_TABLE.get(result.op_desc, 0.0))
    status = Status.PASSED if error <= bound else Status.WRONG
    return CaseResult(name, result.op_desc, node, status, float(error), bound, seconds)


def compute(backend: Backend, case: op_cases.Case) -> tuple[npt.NDArray[Any], Sequence[npt.NDArray[Any] | None], float]:
    """Let a backend compute only the last node of a case, with sources in its own memory.

    Returns
    -------
    found : array
        The node's values, float32 or its integer type.
    sources : sequence of array or None
        The values of its sources.
    seconds : float
        Wall time of the node.

    Raises
    ------
    PyggmlError
        Of the backend.
    """
    values = case.build()
    last = case.result
    result = values[last]
    assert result is not None
    known = {t: i for i, t in enumerate(values) if t is not None}
    roots = {known[s if s.view_src is None else s.view_src] for s in result.src if s is not None} - {last}
    memory = _memory_of(case, roots)
    context = Context()
    for tensor in dict.fromkeys([*(values[i] for i in sorted(roots)), *result.src, result]):
        if tensor is not None:
            context.add(tensor)
    graph = Graph()
    graph.nodes.append(result)
    result.flags |= TensorFlag.COMPUTE
    try:
        context.alloc(backend)
        for i in roots:
            root, data = values[i], np.frombuffer(memory[i], np.uint8)
            assert root is not None
            if len(data):
                tensor_set(root, data.ctypes.data, 0, len(data))
        start = time.perf_counter()
        backend.graph_compute(graph.view(0, 1))
        backend.synchronize()
        seconds = time.perf_counter() - start
        found = result.numpy()
    finally:
        backend.synchronize()
        context.close()

    def source(t: Tensor | None) -> npt.NDArray[Any] | None:
        if t is None or t is result:
            return None
        raw = memory[known[t if t.view_src is None else t.view_src]]
        return decode_array(t, raw[t.view_offs : t.view_offs + t.nbytes])

    return found, [source(t) for t in result.src], seconds


def _memory_of(case: op_cases.Case, indices: set[int]) -> dict[int, bytes]:
    """Return the bytes of some steps' tensors: given ones, and what the host computes of these (weights of a type)."""
    memory = {i: case.data[i] for i in indices if i in case.data}
    computed = sorted(indices - memory.keys())
    if not computed:
        return memory
    values = case.build()
    wanted = [t for i in computed if (t := values[i]) is not None]
    host = REGISTRY.open("cpu").backend()
    try:
        leafs = Context()
        for i in case.data:
            leaf = values[i]
            assert leaf is not None
            leafs.add(leaf)
        leafs.alloc(host)
        graph = Graph()
        graph.expand(*(t.set_output() for t in wanted))
        sched = Scheduler([host])
        sched.alloc_graph(graph)
        for i, raw in case.data.items():
            leaf = values[i]
            assert leaf is not None
            tensor_set(leaf, np.frombuffer(raw, np.uint8).ctypes.data, 0, len(raw))
        sched.compute(graph)
        return memory | {i: t.tobytes() for i, t in zip(computed, wanted, strict=True)}
    finally:
        host.close()
