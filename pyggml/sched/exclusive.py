"""`Exclusive`: one call of a scheduler at a time."""

from __future__ import annotations

import threading

from ..errors import SchedError

__all__ = ["Exclusive"]


class Exclusive:
    """A block that cannot be entered twice: neither by a second thread nor by a callback of the call in it.

    Raises
    ------
    SchedError
        On entry, if a call is in progress. That call continues, unless its callback does not catch the error.

    Notes
    -----
    Differs: upstream does not check. There, a callback that resets its scheduler frees memory that the loop reads next.
    """

    __slots__ = ("_lock", "_thread")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._lock.acquire(blocking=False):
            self._thread = me
        elif self._thread == me:
            raise SchedError(
                "the scheduler was called by its own callback, policy or observer, in the middle of another call",
                hint="wait until that call has returned; in a callback you can read tensors, splits and statistics",
            )
        else:
            raise SchedError(
                "the scheduler is in use by another thread", hint="use one scheduler per thread, or a lock of your own"
            )

    def __exit__(self, *error: object) -> None:
        self._thread = 0
        self._lock.release()
