"""Compiled kernels, made ready before anything is timed."""

from __future__ import annotations

from ._console import progress

__all__ = ["warm_up"]


def warm_up() -> None:
    """Load the kernels from Numba's cache, or compile them, with a progress bar: about a minute once per machine."""
    from ..kernels.cpu import warm

    with progress() as bar:
        task = bar.add_task("compiling kernels", total=None)
        warm.warm_up(lambda name, done, total: bar.update(task, completed=done, total=total, description=name))
