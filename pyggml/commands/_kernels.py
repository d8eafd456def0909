"""Loads or compiles kernels before anything is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._console import progress

if TYPE_CHECKING:
    from ..kernels.cpu.kernel import Kernel
    from ..planning import Planner

__all__ = ["warm_up"]


def warm_up(model: Planner | None = None, *, is_for_child: bool = False) -> None:
    """Load kernels from Numba's cache or compile them, with a progress bar; a line says that this happens once.

    Parameters
    ----------
    model : Planner, optional
        Only its kernels; by default all but rare ones.
    is_for_child : bool
        Only a child process needs them: do nothing if the cache has kernels.
    """
    from ..kernels.cpu import kernel, matmul
    from ..kernels.cpu.cache import CACHE_DIR

    if is_for_child and not kernel.missing([matmul.mul_mat]):
        return
    kernels = kernel.common_kernels() if model is None else _kernels_of(model)
    missing = kernel.missing(kernels)
    if len(missing) > 1:
        click.echo(
            f"Compiling {len(missing)} CPU kernels, once for this version (3 to 4 a second with two cores); cached in "
            f"{CACHE_DIR}",
            err=True,
        )
    with progress() as bar:
        task = bar.add_task("loading kernels", total=None)
        kernel.warm_up(
            lambda name, i, n: bar.update(
                task, completed=i, total=n, description=f"compiling or loading kernel {name}" if name else "kernels"
            ),
            kernels,
        )


def _kernels_of(model: Planner) -> list[Kernel]:
    """Return the kernels of the smallest and the largest micro-batch."""
    from ..backends.host.plan import kernels_of

    params = model.params
    n_tokens = min(params.n_ctx, params.n_ubatch)
    graphs = [model.source.reserved(n, params.n_seq_max, n) for n in (params.n_seq_max, n_tokens)]
    return kernels_of(node for graph in graphs for node in graph.graph.nodes)
