"""Arithmetic, element by element: sums, products, functions of one tensor; ADD_ID; ACC and SET, which write into a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hardware.formulas import Work
from ..tensor import Tensor
from ..types import Op, Type
from . import kernels
from .calls import SERIAL_JOINS, Layout, by_elements, by_rows, flat, with_sources
from .checks import (
    F16_F32,
    F32,
    FLOATS,
    I32,
    gaps,
    is_broadcast,
    like_source,
    not_f32_pair,
    not_f32_rows,
    source,
    wrong_type,
)
from .declaration import Choice, Role, UsedExperts, declare, role_of
from .work import NOTHING, in_other_kernel, one_pass

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan


# -- of two tensors ------------------------------------------------------------------------


def _refuses_add(t: Tensor) -> str:
    if t.type is Type.F32:
        return not_f32_pair(t)
    return wrong_type(t, FLOATS, {t.type}, F32 | {t.type}) or gaps(t, 0, 1)


def _call_add(plan: HostPlan, t: Tensor) -> None:
    if t.type is Type.F32 and source(t, 1).type is Type.F32:
        _call_join(plan, t)
    else:
        plan.add(kernels.copy.add_elements.address, t, with_sources(t, 2), **by_elements(t))


def _call_join(plan: HostPlan, t: Tensor) -> None:
    a, b = source(t, 0), source(t, 1)
    tensors = flat(plan, t, a, b) if a.ne == b.ne else (t, a, b)
    code: int = getattr(kernels.elementwise, t.op.name)
    run = by_elements(t)
    run["serial"] = t.numel < SERIAL_JOINS
    plan.add(kernels.elementwise.join_rows.address, t, tensors, (code,), **run)


def _call_add1(plan: HostPlan, t: Tensor) -> None:
    code = kernels.elementwise.ADD
    plan.add(kernels.elementwise.join_rows.address, t, (t, source(t, 0), source(t, 1)), (code,), **by_elements(t))


def _work_of_add(node: Tensor, used_experts: UsedExperts) -> Work:
    """Nothing for a bias after a product, nor for the sum of experts, which one kernel adds up."""
    first, second = source(node, 0), source(node, 1)
    if second.op is Op.VIEW:
        is_fused = _is_of_experts(second)
    else:
        is_fused = role_of(first.op) is Role.PRODUCT and second.op is Op.NONE and second.nrows == 1
    return NOTHING if is_fused else one_pass(node, used_experts)


def _is_of_experts(view: Tensor) -> bool:
    """Whether a view is one of the experts' results."""
    whole = view.src[0]
    return whole is not None and whole.ne[2] == view.ne[1] and whole.ne[0] == view.ne[0] and whole.ne[1] > 1


def _work_of_mul(node: Tensor, used_experts: UsedExperts) -> Work:
    """Nothing for a norm's weight."""
    first = node.src[0]
    is_fused = first is not None and role_of(first.op) is Role.NORM
    return NOTHING if is_fused else one_pass(node, used_experts)


declare(Op.ADD, refuses=_refuses_add, call=_call_add, n_sources=2, work=_work_of_add, fits=is_broadcast)
declare(Op.SUB, refuses=not_f32_pair, call=_call_join, n_sources=2, fits=is_broadcast)
declare(Op.MUL, refuses=not_f32_pair, call=_call_join, n_sources=2, work=_work_of_mul, fits=is_broadcast)
declare(Op.DIV, refuses=not_f32_pair, call=_call_join, n_sources=2, work=in_other_kernel, fits=is_broadcast)
declare(Op.ADD1, refuses=not_f32_pair, call=_call_add1, n_sources=2, fits=like_source)


# -- of one tensor -------------------------------------------------------------------------


def call_map(plan: HostPlan, t: Tensor) -> None:
    """Call what the kernel has under the op's name, with the op's parameters."""
    params = (getattr(kernels.elementwise, t.op.name), *(t.param_i32(i) for i in range(4)))
    plan.add(kernels.elementwise.map_rows.address, t, flat(plan, t, source(t, 0)), params, **by_elements(t))


def _call_fill(plan: HostPlan, t: Tensor) -> None:
    if t.type is Type.F32:
        call_map(plan, t)
    else:
        plan.add(kernels.copy.fill_elements.address, t, (t,), (t.param_i32(0),), **by_elements(t))


declare(
    *(Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS, Op.SCALE, Op.LEAKY_RELU),
    refuses=not_f32_rows,
    call=call_map,
    fits=like_source,
)
declare(Op.CLAMP, refuses=not_f32_rows, call=call_map, work=in_other_kernel, fits=like_source)  # of a router
declare(Op.FILL, refuses=lambda t: wrong_type(t, F16_F32, {t.type}) or gaps(t, 0, 1), call=_call_fill, fits=like_source)


# -- of parts ------------------------------------------------------------------------------


def _call_add_id(plan: HostPlan, t: Tensor) -> None:
    plan.add(kernels.rows.add_id_rows.address, t, with_sources(t, 3), **by_rows(t))


declare(
    Op.ADD_ID,
    refuses=lambda t: wrong_type(t, F32, F32, F32, I32) or gaps(t, 0, 1, 2),
    call=_call_add_id,
    n_sources=3,
    work=in_other_kernel,
    fits=like_source,
    chooses=Choice(indices=2, chosen=1, is_expert=True),
)


def _refuses_part(t: Tensor) -> str:
    b = source(t, 1)
    nb = (t.type.type_size, *(t.param_i32(i) for i in range(3)))
    end = t.param_i32(3) + t.type.type_size + sum((n - 1) * stride for n, stride in zip(b.ne, nb, strict=True))
    if end > t.nbytes or t.param_i32(3) < 0 or min(nb) < 0:
        return f"the part to be written ends at byte {end} of {t.nbytes}"
    kinds = F32 if t.op is Op.ACC else F32 | I32
    if not t.is_contiguous() or t.src[0] is None or not t.src[0].is_contiguous():
        return "dst or src0 has gaps"
    return wrong_type(t, kinds, {t.type}, {t.type}) or gaps(t, 2)


def _call_part(plan: HostPlan, t: Tensor) -> None:
    """Copy src0 unless in place, then add src1 to a part of it, or write it there."""
    a, b = source(t, 0), source(t, 1)
    copy_rows = kernels.copy.copy_raw_rows
    if plan.address_of(a) != plan.address_of(t):
        plan.add(copy_rows.address, t, flat(plan, t, a), (t.nbytes,), **by_elements(t))
    nb = (t.type.type_size, t.param_i32(0), t.param_i32(1), t.param_i32(2))
    nbytes = t.type.type_size + sum((n - 1) * stride for n, stride in zip(b.ne, nb, strict=True))
    part = Layout(plan.address_of(t) + t.param_i32(3), t.type, b.ne, nb, nbytes)
    if t.op is Op.ACC:
        code = kernels.elementwise.ADD
        plan.add(kernels.elementwise.join_rows.address, t, (part, part, b), (code,), **by_elements(b))
    else:
        plan.add(copy_rows.address, t, (part, b), (b.row_size,), **by_elements(b))


declare(Op.ACC, Op.SET, refuses=_refuses_part, call=_call_part, n_sources=2, fits=like_source)
