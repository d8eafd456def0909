"""Compile a Python function with numba-cuda, without a driver, and run its PTX in the emulator."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from .engine import Program
from .memory import Buffer, Memory
from .stats import Stats

__all__ = ["EmuKernel", "no_driver"]


@contextlib.contextmanager
def no_driver(cc: tuple[int, int]) -> Iterator[None]:
    """Let numba-cuda compile device functions on a machine without a driver.

    Notes
    -----
    For these, numba-cuda 0.30.4 asks for the current device (`dispatcher.compile_device`). Within the block, that is a
    stand-in with the given compute capability.
    """
    dispatcher: Any = importlib.import_module("numba.cuda.dispatcher")  # ships no types

    old = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=tuple(cc))
    try:
        yield
    finally:
        dispatcher.get_current_device = old


def array_args(buf: Buffer, a: np.ndarray[Any, Any]) -> list[int]:
    """Return the scalars that numba passes for one C-contiguous array argument."""
    return [0, 0, a.size, a.itemsize, buf.addr, *a.shape, *a.strides]


class EmuKernel:
    """A Python function, compiled for a card and called as numba calls kernels.

    Parameters
    ----------
    fn, sig : callable, tuple of numba types
    cc : tuple of int
        Compute capability.

    Notes
    -----
    ``kernel[grid, block, shared](...)`` takes numpy arrays and scalars, copies the arrays back, and returns `Stats`.
    """

    def __init__(
        self, fn: Callable[..., Any], sig: Sequence[Any], cc: tuple[int, int] = (8, 6), **compile_options: Any
    ) -> None:  # Any: numba ships no types
        cuda: Any = importlib.import_module("numba.cuda")
        types: Any = importlib.import_module("numba.types")

        self.types = types
        self.sig = sig
        with no_driver(cc):
            self.ptx, _ = cuda.compile_ptx(fn, sig, cc=cc, **compile_options)

    def __getitem__(self, config: tuple[Any, ...]) -> Callable[..., Stats]:
        """Return the kernel with its launch configuration."""
        grid, block, *rest = config

        def launch(*args: Any, **options: Any) -> Stats:
            mem = Memory()
            program = Program(self.ptx, mem)
            flat: list[Any] = []
            back: list[tuple[Any, Buffer]] = []
            for a, t in zip(args, self.sig, strict=True):
                if isinstance(a, np.ndarray):
                    b = mem.upload(a, name=f"arg{len(back)}")
                    back.append((a, b))
                    flat += array_args(b, a) if isinstance(t, self.types.Array) else [b.addr]
                else:
                    flat.append(a)
            stats = program.kernel().launch(grid, block, flat, *rest[:1], **options)
            for a, b in back:
                a[...] = mem.read(b, a.dtype, a.shape)
            return stats

        return launch
