"""The CUDA backend in the table of cases by which builders, definitions and the CPU's kernels are tested."""

from __future__ import annotations

import pytest

from pyggml.backends.cuda import CudaDevice
from pyggml.backends.cuda.ops import KERNELS
from pyggml.testing import conformance, op_cases
from pyggml.testing.conformance import Status
from pyggml.testing.fake_driver import FakeMachine

OF_OP = {}
for name in op_cases.OPS:
    case = op_cases.of_op(name, 0)
    OF_OP.setdefault(case.build()[case.result].op, []).append(name)


@pytest.fixture(scope="module")
def backend():
    """Return our kernels in the emulator."""
    backend = CudaDevice(FakeMachine(seed=1).cards[0]).backend()
    yield backend
    backend.close()


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_kernels_agree_with_definitions(backend, op):
    """Each op with a CUDA kernel takes a case of the table, and gives the definition's result in all that it takes."""
    results = conformance.run(backend, ops=OF_OP[op], n_case=2, with_products=False)
    assert {r.status for r in results} <= {Status.PASSED, Status.UNSUPPORTED}, [
        r for r in results if r.message or r.error
    ]
    assert any(r.status is Status.PASSED for r in results)
