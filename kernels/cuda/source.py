"""`Kernel`: a kernel as source text, and the function that numba compiles.

Kernels are generated, because NVVM does not unroll the loops that matter, and so that one text serves all types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Text = list[str]
#: The cast of a constant, and the constant's type.
_CONSTANT = re.compile(r"\b(u32|u64)\((0x[0-9A-F]+|\d+)\)")
_TYPE_OF = {"u32": np.uint32, "u64": np.uint64}


class Param(NamedTuple):
    """A parameter: ``u64`` (addresses and strides in bytes), ``u32``, ``i32`` or ``f32``."""

    name: str
    type: str

    @classmethod
    def of(cls, text: str) -> Param:
        """Return the parameter of ``name`` or ``name:type``."""
        name, _, type = text.partition(":")
        return cls(name, type or "u64")


def params(*texts: str) -> tuple[Param, ...]:
    """Return parameters of ``name`` or ``name:type`` each."""
    return tuple(Param.of(text) for text in texts)


@dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes
    ----------
    body : list of str
        Lines of Python.
    threads : int
        Most threads of a block.
    blocks : int
        Blocks that must fit on a multiprocessor at once; limits the registers.
    helpers : callable
        Returns more names for the body: intrinsics made for this kernel, which unroll what would be slow as text.
    """

    name: str
    params: tuple[Param, ...]
    body: Text
    threads: int
    helpers: Callable[[], dict[str, Any]] = dict
    blocks: int = 1

    @property
    def bounds(self) -> tuple[int, int]:
        """Launch bounds."""
        return self.threads, self.blocks

    @property
    def text(self) -> str:
        """The whole function."""
        head = f"def {self.name}({', '.join(p.name for p in self.params)}):"
        return "\n".join([head, *indent(self.body)]) + "\n"

    def function(self) -> tuple[Any, tuple[Any, ...]]:
        """Return the Python function and its numba signature."""
        from numba import cuda
        from numba import types as T

        from . import intrinsics

        types = {"u64": T.uint64, "u32": T.uint32, "i32": T.int32, "f32": T.float32, "i8": T.int8}
        space = {"cuda": cuda, "math": math, "libdevice": cuda.libdevice, **vars(intrinsics), **types, **self.helpers()}
        # numba compiles a typed constant in less time than a cast of one, to the same code
        text = _CONSTANT.sub(r"\1_\2", self.text)
        space |= {f"{kind}_{n}": _TYPE_OF[kind](int(n, 0)) for kind, n in _CONSTANT.findall(self.text)}
        exec(compile(text, f"<kernel {self.name}>", "exec"), space)  # noqa: S102 - our own text
        return space[self.name], tuple(types[p.type] for p in self.params)


def indent(lines: Sequence[str], n: int = 1) -> Text:
    """Return the lines ``n`` levels further in."""
    return ["    " * n + line for line in lines]
