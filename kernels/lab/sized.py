"""Replays a cache of one size: entries of different bytes, policies whose order depends on the size, shared pools."""

import numba as nb
import numpy as np

from .stack import BELADY_BYPASS, FIFO, LFRU, better, touch

__all__ = ["sized_hits"]


@nb.njit(inline="always")
def _worse(policy, a, b, stamp, count, last, rank):
    return better(policy, 0, b, a, stamp, count, last, rank)


@nb.njit(inline="always")
def _up(policy, heap, place, i, stamp, count, last, rank):
    """Move an entry of the heap of victims towards its top, the worst."""
    key = heap[i]
    while i > 0:
        parent = (i - 1) >> 1
        if not _worse(policy, key, heap[parent], stamp, count, last, rank):
            break
        heap[i] = heap[parent]
        place[heap[i]] = i
        i = parent
    heap[i] = key
    place[key] = i


@nb.njit(inline="always")
def _down(policy, heap, place, n, i, stamp, count, last, rank):
    """Move an entry of the heap of victims away from its top."""
    key = heap[i]
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and _worse(policy, heap[child + 1], heap[child], stamp, count, last, rank):
            child += 1
        if not _worse(policy, heap[child], key, stamp, count, last, rank):
            break
        heap[i] = heap[child]
        place[heap[i]] = i
        i = child
    heap[i] = key
    place[key] = i


@nb.njit(cache=True, nogil=True)
def sized_hits(offsets, keys, pool, size_of, budget, n_pool, n_key, policy, after, half_life, hit):
    """Replay a trace on caches of ``budget[p]`` bytes.

    An event's keys are out of the list of victims while it is decided, unless the policy may decline them.

    Parameters
    ----------
    size_of : int64, (n_pool, n_key)
    hit : bool, (n_touch,)
        Written: whether the touch was a hit.

    Returns
    -------
    n_evicted : int
    over : int
        Bytes of all pools above the budget after an event, its own entries aside, at most.
    """
    absent, out = -1, -2  # out: resident, but not among the victims
    all_place = np.full((n_pool, n_key), absent, np.int64)
    all_heap = np.zeros((n_pool, n_key), np.int32)
    n_heap = np.zeros(n_pool, np.int64)
    used = np.zeros(n_pool, np.int64)
    times = np.zeros(n_pool, np.int64)
    all_stamp = np.zeros((n_pool, n_key), np.int64)
    all_count = np.zeros((n_pool, n_key), np.int64)
    all_last = np.zeros((n_pool, n_key), np.int64)
    all_rank = np.zeros((n_pool, n_key), np.float64)
    clock = 0
    n_evicted = 0
    over = 0
    total = budget.sum()
    for event in range(len(offsets) - 1):
        p = pool[event]
        heap, place, sizes = all_heap[p], all_place[p], size_of[p]
        stamp, count, last, rank = all_stamp[p], all_count[p], all_last[p], all_rank[p]
        t = times[p]
        times[p] += 1
        n = n_heap[p]
        own = 0
        for i in range(offsets[event], offsets[event + 1]):
            key = keys[i]
            clock += 1
            own += sizes[key]
            at = place[key]
            hit[i] = at != absent
            if at >= 0:  # out of the victims
                n -= 1
                if at != n:
                    heap[at] = heap[n]
                    place[heap[at]] = at
                    if policy != LFRU:
                        moved = heap[at]
                        _down(policy, heap, place, n, at, stamp, count, last, rank)
                        _up(policy, heap, place, place[moved], stamp, count, last, rank)
            elif at == absent:
                used[p] += sizes[key]
            place[key] = out
            if policy == FIFO:
                if not hit[i]:
                    stamp[key] = clock
            else:
                touch(policy, t, key, after[i], clock, half_life, stamp, count, last, rank)
        protected = policy != BELADY_BYPASS
        if not protected:
            n = _enter(policy, heap, place, n, keys, offsets[event], offsets[event + 1], stamp, count, last, rank)
        while used[p] > budget[p] and n > 0:
            at = 0
            if policy == LFRU:  # worth changes with time: no order can be kept
                for j in range(1, n):
                    if better(policy, t, heap[at], heap[j], stamp, count, last, rank):
                        at = j
            worst = heap[at]
            n -= 1
            place[worst] = absent
            if at != n:
                heap[at] = heap[n]
                place[heap[at]] = at
                if policy != LFRU:
                    _down(policy, heap, place, n, at, stamp, count, last, rank)
            used[p] -= sizes[worst]
            n_evicted += 1
        if used.sum() > total:
            over = max(over, used.sum() - max(total, own))
        if protected:
            n = _enter(policy, heap, place, n, keys, offsets[event], offsets[event + 1], stamp, count, last, rank)
        n_heap[p] = n
    return n_evicted, over


@nb.njit(inline="always")
def _enter(policy, heap, place, n, keys, lo, hi, stamp, count, last, rank):
    """Put an event's keys among the victims, and return how many there are."""
    for i in range(lo, hi):
        heap[n] = keys[i]
        place[keys[i]] = n
        if policy != LFRU:
            _up(policy, heap, place, n, stamp, count, last, rank)
        n += 1
    return n
