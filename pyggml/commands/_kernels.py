"""Loads or compiles all kernels before anything is timed."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import click

from ._console import progress

__all__ = ["warm_up"]


def warm_up(*, is_for_child: bool = False) -> None:
    """Load all kernels from Numba's cache or compile them, with a progress bar; a line says that this happens once.

    Parameters
    ----------
    is_for_child : bool
        Only a child process needs them: do nothing if the cache has kernels.
    """
    from ..kernels import cpu
    from ..kernels.cpu.cache import CACHE_DIR

    is_warm = any(Path(CACHE_DIR).rglob("*.nbi"))
    if is_warm and is_for_child:
        return
    if not is_warm:
        click.echo(
            f"Compiling CPU kernels, once for this version (about half a minute); cached in {CACHE_DIR}", err=True
        )
    with progress() as bar:
        task = bar.add_task("loading kernels", total=None)
        for module in pkgutil.iter_modules(cpu.__path__):
            importlib.import_module(f"{cpu.__name__}.{module.name}")
        kernels = list(importlib.import_module(f"{cpu.__name__}.kernel").KERNELS.values())
        for i, made in enumerate(kernels):
            bar.update(task, completed=i, total=len(kernels), description=f"compiling or loading kernel {made.name}")
            _ = made.address
