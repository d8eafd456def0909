"""The real libraries that answer for builders and kernels, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from oracle.child import Child

from .test_sched_live import b11549

#: Builders that 0.20.2 has not, or has otherwise: b11549 answers for them.
LATER = {
    "clamp",  # in place in 0.20.2
    "swiglu_clamp", "prec_set_acc", "prec_set_src", "rope_set_offset", "flash_attn_ext_set_n_kv_max",
    "dsv4_hc_pre", "dsv4_hc_pre_gated", "dsv4_hc_post",  # parameters for gates, and streams that are not mixed
}  # fmt: skip


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    """Ggml 0.20.2."""
    with Child("oracle.programs") as child:
        yield child


@pytest.fixture(scope="session")
def child_of(child: Child) -> Iterator[Callable[[str], Child]]:
    """Return the library that answers for a builder."""
    with ExitStack() as stack:
        started: list[Child] = []

        def of(builder: str) -> Child:
            if builder not in LATER:
                return child
            if not started:
                started.append(stack.enter_context(Child("oracle.programs", b11549())))
            return started[0]

        yield of
