"""`Graph.expand` against the real library: order of nodes and leafs, names of the nameless, use counts, flags."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import programs
from oracle.child import Child

from pyggml.testing.op_cases import Step, ref

UNARY = ["scale", "silu", "cont", "reshape", "cast", "view", "soft_max", "transpose", "add_inplace"]
BINARY = ["add", "mul_inplace", "mul_mat", "cpy", "set_rows", "soft_max_ext"]


def step_of(op: str, a: int, b: int, index: int) -> Step:
    """Return a step on square matrices, so that any two results fit."""
    x, y = ref(a), ref(b)
    special: dict[str, list[Any]] = {
        "scale": ["scale", x, 0.5],
        "reshape": ["reshape_2d", x, 4, 4],
        "cast": ["cast", x, "f32"],
        "view": ["view_2d", x, 4, 4, 16, 0],
        "add_inplace": ["add_inplace", x, x],
        "set_rows": ["set_rows", x, y, ref(index)],
        "soft_max_ext": ["soft_max_ext", x, y, 1.0, 0.0],
    }
    return special.get(op, [op, x, y] if op in BINARY else [op, x])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Step], list[int]]:
    """Draw a program of steps on earlier results, any of them shared, and which results to expand in which order."""
    names = st.sampled_from(["", "", "w", "x"])
    steps: list[Step] = [["new", "i64", [4], draw(names)]]
    steps += [["new", "f32", [4, 4], draw(names)] for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 14))):
        values = st.integers(1, len(steps) - 1)
        step = step_of(draw(st.sampled_from(UNARY + BINARY)), draw(values), draw(values), 0)
        if "tensors" in programs.run_and_describe([*steps, step]):
            steps.append(step)
    results = st.lists(st.integers(0, len(steps) - 1), min_size=1, max_size=4)
    return steps, draw(results)


@settings(derandomize=True, deadline=None, max_examples=250, database=None)
@given(graphs())
def test_expand_orders_names_and_counts_as_the_library(child: Child, drawn: tuple[list[Step], list[int]]) -> None:
    """Expanding any results, in any order and again, gives upstream's graph."""
    steps, results = drawn
    assert programs.expand(steps, results) == child.ask("expand", steps=steps, results=results)
