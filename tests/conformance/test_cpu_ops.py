"""The CPU backend's kernels, op by op: against the numpy definition and against what the real library computes.

The cases are those by which the definitions are checked: random shapes, views, broadcasts and types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from oracle.child import Child

import pyggml as ggml
from pyggml.opset import reason_unsupported
from pyggml.testing import ref
from pyggml.testing.op_cases import COMPUTED, Case, cases_of, of_op
from pyggml.types import Op

from .computed import Computed

#: What the library looks up in tables of f16 is as near to ours as those are.
BY_TABLE = ("GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK")


@pytest.fixture(scope="module")
def cpu() -> Iterator[ggml.Backend]:
    """Our backend, two threads."""
    cpu = ggml.CPU(threads=2)
    yield cpu
    cpu.close()


def compute(cpu: ggml.Backend, case: Case) -> Any:
    """Return the values of a case's result; None if the backend does not take a node."""
    values = case.build()
    result = values[case.result]
    assert result is not None
    graph = ggml.Graph()
    graph.expand(result)
    if any(reason_unsupported(node) for node in graph.nodes):
        return None
    leafs = ggml.Context()
    for i in case.data:
        leaf = values[i]
        assert leaf is not None
        leafs.add(leaf)
    leafs.alloc(cpu)
    sched = ggml.Scheduler([cpu])
    sched.alloc_graph(graph)
    for i, raw in case.data.items():
        leaf = values[i]
        assert leaf is not None
        data = np.frombuffer(raw, np.uint8)
        assert leaf.buffer is not None
        leaf.buffer.set_tensor(leaf, data.ctypes.data, 0, len(raw))
    sched.compute(graph)
    return result.numpy()


def check(cpu: ggml.Backend, child: Child, case: Case) -> None:
    """Compare a case's result with the definition and with the library."""
    found, made = compute(cpu, case), Computed(child, case)
    assert found is not None, f"not taken: {case.steps}"
    expected = ref.compute(made.result, made.sources)
    found, theirs = found.reshape(expected.shape), made.found.reshape(expected.shape)
    if made.result.op is Op.TOP_K:
        expected, found, theirs = (np.sort(x, axis=3) for x in (expected, found, theirs))
    bound = ref.nmse_bound(made.result)
    error = ref.nmse(expected, found)
    assert error <= bound, f"NMSE {error:.3g} > {bound:.3g} of the definition: {case.steps}"
    error, bound = ref.nmse(theirs, found), 5e-7 if made.result.op_desc in BY_TABLE else bound
    assert error <= bound, f"NMSE {error:.3g} > {bound:.3g} of the library: {case.steps}"


@pytest.mark.parametrize("op", COMPUTED)
def test_kernel_agrees_with_definition_and_library(
    cpu: ggml.Backend, child_of: Callable[[str], Child], op: str
) -> None:
    """Each op with a definition has a kernel, which gives what the definition and ggml's CPU backend do."""
    for i in cases_of(op, 6):
        check(cpu, child_of(op), of_op(op, i))


@pytest.mark.parametrize(("op", "argument"), [("argsort", 0), ("argsort", 1), ("top_k", 5)])
def test_equal_values_are_left_in_the_librarys_order(cpu: ggml.Backend, child: Child, op: str, argument: int) -> None:
    """Indices of rows with many equal values are those that ggml's CPU backend gives."""
    case = Case(0)
    ties = case.values(case.numbers.integers(0, 12, (7, 300)))
    case.result = case.add(op, ties, argument)["t"]
    assert np.array_equal(compute(cpu, case), Computed(child, case).found)
