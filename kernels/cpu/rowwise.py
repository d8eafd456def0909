"""Products of quantised rows, read in place, with few tokens: the part that all types share.

Some rows are taken together: they share what is loaded and spread of the activations, and none waits for its own sums.
A row's result does not depend on which rows it is taken with.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as product_of

from .emit import I64, Emit, ir
from .kernel import Kernel, micro_kernel

#: ``product(e, rows, ahead, n_blocks, xs)``: the products of each row with each token, row by row. ``ahead``: where
#: what is to be fetched meanwhile begins, as many bytes as the rows have (`fetch`).
Product = Callable[[Emit, list[ir.Value], ir.Value, ir.Value, list[ir.Value]], list[ir.Value]]

#: Rows that are taken together for one token, and for two, where a CPU has 32 registers.
TOGETHER = {1: 2, 2: 2}
#: The same with 16 registers.
TOGETHER_NARROW = {1: 2, 2: 1}
#: Smallest distance of prefetching: with short rows, the next two rows are too near.
AHEAD_BYTES = 4096
#: Rows that stay in L2 while tokens are multiplied.
KEPT_ROWS = 64


def fetch(e: Emit, ahead: ir.Value, at: ir.Value, n_rows: int, n: int) -> None:
    """Fetch what comes after some rows, while n bytes of each, ``at`` bytes from its start, are used.

    In the order of memory, line by line: so the processor's own prefetcher runs ahead. It does not where several rows
    are read at once.
    """
    if n_rows == 1 and e.streams_alone:
        return
    first = e.add(ahead, e.mul(at, n_rows))
    for line in range(max(1, n_rows * n // 64)):
        e.prefetch(first, 64 * line)


def make_rows_kernel(name: str, product: Product, *, together: int = TOGETHER[1], rare: bool = False) -> Kernel:
    """Return the kernel of a type: ``(w, stride, n_rows, n_blocks, n_tokens, xs, outs, out_offset)``.

    Tokens are taken two by two. Results of row r go to ``outs[token] + out_offset + 4 * r``.

    Parameters
    ----------
    name : str
        Name of the kernel.
    product : callable
        See `Product`.
    together : int
        Rows that are taken together for one token where a CPU has 32 registers. 1, also elsewhere: memory limits the
        type, and likes that best.
    rare : bool
        See `Kernel`.
    """

    def rows(e, w, stride, n_rows, n_blocks, n_tokens, xs, outs, out_offset):
        b = e.b
        is_wide = e.has("avx512vl")
        rows_of = dict(TOGETHER if is_wide else TOGETHER_NARROW)
        if is_wide or together == 1:
            rows_of[1] = together
        last = e.add(n_rows, -1)
        least_ahead = I64(AHEAD_BYTES)
        distance = {}
        for n, n_together in rows_of.items():
            group = e.mul(stride, n_together)
            distance[n] = b.select(b.icmp_signed(">", group, least_ahead), group, least_ahead)

        def least(r: ir.Value, most: ir.Value) -> ir.Value:
            return b.select(b.icmp_signed("<", r, most), r, most)

        def tokens(begin: ir.Value, end: ir.Value, token: ir.Value, n: int) -> None:
            at = e.mul(token, 8)
            x = [e.load(I64, e.add(xs, at), 8 * t) for t in range(n)]
            out = [e.add(e.load(I64, e.add(outs, at), 8 * t), out_offset) for t in range(n)]
            with e.loop(end, rows_of[n], begin) as (first, _):
                # behind the last row comes the last again
                group = [first, *[least(e.add(first, i), last) for i in range(1, rows_of[n])]]
                ahead = e.add(e.add(w, e.mul(first, stride)), distance[n])
                values = product(e, [e.add(w, e.mul(r, stride)) for r in group], ahead, n_blocks, x)
                for value, (r, to) in zip(values, product_of(group, out), strict=True):
                    e.store(value, e.add(to, e.mul(r, 4)))

        pairs = b.and_(n_tokens, I64(-2))
        with e.loop(n_rows, KEPT_ROWS) as (begin, _):
            end = least(e.add(begin, KEPT_ROWS), n_rows)
            with e.loop(pairs, 2) as (token, _):
                tokens(begin, end, token, 2)
            with e.when(b.icmp_signed("<", pairs, n_tokens)):
                tokens(begin, end, pairs, 1)

    rows.__name__ = name
    rows.__doc__ = "Rows as they lie times tokens, two by two; see the module."
    return micro_kernel(8, rare=rare)(rows)
