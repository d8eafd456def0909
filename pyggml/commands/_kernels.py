"""Compiled kernels, made ready before anything is timed."""

from __future__ import annotations

import importlib
import pkgutil

from ._console import progress

__all__ = ["warm_up"]


def warm_up() -> None:
    """Load all kernels from Numba's cache, or compile them, with a progress bar: half a minute once per machine."""
    from ..kernels import cpu

    with progress() as bar:
        task = bar.add_task("loading kernels", total=None)
        for module in pkgutil.iter_modules(cpu.__path__):
            importlib.import_module(f"{cpu.__name__}.{module.name}")
        kernels = list(importlib.import_module(f"{cpu.__name__}.kernel").KERNELS.values())
        for i, made in enumerate(kernels):
            bar.update(task, completed=i, total=len(kernels), description=f"kernel {made.name}")
            _ = made.address
