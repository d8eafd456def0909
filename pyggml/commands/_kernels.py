"""Compiled kernels, made ready before anything is timed."""

from __future__ import annotations

from ._console import progress

__all__ = ["warm_up"]


def warm_up() -> None:
    """Load the kernels from Numba's cache, or compile them, with a progress bar: about a minute once per machine."""
    from ..kernels.cpu import kernel

    with progress() as bar:
        task = bar.add_task("compiling kernels", total=None)
        todo = list(kernel.KERNELS.values())
        for i, made in enumerate(todo):
            bar.update(task, completed=i, total=len(todo), description=f"compiling {made.name}")
            _ = made.address
