"""`Pool`: threads that run plans. Idle threads spin briefly for the next stage, then sleep.

A worker runs compiled code without the interpreter's lock. On Linux (x86-64) it sleeps on a futex; elsewhere it returns
to Python and sleeps on a condition. A pool of one thread starts none. No plan depends on a worker being awake (`plan`).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .kernel import entry
from .memory import atomic_add, atomic_load, futex_wait, futex_wake, has_futex, ld_i64, pause
from .plan import PART_MASK, run, run_part, take_part
from .words import (
    ABORT,
    DONE,
    ERROR_LIMIT,
    ERROR_POSITION,
    ERROR_SET,
    ERROR_VALUE,
    ERRORS,
    LINE,
    QUIT,
    SLEEPERS,
    STAGE_AT,
    STAGE_COUNT,
    TICKET,
    control_words,
)

from llvmlite import binding  # isort: skip

#: Turns that an idle thread spins before it sleeps: about 0.3 ms.
IDLE_SPINS = 20_000
#: Whether threads can sleep in compiled code.
CAN_SLEEP = has_futex(binding.get_process_triple())


@entry(3)
def serve(n_threads, ctl, can_sleep):
    """Take parts of stages until told to quit (1), or until idle if threads cannot sleep here (0)."""
    spins = 0
    while ld_i64(ctl + 8 * QUIT) == 0:
        ticket = atomic_load(ctl + 8 * TICKET)
        part = take_part(ctl, n_threads)
        if part < n_threads:
            run_part(part, n_threads, ld_i64(ctl + 8 * STAGE_AT), ld_i64(ctl + 8 * STAGE_COUNT), ctl)
            atomic_add(ctl + 8 * DONE, 1)
            spins = 0
            continue
        pause(0)
        spins += 1
        if spins > IDLE_SPINS:
            if can_sleep == 0:
                return 0
            atomic_add(ctl + 8 * SLEEPERS, 1)
            futex_wait(ctl + 8 * TICKET, ticket & 0xFFFFFFFF)
            atomic_add(ctl + 8 * SLEEPERS, -1)
            spins = 0
    return 1


@entry(1)
def wake_all(ctl):
    """Wake sleeping workers."""
    futex_wake(ctl + 8 * TICKET)
    return 0


class BadIndex(NamedTuple):
    """An index that an op refused; see `plan.report`."""

    descriptor: int  #: index of the descriptor in its plan
    position: int  #: where among the indices
    value: int
    limit: int  #: indices lie in 0 .. limit - 1


#: A plan was stopped by `Pool.abort`.
ABORTED = BadIndex(-1, 0, 0, 0)


class _Crew:
    """The threads of one process, and the memory they share."""

    def __init__(self, n_threads: int, can_sleep: bool) -> None:
        self.n_threads = n_threads
        self.can_sleep = can_sleep
        self.pid = os.getpid()
        n_words = control_words(n_threads)
        memory = np.zeros(n_words + LINE, np.int64)
        first = -memory.ctypes.data % 64 // 8
        self.control = memory[first : first + n_words]
        self.ctl = self.control.ctypes.data
        self.reserve(0)
        self.control[TICKET] = PART_MASK  # nothing to take
        self.wake = threading.Condition()
        for i in range(1, n_threads):
            args = (n_threads, self.control, self.wake, can_sleep)
            threading.Thread(target=_work, args=args, name=f"pyggml-cpu-{i}", daemon=True).start()

    def run(self, plan: int, n: int, times: int, shared_bytes: int, thread_bytes: int) -> int:
        if not self.can_sleep:
            with self.wake:
                self.wake.notify_all()
        shared = self.base
        stopped: int = run(self.n_threads, plan, n, self.ctl, times, shared, shared + shared_bytes, thread_bytes)
        return stopped

    def reserve(self, size: int) -> None:
        """Have scratch of a size, at a line of the cache."""
        self.scratch = np.empty(size + 64, np.uint8)
        self.base = self.scratch.ctypes.data
        self.base += -self.base % 64
        self.n_scratch = size


def _work(n_threads: int, control: np.ndarray, wake: threading.Condition, can_sleep: bool) -> None:
    """Serve in compiled code; where that cannot sleep, sleep here. Its arguments keep the shared memory alive."""
    while not serve(n_threads, control.ctypes.data, can_sleep):
        with wake:
            if not control[QUIT]:
                wake.wait()


def _dismiss(control: np.ndarray, wake: threading.Condition, pid: int) -> None:
    """Tell threads to end; in a forked child there are none."""
    if os.getpid() == pid:
        with wake:
            control[QUIT] = 1
            wake.notify_all()
        control[TICKET] += 1 << 16  # who is about to sleep sees another ticket
        wake_all(control.ctypes.data)


class Pool:
    """Threads that run plans, one plan at a time.

    Parameters
    ----------
    threads : int
        Number of threads that run a plan, including the caller.
    can_sleep : bool, optional
        Whether waiting threads sleep on a futex; False is for tests.

    Notes
    -----
    Any Python thread may run a plan; a lock allows one at a time. After `os.fork` the child starts new threads at its
    first run. Threads are daemons, and end when the pool is closed or collected.
    """

    def __init__(self, threads: int, *, can_sleep: bool = CAN_SLEEP) -> None:
        if threads < 1:
            raise ValueError(f"a pool has at least one thread, not {threads}")
        self.n_threads = threads
        self._can_sleep = can_sleep
        self._hire()

    def _hire(self) -> None:
        self._lock = threading.Lock()
        self._crew: _Crew | None = _Crew(self.n_threads, self._can_sleep)
        crew = self._crew
        self._finalizer = weakref.finalize(self, _dismiss, crew.control, crew.wake, crew.pid)
        self._finalizer.atexit = False  # daemons: they end with the process

    def run(
        self, pieces: Sequence[tuple[int, int]], shared_bytes: int = 0, thread_bytes: int = 0, times: int = 0
    ) -> BadIndex | None:
        """Run a plan, piece by piece.

        Parameters
        ----------
        pieces : sequence of (int, int)
            Address of the first descriptor, and number of descriptors. Python handles signals between pieces.
        shared_bytes, thread_bytes : int
            Scratch that the plan needs: once, and for each thread.
        times : int
            Address of counters of cycles, or 0: int64, for each descriptor one per thread, and one more; see
            `plan.run`.

        Returns
        -------
        BadIndex or None
            What stopped the plan: the first index out of range, or `ABORTED`.

        Raises
        ------
        RuntimeError
            The pool is closed.
        """
        crew = self._crew
        if crew is None:
            raise RuntimeError("the thread pool is closed")
        if crew.pid != os.getpid():
            self._hire()
            return self.run(pieces, shared_bytes, thread_bytes, times)
        with self._lock:
            need = shared_bytes + self.n_threads * thread_bytes
            if crew.n_scratch < need:
                crew.reserve(need)
            for plan, n in pieces:
                if crew.run(plan, n, times, shared_bytes, thread_bytes):
                    return self.take_error()
        return None

    @property
    def memory(self) -> tuple[int, int, int]:
        """Address of the control block, and address and bytes of the scratch, until a plan needs more."""
        crew = self._crew
        assert crew is not None
        return crew.ctl, crew.base, crew.n_scratch

    def take_error(self) -> BadIndex:
        """Return what stopped a plan, and forget it."""
        crew = self._crew
        assert crew is not None
        errors = crew.control[ERRORS:].reshape(self.n_threads, LINE)
        found = [
            BadIndex(int(e[ERROR_SET]) - 1, int(e[ERROR_POSITION]), int(e[ERROR_VALUE]), int(e[ERROR_LIMIT]))
            for e in errors
            if e[ERROR_SET]
        ]
        errors[:] = 0
        crew.control[ABORT] = 0
        return min(found, default=ABORTED)

    def abort(self) -> None:
        """Make a running plan stop at its next op; from another thread or a signal handler."""
        if self._crew is not None:
            self._crew.control[ABORT] = 1

    def close(self) -> None:
        """End the threads; the pool cannot be used afterwards."""
        self._crew = None
        self._finalizer()

    def __repr__(self) -> str:
        return f"<Pool of {self.n_threads} threads{', closed' if self._crew is None else ''}>"
