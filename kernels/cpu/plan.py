"""Runs plans, stage by stage. Thread 0 drives; workers take parts of stages when they can.

A stage that is worth sharing is published as a ticket: its number, and the next free part. A thread takes a part by
adding 1 to the ticket; thread 0 does so after part 0. Thread 0 therefore never waits for a worker that has not begun:
on a busy machine, where a worker may not run for milliseconds, a plan is not slower than with one thread. It waits only
for parts that were taken, then continues with the next stage.
"""

from __future__ import annotations

from .kernel import device, entry
from .memory import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call4,
    cycles,
    futex_wake,
    ld_i64,
    pause,
    sched_yield,
    st_i64,
)
from .words import (
    ABORT,
    DONE,
    ERROR_LIMIT,
    ERROR_POSITION,
    ERROR_SET,
    ERROR_VALUE,
    ERRORS,
    INDEX,
    KERNEL,
    LENGTH,
    LINE,
    PARALLEL,
    SERIAL,
    SHARED,
    SLEEPERS,
    STAGE,
    STAGE_AT,
    STAGE_COUNT,
    THREAD_BYTES,
    THREADS,
    TICKET,
    TIMES,
)

#: Turns of a waiting thread before it lets others run on its core.
SPINS = 2000
#: Low bits of a ticket: the next part.
PART_MASK = 0xFFFF


@device
def report(part, d, ctl, position, value, limit):
    """Record a value that is not in 0 .. limit - 1, and stop after this stage; a part's first record stays."""
    slot = ctl + 8 * (ERRORS + LINE * part)
    if ld_i64(slot + 8 * ERROR_SET) == 0:
        st_i64(slot + 8 * ERROR_POSITION, position)
        st_i64(slot + 8 * ERROR_VALUE, value)
        st_i64(slot + 8 * ERROR_LIMIT, limit)
        st_i64(slot + 8 * ERROR_SET, ld_i64(d + 8 * INDEX) + 1)
    atomic_store(ctl + 8 * ABORT, 1)


@device
def _note(at, start):
    """Add the cycles since a start to a word."""
    st_i64(at, ld_i64(at) + cycles(0) - start)


@device
def run_part(part, n_parts, d, n, ctl):
    """Run a part of a stage of n descriptors, and return the address after them.

    A part that refused an index stops; others continue to the end of the stage, so that the report does not depend on
    their speed.
    """
    failed, times, start = ctl + 8 * (ERRORS + LINE * part + ERROR_SET), ld_i64(ctl + 8 * TIMES), 0
    for _ in range(n):
        if times != 0:
            start = cycles(0)
        if ld_i64(failed) == 0:
            if ld_i64(d + 8 * SERIAL) == 0:
                call4(ld_i64(d + 8 * KERNEL), part, n_parts, d, ctl)
            elif part == 0:
                call4(ld_i64(d + 8 * KERNEL), 0, 1, d, ctl)
        if times != 0:
            _note(times + 8 * ((n_parts + 1) * ld_i64(d + 8 * INDEX) + part), start)
        d += 8 * ld_i64(d + 8 * LENGTH)
    return d


@device
def take_part(ctl, n_parts):
    """Take a part of the open stage and return its number; at least n_parts if there is none.

    If the ticket changes between reading and adding, the result is a part of the newer stage.
    """
    if atomic_load(ctl + 8 * TICKET) & PART_MASK >= n_parts:
        return n_parts
    return atomic_add(ctl + 8 * TICKET, 1) & PART_MASK


@device
def _share(n_threads, d, n, ctl):
    """Run a stage together with available workers; return the address after it."""
    st_i64(ctl + 8 * STAGE_AT, d)
    st_i64(ctl + 8 * STAGE_COUNT, n)
    atomic_store(ctl + 8 * DONE, 0)
    number = (atomic_load(ctl + 8 * TICKET) >> 16) + 1
    atomic_swap(ctl + 8 * TICKET, number << 16 | 1)
    if atomic_load(ctl + 8 * SLEEPERS) > 0:
        futex_wake(ctl + 8 * TICKET)
    end = run_part(0, n_threads, d, n, ctl)
    others = n_threads - 1
    while True:
        part = take_part(ctl, n_threads)
        if part >= n_threads:
            break
        run_part(part, n_threads, d, n, ctl)
        others -= 1
    spins = 0
    while atomic_load(ctl + 8 * DONE) != others:
        pause(0)
        spins += 1
        if spins > SPINS:
            sched_yield(0)
    return end


@entry(8)
def run(n_threads, plan, n, ctl, times, shared, threads, thread_bytes):
    """Run n descriptors (whole stages) from an address on; return 1 if they were stopped.

    ``shared``, ``threads``: addresses of scratch for all and, ``thread_bytes`` each, for each part.

    At ``times``, unless 0, cycles are added up: for each descriptor a word for each part, then one for the whole stage
    that it begins, as thread 0 saw it.
    """
    d, start = plan, 0
    st_i64(ctl + 8 * TIMES, times)
    st_i64(ctl + 8 * SHARED, shared)
    st_i64(ctl + 8 * THREADS, threads)
    st_i64(ctl + 8 * THREAD_BYTES, thread_bytes)
    while n > 0:
        stage = d
        if times != 0:
            start = cycles(0)
        if atomic_load(ctl + 8 * ABORT) != 0:
            return 1
        count = max(1, ld_i64(d + 8 * STAGE))  # one that begins no stage is run alone: for traces and benches
        if n_threads == 1 or ld_i64(d + 8 * PARALLEL) == 0:
            d = run_part(0, n_threads, d, count, ctl)
        else:
            d = _share(n_threads, d, count, ctl)
        if times != 0:
            _note(times + 8 * ((n_threads + 1) * ld_i64(stage + 8 * INDEX) + n_threads), start)
        n -= count
    return 1 if atomic_load(ctl + 8 * ABORT) != 0 else 0
