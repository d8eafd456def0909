"""LIGHTNING_INDEXER: how much each token wants each key, by few short heads; the best keys are attended to."""

from __future__ import annotations

import numpy as np

from .convert import row_to_f32
from .descriptor import own_scratch, row_at, share, sizes, word
from .kernel import rare_op_kernel
from .memory import floats, ld_f16
from .recurrent import dot_of
from .words import DST, F32, NE2, NE3, PARAM, SRC0, SRC1, SRC2, SRC3, TYPE

#: Parameter: address of a kernel of `DEQUANTISE`.
DEQUANTISE = PARAM


@rare_op_kernel
def lightning_indexer(ith, nth, d, ctl):
    """Add up positive products of queries (src0) and keys (src1), weighed by head (src2), and the mask (src3)."""
    n, n_head, n_token, n_stream = sizes(d, SRC0)
    type, n_kv, n_mask = word(d, SRC1 + TYPE), word(d, SRC1 + NE2), word(d, SRC3 + NE3)
    floats_at = own_scratch(ctl, ith)
    first, end = share(n_kv * n_stream, ith, nth)
    for unit in range(first, end):
        i_kv, stream = unit % n_kv, unit // n_kv
        key = row_at(d, SRC1, 0, i_kv, stream)
        if type != F32:
            row_to_f32(type, key, floats_at, n, word(d, DEQUANTISE))
            key = floats_at
        for t in range(n_token):
            weights, score = floats(row_at(d, SRC2, t, 0, stream)), np.float32(0.0)
            for head in range(n_head):
                score += max(dot_of(row_at(d, SRC0, head, t, stream), key, n), np.float32(0.0)) * weights[head]
            mask = ld_f16(row_at(d, SRC3, t, 0, stream % n_mask) + 2 * i_kv)
            floats(row_at(d, DST, t, 0, stream))[i_kv] = score + mask
