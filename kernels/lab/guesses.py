"""What the prefetchers of `pyggml.lab.predict` guess before each event of a request; each decides like its class there."""

import numba as nb
import numpy as np

__all__ = ["AVERAGE", "BOTH", "ONLINE", "ORACLE", "POPULARITY", "PREVIOUS_LAYER", "count_followers", "guesses"]

POPULARITY, AVERAGE, PREVIOUS_LAYER, BOTH, ONLINE, ORACLE = 0, 1, 2, 3, 4, 5


@nb.njit(cache=True, nogil=True)
def count_followers(offsets, keys, layer, n_layer, n_expert):
    """Return how often an expert followed one of the previous event: float64, (n_layer, n_expert, n_expert)."""
    table = np.zeros((n_layer, n_expert, n_expert), np.float64)
    for event in range(1, len(layer)):
        for i in range(offsets[event - 1], offsets[event]):
            for j in range(offsets[event], offsets[event + 1]):
                table[layer[event], keys[i], keys[j]] += 1
    return table


@nb.njit(cache=True, nogil=True)
def guesses(offsets, keys, layer, n_layer, n_expert, kind, n, counts, table, keep, weight):
    """Return the experts that are guessed for each event, the best first: int32, (n_event, n); -1 where there are fewer.

    Parameters
    ----------
    counts : float64, (n_layer, n_expert)
        Added to each score.
    table : float64, (n_layer, n_expert, n_expert)
        How much an expert speaks for one of the next layer. `ONLINE` writes to it.
    keep, weight : float
        What an event leaves of the average of those before, and how much the average counts.
    """
    out = np.full((len(layer), n), -1, np.int32)
    average = np.zeros((n_layer, n_expert), np.float64)
    score = np.zeros(n_expert, np.float64)
    has_average = kind in (AVERAGE, BOTH)
    has_table = kind in (PREVIOUS_LAYER, BOTH, ONLINE)
    for event in range(len(layer)):
        at = layer[event]
        lo, hi = offsets[event], offsets[event + 1]
        before = offsets[event - 1] if event else lo
        score[:] = 0
        if has_table:
            for i in range(before, lo):
                for e in range(n_expert):
                    score[e] += table[at, keys[i], e]
        if has_average:
            for e in range(n_expert):
                score[e] += weight * average[at, e]
        if kind == ORACLE:
            for i in range(lo, hi):
                score[keys[i]] = 1
        if kind in (POPULARITY, AVERAGE):
            for e in range(n_expert):
                score[e] += counts[at, e]
        for j in range(min(n, n_expert)):
            best = 0
            for e in range(1, n_expert):
                if score[e] > score[best]:
                    best = e
            if not score[best] > 0:
                break
            out[event, j] = best
            score[best] = -1
        if has_average:
            for e in range(n_expert):
                average[at, e] *= keep
            for i in range(lo, hi):
                average[at, keys[i]] += 1
        if kind == ONLINE:
            for i in range(before, lo):
                for j in range(lo, hi):
                    table[at, keys[i], keys[j]] += 1
    return out
