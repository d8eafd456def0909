"""Replays policies that keep their keys in lists, at one size; each decides like its class in `pyggml.lab.evictions`.

A key is in at most one list. The lists of a pool are linked through its keys, so that a key is removed in constant
time.
"""

import numba as nb
import numpy as np

__all__ = ["ARC", "CLOCK", "HALF_PINNED", "SLRU", "STATIC", "listed_hits"]

SLRU, CLOCK, ARC, HALF_PINNED, STATIC = 7, 8, 9, 10, 11
NO_LIST, ONCE, OFTEN, GHOSTS_ONCE, GHOSTS_OFTEN = 0, 1, 2, 3, 4
NO_KEY = -1


@nb.njit(inline="always")
def _append(which, key, after, before, first, last, size, list_of):
    """Put a key that is in no list at the end of one."""
    end = last[which]
    before[key] = end
    after[key] = NO_KEY
    if end == NO_KEY:
        first[which] = key
    else:
        after[end] = key
    last[which] = key
    size[which] += 1
    list_of[key] = which


@nb.njit(inline="always")
def _remove(key, after, before, first, last, size, list_of):
    """Take a key out of its list."""
    which = list_of[key]
    a, b = after[key], before[key]
    if b == NO_KEY:
        first[which] = a
    else:
        after[b] = a
    if a == NO_KEY:
        last[which] = b
    else:
        before[a] = b
    size[which] -= 1
    list_of[key] = NO_LIST


@nb.njit(inline="always")
def _oldest(which, mark, event, pinned, after, first):
    """Return the first key of a list that the event does not use and that is not pinned; `NO_KEY` if there is none."""
    key = first[which]
    while key != NO_KEY and (mark[key] == event or pinned[key]):
        key = after[key]
    return key


@nb.njit(cache=True, nogil=True)
def listed_hits(offsets, keys, pool, slots, n_pool, n_key, policy, preload, n_preload, n_protected, hit):
    """Replay a trace on caches of ``slots[p]`` keys.

    Parameters
    ----------
    preload : int64, (n_pool, n_key)
        Keys that are resident before the first event, ``n_preload[p]`` of each pool, the oldest first.
    n_protected : int64, (n_pool,)
        Keys that `SLRU` protects.
    hit : bool, (n_touch,)
        Written: whether the touch was a hit.

    Returns
    -------
    int
        The first event whose keys do not fit, though the policy must admit them; -1 if all do.
    """
    all_after = np.full((n_pool, n_key), NO_KEY, np.int64)
    all_before = np.full((n_pool, n_key), NO_KEY, np.int64)
    all_first = np.full((n_pool, 5), NO_KEY, np.int64)
    all_last = np.full((n_pool, 5), NO_KEY, np.int64)
    all_size = np.zeros((n_pool, 5), np.int64)
    all_list = np.full((n_pool, n_key), NO_LIST, np.int8)
    all_mark = np.full((n_pool, n_key), -1, np.int64)
    all_pinned = np.zeros((n_pool, n_key), np.bool_)
    all_bit = np.zeros((n_pool, n_key), np.bool_)  # CLOCK: used since the hand passed; ARC: known although missing
    target = np.zeros(n_pool, np.float64)
    for p in range(n_pool):
        for i in range(n_preload[p]):
            key = preload[p, i]
            all_pinned[p, key] = True
            _append(ONCE, key, all_after[p], all_before[p], all_first[p], all_last[p], all_size[p], all_list[p])
    for event in range(len(offsets) - 1):
        p = pool[event]
        after, before, list_of, mark, bit = all_after[p], all_before[p], all_list[p], all_mark[p], all_bit[p]
        first, last, size, pinned = all_first[p], all_last[p], all_size[p], all_pinned[p]
        n_slot = slots[p]
        lo, hi = offsets[event], offsets[event + 1]
        for i in range(lo, hi):
            key = keys[i]
            mark[key] = event
            where = list_of[key]
            hit[i] = where in (ONCE, OFTEN)
        for i in range(lo, hi):  # uses
            key = keys[i]
            where = list_of[key]
            if policy == CLOCK:
                if hit[i]:
                    bit[key] = True
            elif policy == SLRU:
                if hit[i]:
                    _remove(key, after, before, first, last, size, list_of)
                    _append(OFTEN, key, after, before, first, last, size, list_of)
                    if size[OFTEN] > n_protected[p]:
                        oldest = first[OFTEN]
                        _remove(oldest, after, before, first, last, size, list_of)
                        _append(ONCE, oldest, after, before, first, last, size, list_of)
            elif policy == ARC:
                if hit[i]:
                    _remove(key, after, before, first, last, size, list_of)
                    _append(OFTEN, key, after, before, first, last, size, list_of)
                elif where == GHOSTS_ONCE:
                    step = max(1.0, size[GHOSTS_OFTEN] / size[GHOSTS_ONCE])
                    target[p] = min(float(n_slot), target[p] + step)
                    _remove(key, after, before, first, last, size, list_of)
                    bit[key] = True
                elif where == GHOSTS_OFTEN:
                    step = max(1.0, size[GHOSTS_ONCE] / size[GHOSTS_OFTEN])
                    target[p] = max(0.0, target[p] - step)
                    _remove(key, after, before, first, last, size, list_of)
                    bit[key] = True
        for i in range(lo, hi):  # misses enter
            if hit[i]:
                continue
            key = keys[i]
            if size[ONCE] + size[OFTEN] >= n_slot:
                if policy == STATIC:
                    continue
                victim = NO_KEY
                if policy == CLOCK:
                    for _ in range(2 * size[ONCE]):
                        front = first[ONCE]
                        is_own = mark[front] == event
                        if not bit[front] and not is_own:
                            victim = front
                            break
                        if not is_own:
                            bit[front] = False
                        _remove(front, after, before, first, last, size, list_of)
                        _append(ONCE, front, after, before, first, last, size, list_of)
                else:
                    one, other = ONCE, OFTEN
                    if policy == ARC and size[OFTEN] > 0 and size[ONCE] <= max(1.0, target[p]):
                        one, other = OFTEN, ONCE
                    victim = _oldest(one, mark, event, pinned, after, first)
                    if victim == NO_KEY:
                        victim = _oldest(other, mark, event, pinned, after, first)
                if victim == NO_KEY:
                    return event
                ghosts = GHOSTS_ONCE if list_of[victim] == ONCE else GHOSTS_OFTEN
                _remove(victim, after, before, first, last, size, list_of)
                if policy == ARC:
                    _append(ghosts, victim, after, before, first, last, size, list_of)
                    if size[ghosts] > n_slot:
                        _remove(first[ghosts], after, before, first, last, size, list_of)
            which = ONCE
            if policy == ARC and bit[key]:
                which = OFTEN
            bit[key] = False
            _append(which, key, after, before, first, last, size, list_of)
        if policy == HALF_PINNED:  # recency runs in slot order, hits among misses
            for i in range(lo, hi):
                _remove(keys[i], after, before, first, last, size, list_of)
                _append(ONCE, keys[i], after, before, first, last, size, list_of)
    return -1
