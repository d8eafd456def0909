"""Replays a pool of one size with any eviction and admission; each decides like its class in `pyggml.lab`.

Evictions by a score scan the resident keys. The others keep their keys in lists, which are linked through the keys, so that
a key is removed in constant time; a key is in at most one list.
"""

import numba as nb
import numpy as np

from .stack import FIFO, LFRU, LFU, LFU_DECAY, LRU, better, touch

__all__ = [
    "ALWAYS", "ARC", "AT_MOST", "CLOCK", "HALF_PINNED", "HOTTER", "LLAMA_LRU", "LLAMA_SLRU", "NEXT_STEP", "N_OF_M", "SLRU", "STATIC",
    "pool_hits",
]  # fmt: skip

#: Evictions, beside those of `stack`.
SLRU, CLOCK, ARC, HALF_PINNED, STATIC, LLAMA_LRU, LLAMA_SLRU = 7, 8, 9, 10, 11, 12, 13
#: Admissions.
ALWAYS, N_OF_M, HOTTER, AT_MOST, NEXT_STEP = 0, 1, 2, 3, 4
NO_LIST, ONCE, OFTEN, GHOSTS_ONCE, GHOSTS_OFTEN = 0, 1, 2, 3, 4
#: A compiled function is typed once if these are no literals.
NO_KEY, NOBODY, START = np.int64(-1), np.int64(-2), np.int64(0)

# What a pool knows is in few arrays, because each costs time in every call.
#: Rows of ``k``, by key: whether it is resident; the last event, or step, that protects it; whether it is pinned; CLOCK: used since
#: the hand passed, ARC: known although missing; its list and its place there; `stack`'s stamp, count and last use; its place
#: among the residents of a score; whether it waits for the next step, its number of uses and the event of its heat.
HERE, MARK, PINNED, BIT, LIST, AFTER, BEFORE, STAMP, COUNT, LAST_USE, PLACE, PENDING, N_USE, HEATED = range(14)
#: The residents of a score, keys that wait for the next step, and an event's misses.
HELD, WAITING, MISSING = 14, 15, 16
#: Rows of ``r``, by key: `stack`'s rank; the heat of `HOTTER`; first of all ARC's target.
RANK, HEAT, TARGET = 0, 1, 2
#: Entries of ``c``: lists by number, then how many residents a score has, the budget in use, entries of this step, slots.
FIRST, LAST, SIZE, N_HELD, USED, N_ENTERED, N_SLOT = 0, 5, 10, 15, 16, 17, 18


@nb.njit(inline="always")
def _is_scored(policy):
    return policy in (LFU, LFRU, LFU_DECAY)


@nb.njit(inline="always")
def _link(k, c, which, key, behind, ahead):
    """Put a key that is in no list between two neighbours; `NO_KEY` stands for an end of the list."""
    k[BEFORE, key], k[AFTER, key] = behind, ahead
    if behind == NO_KEY:
        c[FIRST + which] = key
    else:
        k[AFTER, behind] = key
    if ahead == NO_KEY:
        c[LAST + which] = key
    else:
        k[BEFORE, ahead] = key
    c[SIZE + which] += 1
    k[LIST, key] = which


@nb.njit(inline="always")
def _insert(k, c, which, key):
    """Put a key that is in no list behind those of a list with smaller stamps."""
    behind, ahead = c[LAST + which], NO_KEY
    while behind != NO_KEY and k[STAMP, behind] > k[STAMP, key]:
        behind, ahead = k[BEFORE, behind], behind
    _link(k, c, which, key, behind, ahead)


@nb.njit(inline="always")
def _append(k, c, which, key):
    """Put a key that is in no list at the end of one."""
    _link(k, c, which, key, c[LAST + which], NO_KEY)


@nb.njit(inline="always")
def _remove(k, c, key):
    """Take a key out of its list."""
    which = k[LIST, key]
    a, b = k[AFTER, key], k[BEFORE, key]
    if b == NO_KEY:
        c[FIRST + which] = a
    else:
        k[AFTER, b] = a
    if a == NO_KEY:
        c[LAST + which] = b
    else:
        k[BEFORE, a] = b
    c[SIZE + which] -= 1
    k[LIST, key] = NO_LIST


@nb.njit(inline="always")
def _oldest(k, c, which, guard):
    """Return the first key of a list that is neither protected nor pinned; `NO_KEY` if there is none."""
    key = c[FIRST + which]
    while key != NO_KEY and (k[MARK, key] == guard or k[PINNED, key]):
        key = k[AFTER, key]
    return key


@nb.njit
def _victim(policy, k, c, r, sizes, t, guard):
    """Return the resident key that leaves next; `NO_KEY` if there is none."""
    if policy == STATIC:
        return NO_KEY
    if _is_scored(policy):
        worst = NO_KEY
        for j in range(c[N_HELD]):
            key = k[HELD, j]
            if k[MARK, key] != guard and (
                worst == NO_KEY or better(policy, t, worst, key, k[STAMP], k[COUNT], k[LAST_USE], r[RANK])
            ):
                worst = key
        return worst
    if policy == CLOCK:
        for _ in range(2 * c[SIZE + ONCE]):
            front = c[FIRST + ONCE]
            if k[MARK, front] != guard:
                if not k[BIT, front]:
                    return front
                k[BIT, front] = False
            _remove(k, c, front)
            _append(k, c, ONCE, front)
        return NO_KEY
    one, other = ONCE, OFTEN
    if policy == ARC and c[SIZE + OFTEN] > 0 and c[SIZE + ONCE] <= max(1.0, r[TARGET, 0]):
        one, other = OFTEN, ONCE
    victim = _oldest(k, c, one, guard)
    return victim if victim != NO_KEY else _oldest(k, c, other, guard)


@nb.njit
def _drop(policy, k, c, r, sizes, key):
    """Evict a key."""
    k[HERE, key] = False
    c[USED] -= sizes[key]
    if _is_scored(policy):
        n = c[N_HELD] - 1
        c[N_HELD] = n
        at, moved = k[PLACE, key], k[HELD, n]
        k[HELD, at], k[PLACE, moved] = moved, at
        return
    ghosts = GHOSTS_ONCE if k[LIST, key] == ONCE else GHOSTS_OFTEN
    _remove(k, c, key)
    if policy == ARC:
        _append(k, c, ghosts, key)
        if c[SIZE + ghosts] > c[N_SLOT]:
            _remove(k, c, c[FIRST + ghosts])


@nb.njit
def _add(policy, k, c, r, sizes, t, guard, budget, key, victim, clock):
    """Make room for a key and let it enter; return whether it could."""
    while sizes[key] > budget - c[USED]:
        if victim == NO_KEY:
            victim = _victim(policy, k, c, r, sizes, t, guard)
            if victim == NO_KEY:
                return False
        _drop(policy, k, c, r, sizes, victim)
        victim = NO_KEY
    k[HERE, key] = True
    c[USED] += sizes[key]
    if _is_scored(policy):
        n = c[N_HELD]
        k[HELD, n], k[PLACE, key] = key, n
        c[N_HELD] = n + 1
    elif policy in (LRU, HALF_PINNED):
        _insert(k, c, ONCE, key)
    else:
        if policy in (FIFO, LLAMA_LRU):
            k[STAMP, key] = clock
        _append(k, c, OFTEN if policy == ARC and k[BIT, key] else ONCE, key)
        k[BIT, key] = False
    return True


@nb.njit
def _use(policy, k, c, r, sizes, t, key, is_hit, clock, half_life, n_protected):
    """Note that an event uses a key."""
    if _is_scored(policy):
        touch(policy, t, key, 0, clock, half_life, k[STAMP], k[COUNT], k[LAST_USE], r[RANK])
    elif policy in (LRU, HALF_PINNED, LLAMA_LRU):
        k[STAMP, key] = clock
        if is_hit:
            _remove(k, c, key)
            _append(k, c, ONCE, key)
    elif policy == CLOCK:
        if is_hit:
            k[BIT, key] = True
    elif policy in (SLRU, LLAMA_SLRU):
        if is_hit:
            _remove(k, c, key)
            _append(k, c, OFTEN, key)
            if c[SIZE + OFTEN] > n_protected:
                oldest = c[FIRST + OFTEN]
                _remove(k, c, oldest)
                _append(k, c, ONCE, oldest)
    elif policy == ARC:
        where = k[LIST, key]
        if is_hit:
            _remove(k, c, key)
            _append(k, c, OFTEN, key)
        elif where == GHOSTS_ONCE:
            step = max(1.0, c[SIZE + GHOSTS_OFTEN] / c[SIZE + GHOSTS_ONCE])
            r[TARGET, 0] = min(float(c[N_SLOT]), r[TARGET, 0] + step)
            _remove(k, c, key)
            k[BIT, key] = True
        elif where == GHOSTS_OFTEN:
            step = max(1.0, c[SIZE + GHOSTS_ONCE] / c[SIZE + GHOSTS_OFTEN])
            r[TARGET, 0] = max(0.0, r[TARGET, 0] - step)
            _remove(k, c, key)
            k[BIT, key] = True


@nb.njit(cache=True, nogil=True)
def pool_hits(
    offsets, keys, events, step, sizes, budget, n_slot, policy, half_life, preload, n_protected, must_admit, admission, n_of, m_of,
    heat_half_life, hit, held,
):  # fmt: skip
    """Replay the events of one pool on a cache of ``budget`` bytes, or slots if all ``sizes`` are 1.

    Parameters
    ----------
    events : int64, (n_event of the pool,)
    sizes : int64, (n_key,)
    n_slot : int
        Slots by which an eviction divides its lists.
    preload : int64, (n_preload,)
        Keys that are resident before the first event, the oldest first.
    n_protected : int
        Keys that `SLRU` protects.
    must_admit : bool
        Whether each event's misses always enter.
    n_of, m_of : int
        `N_OF_M`: uses, and events of the pool in which they are. `AT_MOST`: keys that enter in a step.
    hit : bool, (n_touch,)
        Written: whether the touch was a hit.
    held : bool, (n_event, n_key) or (0, 0)
        Written, if there is room for it: which keys of its pool are resident before an event.

    Returns
    -------
    int
        The first event whose keys do not fit, though the policy must admit them; -1 if all do.
    """
    n_key = len(sizes)
    k, r, c = np.zeros((17, n_key), np.int64), np.zeros((3, n_key), np.float64), np.zeros(19, np.int64)
    k[MARK] = -1
    c[:SIZE] = NO_KEY
    c[N_SLOT] = n_slot
    uses = np.full((n_key, n_of if admission == N_OF_M else 1), np.int64(-1) << 60, np.int64)
    n_pending = 0
    clock = 0
    for key in preload:
        clock += 1
        k[PINNED, key] = 1
        k[STAMP, key] = clock
        _add(policy, k, c, r, sizes, START, NOBODY, budget, key, NO_KEY, clock)
    at_step = np.int64(1) << 62
    for t in range(len(events)):
        event = events[t]
        lo, hi = offsets[event], offsets[event + 1]
        if len(held):
            for key in range(n_key):
                held[event, key] = k[HERE, key] != 0
        if step[event] != at_step:
            at_step = step[event]
            c[N_ENTERED] = 0
            if n_pending:
                guard = -2 - event
                for i in range(n_pending):
                    k[MARK, k[WAITING, i]] = guard
                for i in range(n_pending):
                    key = k[WAITING, i]
                    k[PENDING, key] = 0
                    if not k[HERE, key]:
                        clock += 1
                        _add(policy, k, c, r, sizes, t - 1, guard, budget, key, NO_KEY, clock)
                n_pending = 0
        for i in range(lo, hi):
            key = keys[i]
            k[MARK, key] = event
            hit[i] = k[HERE, key] != 0
            if admission == N_OF_M:
                uses[key, k[N_USE, key] % n_of] = t
                k[N_USE, key] += 1
            elif admission == HOTTER:
                r[HEAT, key] = r[HEAT, key] * np.exp2((k[HEATED, key] - t) / heat_half_life) + 1.0
                k[HEATED, key] = t
        n_missing = 0
        for i in range(lo, hi):
            key = keys[i]
            clock += 1
            _use(policy, k, c, r, sizes, t, key, hit[i], clock, half_life, n_protected)
            if not hit[i]:
                j = n_missing
                n_missing += 1
                if policy in (LLAMA_LRU, LLAMA_SLRU):  # misses enter by id
                    while j > 0 and k[MISSING, j - 1] > key:
                        k[MISSING, j] = k[MISSING, j - 1]
                        j -= 1
                k[MISSING, j] = key
        for j in range(n_missing):
            key = k[MISSING, j]
            if admission == NEXT_STEP:
                if not k[PENDING, key]:
                    k[PENDING, key] = 1
                    k[WAITING, n_pending] = key
                    n_pending += 1
                continue
            victim = NO_KEY
            if sizes[key] > budget - c[USED]:
                victim = _victim(policy, k, c, r, sizes, t, event)
                if victim == NO_KEY:
                    if must_admit:
                        return event
                    continue
            if admission == N_OF_M:  # the n-th use before must be in the window
                if uses[key, k[N_USE, key] % n_of] <= t - m_of:
                    continue
            elif admission == HOTTER:
                if victim != NO_KEY:
                    mine = r[HEAT, key] * np.exp2((k[HEATED, key] - t) / heat_half_life)
                    if mine <= r[HEAT, victim] * np.exp2((k[HEATED, victim] - t) / heat_half_life):
                        continue
            elif admission == AT_MOST:
                if c[N_ENTERED] >= n_of:
                    continue
                c[N_ENTERED] += 1
            clock += 1
            _add(policy, k, c, r, sizes, t, event, budget, key, victim, clock)
    return -1
