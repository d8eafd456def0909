"""The CPU backend's kernels, op by op: against the numpy definition and against what the real library computes.

The cases are those by which the definitions are checked: random shapes, views, broadcasts and types.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from oracle.child import Child

import pyggml as ggml
from pyggml.opset import reason_unsupported
from pyggml.testing import ref
from pyggml.testing.op_cases import OPS, Case, of_op
from pyggml.types import Op

from .computed import Computed
from .test_sched_live import b11549

N_CASE = 6
#: Ops that have more kinds than six cases would meet.
MANY = (
    "mul_mat",
    "mul_mat_id",
    "get_rows",
    "set_rows",
    "cpy",
    "flash_attn_ext",
    "rope_ext",
    "rope_multi",
    "rope_multi_back",
)
#: What the library looks up in tables of f16 is as near to ours as those are.
BY_TABLE = ("GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK")


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """The real library, in a process of its own."""
    with Child("oracle.programs") as child:
        yield child


@pytest.fixture(scope="module")
def cpu() -> Iterator[ggml.Backend]:
    """Our backend, two threads."""
    cpu = ggml.CPU(threads=2)
    yield cpu
    cpu.close()


def compute(cpu: ggml.Backend, case: Case) -> Any:
    """Return the values of a case's result; None if the backend does not take a node."""
    values = case.build()
    result = values[case.result % len(values)]
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


@pytest.mark.parametrize("op", OPS)
def test_kernel_agrees_with_definition_and_library(cpu: ggml.Backend, child: Child, op: str) -> None:
    """Each op with a definition has a kernel, which gives what the definition and ggml's CPU backend do."""
    for i in range(N_CASE * (4 if op in MANY else 1)):
        check(cpu, child, of_op(op, i))


@pytest.mark.parametrize(
    ("op", "setter"), [("soft_max_ext", "soft_max_add_sinks"), ("flash_attn_ext", "flash_attn_ext_add_sinks")]
)
def test_sinks(cpu: ggml.Backend, child: Child, op: str, setter: str) -> None:
    """With sinks, softmax and flash attention still give what the definition and the library do."""
    for i in range(N_CASE):
        case = Case(zlib.crc32(f"{setter} {i}".encode()))
        case.result = case.add(op, *OPS[op](case))["t"]
        made = case.build()[-1]
        assert made is not None
        assert made.src[0] is not None
        case.add(setter, {"t": case.result}, case.tensor([made.src[0].ne[2]], low=-2, high=2, plain=True))
        check(cpu, child, case)


def test_hyper_connections_of_later_versions(cpu: ggml.Backend) -> None:
    """Streams weighted by gates and streams that are not mixed, which ggml 0.20 has not, give what b11549 computes."""
    with Child("oracle.programs", b11549()) as child:
        for op in ("dsv4_hc_pre", "dsv4_hc_pre_gated", "dsv4_hc_post"):
            for i in range(N_CASE):
                case = Case(zlib.crc32(f"{op} later {i}".encode()))
                arguments = OPS["dsv4_hc_post" if op == "dsv4_hc_post" else "dsv4_hc_pre"](case)
                if op == "dsv4_hc_post":
                    arguments[3] = None
                elif op == "dsv4_hc_pre_gated":
                    x = case.build()[arguments[0]["t"]]
                    assert x is not None
                    arguments[1:] = [case.tensor([*x.ne[:3]], low=-3, high=3), 0.5]
                case.result = case.add(op, *arguments)["t"]
                check(cpu, child, case)
