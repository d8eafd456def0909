"""Activations: UNARY with its functions, GLU with its gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tensor import Tensor
from ..types import GluOp, Op, UnaryOp
from . import kernels
from .calls import by_elements, flat
from .checks import F32, gaps, like_source, not_f32_rows, optional, source, wrong_type
from .declaration import declare
from .work import in_other_kernel

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan


def _refuses_unary(t: Tensor) -> str:
    if t.param_i32(0) not in list(UnaryOp):
        return f"unknown unary op {t.param_i32(0)}"
    return not_f32_rows(t)


def _call_unary(plan: HostPlan, t: Tensor) -> None:
    params = tuple(t.param_i32(i) for i in range(5))
    plan.add(kernels.elementwise.map_rows.address, t, flat(plan, t, source(t, 0)), params, **by_elements(t))


declare(Op.UNARY, refuses=_refuses_unary, call=_call_unary, fits=like_source)


def _refuses_glu(t: Tensor) -> str:
    if t.param_i32(0) not in list(GluOp):
        return f"unknown GLU op {t.param_i32(0)}"
    return wrong_type(t, F32, F32, F32) or gaps(t, 0, 1, 2)


def _call_glu(plan: HostPlan, t: Tensor) -> None:
    gate, value = source(t, 0), optional(t, 1)
    gate_at = value_at = 0
    if value is None:  # both in one row, gate first unless swapped
        half = 4 * t.ne[0]
        gate_at, value_at = (half, 0) if t.param_i32(1) else (0, half)
    params = (t.param_i32(0), gate_at, value_at, t.param_i32(2), t.param_i32(3))
    tensors = (t, gate, gate if value is None else value)
    plan.add(kernels.elementwise.glu_rows.address, t, tensors, params, **by_elements(t))


def _fits_glu(t: Tensor) -> bool:
    a = source(t, 0)
    return t.ne == (a.ne if optional(t, 1) is not None else (a.ne[0] // 2, *a.ne[1:]))


declare(Op.GLU, refuses=_refuses_glu, call=_call_glu, work=in_other_kernel, fits=_fits_glu)
