"""Ops on whole rows: norms, sums, orders, and elements placed and padded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..hardware.formulas import Work
from ..ops.modes import TriType
from ..tensor import Tensor
from ..types import Op, Type
from . import kernels
from .calls import ELEMENTS_PER_S, Layout, bits, by_elements, by_rows
from .checks import F32, I32, any_gaps, gaps, like_source, not_all_f32, not_f32_rows, one_a_row, source, wrong_type
from .declaration import Role, UsedExperts, declare, role_of
from .work import in_other_kernel, made_by, moved_bytes

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan


# -- norms ---------------------------------------------------------------------------------


def _call_norm(plan: HostPlan, t: Tensor) -> None:
    params = (getattr(kernels.norms, t.op.name), t.param_i32(0))
    plan.add(kernels.norms.norm_rows.address, t, (t, source(t, 0)), params, **by_rows(t))


def _work_of_norm(node: Tensor, used_experts: UsedExperts) -> Work:
    """Charge nothing for what a product has just written: its work has the bytes."""
    after = role_of(made_by(source(node, 0)).op) is Role.PRODUCT
    return Work(flops=float(node.numel), moved_bytes=0.0 if after else moved_bytes(node))


declare(
    *(Op.NORM, Op.RMS_NORM, Op.L2_NORM),
    refuses=not_f32_rows,
    call=_call_norm,
    work=_work_of_norm,
    fits=like_source,
    role=Role.NORM,
)


def _refuses_groups(t: Tensor) -> str:
    is_none = t.param_i32(0) < 1
    return any_gaps(t) or (f"{t.param_i32(0)} groups cannot be" if is_none else not_all_f32(t))


def _call_group_norm(plan: HostPlan, t: Tensor) -> None:
    """Norm the channels of a group as one row; the last group may have fewer."""
    x = source(t, 0)
    n_channel, channel_bytes = t.ne[2], 4 * t.ne[0] * t.ne[1]
    per_group = -(-n_channel // t.param_i32(0))
    n_whole = n_channel // per_group
    for first, n_group, size in ((0, n_whole, per_group), (n_whole * per_group, 1, n_channel % per_group)):
        if not n_group or not size:
            continue
        row, whole = size * channel_bytes, n_channel * channel_bytes
        layouts = [
            Layout(
                plan.address_of(y) + first * channel_bytes,
                y.type,
                (row // 4, n_group, t.ne[3], 1),
                (4, row, whole, whole * t.ne[3]),
                whole * (t.ne[3] - 1) + n_group * row,
            )
            for y in (t, x)
        ]
        params = (kernels.norms.NORM, t.param_i32(1))
        plan.add(kernels.norms.norm_rows.address, t, layouts, params, **by_elements(t))


declare(
    Op.GROUP_NORM,
    refuses=_refuses_groups,
    call=_call_group_norm,
    work=_work_of_norm,
    fits=like_source,
    role=Role.NORM,
)


# -- sums ----------------------------------------------------------------------------------


def _call_reduce(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    params = (getattr(kernels.reduce, t.op.name), bits(-math.inf), t.param_i32(0))
    plan.add(kernels.reduce.reduce_rows.address, t, (t, x), params, **by_rows(x))


def _call_sum(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    plan.add(kernels.reduce.sum_all.address, t, (t, x), serial=True, cost=x.numel / ELEMENTS_PER_S)


declare(Op.SUM_ROWS, refuses=not_f32_rows, call=_call_reduce, work=in_other_kernel, fits=one_a_row)  # of a router
declare(Op.MEAN, refuses=not_f32_rows, call=_call_reduce, fits=one_a_row)
declare(Op.CUMSUM, refuses=not_f32_rows, call=_call_reduce, fits=like_source)
declare(Op.SUM, refuses=not_f32_rows, call=_call_sum)


def _refuses_count(t: Tensor) -> str:
    is_same = source(t, 0).ne == source(t, 1).ne
    return wrong_type(t, {Type.I64}, I32, I32) if is_same else "src0 and src1 have different shapes"


def _call_count(plan: HostPlan, t: Tensor) -> None:
    a = source(t, 0)
    tensors = (t, a, source(t, 1))
    plan.add(kernels.shape.count_equal.address, t, tensors, serial=True, cost=a.numel / ELEMENTS_PER_S)


declare(Op.COUNT_EQUAL, refuses=_refuses_count, call=_call_count, n_sources=2)


# -- orders --------------------------------------------------------------------------------


def _refuses_order(t: Tensor) -> str:
    return wrong_type(t, I32, F32) or gaps(t, 0, 1)


def _call_argsort(plan: HostPlan, t: Tensor) -> None:
    plan.need_thread_bytes(12 * kernels.sort.STACK)
    plan.add(kernels.sort.argsort_rows.address, t, (t, source(t, 0)), (t.param_i32(0),), **by_rows(t))


def _call_top_k(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    plan.need_thread_bytes(4 * src.ne[0])
    plan.add(kernels.sort.top_k_rows.address, t, (t, src), **by_rows(src))


declare(Op.ARGSORT, refuses=_refuses_order, call=_call_argsort, fits=like_source, role=Role.POSITIONS)
declare(Op.TOP_K, refuses=_refuses_order, call=_call_top_k, role=Role.POSITIONS)
declare(Op.ARGMAX, refuses=_refuses_order, call=_call_reduce, role=Role.POSITIONS)


# -- elements placed and padded ------------------------------------------------------------

#: A distance from the diagonal larger than any element's.
_FAR = 1 << 40
#: The columns that a row of TRI keeps, relative to the row's number: first, end.
_KEPT = {
    TriType.UPPER_DIAG: (0, _FAR),
    TriType.UPPER: (1, _FAR),
    TriType.LOWER_DIAG: (-_FAR, 1),
    TriType.LOWER: (-_FAR, 0),
}


def _call_pad(plan: HostPlan, t: Tensor) -> None:
    params = (*(t.param_i32(2 * i) for i in range(4)), t.param_i32(8))
    plan.add(kernels.shape.pad_rows.address, t, (t, source(t, 0)), params, **by_rows(t))


def _call_roll(plan: HostPlan, t: Tensor) -> None:
    params = [t.param_i32(i) for i in range(4)]
    plan.add(kernels.shape.roll_rows.address, t, (t, source(t, 0)), params, **by_rows(t))


def _call_tri(plan: HostPlan, t: Tensor) -> None:
    params = _KEPT[TriType(t.param_i32(0))]
    plan.add(kernels.shape.triangle_rows.address, t, (t, source(t, 0)), params, **by_rows(t))


def _call_diag(plan: HostPlan, t: Tensor) -> None:
    plan.add(kernels.shape.diagonal_rows.address, t, (t, source(t, 0)), **by_rows(t))


def _call_arange(plan: HostPlan, t: Tensor) -> None:
    plan.add(kernels.shape.arange_row.address, t, (t,), (t.param_i32(0), t.param_i32(2)), serial=True)


declare(Op.PAD, refuses=not_f32_rows, call=_call_pad)
declare(Op.ROLL, refuses=not_f32_rows, call=_call_roll, fits=like_source)
declare(Op.TRI, refuses=not_f32_rows, call=_call_tri, fits=like_source)
declare(Op.DIAG, refuses=not_f32_rows, call=_call_diag)
declare(Op.ARANGE, refuses=not_f32_rows, call=_call_arange, n_sources=0)
