"""Attention: FLASH_ATTN_EXT, SOFT_MAX and the masks before it, LIGHTNING_INDEXER."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..hardware.formulas import Kind, Work
from ..tensor import Tensor
from ..types import Op, Type
from . import kernels
from .calls import bits, by_products, by_rows, dequantiser, with_sources
from .checks import F16_F32, F32, FLOATS, QUANTISED, gaps, like_source, not_f32_rows, optional, source, wrong_type
from .declaration import UsedExperts, declare
from .work import NOTHING, moved_bytes, one_pass, rows_bytes

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan

_CACHED = FLOATS | QUANTISED
_F16 = frozenset({Type.F16})


def _slopes(n_head: int, max_bias: float) -> tuple[int, int, int]:
    """Return ALiBi's two bases, and the number of heads that use the first."""
    max_bias = max(0.0, max_bias)
    n_head_log2 = 1 << max(0, n_head.bit_length() - 1)
    return bits(2.0 ** (-max_bias / n_head_log2)), bits(2.0 ** (-max_bias / 2.0 / n_head_log2)), n_head_log2


# -- SOFT_MAX ------------------------------------------------------------------------------


def _call_soft_max(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    params = (t.param_i32(0), t.param_i32(1), *_slopes(x.ne[2], t.param_f32(1)))
    tensors = (t, x, optional(t, 1), optional(t, 2))
    plan.add(kernels.softmax.soft_max_rows.address, t, tensors, params, **by_rows(t))


def _work_of_soft_max(node: Tensor, used_experts: UsedExperts) -> Work:
    """Nothing for that of a router, which has no mask and is part of its kernel."""
    is_fused = optional(node, 1) is None and node.ne[2] == 1
    return NOTHING if is_fused else one_pass(node, used_experts)


declare(
    Op.SOFT_MAX,
    refuses=lambda t: wrong_type(t, F32, F32, F16_F32, F32) or gaps(t, 0, 1, 2),
    call=_call_soft_max,
    work=_work_of_soft_max,
    fits=like_source,
)


def _call_mask(plan: HostPlan, t: Tensor) -> None:
    x, hidden = source(t, 0), 0.0 if t.op is Op.DIAG_MASK_ZERO else -math.inf
    params = (kernels.reduce.DIAG_MASK, bits(hidden), t.param_i32(0))
    plan.add(kernels.reduce.reduce_rows.address, t, (t, x), params, **by_rows(x))


declare(Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO, refuses=not_f32_rows, call=_call_mask, fits=like_source)


# -- FLASH_ATTN_EXT ------------------------------------------------------------------------


def _call(plan: HostPlan, t: Tensor) -> None:
    attention = kernels.attention
    q, k, v = source(t, 0), source(t, 1), source(t, 2)
    scale, max_bias, softcap = (t.param_f32(i) for i in range(3))
    key_type, value_type = (x.type if x.type in attention.KEYS_PANELS else Type.F32 for x in (k, v))
    plan.need_thread_bytes(attention.thread_bytes(q.ne[0], v.ne[0], k.type.is_quantized or v.type.is_quantized))
    params = (
        bits(scale / softcap if softcap else scale),
        bits(max_bias),
        *_slopes(q.ne[2], max_bias),
        bits(softcap),
        attention.KEYS_PANELS[key_type].address,
        attention.ADD_VALUES[value_type].address,
        attention.score_tile.address,
        attention.soften.address,
        dequantiser(k),
        dequantiser(v),
    )
    n_products = q.nrows * k.ne[1] * (q.ne[0] + v.ne[0])
    tensors = (t, q, k, v, optional(t, 3), optional(t, 4))
    plan.add(attention.flash_attention.address, t, tensors, params, **by_products(n_products))


def _work(node: Tensor, used_experts: UsedExperts) -> Work:
    """Scores that a causal mask hides are skipped: of the last tokens, half of them on the average."""
    q, k, v = (source(node, i) for i in range(3))
    seen = 1.0 - 0.5 * min(q.ne[1], k.ne[1]) / k.ne[1] if optional(node, 3) is not None else 1.0
    flops = 2.0 * seen * q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1] * (k.ne[0] + v.ne[0])
    read = float(rows_bytes(k) + (0 if _is_part_of(v, k) else rows_bytes(v)))
    heads = seen * read * q.ne[2] / k.ne[2] if k.type.is_quantized and not _is_part_of(v, k) else 0.0
    return Work(Kind.ATTENTION, flops, seen * read, n_tokens=q.ne[1], heads_bytes=heads)


def _is_part_of(v: Tensor, k: Tensor) -> bool:
    """Whether V is read from K, as in latent attention."""
    return v.view_src is not None and v.view_src is k.view_src and v.view_offs == k.view_offs


declare(
    Op.FLASH_ATTN_EXT,
    refuses=lambda t: wrong_type(t, F32, F32, _CACHED, _CACHED, _F16, F32) or gaps(t, 0, 1, 2, 3, 4),
    call=_call,
    n_sources=3,
    work=_work,
)


# -- LIGHTNING_INDEXER ---------------------------------------------------------------------


def _call_indexer(plan: HostPlan, t: Tensor) -> None:
    q, k = source(t, 0), source(t, 1)
    n_products = q.numel * k.ne[2]
    plan.need_thread_bytes(4 * k.ne[0])
    kernel, how = kernels.indexer.lightning_indexer, by_products(n_products, 4)
    plan.add(kernel.address, t, with_sources(t, 4), (dequantiser(k),), **how)


def _work_of_indexer(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each pair of a token and a key: a product by each head, weighted and added."""
    q = source(node, 0)
    flops = 2.0 * (q.ne[0] + 1) * q.ne[1] * node.numel
    return Work(Kind.ATTENTION, flops, moved_bytes(node), n_tokens=q.ne[2])


declare(
    Op.LIGHTNING_INDEXER,
    refuses=lambda t: wrong_type(t, F32, F32, _CACHED, F32, _F16) or gaps(t, 0, 1, 2, 3, 4),
    call=_call_indexer,
    n_sources=4,
    work=_work_of_indexer,
)
