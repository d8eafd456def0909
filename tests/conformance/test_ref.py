"""The numpy definition of each op against what the real library's CPU backend computes, within upstream's bounds.

Sources are of random shape and layout; ggml 0.20.2 computes in a child process, with one thread.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from oracle.child import Child

from pyggml.testing import ref
from pyggml.testing.op_cases import OPS, Case, of_op
from pyggml.types import Op

from .computed import Computed

N_CASE = 6
#: The library looks these up in a table of f16, for each f16; its own error is above upstream's bound, as upstream
#: never compares it with anything exact.
BY_TABLE = ("GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK")


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """The real library, in a process of its own."""
    with Child("oracle.programs") as child:
        yield child


def check(child: Child, case: Case) -> None:
    """Compute the last step with the library, and by definition from the sources that the library had."""
    made = Computed(child, case)
    expected = ref.compute(made.result, made.sources)
    found = made.found.reshape(expected.shape)
    if made.result.op is Op.TOP_K:
        expected, found = np.sort(expected, axis=3), np.sort(found, axis=3)
    error, bound = ref.nmse(expected, found), ref.nmse_bound(made.result)
    if made.result.op_desc in BY_TABLE:
        bound = 5e-7
    assert error <= bound, f"NMSE {error:.3g} > {bound:.3g}: {case.steps}"


@pytest.mark.parametrize("op", OPS)
def test_definition_agrees_with_the_library(child: Child, op: str) -> None:
    """The numpy definition gives what ggml's CPU backend computes, within upstream's bound for the op."""
    for i in range(N_CASE * (3 if op in ("mul_mat", "mul_mat_id", "get_rows", "flash_attn_ext") else 1)):
        check(child, of_op(op, i))


@pytest.mark.parametrize(
    ("op", "setter"), [("soft_max_ext", "soft_max_add_sinks"), ("flash_attn_ext", "flash_attn_ext_add_sinks")]
)
def test_sinks_agree_with_the_library(child: Child, op: str, setter: str) -> None:
    """With sinks, the definitions of softmax and flash attention still give what ggml's CPU backend computes."""
    for i in range(N_CASE):
        case = Case(zlib.crc32(f"{setter} {i}".encode()))
        case.result = case.add(op, *OPS[op](case))["t"]
        made = case.build()[-1]
        assert made is not None
        assert made.src[0] is not None
        sinks = case.tensor([made.src[0].ne[2]], low=-2, high=2, plain=True)
        case.add(setter, {"t": case.result}, sinks)
        check(child, case)


def test_every_definition_is_checked() -> None:
    """Each op that has a definition is computed above."""
    checked = set()
    for op, arguments in OPS.items():
        case = Case(0)
        case.add(op, *arguments(case))
        made = case.build()[-1]
        assert made is not None
        checked.add(made.op)
    assert ref.defined_ops() == checked
