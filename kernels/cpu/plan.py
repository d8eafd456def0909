"""Runs descriptors: every thread walks the whole plan, and all meet where the plan says so."""

from __future__ import annotations

from .kernel import device, entry
from .memory import (
    atomic_add,
    atomic_load,
    atomic_store,
    call4,
    ld_i64,
    pause,
    sched_yield,
    st_i64,
)
from .words import (
    ABORT,
    ARRIVED,
    BARRIER,
    ERROR_LIMIT,
    ERROR_POSITION,
    ERROR_SET,
    ERROR_VALUE,
    ERRORS,
    GENERATION,
    INDEX,
    KERNEL,
    LENGTH,
    LINE,
    SERIAL,
    STOP,
)

from numba import int64  # isort: skip

#: Turns of a waiting thread before it lets others run on its core.
SPINS = 2000


@device
def meet(ctl, nth):
    """Wait for all threads; return 1 if all are to leave the plan.

    The last to arrive decides for all, so that no thread waits at a barrier that another never reaches.
    """
    if nth == 1:
        return int64(atomic_load(ctl + 8 * ABORT) != 0)
    generation = atomic_load(ctl + 8 * GENERATION)
    if atomic_add(ctl + 8 * ARRIVED, 1) == nth - 1:
        if atomic_load(ctl + 8 * ABORT) != 0:
            st_i64(ctl + 8 * STOP, generation + 1)
        atomic_store(ctl + 8 * ARRIVED, 0)
        atomic_store(ctl + 8 * GENERATION, generation + 1)
    else:
        spins = 0
        while atomic_load(ctl + 8 * GENERATION) == generation:
            pause(0)
            spins += 1
            if spins > SPINS:
                sched_yield(0)
    return int64(ld_i64(ctl + 8 * STOP) == generation + 1)


@device
def report(ith, d, ctl, position, value, limit):
    """Note a value that is not in 0 .. limit - 1, and make all threads stop; a thread's first note stays."""
    slot = ctl + 8 * (ERRORS + LINE * ith)
    if ld_i64(slot + 8 * ERROR_SET) == 0:
        st_i64(slot + 8 * ERROR_POSITION, position)
        st_i64(slot + 8 * ERROR_VALUE, value)
        st_i64(slot + 8 * ERROR_LIMIT, limit)
        st_i64(slot + 8 * ERROR_SET, ld_i64(d + 8 * INDEX) + 1)
    atomic_store(ctl + 8 * ABORT, 1)


@entry(5)
def run(ith, nth, plan, n, ctl):
    """Run n descriptors from an address on, as thread ith of nth; 1 if stopped before the end."""
    d = plan
    failed = ctl + 8 * (ERRORS + LINE * ith + ERROR_SET)
    for _ in range(n):
        # a thread that refused an index does nothing more; the others finish their parts, so that the report is the same
        # whichever was faster, and leave at the next meeting
        if ld_i64(failed) == 0:
            if ld_i64(d + 8 * SERIAL) == 0:
                call4(ld_i64(d + 8 * KERNEL), ith, nth, d, ctl)
            elif ith == 0:
                call4(ld_i64(d + 8 * KERNEL), 0, 1, d, ctl)
        if ld_i64(d + 8 * BARRIER) != 0 and meet(ctl, nth) != 0:
            return 1
        d += 8 * ld_i64(d + 8 * LENGTH)
    return 0
