"""Random programs over a real library's device and over a remote one: results are the CPU's.

Ids are rewritten, chosen and copied on the way, so that what is checked before a node is given away shows, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import pyggml as ggml
from pyggml.backend import REGISTRY, Backend
from pyggml.backends.libggml import open_device
from pyggml.testing.rpc_server import RPCServer

from .test_results import PROGRAMS, ROUTINGS, Instruction, _on_cpu, _Run

SOME = settings(
    max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def library() -> Iterator[Backend]:
    """Give the installed library's CPU."""
    backend = open_device("CPU").backend(threads=1)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RPCServer]:
    """Give a server that computes with our kernels."""
    with RPCServer(version=(8, 0, 0)) as made:
        yield made


def run_on(
    backend: Backend, program: list[Instruction], routings: list[list[int]], *, parallel: bool = False
) -> list[np.ndarray]:
    """Return the results of two computings over a backend, which takes all it can, and the CPU."""
    cpu = ggml.CPU(threads=1)
    run = _Run([backend, cpu], routings, parallel=parallel, offload_rule=lambda b, op: b is backend)
    run.build(program)
    return [run.compute(), run.compute()]


@SOME
@given(program=PROGRAMS, routings=ROUTINGS)
def test_results_on_the_real_library(library: Backend, program: list[Instruction], routings: list[list[int]]) -> None:
    """The library's kernels give the CPU's numbers, but for rounding, in the first computing and the second."""
    expected = _on_cpu(program, routings)
    for got in run_on(library, program, routings):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("parallel", [False, True])
@SOME
@given(program=PROGRAMS, routings=ROUTINGS)
def test_results_on_a_remote_device(
    server: RPCServer, parallel: bool, program: list[Instruction], routings: list[list[int]]
) -> None:
    """Our kernels at the other end of the protocol give the CPU's numbers, bit for bit, and nothing is refused."""
    expected = _on_cpu(program, routings)
    backend = REGISTRY.open(server.address).backend()
    for got in run_on(backend, program, routings, parallel=parallel):
        np.testing.assert_array_equal(got, expected)
    assert server.refused == []
