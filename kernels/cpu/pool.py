"""`Pool`: threads of our own that run plans. They spin a little for the next plan, then sleep.

A waiting thread lives in compiled code without the interpreter's lock. On Linux (x86-64) it sleeps on a futex; elsewhere
it returns to Python and sleeps on a condition. With one thread there is nothing to start or to wait for.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .emit import types
from .kernel import entry
from .memory import (
    atomic_add,
    atomic_load,
    atomic_store,
    futex_wait,
    futex_wake,
    has_futex,
    ld_i64,
    pause,
    sched_yield,
    st_i64,
)
from .plan import SPINS, run
from .words import (
    ABORT,
    COUNT,
    DONE,
    ERROR_LIMIT,
    ERROR_POSITION,
    ERROR_SET,
    ERROR_VALUE,
    ERRORS,
    LINE,
    PLAN,
    QUIT,
    REQUEST,
    SHARED,
    SLEEPERS,
    THREAD_BYTES,
    control_words,
)

from llvmlite import binding  # isort: skip

#: Turns that an idle thread waits for the next plan before it sleeps: some 0.3 ms.
IDLE_SPINS = 20_000
#: Whether threads can sleep in compiled code.
CAN_SLEEP = has_futex(binding.get_process_triple())


@entry(5)
def serve(ith, nth, ctl, seen, can_sleep):
    """Run plans as they come; -1 when told to quit, or, where it cannot sleep, the requests seen when idle."""
    while True:
        spins = 0
        while atomic_load(ctl + 8 * REQUEST) == seen:
            pause(0)
            spins += 1
            if spins > IDLE_SPINS:
                if can_sleep == 0:
                    return seen
                atomic_add(ctl + 8 * SLEEPERS, 1)
                futex_wait(ctl + 8 * REQUEST, seen & 0xFFFFFFFF)
                atomic_add(ctl + 8 * SLEEPERS, -1)
                spins = 0
        seen += 1
        if ld_i64(ctl + 8 * QUIT) != 0:
            return types.int64(-1)
        run(ith, nth, ld_i64(ctl + 8 * PLAN), ld_i64(ctl + 8 * COUNT), ctl)
        atomic_add(ctl + 8 * DONE, 1)


@entry(3)
def submit(plan, n, ctl):
    """Tell the threads that serve of a plan."""
    st_i64(ctl + 8 * PLAN, plan)
    st_i64(ctl + 8 * COUNT, n)
    atomic_store(ctl + 8 * DONE, 0)
    atomic_add(ctl + 8 * REQUEST, 1)
    if atomic_add(ctl + 8 * SLEEPERS, 0) > 0:
        futex_wake(ctl + 8 * REQUEST)
    return 0


@entry(4)
def finish(nth, plan, n, ctl):
    """Run a plan as thread 0, and wait until the threads that serve are done with it."""
    stopped = run(0, nth, plan, n, ctl)
    spins = 0
    while atomic_load(ctl + 8 * DONE) != nth - 1:
        pause(0)
        spins += 1
        if spins > SPINS:
            sched_yield(0)
    return stopped


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
        self.scratch = np.zeros(0, np.uint8)
        self.wake = threading.Condition()
        for ith in range(1, n_threads):
            args = (ith, n_threads, self.control, self.wake, can_sleep)
            threading.Thread(target=_work, args=args, name=f"pyggml-cpu-{ith}", daemon=True).start()

    def run(self, plan: int, n: int) -> int:
        submit(plan, n, self.ctl)
        if not self.can_sleep:
            with self.wake:
                self.wake.notify_all()
        stopped: int = finish(self.n_threads, plan, n, self.ctl)
        return stopped

    def reserve(self, shared_bytes: int, thread_bytes: int) -> None:
        need = shared_bytes + self.n_threads * thread_bytes + 64
        if self.scratch.nbytes < need:
            self.scratch = np.empty(need, np.uint8)
        base = self.scratch.ctypes.data
        base += -base % 64
        self.control[SHARED : THREAD_BYTES + 1] = base, base + shared_bytes, thread_bytes


def _work(ith: int, nth: int, control: np.ndarray, wake: threading.Condition, can_sleep: bool) -> None:
    """Serve in compiled code; where that cannot sleep, sleep here. Its arguments keep the shared memory alive."""
    seen = 0
    while (seen := serve(ith, nth, control.ctypes.data, seen, can_sleep)) >= 0:
        with wake:
            wake.wait_for(lambda seen=seen: control[REQUEST] != seen)


def _dismiss(control: np.ndarray, wake: threading.Condition, pid: int) -> None:
    """Tell threads to end; in a forked child there are none."""
    if os.getpid() == pid:
        control[QUIT] = 1
        submit(0, 0, control.ctypes.data)
        with wake:
            wake.notify_all()


class Pool:
    """Threads that run plans, one plan at a time.

    Parameters
    ----------
    threads : int
        How many threads work on a plan; the caller is one of them.
    can_sleep : bool, optional
        Whether waiting threads sleep on a futex; False tests the other way.

    Notes
    -----
    Any Python thread may run a plan; a lock makes them take turns. After `os.fork` the child has no threads but the one
    that forked: new ones are started at its first run. Threads are daemons, and end when the pool is closed or collected.
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

    def run(self, pieces: Sequence[tuple[int, int]], shared_bytes: int = 0, thread_bytes: int = 0) -> BadIndex | None:
        """Run a plan, piece by piece.

        Parameters
        ----------
        pieces : sequence of (int, int)
            Address of a first descriptor, and how many follow each other there. Python looks for signals between pieces.
        shared_bytes, thread_bytes : int
            Scratch that the plan needs: once, and for each thread.

        Returns
        -------
        BadIndex or None
            What stopped the plan: the first index out of bounds, or `ABORTED`.

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
            return self.run(pieces, shared_bytes, thread_bytes)
        with self._lock:
            crew.reserve(shared_bytes, thread_bytes)
            for plan, n in pieces:
                if crew.run(plan, n) or crew.control[ABORT]:
                    return self._take_error(crew)
        return None

    def _take_error(self, crew: _Crew) -> BadIndex:
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
        """End the threads; the pool cannot be used any more."""
        self._crew = None
        self._finalizer()

    def __repr__(self) -> str:
        return f"<Pool of {self.n_threads} threads{', closed' if self._crew is None else ''}>"
