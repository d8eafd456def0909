"""MUL_MAT and MUL_MAT_ID: one op kernel; a dense product has one group per matrix.

Work is divided into jobs of (matrix, rows), which threads take one by one. A row's result does not depend on its job or
thread, because panels begin at multiples of 32 rows in every job. Activations (`activations`) and the grouping by
expert (`routing`) are prepared before.
"""

from __future__ import annotations

from . import blocks32, coded, floatrows, kquants, panel
from .activations import quantise_row_halves, quantise_row_halves_q8_0, quantise_row_q8_0, quantise_row_q8_k
from .descriptor import address, own_scratch, scratch, sizes, strides, word
from .kernel import device, op_kernel
from .memory import atomic_add, atomic_store, call4, call8, copy_bytes, ld_i64, st_i32, st_i64
from .panel import PANEL_BLOCK, ROWS, TILE_TOKENS
from .routing import active_at
from .words import BF16, COUNTER, DST, F16, F32, NB1, NE0, NE2, NE3, NVFP4, PARAM, Q1_0, Q2_0, SHARED, SRC0, SRC1

#: Parameters. X_BASE: byte offset of prepared rows in the shared scratch, or -1: src1 itself. GROUPS: the same of the
#: grouping by expert, or -1: dense. FEW: up to so many tokens rows are taken as they lie. OUT_BASE: byte offset in the
#: shared scratch of the result, laid out as dst, or -1: dst itself.
X_BASE, X_ROW_BYTES, GROUPS, FEW, ROWS_KERNEL, UNPACK_KERNEL, TILE_KERNEL, N_USED = (PARAM + i for i in range(8))
IS_FLOAT, OUT_BASE = PARAM + 8, PARAM + 9
#: Parameter of `place_product`.
N_BYTES = PARAM

FLOAT_TYPES = frozenset({F32, F16, BF16})
QUANTISED_TYPES = frozenset(blocks32.NAMES) | frozenset(kquants.NAMES)
OFFSET = {
    **blocks32.OFFSET,
    **kquants.OFFSET,
    **dict.fromkeys(FLOAT_TYPES, 0),
    **dict.fromkeys(coded.TYPES, coded.OFFSET),
}
ROWS_KERNELS = {**blocks32.ROWS, **kquants.ROWS, **floatrows.ROWS}
UNPACK_KERNELS = {**blocks32.UNPACK, **kquants.UNPACK}
TILE_KERNELS = {
    **dict.fromkeys(QUANTISED_TYPES, panel.tile_plain),
    **dict.fromkeys(blocks32.HAS_MINIMUM | kquants.HAS_MINIMUM, panel.tile_minima),
    kquants.Q6_K: panel.tile_halves,
    kquants.Q3_K: panel.tile_halves,
}
#: How activations are quantised for a type.
QUANTISE_KERNELS = {
    **dict.fromkeys(QUANTISED_TYPES, quantise_row_q8_0),
    **dict.fromkeys((kquants.Q4_K, kquants.Q5_K), quantise_row_q8_k),
    **dict.fromkeys((kquants.Q6_K, kquants.Q3_K, kquants.Q2_K, *coded.TYPES), quantise_row_halves),
    **dict.fromkeys((NVFP4, Q1_0, Q2_0), quantise_row_halves_q8_0),
}
#: Rows of a job if there are enough: shorter streams cost 6 to 10 % when memory is the limit.
JOB_ROWS = 256
#: Tokens for which rows as they lie are faster than a panel; measured.
FEW_TOKENS = {blocks32.Q8_0: 6, kquants.Q2_K: 1 << 40}  # the last has no panels
FEW_TOKENS_ELSE = 4
#: The same for float weights; the kernel takes up to 4.
FEW_FLOAT_TOKENS = 2
#: Bytes of float activations that stay in L2 while rows are read.
TOKEN_BLOCK_BYTES = 256 * 1024
#: Tokens of a job whose addresses, and those of their results, are listed at once.
_LISTS = 512


def kernels_of(typ: int) -> tuple[int, int, int]:
    """Return the addresses of a type's kernels: of rows as they lie, and of panels and their tiles, 0 without."""
    if typ in coded.TYPES:
        return coded.rows_kernel(typ).address, coded.unpack_kernel(typ).address, panel.tile_halves.address
    rows = ROWS_KERNELS[typ].address
    return (rows, UNPACK_KERNELS[typ].address, TILE_KERNELS[typ].address) if typ in UNPACK_KERNELS else (rows, 0, 0)


def thread_bytes(typ: int, k: int) -> int:
    """Bytes of scratch that each thread needs."""
    blocks = 0 if typ in FLOAT_TYPES else k // 32
    return blocks * PANEL_BLOCK + 2 * 8 * _LISTS


@device
def _address_tokens(d, ctl, i02, i03, order, j, n, lists):
    """Write where tokens j .. j+n-1 of a group lie and where their results go, to the lists."""
    ne11, ne12, ne13 = sizes(d, SRC1)[1:]
    nb11, nb12, nb13 = strides(d, SRC1)[1:]
    nb1, nb2, nb3 = strides(d, DST)[1:]
    x_base, row_bytes, out_base, n_used = word(d, X_BASE), word(d, X_ROW_BYTES), word(d, OUT_BASE), word(d, N_USED)
    shared = ld_i64(ctl + 8 * SHARED)
    x = address(d, SRC1) if x_base < 0 else shared + x_base
    out = address(d, DST) if out_base < 0 else shared + out_base
    r2, r3 = max(1, ne12 // word(d, SRC0 + NE2)), max(1, ne13 // word(d, SRC0 + NE3))
    for i in range(n):
        if order != 0:
            pair = ld_i64(order + 8 * (j + i))
            o1, i2, i3 = pair % n_used, pair // n_used, 0
            i1 = o1 % ne11
        else:
            i1 = (j + i) % ne11
            outer = (j + i) // ne11
            o1, i2, i3 = i1, i02 * r2 + outer % r2, i03 * r3 + outer // r2
        if x_base < 0:
            st_i64(lists + 8 * i, x + i1 * nb11 + i2 * nb12 + i3 * nb13)
        else:
            st_i64(lists + 8 * i, x + ((i3 * ne12 + i2) * ne11 + i1) * row_bytes)
        st_i64(lists + 8 * (_LISTS + i), out + o1 * nb1 + i2 * nb2 + i3 * nb3)


@device
def _float_job(d, w, r0, r1, n_tokens, lists):
    """Rows r0 .. r1-1 of a float matrix at w times the tokens in the lists."""
    k, nb01, kernel = word(d, SRC0 + NE0), word(d, SRC0 + NB1), word(d, ROWS_KERNEL)
    outs = lists + 8 * _LISTS
    if n_tokens <= FEW_FLOAT_TOKENS:
        call8(kernel, w + r0 * nb01, nb01, r1 - r0, k, n_tokens, lists, outs, 4 * r0)
        return
    block = max(4, TOKEN_BLOCK_BYTES // (4 * k) // 4 * 4)
    for b0 in range(0, n_tokens, block):
        b1 = min(n_tokens, b0 + block)
        for r in range(r0, r1, 4):
            for j in range(b0, b1, 4):
                n, at = min(4, b1 - j), 8 * j
                call8(kernel, w + r * nb01, nb01, min(4, r1 - r), k, n, lists + at, outs + at, 4 * r)


@device
def _quantised_job(d, w, r0, r1, n_tokens, few, thread_panel, lists):
    """Rows r0 .. r1-1 of a quantised matrix at w times the tokens in the lists."""
    k, n_rows, _, _ = sizes(d, SRC0)
    n_blocks, nb01 = k // 32, word(d, SRC0 + NB1)
    rows_kernel, unpack, tile = word(d, ROWS_KERNEL), word(d, UNPACK_KERNEL), word(d, TILE_KERNEL)
    outs, r = lists + 8 * _LISTS, r0
    if not few:
        while r + ROWS <= r1:
            call4(unpack, w + r * nb01, nb01, n_blocks, thread_panel)
            call4(unpack, w + (r + 16) * nb01, nb01, n_blocks, thread_panel + 64)
            # while the first tile computes, the next rows are fetched, if there are as many
            fetch = r + 2 * ROWS <= n_rows
            ahead = w + (r + ROWS) * nb01 if fetch else thread_panel
            step = nb01 * ROWS // n_blocks if fetch else 0
            j = 0
            while j < n_tokens:
                tiles = (n_tokens - j + TILE_TOKENS - 1) // TILE_TOKENS
                n = (n_tokens - j + tiles - 1) // tiles  # evenly: 7 tokens are 4 and 3
                call8(tile, n, thread_panel, n_blocks, lists + 8 * j, outs + 8 * j, 4 * r, ahead, step)
                ahead, step = thread_panel, 0
                j += n
            r += ROWS
    if r < r1:
        call8(rows_kernel, w + r * nb01, nb01, r1 - r, n_blocks, n_tokens, lists, outs, 4 * r)


@device
def _job_rows(n_rows, n_matrices, nth):
    """Rows of a job: fewer where there are few, so that threads end together; always whole panels."""
    share = n_rows * n_matrices // (4 * nth)
    return max(ROWS, min(JOB_ROWS, (share + ROWS - 1) // ROWS * ROWS))


@device
def _clear_skipped(ith, nth, d, order, n_pairs, total):
    """Set the results of pairs without an expert to 0; this thread's share of them."""
    out, n_used, ne0 = address(d, DST), word(d, N_USED), word(d, DST + NE0)
    nb0, nb1, nb2, _ = strides(d, DST)
    for j in range(total + ith, n_pairs, nth):
        pair = ld_i64(order + 8 * j)
        row = out + pair % n_used * nb1 + pair // n_used * nb2
        for i in range(ne0):
            st_i32(row + i * nb0, 0)


@op_kernel
def mul_mat(ith, nth, d, ctl):
    """Multiply matrices src0 with the tokens of src1 that belong to each."""
    _, n_rows, ne02, ne03 = sizes(d, SRC0)
    _, _, nb02, nb03 = strides(d, SRC0)
    _, ne1, ne2, ne3 = sizes(d, DST)
    n_outs = ne1 * ne2 * ne3
    weights, groups, is_float = address(d, SRC0), word(d, GROUPS), word(d, IS_FLOAT)
    first = ld_i64(ctl + 8 * SHARED) + groups
    active = active_at(first, ne02, n_outs)
    order = first + 8 * (ne02 + 1) if groups >= 0 else 0
    n_matrices = ld_i64(active) if groups >= 0 else ne02 * ne03
    lists = own_scratch(ctl, ith)
    thread_panel = lists + 2 * 8 * _LISTS
    job_rows = _job_rows(n_rows, n_matrices, nth)
    if groups >= 0:
        _clear_skipped(ith, nth, d, order, n_outs, ld_i64(first + 8 * ne02))
    per_matrix = (n_rows + job_rows - 1) // job_rows
    n_jobs = n_matrices * per_matrix
    while True:
        job = atomic_add(d + 8 * COUNTER, 1)
        if job >= n_jobs:
            break
        matrix = job // per_matrix
        i02, i03, j0, j1 = matrix % ne02, matrix // ne02, 0, n_outs // (ne02 * ne03)
        if groups >= 0:
            i02, i03 = ld_i64(active + 8 * (matrix + 1)), 0
            j0, j1 = ld_i64(first + 8 * i02), ld_i64(first + 8 * (i02 + 1))
        r0 = (job - matrix * per_matrix) * job_rows
        r1 = min(n_rows, r0 + job_rows)
        w = weights + i02 * nb02 + i03 * nb03
        few = j1 - j0 <= word(d, FEW)
        for j in range(j0, j1, _LISTS):
            n = min(_LISTS, j1 - j)
            _address_tokens(d, ctl, i02, i03, order, j, n, lists)
            if is_float != 0:
                _float_job(d, w, r0, r1, n, lists)
            else:
                _quantised_job(d, w, r0, r1, n, few, thread_panel, lists)
    if job == n_jobs + nth - 1:  # the last to ask leaves the counter as it was
        atomic_store(d + 8 * COUNTER, 0)


@op_kernel
def place_product(ith, nth, d, ctl):
    """Copy a product's result from scratch to its own memory."""
    copy_bytes(address(d, DST), scratch(d, ctl), word(d, N_BYTES))
