"""Sorts ids by expert, once for all products that share them.

The result lies in the plan's scratch, in int64 words: ``first[n_expert + 1]`` (the group of expert e is
order[first[e]] up to order[first[e + 1]]), ``order[n_token * n_used]`` (pairs ``token * n_used + slot``; after the last
group those that are skipped), the number of experts that are used, and their numbers.
"""

from __future__ import annotations

from .descriptor import address, scratch, sizes, strides, word
from .kernel import device, op_kernel
from .memory import ld_i32, ld_i64, st_i64
from .plan import report
from .words import PARAM, SRC0

#: SKIPS: whether negative ids are skipped; otherwise they are reported.
N_EXPERT, SKIPS = PARAM, PARAM + 1


def routing_bytes(n_expert: int, n_pairs: int) -> int:
    """Bytes of the result."""
    return 8 * (n_expert + 1 + n_pairs + 1 + n_expert)


@device
def active_at(groups, n_expert, n_pairs):
    """Address of the number of used experts."""
    return groups + 8 * (n_expert + 1 + n_pairs)


@op_kernel
def group_by_expert(ith, nth, d, ctl):
    """Sort the pairs of (token, slot) by expert; one thread."""
    ids = address(d, SRC0)
    n_used, n_token, _, _ = sizes(d, SRC0)
    nb0, nb1, _, _ = strides(d, SRC0)
    n_expert, skips = word(d, N_EXPERT), word(d, SKIPS)
    first = scratch(d, ctl)
    order = first + 8 * (n_expert + 1)
    active = active_at(first, n_expert, n_token * n_used)
    for e in range(n_expert + 1):
        st_i64(first + 8 * e, 0)
    for t in range(n_token):
        for u in range(n_used):
            e = ld_i32(ids + t * nb1 + u * nb0)
            if e < 0 and skips != 0:
                continue
            if e < 0 or e >= n_expert:
                report(ith, d, ctl, t * n_used + u, e, n_expert)
                return
            st_i64(first + 8 * e, ld_i64(first + 8 * e) + 1)
    n_active = 0
    total = 0
    for e in range(n_expert):
        count = ld_i64(first + 8 * e)
        if count > 0:
            n_active += 1
            st_i64(active + 8 * n_active, e)
        total += count
        st_i64(first + 8 * e, total)  # the group's end: filling from the back makes it the start
    st_i64(active, n_active)
    st_i64(first + 8 * n_expert, total)
    end = n_token * n_used
    for t in range(n_token - 1, -1, -1):
        for u in range(n_used - 1, -1, -1):
            e = ld_i32(ids + t * nb1 + u * nb0)
            if e < 0:
                end -= 1
                st_i64(order + 8 * end, t * n_used + u)
                continue
            at = first + 8 * e
            st_i64(at, ld_i64(at) - 1)
            st_i64(order + 8 * ld_i64(at), t * n_used + u)
