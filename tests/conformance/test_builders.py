"""Every op builder against the real library's, on random arguments: what it makes, and what it refuses."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracle import programs
from oracle.child import Child

from pyggml import ops
from pyggml.testing.op_cases import OPS, Case, Step
from pyggml.types import Type

#: Functions that no program calls, and where they are tested.
NOT_COMPARED = {
    "dup_tensor": "makes a leaf, which a program has its own step for; compared by name in test_leafs",
    "view_tensor": "as dup_tensor",
    "flash_attn_ext_get_prec": "returns a number: tested with flash_attn_ext_set_prec in tests/unit/test_ops.py",
}
FLOATS = (0.0, 1.0, -1.0, 0.125, 1e-5, 10000.0, 0.1, -3.7, 1e30)
TYPES = ("f32", "f16", "bf16", "i32", "i64", "q8_0", "q4_1")


class Loose(Case):
    """A case for builders alone: other shapes and layouts, and in every second case arguments that may not fit."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.may_misfit = self.one_in(2)

    def one_in(self, n: int) -> bool:
        """Return True once in n times."""
        return self.random.randrange(n) == 0

    def dim(self) -> int:
        """Return a dimension, seldom 0."""
        return 0 if self.one_in(60) else self.random.choice([1, 2, 3, 4, 6, 8])

    def ne(self) -> list[int]:
        """Return four dimensions."""
        return [self.dim() for _ in range(4)]

    def choice(self, *options: Any, also: Any = ()) -> Any:
        """Return an option, or, if arguments may misfit, one of ``also``."""
        if not self.may_misfit:
            return self.random.choice(options)
        if not also and all(isinstance(option, float) for option in options):
            also = FLOATS
        return self.random.choice([*options, *also])

    def node(self, builder: str) -> dict[str, int]:
        """Return a result of the builder, or a leaf where a node is wanted."""
        return self.tensor(self.ne()) if self.may_misfit and self.one_in(4) else super().node(builder)

    def values(self, values: Any, type: str = "f32") -> dict[str, int]:
        """Return a leaf of the values' shape; builders read none."""
        return self.tensor(list(np.shape(values)[::-1]), type, plain=True)

    def distinct(self, ne: list[int]) -> dict[str, int]:
        """Return a leaf; builders read no values."""
        return self.tensor(ne)

    def integers(self, ne: list[int], n: int, type: str = "i32") -> dict[str, int]:
        """Return a leaf of an integer type, whatever the range."""
        return self.tensor(ne, type, plain=True)

    def weight(self, ne: list[int], type: str) -> dict[str, int]:
        """Return a leaf of a weight's type."""
        return self.tensor(ne, type)

    def tensor(self, ne: list[int], type: str = "f32", *, plain: bool = False, **values: float) -> dict[str, int]:
        """Return a leaf of about the given shape and type, laid out in some way."""
        ne = [*ne, *[1] * (4 - len(ne))]
        if self.may_misfit and self.one_in(12):
            ne[self.random.randrange(4)] = self.dim()
        if self.may_misfit and self.one_in(8):
            type = self.random.choice(TYPES)
        block, row_size = Type.of(type).block_size, Type.of(type).row_size
        ne[0] = -(-ne[0] // block) * block
        name = self.random.choice(["", "x", "blk.0"])
        layout = self.random.choice(["plain", "plain", "plain", "permuted", "strided", "reshaped"])
        if layout == "reshaped":
            return self.add("reshape_4d", self.add("new", type, [ne[0], ne[1] * ne[2] * ne[3]], name), *ne)
        if layout == "plain" or (plain and not self.may_misfit):
            return self.add("new", type, ne, name)
        if layout == "permuted":
            axes = self.random.sample(range(4), 4) if block == 1 else [0, *self.random.sample([1, 2, 3], 3)]
            return self.add("permute", self.add("new", type, [ne[axis] for axis in axes], name), *axes)
        big = [ne[0] + block * self.random.randint(0, 2), *(n + self.random.randint(0, 2) for n in ne[1:])]
        nb1 = row_size(big[0])
        nb = [nb1, nb1 * big[1], nb1 * big[1] * big[2]]
        last = sum((n - 1) * b for n, b in zip(ne[1:], nb, strict=True)) + row_size(ne[0])
        fits = [at for at in (0, Type.of(type).type_size, nb1, nb[1]) if at + last <= nb[2] * big[3]]
        return self.add("view_4d", self.add("new", type, big, name), *ne, *nb, self.random.choice(fits or [0]))


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
    row = Type.of(part["type"]).row_size(part["ne"][0])
    end = step[-1] + row + sum((n - 1) * b for n, b in zip(part["ne"][1:], nb, strict=True))
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


def check_builder(child: Child, builder: str, numbers: range) -> None:
    """Compare one builder on random arguments, the same ones in each run; the library answers all at once."""
    programs_of = []
    for i in numbers:
        case = (Loose if i % 4 else Case)(zlib.crc32(f"{builder} {i}".encode()))
        case.add(builder, *OPS[builder](case))
        programs_of.append(case.steps)
    for theirs, steps in zip(child.ask_each("build", [{"steps": s} for s in programs_of]), programs_of, strict=True):
        try:
            compare(theirs, steps)
        except AssertionError as error:
            error.add_note(f"the program: {steps}")
            raise


@pytest.mark.parametrize("builder", OPS)
def test_builders_make_and_refuse_what_the_library_does(child_of: Callable[[str], Child], builder: str) -> None:
    """A builder gives upstream's shape, strides, type, name, parameters, sources and view, or refuses as upstream."""
    check_builder(child_of(builder), builder, range(12))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("builder", OPS)
def test_builders_soak(child_of: Callable[[str], Child], builder: str) -> None:
    """The same, with many more arguments."""
    check_builder(child_of(builder), builder, range(400))


def test_leafs(child: Child) -> None:
    """A leaf of each type has upstream's strides and size."""
    steps = [["new", t.ggml_name, [2 * t.block_size, 3, 5], "x"] for t in Type if t.name not in ("Q2_0",)]
    compare(child.ask("build", steps=steps), steps)


def test_every_builder_has_cases() -> None:
    """Each public builder is in the table of cases, or in the list of those that the library cannot answer for."""
    public = {name for name in ops.__all__ if not inspect.isclass(getattr(ops, name))}
    assert public - set(OPS) == set(NOT_COMPARED)
