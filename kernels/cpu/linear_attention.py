"""Linear attention with a state for each head: RWKV_WKV6, RWKV_WKV7, GATED_LINEAR_ATTN.

The state of a head of n elements is a matrix of n rows. The last source has the states of all sequences; dst has the outputs of all tokens, then the new
states. A head of a sequence is taken by one thread from the first token to the last.
"""

from __future__ import annotations

from .descriptor import address, number, share, sizes, word
from .emit import F32, F32x16, ir, micro, types
from .kernel import device, rare_op_kernel
from .memory import bits_of, floats, ld_f32
from .recurrent import dot_of
from .shape import clear
from .words import DST, PARAM, SRC0, SRC1, SRC2, SRC3, SRC4, SRC5, SRC6

#: Parameters: how many sequences the tokens are divided into; the scale of GATED_LINEAR_ATTN's queries (bits).
N_SEQ, SCALE = PARAM, PARAM + 1


@device
def _at(d, tensor, offset):
    return address(d, tensor) + offset


@device
def _heads_of(d, ith, nth):
    """Return elements and number of heads, tokens of a sequence, where states begin in dst, and which heads of all sequences thread ith does."""
    n, n_head, n_token, _ = sizes(d, SRC0)
    n_seq = word(d, N_SEQ)
    first, end = share(n_head * n_seq, ith, nth)
    return n, n_head, n_token // n_seq, 4 * n * n_head * n_token, first, end


@micro(types.void, 9)
def _wkv6_row(e, n, old, to, v, out, k, r, bonus, decay):
    """``out += r * (k v * bonus + old)``; ``to = old * decay + k v``. The last four are addresses of one float each."""
    k, r, bonus, decay = (e.splat(e.load(F32, at)) for at in (k, r, bonus, decay))

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        kv, was = e.b.fmul(e.load_lanes(F32x16, e.add(v, at), mask), k), e.load_lanes(F32x16, e.add(old, at), mask)
        read = e.fma(kv, bonus, was)
        e.store_lanes(e.fma(read, r, e.load_lanes(F32x16, e.add(out, at), mask)), e.add(out, at), mask)
        e.store_lanes(e.fma(was, decay, kv), e.add(to, at), mask)

    e.vectors(n, body)


@rare_op_kernel
def rwkv_wkv6(ith, nth, d, ctl):
    """Forget by src4, learn src0 times src1, read by src2, with a bonus (src3) for the token itself."""
    n, n_head, per_seq, states, first, end = _heads_of(d, ith, nth)
    for unit in range(first, end):
        head, seq = unit % n_head, unit // n_head
        old, to = _at(d, SRC5, 4 * n * n * unit), _at(d, DST, states + 4 * n * n * unit)
        bonus = _at(d, SRC3, 4 * n * head)
        for t in range(seq * per_seq, (seq + 1) * per_seq):
            at = 4 * n * (head + n_head * t)
            out, v = _at(d, DST, at), _at(d, SRC1, at)
            k, r, decay = _at(d, SRC0, at), _at(d, SRC2, at), _at(d, SRC4, at)
            clear(out, 0, n)
            for i in range(n):
                row = 4 * n * i
                _wkv6_row(n, old + row, to + row, v, out, k + 4 * i, r + 4 * i, bonus + 4 * i, decay + 4 * i)
            old = to


@micro(types.void, 8)
def _gated_row(e, n, old, to, v, out, k, q, gate):
    """``to = old * gate + k v``; ``out += q * to``. Key and gate are addresses of one float each, q is bits."""
    k, gate = (e.splat(e.load(F32, at)) for at in (k, gate))
    q = e.splat(e.float_of(q))

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        kv = e.b.fmul(e.load_lanes(F32x16, e.add(v, at), mask), k)
        new = e.fma(e.load_lanes(F32x16, e.add(old, at), mask), gate, kv)
        e.store_lanes(e.fma(new, q, e.load_lanes(F32x16, e.add(out, at), mask)), e.add(out, at), mask)
        e.store_lanes(new, e.add(to, at), mask)

    e.vectors(n, body)


@rare_op_kernel
def gated_linear_attn(ith, nth, d, ctl):
    """Forget by src3, learn src0 times src1, read by src2, which is scaled."""
    n, n_head, per_seq, states, first, end = _heads_of(d, ith, nth)
    scale = number(d, SCALE)
    for unit in range(first, end):
        head, seq = unit % n_head, unit // n_head
        old, to = _at(d, SRC4, 4 * n * n * unit), _at(d, DST, states + 4 * n * n * unit)
        for t in range(seq * per_seq, (seq + 1) * per_seq):
            at = 4 * n * (head + n_head * t)
            out, v = _at(d, DST, at), _at(d, SRC1, at)
            k, q, gate = _at(d, SRC0, at), _at(d, SRC2, at), _at(d, SRC3, at)
            clear(out, 0, n)
            for i in range(n):
                row = 4 * n * i
                read = bits_of(ld_f32(q + 4 * i) * scale)
                _gated_row(n, old + row, to + row, v, out, k + 4 * i, read, gate + 4 * i)
            old = to


@micro(types.float32, 9)
def _wkv7_row(e, n, old, to, w, k, b, r, value, removed):
    """Write ``old * w + k * value + b * removed`` and return its product with r; value and removed are bits."""
    value, removed = (e.splat(e.float_of(x)) for x in (value, removed))
    acc = e.zeros(F32x16)

    def body(i: ir.Value, mask: ir.Value | None) -> None:
        at = e.mul(i, 4)
        was, w_, k_, b_, r_ = (e.load_lanes(F32x16, e.add(x, at), mask) for x in (old, w, k, b, r))
        new = e.fma(b_, removed, e.fma(was, w_, e.b.fmul(k_, value)))
        e.store_lanes(new, e.add(to, at), mask)
        e.b.store(e.fma(new, r_, e.b.load(acc)), acc)

    e.vectors(n, body)
    return e.sum(e.b.load(acc))


@rare_op_kernel
def rwkv_wkv7(ith, nth, d, ctl):
    """Forget by src1, remove what src4 reads and put it at src5, learn src3 at src2, read by src0; rows of a state belong to values."""
    n, n_head, per_seq, states, first, end = _heads_of(d, ith, nth)
    for unit in range(first, end):
        head, seq = unit % n_head, unit // n_head
        old, to = _at(d, SRC6, 4 * n * n * unit), _at(d, DST, states + 4 * n * n * unit)
        for t in range(seq * per_seq, (seq + 1) * per_seq):
            at = 4 * n * (head + n_head * t)
            r, w, k, v = _at(d, SRC0, at), _at(d, SRC1, at), _at(d, SRC2, at), _at(d, SRC3, at)
            a, b, out = _at(d, SRC4, at), _at(d, SRC5, at), floats(_at(d, DST, at))
            for i in range(n):
                row = 4 * n * i
                value, removed = bits_of(ld_f32(v + 4 * i)), bits_of(dot_of(old + row, a, n))
                out[i] = _wkv7_row(n, old + row, to + row, w, k, b, r, value, removed)
            old = to
