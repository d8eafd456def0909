"""Hits of a cache at all its sizes in one pass over a trace.

If a policy's order does not depend on the size, a larger cache contains all keys of a smaller one (Mattson et al.,
1970). The contents of all sizes are then one list, the stack: a cache of ``n`` slots has its first ``n`` entries.
Events of several keys keep this property: the event's keys are protected and each size drops its worst others; if the
policy may decline, the event's keys compete, too.
"""

import numba as nb
import numpy as np

__all__ = [
    "BELADY",
    "BELADY_BYPASS",
    "LFRU",
    "LFU",
    "LFU_DECAY",
    "LRU",
    "better",
    "count_hits",
    "count_uses",
    "distinct",
    "next_uses",
    "stack_hits",
    "touch",
]

LRU, LFU, LFRU, BELADY, BELADY_BYPASS, LFU_DECAY, FIFO = 0, 1, 2, 3, 4, 5, 6
NEVER = np.int64(1) << 60


@nb.njit(cache=True, nogil=True)
def distinct(first_row, ids, n_expert, by_first=False):
    """Return offsets and the distinct experts of each event, in the order of their last slot, or of their first."""
    n_event = len(first_row) - 1
    n_slot = ids.shape[1]
    offsets = np.zeros(n_event + 1, np.int64)
    out = np.empty(ids.size, np.int32)
    seen = np.full(n_expert, -1, np.int64)
    order = np.empty(n_expert, np.int32)
    n = 0
    for event in range(n_event):
        m = 0
        lo, hi = first_row[event] * n_slot, first_row[event + 1] * n_slot
        for j in range(hi - lo):
            at = lo + j if by_first else hi - 1 - j
            expert = ids[at // n_slot, at % n_slot]
            if expert >= 0 and seen[expert] != event:
                seen[expert] = event
                order[m] = expert
                m += 1
        for i in range(m):
            out[n + i] = order[i] if by_first else order[m - 1 - i]
        n += m
        offsets[event + 1] = n
    return offsets, out[:n].copy()


@nb.njit(cache=True, nogil=True)
def next_uses(offsets, keys, pool, n_pool, n_key):
    """Return, for each touch, the event of its pool that touches the key next, counted in the pool; `NEVER` if none does."""
    last = np.full((n_pool, n_key), NEVER, np.int64)
    t = np.zeros(n_pool, np.int64)
    after = np.empty(len(keys), np.int64)
    for event in range(len(offsets) - 2, -1, -1):
        p = pool[event]
        t[p] -= 1
        for i in range(offsets[event], offsets[event + 1]):
            after[i] = last[p, keys[i]]
        for i in range(offsets[event], offsets[event + 1]):
            last[p, keys[i]] = t[p]
    return after


@nb.njit(cache=True, nogil=True)
def count_uses(offsets, keys, pool, n_pool, n_key):
    """Return how often each key of each pool is used: int64, (n_pool, n_key)."""
    n = np.zeros((n_pool, n_key), np.int64)
    for event in range(len(pool)):
        for i in range(offsets[event], offsets[event + 1]):
            n[pool[event], keys[i]] += 1
    return n


@nb.njit(cache=True, nogil=True)
def count_hits(offsets, keys, pool, is_counted, hit, sizes):
    """Return touches and hits by pool, int64, (n_pool, 2), and the bytes of the misses."""
    n = np.zeros((len(sizes), 2), np.int64)
    missed = np.int64(0)
    for event in range(len(pool)):
        p = pool[event]
        for i in range(offsets[event], offsets[event + 1]):
            if is_counted[i]:
                n[p, 0] += 1
                if hit[i]:
                    n[p, 1] += 1
                else:
                    missed += sizes[p, keys[i]]
    return n, missed


@nb.njit(inline="always")
def better(policy, t, a, b, stamp, count, last, rank):
    """Return whether key ``a`` of a pool is worth more than ``b`` at the pool's event ``t``."""
    if policy == LFU:
        if count[a] != count[b]:
            return count[a] > count[b]
    elif policy == LFRU:
        left = count[a] * (t - last[b] + 1)
        right = count[b] * (t - last[a] + 1)
        if left != right:
            return left > right
    elif policy in (BELADY, BELADY_BYPASS):
        if last[a] != last[b]:  # here: the next use
            return last[a] < last[b]
    elif policy == LFU_DECAY and rank[a] != rank[b]:
        return rank[a] > rank[b]
    return stamp[a] > stamp[b]


@nb.njit(inline="always")
def touch(policy, t, key, after, clock, half_life, stamp, count, last, rank):
    """Note that a key was used."""
    stamp[key] = clock
    if policy == LFU_DECAY:
        # score * 2**((last - t) / half_life) + 1, as a logarithm that does not age
        age = rank[key] - t / half_life if count[key] else -np.inf
        rank[key] = np.log2(2.0**age + 1.0) + t / half_life
    count[key] += 1
    last[key] = after if policy in (BELADY, BELADY_BYPASS) else t


@nb.njit(inline="always")
def _take_best(policy, t, waiting, n_wait, stamp, count, last, rank):
    """Return the worthiest of the waiting keys; the last one takes its place."""
    best = 0
    for j in range(1, n_wait):
        if better(policy, t, waiting[j], waiting[best], stamp, count, last, rank):
            best = j
    key = waiting[best]
    waiting[best] = waiting[n_wait - 1]
    return key


@nb.njit(cache=True, nogil=True)
def stack_hits(offsets, keys, pool, n_pool, n_key, policy, after, half_life):
    """Return how often a touched key was at each place of its pool's stack: int64, (n_pool, n_key + 1).

    A cache of ``n`` slots a pool hits the touches at places below ``n``; the last column counts first touches.
    """
    all_hits = np.zeros((n_pool, n_key + 1), np.int64)
    all_stack = np.zeros((n_pool, n_key), np.int32)
    length = np.zeros(n_pool, np.int64)
    times = np.zeros(n_pool, np.int64)
    all_stamp = np.zeros((n_pool, n_key), np.int64)
    all_count = np.zeros((n_pool, n_key), np.int64)
    all_last = np.zeros((n_pool, n_key), np.int64)
    all_rank = np.zeros((n_pool, n_key if policy == LFU_DECAY else 1), np.float64)
    all_mark = np.full((n_pool, n_key), -1, np.int64)
    waiting = np.empty(2 * n_key + 1, np.int32)
    clock = 0
    for event in range(len(offsets) - 1):
        p = pool[event]
        hits, stack, mark = all_hits[p], all_stack[p], all_mark[p]
        stamp, count, last, rank = all_stamp[p], all_count[p], all_last[p], all_rank[p]
        lo, hi = offsets[event], offsets[event + 1]
        m = hi - lo
        t = times[p]
        times[p] += 1
        n = length[p]
        for i in range(lo, hi):
            clock += 1
            mark[keys[i]] = event
            if policy != LRU:
                touch(policy, t, keys[i], after[i], clock, half_life, stamp, count, last, rank)
        remaining = m
        i = 0
        if policy == LRU:  # the others keep their order: the stack is moved down, the event's keys come on top
            while i < n and remaining > 0:
                if mark[stack[i]] == event:
                    hits[i] += 1
                    remaining -= 1
                i += 1
            hits[n_key] += remaining
            length[p] = n + remaining
            free = i + remaining
            for j in range(i - 1, -1, -1):
                if mark[stack[j]] != event:
                    free -= 1
                    stack[free] = stack[j]
            for j in range(m):
                stack[j] = keys[hi - 1 - j]
            continue
        n_wait = 0
        n_top = m
        if policy == BELADY_BYPASS:
            n_top = 0
            for j in range(lo, hi):
                waiting[n_wait] = keys[j]
                n_wait += 1
        while i < n and (remaining > 0 or i < n_top):
            key = stack[i]
            if mark[key] == event:
                hits[i] += 1
                remaining -= 1
            else:
                waiting[n_wait] = key
                n_wait += 1
            if i < n_top:
                stack[i] = keys[hi - 1 - i]
            else:
                stack[i] = _take_best(policy, t, waiting, n_wait, stamp, count, last, rank)
                n_wait -= 1
            i += 1
        if remaining > 0:
            hits[n_key] += remaining
            n += remaining
            length[p] = n
            while i < n:
                if i < n_top:
                    stack[i] = keys[hi - 1 - i]
                else:
                    stack[i] = _take_best(policy, t, waiting, n_wait, stamp, count, last, rank)
                    n_wait -= 1
                i += 1
    return all_hits
