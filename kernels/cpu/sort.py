"""ARGSORT and TOP_K. Equal values have the order in which the GNU C++ library's sort leaves them, as in ggml.

The algorithms are those of its `std::sort` (introsort: quicksort by the median of three, heap sort when that goes too
deep, insertion sort at the end) and `std::partial_sort` (heap select).
"""

from __future__ import annotations

from .descriptor import own_scratch, row_address, rows_of, word
from .kernel import device, op_kernel
from .memory import floats
from .words import DST, NE0, PARAM, SRC0

from .emit import intrinsic, types  # isort: skip

DESCENDING = PARAM
#: Ranges up to so long are left to insertion sort.
THRESHOLD = 16
#: Ranges of one row that wait: twice the depth of quicksort for any length.
STACK = 128


@intrinsic
def ints(typingctx, a):
    """Return an address as a pointer to int32 that njit code can index."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int32)(types.int64), codegen


@device
def _before(x, a, b, descending):
    return x[a] > x[b] if descending != 0 else x[a] < x[b]


@device
def _sift(x, order, base, hole, length, value, descending):
    """Let a value sink from a hole of a heap, then rise to its place."""
    top = hole
    child = hole
    while child < (length - 1) // 2:
        child = 2 * (child + 1)
        if _before(x, order[base + child], order[base + child - 1], descending):
            child -= 1
        order[base + hole] = order[base + child]
        hole = child
    if length % 2 == 0 and child == (length - 2) // 2:
        child = 2 * (child + 1)
        order[base + hole] = order[base + child - 1]
        hole = child - 1
    parent = (hole - 1) // 2
    while hole > top and _before(x, order[base + parent], value, descending):
        order[base + hole] = order[base + parent]
        hole = parent
        parent = (hole - 1) // 2
    order[base + hole] = value


@device
def partial_sort(x, order, first, middle, last, descending):
    """Sort what belongs into first .. middle-1; the rest stays in some order."""
    length = middle - first
    for parent in range((length - 2) // 2, -1, -1):
        _sift(x, order, first, parent, length, order[first + parent], descending)
    for i in range(middle, last):
        if _before(x, order[i], order[first], descending):
            value = order[i]
            order[i] = order[first]
            _sift(x, order, first, 0, length, value, descending)
    for end in range(middle - 1, first, -1):
        value = order[end]
        order[end] = order[first]
        _sift(x, order, first, 0, end - first, value, descending)


@device
def _swap(order, i, j):
    order[i], order[j] = order[j], order[i]


@device
def _median_to_first(x, order, result, a, b, c, descending):
    va, vb, vc = order[a], order[b], order[c]
    if _before(x, va, vb, descending):
        if _before(x, vb, vc, descending):
            _swap(order, result, b)
        elif _before(x, va, vc, descending):
            _swap(order, result, c)
        else:
            _swap(order, result, a)
    elif _before(x, va, vc, descending):
        _swap(order, result, a)
    elif _before(x, vb, vc, descending):
        _swap(order, result, c)
    else:
        _swap(order, result, b)


@device
def _partition(x, order, first, last, descending):
    _median_to_first(x, order, first, first + 1, first + (last - first) // 2, last - 1, descending)
    pivot = order[first]
    i, j = first + 1, last
    while True:
        while i < last - 1 and _before(x, order[i], pivot, descending):  # the bound is for NaN only
            i += 1
        j -= 1
        while j > first and _before(x, pivot, order[j], descending):
            j -= 1
        if i >= j:
            return i
        _swap(order, i, j)
        i += 1


@device
def _insert(x, order, i, descending):
    value = order[i]
    while i > 0 and _before(x, value, order[i - 1], descending):
        order[i] = order[i - 1]
        i -= 1
    order[i] = value


@device
def _insertion_sort(x, order, first, last, descending):
    for i in range(first + 1, last):
        if _before(x, order[i], order[first], descending):
            value = order[i]
            for j in range(i, first, -1):
                order[j] = order[j - 1]
            order[first] = value
        else:
            _insert(x, order, i, descending)


@device
def sort(x, order, n, descending, stack):
    """Sort n indices by their values; ``stack`` is memory for STACK * 3 int32."""
    depth = 0
    while (1 << (depth + 1)) <= n:
        depth += 1
    waiting = 1
    stack[0], stack[1], stack[2] = 0, n, 2 * depth
    while waiting > 0:
        waiting -= 1
        first, last, depth = stack[3 * waiting], stack[3 * waiting + 1], stack[3 * waiting + 2]
        while last - first > THRESHOLD:
            if depth == 0:
                partial_sort(x, order, first, last, last, descending)
                break
            depth -= 1
            cut = _partition(x, order, first, last, descending)
            # ranges are disjoint, so their order does not matter
            stack[3 * waiting], stack[3 * waiting + 1], stack[3 * waiting + 2] = cut, last, depth
            waiting += 1
            last = cut
    _insertion_sort(x, order, 0, min(n, THRESHOLD), descending)
    for i in range(THRESHOLD, n):
        _insert(x, order, i, descending)


@op_kernel
def argsort_rows(ith, nth, d, ctl):
    """Write the indices that sort each row."""
    n, ne1, ne2, first, end = rows_of(d, SRC0, ith, nth)
    descending = word(d, DESCENDING)
    stack = ints(own_scratch(ctl, ith))
    for row in range(first, end):
        x, order = floats(row_address(d, SRC0, row, ne1, ne2)), ints(row_address(d, DST, row, ne1, ne2))
        for i in range(n):
            order[i] = i
        sort(x, order, n, descending, stack)


@op_kernel
def top_k_rows(ith, nth, d, ctl):
    """Write the indices of the k largest of each row, the first two swapped as upstream does."""
    n, ne1, ne2, first, end = rows_of(d, SRC0, ith, nth)
    k = word(d, DST + NE0)
    order = ints(own_scratch(ctl, ith))
    for row in range(first, end):
        x, out = floats(row_address(d, SRC0, row, ne1, ne2)), ints(row_address(d, DST, row, ne1, ne2))
        for i in range(n):
            order[i] = i
        partial_sort(x, order, 0, k, n, 1)
        for i in range(k):
            out[i] = order[i]
        if k > 1:
            _swap(out, 0, 1)
