"""The CPU backend's kernels and the numpy definitions, op by op: against each other and against what the real library computes.

Cases are of random shapes, views, broadcasts and types; ggml computes them in a child process, with one thread.
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

from .computed import Computed, computed

#: The library looks these up in a table of f16, for each f16; its own error is above upstream's bound, as upstream
#: never compares it with anything exact.
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


def check(cpu: ggml.Backend, case: Case, made: Computed) -> None:
    """Compare a case's result, the definition of its last step from the library's sources, and the library's result."""
    found = compute(cpu, case)
    assert found is not None, f"not taken: {case.steps}"
    expected = ref.compute(made.result, made.sources)
    found, theirs = found.reshape(expected.shape), made.found.reshape(expected.shape)
    if made.result.op is Op.TOP_K:
        expected, found, theirs = (np.sort(x, axis=3) for x in (expected, found, theirs))
    bound = ref.nmse_bound(made.result)
    bound_of_theirs = 5e-7 if made.result.op_desc in BY_TABLE else bound
    for what, a, b, limit in (
        ("kernel and definition", expected, found, bound),
        ("kernel and library", theirs, found, bound_of_theirs),
        ("definition and library", expected, theirs, bound_of_theirs),
    ):
        error = ref.nmse(a, b)
        assert error <= limit, f"{what}: NMSE {error:.3g} > {limit:.3g}: {case.steps}"


@pytest.mark.parametrize("op", COMPUTED)
def test_kernel_definition_and_library_agree(cpu: ggml.Backend, child_of: Callable[[str], Child], op: str) -> None:
    """Each op with a definition has a kernel, and both give what ggml's CPU backend does, within upstream's bound for the op."""
    cases = [of_op(op, i) for i in cases_of(op, 6)]
    for case, made in zip(cases, computed(child_of(op), cases), strict=True):
        check(cpu, case, made)


def test_every_definition_is_checked() -> None:
    """Each op that has a definition is computed above."""
    cases = [of_op(op, 0) for op in COMPUTED]
    assert ref.defined_ops() == {case.build()[case.result].op for case in cases}


@pytest.mark.parametrize(("op", "argument"), [("argsort", 0), ("argsort", 1), ("top_k", 5)])
def test_equal_values_are_left_in_the_librarys_order(cpu: ggml.Backend, child: Child, op: str, argument: int) -> None:
    """Indices of rows with many equal values are those that ggml's CPU backend gives."""
    case = Case(0)
    ties = case.values(case.numbers.integers(0, 12, (7, 300)))
    case.result = case.add(op, ties, argument)["t"]
    [made] = computed(child, [case])
    assert np.array_equal(compute(cpu, case), made.found)
