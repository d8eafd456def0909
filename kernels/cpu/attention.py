"""FLASH_ATTN_EXT: softmax of masked products of queries and keys, times values, in one pass over blocks of keys.

A job is up to `QUERIES` queries (tokens, or heads that share keys) of one key head. Keys come in blocks of `KEYS`:
transposed into a panel of floats whose lanes are keys; scores; probabilities against the largest score so far, by
which earlier sums are corrected; values added up with lanes along their row. Blocks and jobs depend on shapes alone,
so results do not depend on threads. A key that the mask hides from all queries of a job is never read, because its
memory may be uninitialised.
"""

from __future__ import annotations

import math

import numpy as np

from .convert import row_to_f32
from .descriptor import address, number, own_scratch, repeated_row_address, row_at, sizes, word
from .emit import F32, I16, I64, LANES, Emit, F16x16, F32x16, I16x16, ir, micro, types, vec
from .floatrows import load_floats
from .functions import V, exp, tanh
from .kernel import device, micro_kernel, op_kernel
from .memory import (
    atomic_add,
    atomic_store,
    bits_of,
    call4,
    call6,
    call8,
    floats,
    ld_f32,
    ld_i64,
    ld_u16,
    st_f32,
    st_i64,
)
from .norms import scale_row
from .softmax import M0, M1, MAX_BIAS, N_HEAD_LOG2, SCALE, slope
from .words import BF16, COUNTER, DST, F16, NB1, NE0, NE2, PARAM, SRC0, SRC1, SRC2, SRC3, SRC4, TYPE
from .words import F32 as TYPE_F32

#: Parameters after those of softmax: logit softcap (0: none), kernels; DEQUANTISE: of keys, then of values.
SOFTCAP, KEYS_KERNEL, VALUES_KERNEL, SCORES_KERNEL, SOFTEN_KERNEL, DEQUANTISE = (PARAM + 5 + i for i in range(6))

KEYS = 64
QUERIES = 48
#: Queries of a tile: 4 x 6 accumulators, 4 vectors of keys or values and one broadcast fit 32 registers.
TILE = 6
_VECTORS = KEYS // LANES
#: Floats kept for each query, in arrays one behind the other.
LARGEST, TOTAL, CORRECTION, BASE, SLOPE = range(5)
STATES = 5


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def thread_bytes(d_key: int, d_value: int, quantised: bool) -> int:
    """Bytes of scratch that each thread needs."""
    floats_ = KEYS * _round_up(d_key, LANES) + QUERIES * KEYS + QUERIES * _round_up(d_value, LANES) + STATES * QUERIES
    rows = KEYS * (d_key + d_value) if quantised else 0
    return 4 * (floats_ + rows) + 8 * (2 * KEYS + 2 * QUERIES)


# -- micro-kernels ---------------------------------------------------------------------------


def _transpose16(e: Emit, v: list[ir.Value]) -> list[ir.Value]:
    """Transpose 16 x 16 floats by four exchanges of ever larger halves."""
    for s in (1, 2, 4, 8):
        low = [lane if not lane & s else LANES + lane - s for lane in range(LANES)]
        high = [lane + s if not lane & s else LANES + lane for lane in range(LANES)]
        out = list(v)
        for i in range(LANES):
            if not i & s:
                out[i], out[i + s] = e.shuffle(v[i], v[i + s], low), e.shuffle(v[i], v[i + s], high)
        v = out
    return v


def _make_keys_panel(typ: int, name: str):
    def keys_panel(e, addresses, d_key, panel, _):
        """Rows of 64 keys -> [dimension][key], floats; dimensions up to a multiple of 16, zeros there."""
        with e.loop(I64(KEYS), LANES) as (key, _):
            rows = [e.load(I64, e.add(addresses, e.mul(key, 8)), 8 * i) for i in range(LANES)]
            column = e.add(panel, e.mul(key, 4))

            def body(i: ir.Value, mask: ir.Value | None, rows=rows, column=column) -> None:
                at = e.mul(i, 4 if typ == TYPE_F32 else 2)
                block = [load_floats(e, typ, e.add(row, at), mask) for row in rows]
                for j, v in enumerate(_transpose16(e, block)):
                    e.store(v, e.add(column, e.mul(i, 4 * KEYS)), 4 * KEYS * j)

            e.vectors(d_key, body)

    keys_panel.__name__ = name
    return micro_kernel(4)(keys_panel)


def _make_add_values(typ: int, name: str):
    def add_values(e, n_queries, weights, corrections, addresses, n_keys, sums, d_value, stride):
        """Compute ``sums * correction + weights @ values`` for 1 to 6 queries; sums are ``stride`` bytes apart."""
        b = e.b

        def columns(n: int, first: ir.Value, width: int, mask: ir.Value | None) -> None:
            at4 = e.mul(first, 4)
            own = [e.add(e.add(sums, e.mul(stride, q)), at4) for q in range(n)]
            acc = []
            for q in range(n):
                factor = e.splat(e.load(F32, corrections, 4 * q))
                acc.append([e.var(b.fmul(e.load(F32x16, own[q], 64 * j), factor)) for j in range(width)])
            size = 4 if typ == TYPE_F32 else 2
            with e.loop(n_keys) as (key, _):
                row = e.add(e.load(I64, e.add(addresses, e.mul(key, 8))), e.mul(first, size))
                values = [load_floats(e, typ, e.add(row, LANES * size * j), mask) for j in range(width)]
                for q in range(n):
                    weight = e.splat(e.load(F32, e.add(weights, e.mul(key, 4)), 4 * KEYS * q))
                    for j, v in enumerate(values):
                        b.store(e.fma(v, weight, b.load(acc[q][j])), acc[q][j])
            for q in range(n):
                for j in range(width):
                    e.store(b.load(acc[q][j]), own[q], 64 * j)

        def write(n: int) -> None:
            whole = b.and_(d_value, I64(-4 * LANES))
            with e.loop(whole, 4 * LANES) as (first, _):
                columns(n, first, 4, None)
            with e.loop(d_value, LANES, whole) as (first, _):
                columns(n, first, 1, e.lanes_below(b.sub(d_value, first)))

        e.switch(n_queries, range(1, TILE + 1), write)

    add_values.__name__ = name
    return micro_kernel(8)(add_values)


@micro_kernel(6)
def score_tile(e, n_queries, queries, panel, d_key, scores, _):
    """Products of 1 to 6 queries with the 64 keys of a panel."""
    b = e.b

    def write(n: int) -> None:
        at = [e.load(I64, queries, 8 * q) for q in range(n)]
        acc = [[e.zeros(F32x16) for _ in range(_VECTORS)] for _ in range(n)]
        with e.loop(d_key) as (i, _):
            keys = [e.load(F32x16, e.add(panel, e.mul(i, 4 * KEYS)), 64 * j) for j in range(_VECTORS)]
            for q in range(n):
                query = e.splat(e.load(F32, e.add(at[q], e.mul(i, 4))))
                for j, key in enumerate(keys):
                    b.store(e.fma(key, query, b.load(acc[q][j])), acc[q][j])
        for q in range(n):
            for j in range(_VECTORS):
                e.store(b.load(acc[q][j]), scores, 4 * KEYS * q + 64 * j)

    e.switch(n_queries, range(1, TILE + 1), write)


@micro_kernel(8)
def soften(e, n_queries, scores, n_keys, factor, softcap, masks, first, states):
    """Turn the scores of a block into weights against each query's largest score so far.

    scores : rows of 64; factor, softcap : bits of floats; masks : addresses of rows of halves, or 0; first : the
    block's first key;
    states : the arrays named above. Corrections, by which earlier sums are to be multiplied, are among them.
    """
    b = e.b
    factor, cap = (V(e, e.splat(e.float_of(v))) for v in (factor, softcap))
    kind = e.add(
        b.zext(b.icmp_signed("!=", masks, I64(0)), I64), e.mul(b.zext(b.icmp_signed("!=", softcap, I64(0)), I64), 2)
    )
    there = [e.lanes_below(e.add(n_keys, -LANES * j)) for j in range(_VECTORS)]
    hidden = e.const(F32x16, -math.inf)

    def state(which: int, i: ir.Value) -> ir.Value:
        return e.add(e.add(states, 4 * QUERIES * which), e.mul(i, 4))

    def logits(case: int) -> None:
        with e.loop(n_queries) as (q, _):
            row = e.add(scores, e.mul(q, 4 * KEYS))
            if case & 1:
                mask = e.add(e.load(I64, e.add(masks, e.mul(q, 8))), e.mul(first, 2))
                slope_ = V(e, e.splat(e.load(F32, state(SLOPE, q))))
            values = []
            for j in range(_VECTORS):
                v = V(e, e.load(F32x16, row, 64 * j)) * factor
                if case & 2:
                    v = cap * tanh(v)
                if case & 1:
                    half = e.load_lanes(I16x16, e.add(mask, 2 * LANES * j), there[j])
                    v = v + slope_ * V(e, e.to_f32(e.cast(half, F16x16)))
                values.append(b.select(there[j], v.v, hidden))
                e.store(values[j], row, 64 * j)
            largest = e.fold(e.fmax(e.fmax(values[0], values[1]), e.fmax(values[2], values[3])), e.fmax)
            e.store(largest, state(BASE, q))

    e.switch(kind, range(4), logits)
    with e.loop(n_queries, LANES) as (q, _):  # corrections of 16 queries at once
        old, new = e.load(F32x16, state(LARGEST, q)), e.load(F32x16, state(BASE, q))
        top = e.fmax(old, new)
        base = b.select(b.fcmp_ordered(">", top, hidden), top, e.const(F32x16, 0.0))  # all hidden: weights 0, not NaN
        e.store(top, state(LARGEST, q))
        e.store(base, state(BASE, q))
        e.store(exp(V(e, old) - V(e, base)).v, state(CORRECTION, q))
    with e.loop(n_queries) as (q, _):
        row = e.add(scores, e.mul(q, 4 * KEYS))
        base = V(e, e.splat(e.load(F32, state(BASE, q))))
        weights = [exp(V(e, e.load(F32x16, row, 64 * j)) - base).v for j in range(_VECTORS)]
        for j, v in enumerate(weights):
            e.store(v, row, 64 * j)
        added = e.sum(b.fadd(b.fadd(weights[0], weights[1]), b.fadd(weights[2], weights[3])))
        total = b.fmul(e.load(F32, state(TOTAL, q)), e.load(F32, state(CORRECTION, q)))
        e.store(b.fadd(total, added), state(TOTAL, q))


@micro(types.int64, 3)
def _visible(e, masks, n_queries, first):
    """Bits of the 64 keys from ``first`` on that some mask (rows of halves at addresses) does not hide.

    Reads whole blocks, so all 64 keys must exist.
    """
    b = e.b
    shorts = vec(I16, KEYS)
    seen = e.var(I64(0))
    with e.loop(n_queries) as (q, _):
        at = e.add(e.load(I64, e.add(masks, e.mul(q, 8))), e.mul(first, 2))
        shown = b.icmp_unsigned("!=", e.load(shorts, at), e.const(shorts, -1024))  # 0xFC00: minus infinity
        b.store(b.or_(b.load(seen), b.bitcast(shown, I64)), seen)
    return b.load(seen)


_FLOAT_NAMES = {TYPE_F32: "f32", F16: "f16", BF16: "bf16"}
#: Kernels by type; quantised keys and values are turned into F32 first.
KEYS_PANELS = {typ: _make_keys_panel(typ, f"keys_panel_{name}") for typ, name in _FLOAT_NAMES.items()}
ADD_VALUES = {typ: _make_add_values(typ, f"add_values_{name}") for typ, name in _FLOAT_NAMES.items()}


# -- the op ------------------------------------------------------------------------------------


@device
def _is_float(typ):
    return typ in (TYPE_F32, F16, BF16)


@device
def _visible_tail(masks, n_queries, first, n_keys):
    """As `_visible`, for fewer than 64 keys."""
    seen = 0
    for key in range(n_keys):
        for q in range(n_queries):
            if ld_u16(ld_i64(masks + 8 * q) + 2 * (first + key)) != 0xFC00:
                seen |= 1 << key
                break
    return seen


@device
def _address_rows(d, tensor, i2, i3, first, n_keys, seen, rows, floats_at):
    """Write the addresses of the rows of a block's keys; hidden keys get the row of a visible one, with weight 0."""
    base = row_at(d, tensor, 0, i2, i3)
    nb1, typ, n = word(d, tensor + NB1), word(d, tensor + TYPE), word(d, tensor + NE0)
    dequantise = word(d, DEQUANTISE if tensor == SRC1 else DEQUANTISE + 1)
    spare = 0
    while (seen >> spare) & 1 == 0:
        spare += 1
    for key in range(KEYS):
        use = key if (seen >> key) & 1 != 0 else spare
        if _is_float(typ):
            st_i64(rows + 8 * key, base + (first + use) * nb1)
        else:
            if use == key:
                row_to_f32(typ, base + (first + key) * nb1, floats_at + 4 * n * key, n, dequantise)
            st_i64(rows + 8 * key, floats_at + 4 * n * use)


@device
def _attend(d, first_query, n_queries, kv_head, i3, scratch):
    """One job: queries first_query .. of those that share a key head; query = token * heads in group + head."""
    d_key, _, n_head, n_stream = sizes(d, SRC0)
    _, n_kv, n_kv_head, n_kv_stream = sizes(d, SRC1)
    d_value, group = word(d, SRC2 + NE0), n_head // n_kv_head
    i3_kv = i3 // (n_stream // n_kv_stream)
    v_head = kv_head * group // (n_head // word(d, SRC2 + NE2))
    sum_bytes = (d_value + LANES - 1) // LANES * LANES * 4
    panel = scratch
    scores = panel + KEYS * ((d_key + LANES - 1) // LANES * LANES) * 4
    sums = scores + QUERIES * KEYS * 4
    states = sums + QUERIES * sum_bytes
    queries = states + 4 * STATES * QUERIES
    masks = queries + 8 * QUERIES
    key_rows = masks + 8 * QUERIES
    value_rows = key_rows + 8 * KEYS
    key_floats = value_rows + 8 * KEYS
    value_floats = key_floats + 4 * KEYS * d_key
    mask = address(d, SRC3)
    factor, softcap = bits_of(number(d, SCALE)), bits_of(number(d, SOFTCAP))
    keys_panel, add_values = word(d, KEYS_KERNEL), word(d, VALUES_KERNEL)
    score, soften_ = word(d, SCORES_KERNEL), word(d, SOFTEN_KERNEL)
    _begin(d, first_query, n_queries, kv_head * group, group, i3, queries, masks, states)
    zero = floats(sums)
    for i in range(n_queries * sum_bytes // 4):
        zero[i] = np.float32(0.0)
    tiles = (n_queries + TILE - 1) // TILE
    per_tile = (n_queries + tiles - 1) // tiles
    for first in range(0, n_kv, KEYS):
        n_keys = min(KEYS, n_kv - first)
        seen = np.int64(-1) if n_keys == KEYS else (np.int64(1) << n_keys) - 1
        if mask != 0:
            if n_keys == KEYS:
                seen = _visible(masks, n_queries, first)
            else:
                seen = _visible_tail(masks, n_queries, first, n_keys)
        if seen == 0:
            continue
        _address_rows(d, SRC1, kv_head, i3_kv, first, n_keys, seen, key_rows, key_floats)
        _address_rows(d, SRC2, v_head, i3_kv, first, n_keys, seen, value_rows, value_floats)
        call4(keys_panel, key_rows, d_key, panel, 0)
        for q in range(0, n_queries, per_tile):
            call6(score, min(per_tile, n_queries - q), queries + 8 * q, panel, d_key, scores + 4 * KEYS * q, 0)
        call8(soften_, n_queries, scores, n_keys, factor, softcap, masks if mask != 0 else 0, first, states)
        for q in range(0, n_queries, per_tile):
            call8(
                add_values,
                min(per_tile, n_queries - q),
                scores + 4 * KEYS * q,
                states + 4 * (QUERIES * CORRECTION + q),
                value_rows,
                n_keys,
                sums + sum_bytes * q,
                d_value,
                sum_bytes,
            )
    _finish(d, first_query, n_queries, kv_head * group, group, i3, states, sums, sum_bytes)


@device
def _begin(d, first_query, n_queries, first_head, group, i3, queries, masks, states):
    """Write the addresses of the queries and their masks, and initialise their states."""
    mask = address(d, SRC3)
    max_bias, m0, m1 = number(d, MAX_BIAS), number(d, M0), number(d, M1)
    n_head_log2 = word(d, N_HEAD_LOG2)
    for q in range(n_queries):
        token, head = (first_query + q) // group, first_head + (first_query + q) % group
        st_i64(queries + 8 * q, repeated_row_address(d, SRC0, token, head, i3))
        if mask != 0:
            st_i64(masks + 8 * q, repeated_row_address(d, SRC3, token, head, i3))
        st_f32(states + 4 * (QUERIES * LARGEST + q), np.float32(-np.inf))
        st_f32(states + 4 * (QUERIES * TOTAL + q), np.float32(0.0))
        st_f32(states + 4 * (QUERIES * SLOPE + q), slope(max_bias, m0, m1, n_head_log2, head))


@device
def _finish(d, first_query, n_queries, first_head, group, i3, states, sums, sum_bytes):
    """Divide by the sums of weights, sinks included, and write the rows: heads within tokens."""
    d_value = word(d, SRC2 + NE0)
    sinks = address(d, SRC4)
    for q in range(n_queries):
        token, head = (first_query + q) // group, first_head + (first_query + q) % group
        top, total = ld_f32(states + 4 * (QUERIES * LARGEST + q)), ld_f32(states + 4 * (QUERIES * TOTAL + q))
        factor = np.float32(1.0)
        if sinks != 0:
            sink = ld_f32(sinks + 4 * head)
            if sink > top:
                factor = np.float32(math.exp(top - sink))
                total = total * factor + np.float32(1.0)
            else:
                total += np.float32(math.exp(sink - top))
        factor = factor / total if total != np.float32(0.0) else np.float32(0.0)
        out = row_at(d, DST, head, token, i3)
        scale_row(sums + q * sum_bytes, out, d_value, bits_of(np.float32(0.0)), bits_of(factor))


@op_kernel
def flash_attention(ith, nth, d, ctl):
    """Attend with all queries; jobs are taken one by one."""
    _, n_token, n_head, n_stream = sizes(d, SRC0)
    n_kv_head = word(d, SRC1 + NE2)
    scratch = own_scratch(ctl, ith)
    n_shared = n_head // n_kv_head * n_token
    chunks = (n_shared + QUERIES - 1) // QUERIES
    n_jobs = chunks * n_kv_head * n_stream
    while True:
        job = atomic_add(d + 8 * COUNTER, 1)
        if job >= n_jobs:
            break
        # the last queries see the most keys, so they are first
        chunk, rest = chunks - 1 - job % chunks, job // chunks
        first = chunk * QUERIES
        _attend(d, first, min(QUERIES, n_shared - first), rest % n_kv_head, rest // n_kv_head, scratch)
    if job == n_jobs + nth - 1:
        atomic_store(d + 8 * COUNTER, 0)
