"""The numpy definition of each op against what the real library's CPU backend computes, within upstream's bounds.

Sources are of random shape and layout; ggml 0.20.2 computes in a child process, with one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from oracle.child import Child

from pyggml.testing import ref
from pyggml.testing.op_cases import COMPUTED, Case, cases_of, of_op
from pyggml.types import Op

from .computed import Computed

#: The library looks these up in a table of f16, for each f16; its own error is above upstream's bound, as upstream
#: never compares it with anything exact.
BY_TABLE = ("GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK")


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


@pytest.mark.parametrize("op", COMPUTED)
def test_definition_agrees_with_the_library(child_of: Callable[[str], Child], op: str) -> None:
    """The numpy definition gives what ggml's CPU backend computes, within upstream's bound for the op."""
    for i in cases_of(op, 5):
        check(child_of(op), of_op(op, i))


def test_every_definition_is_checked() -> None:
    """Each op that has a definition is computed above."""
    cases = [of_op(op, 0) for op in COMPUTED]
    assert ref.defined_ops() == {case.build()[case.result].op for case in cases}
