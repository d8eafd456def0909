"""Loads or compiles all kernels before anything is timed."""

from __future__ import annotations

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
    from ..kernels.cpu import kernel
    from ..kernels.cpu.cache import CACHE_DIR

    is_warm = kernel.is_compiled()
    if is_warm and is_for_child:
        return
    if not is_warm:
        click.echo(
            f"Compiling CPU kernels, once for this version (about 20 s with two cores); cached in {CACHE_DIR}", err=True
        )
    with progress() as bar:
        task = bar.add_task("loading kernels", total=None)
        kernel.warm_up(
            lambda name, i, n: bar.update(
                task, completed=i, total=n, description=f"compiling or loading kernel {name}" if name else "kernels"
            )
        )
