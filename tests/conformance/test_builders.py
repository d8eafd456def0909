"""Every op builder against the real library's, on random arguments: what it makes, and what it refuses.

ggml 0.20.2 answers; 0.26, which pyggml follows, differs in what `DIFFERS` lists, each read in its source.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from oracle import programs
from oracle.child import Child

from pyggml import ops
from pyggml.testing.op_cases import OPS, Step, of_op
from pyggml.types import Type

from .builder_arguments import FAMILIES, Arguments, Draw

#: Builders that 0.20.2 has not, or has otherwise, and where 0.26 says what they do.
DIFFERS = {
    "clamp": "0.20.2's ggml_clamp is in place: it is compared with clamp_inplace (0.26: ggml_clamp_impl)",
    "swiglu_clamp": "new in 0.26",
    "prec_set_acc": "new in 0.26",
    "prec_set_src": "new in 0.26",
    "rope_set_offset": "new in 0.26",
    "flash_attn_ext_set_n_kv_max": "new in 0.26",
    "dsv4_hc_pre": "0.20.2 sets no parameters, as it has no gates (0.26: ggml_dsv4_hc_pre_impl)",
    "dsv4_hc_pre_gated": "new in 0.26",
    "dup_tensor": "makes a leaf, which a program has its own step for; compared by name in test_leafs",
    "view_tensor": "as dup_tensor",
    "flash_attn_ext_get_prec": "returns a number: tested with flash_attn_ext_set_prec in tests/unit/test_ops.py",
}


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """The real library, in a process of its own."""
    with Child("oracle.programs") as child:
        yield child


def reaches_outside(tensors: list[Any], step: Step) -> bool:
    """Whether a tensor that the library makes reaches past the memory it is in: these we refuse."""

    def of(t: Any) -> Any:
        return tensors[t] if isinstance(t, int) else t

    views = [t for t in tensors if t and t["view_src"] is not None]
    if any(t["view_offs"] + t["nbytes"] > of(t["view_src"])["nbytes"] for t in views):
        return True
    if not step[0].startswith(("acc", "set_1d", "set_2d", "set", "set_inplace")):
        return False
    a, part = (of(i) for i in tensors[-1]["src"][:2])
    given = step[3:-1]  # strides that the builder takes, the others are a's; then the offset
    nb = [*given, *a["nb"][1 + len(given) :]]
    end = step[-1] + 4 + sum((n - 1) * b for n, b in zip(part["ne"], (4, *nb), strict=True))
    return end > a["nbytes"] or max(step[-1], *nb) >= 2**31


def compare(theirs: dict[str, Any], steps: list[Step]) -> None:
    """Both refuse a program, or both make the same tensors."""
    ours = programs.run_and_describe(steps)
    if "refused" in ours and "blocks of" in ours["refused"]:  # number of blocks, by the builder or by the tensor
        # an assertion that the library's release build leaves out: it makes a row that ends inside a block
        assert any(t["ne"][0] % Type.of(t["type"]).block_size for t in theirs.get("tensors", ()) if t)
        return
    if "refused" in ours and any(
        text in ours["refused"] for text in ("ends past", "outside the", "cannot be negative")
    ):
        assert "tensors" not in theirs or reaches_outside(theirs["tensors"], steps[-1])
        return
    if "tensors" not in theirs or "tensors" not in ours:
        assert "tensors" not in theirs, f"ours refused: {ours['refused']}"
        assert "tensors" not in ours, f"only the library refused: {theirs}"
        return
    for i, (a, b) in enumerate(zip(ours["tensors"], theirs["tensors"], strict=True)):
        assert a == b, f"step {i}, {steps[i]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_builders_make_and_refuse_what_the_library_does(child: Child, family: str) -> None:
    """A builder gives upstream's shape, strides, type, name, parameters, sources and view, or refuses as upstream."""
    for builder, arguments in FAMILIES[family].items():
        check_builder(child, builder, arguments, n_example=8)


@pytest.mark.parametrize("builder", sorted(set(OPS) - set(DIFFERS)))
def test_builders_make_of_the_cases_what_the_library_does(child: Child, builder: str) -> None:
    """In the cases with which kernels and definitions are tested, too, builders make what upstream's make."""
    for i in range(2):
        steps = of_op(builder, i).steps
        compare(child.ask("build", steps=steps), steps)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("family", FAMILIES)
def test_builders_soak(child: Child, family: str) -> None:
    """The same, with many more arguments."""
    for builder, arguments in FAMILIES[family].items():
        check_builder(child, builder, arguments, n_example=300)


def check_builder(child: Child, builder: str, arguments: Arguments, *, n_example: int) -> None:
    """Compare one builder on random arguments, the same ones in each run; the library answers all at once."""
    drawn: list[list[Step]] = []

    @seed(zlib.crc32(builder.encode()))
    @settings(
        deadline=None, max_examples=n_example, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        d = Draw(data)
        d.add(builder, *arguments(d))
        drawn.append(d.steps)

    draw()
    for theirs, steps in zip(child.ask_each("build", [{"steps": s} for s in drawn]), drawn, strict=True):
        try:
            compare(theirs, steps)
        except AssertionError as error:
            error.add_note(f"the program: {steps}")
            raise


def test_leafs(child: Child) -> None:
    """A leaf of each type has upstream's strides and size."""
    steps = [["new", t.ggml_name, [2 * t.block_size, 3, 5], "x"] for t in Type if t.name not in ("Q2_0",)]
    compare(child.ask("build", steps=steps), steps)


def test_every_builder_is_compared() -> None:
    """Each public builder is in a family above, in the table of cases, or in the list of those that the library cannot answer for."""
    public = {name for name in ops.__all__ if not inspect.isclass(getattr(ops, name))}
    compared = {name for table in FAMILIES.values() for name in table}
    assert public - compared - (set(OPS) - set(DIFFERS)) == set(DIFFERS)
