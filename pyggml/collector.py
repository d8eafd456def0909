"""`rare_collections`: Python's garbage collector runs seldom while a plan makes many tensors, and in the program `pyggml`.

It visits all containers that are alive again and again, which takes a quarter of the time of a plan; little of what a plan makes is
garbage in cycles.
"""

from __future__ import annotations

import gc
import threading
from contextlib import ContextDecorator

__all__ = ["rare_collections"]

#: New containers between two collections; those of a plan's graphs have some 100 MB.
_N_CONTAINERS = 400_000


class _RareCollections(ContextDecorator):
    """Lets the collector of this process run seldom inside ``with``, in whichever thread; a decorator, too.

    A threshold that is higher already stays, and so does a collector that is switched off.
    """

    def __init__(self) -> None:
        self._lock, self._n_inside = threading.Lock(), 0
        self._before = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._before = gc.get_threshold()
                if 0 < self._before[0] < _N_CONTAINERS:
                    gc.set_threshold(_N_CONTAINERS, *self._before[1:])
            self._n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                gc.set_threshold(*self._before)


rare_collections = _RareCollections()
