"""Ops that move elements: copies, repetitions, and rows chosen by indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hardware.formulas import Work
from ..tensor import Tensor
from ..types import Op, Type
from . import kernels
from .calls import Layout, by_elements, by_rows, dequantiser, flat
from .checks import CODED, F32, FLOATS, I32, QUANTISED, WEIGHTS, gaps, source, wrong_type
from .declaration import Choice, UsedExperts, declare
from .work import in_other_kernel, rows_bytes

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan

_WRITABLE = FLOATS | QUANTISED | I32
_ROW_NUMBERS = frozenset({Type.I32, Type.I64})


def _quantiser(t: Tensor) -> int:
    """Return the address of the function that quantises a node's rows; 0 if the type is not quantised."""
    return int(kernels.quantise.quantiser(t.type).address) if t.type.is_quantized else 0


# -- CPY, CONT, DUP ------------------------------------------------------------------------


def _refuses_copy(t: Tensor) -> str:
    src = source(t, 0)
    if src.type is t.type:
        if t.type.is_quantized and src.ne != t.ne and not (src.is_contiguous() and t.is_contiguous()):
            return "a quantised tensor cannot be copied to another shape with gaps"
        return gaps(t, 0, 1) if t.type.is_quantized else ""
    reason = wrong_type(t, _WRITABLE, _WRITABLE | CODED)
    if not reason and (t.type.is_quantized or src.type.is_quantized):
        reason = "rows of different lengths" if src.ne != t.ne else gaps(t, 0, 1)
    return reason


def _call_copy(plan: HostPlan, t: Tensor) -> None:
    copy = kernels.copy
    src = source(t, 0)
    tensors: tuple[Tensor | Layout, ...] = (t, src)
    dense = all(x.nb[0] == x.type.type_size or x.ne[0] == 1 for x in (t, src))
    same_type, same_shape = src.type is t.type, src.ne == t.ne
    size = t.type.type_size if same_type else 0
    if src.is_contiguous() and t.is_contiguous() and (same_type or not same_shape):
        tensors = flat(plan, t, src)
        kernel, size = (copy.copy_raw_rows, t.nbytes) if same_type else (copy.copy_converted_rows, 0)
        plan.need_thread_bytes(0 if same_type else 4 * t.numel)
    elif same_shape and dense:
        kernel, size = (copy.copy_raw_rows, t.row_size) if same_type else (copy.copy_converted_rows, 0)
        plan.need_thread_bytes(4 * t.ne[0])
    else:
        kernel = copy.copy_strided_rows if same_shape else copy.copy_reshaped
    params = (size,) if same_type else (size, dequantiser(src), _quantiser(t))
    plan.add(kernel.address, t, tensors, params, **by_elements(t))


declare(Op.CPY, Op.CONT, Op.DUP, refuses=_refuses_copy, call=_call_copy, fits=lambda t: t.numel == source(t, 0).numel)


# -- REPEAT, CONCAT ------------------------------------------------------------------------


def _refuses_repeat(t: Tensor) -> str:
    if t.type.is_quantized:
        return f"dst '{t.name}' is quantised"
    return wrong_type(t, *[{t.type}] * 2) or gaps(t, 0, 1)


def _call_repeat(plan: HostPlan, t: Tensor) -> None:
    plan.add(kernels.copy.repeat_rows.address, t, (t, source(t, 0)), (t.type.type_size,), **by_elements(t))


def _fits_repeat(t: Tensor) -> bool:
    return not any(d % s if s else d for d, s in zip(t.ne, source(t, 0).ne, strict=True))


declare(Op.REPEAT, refuses=_refuses_repeat, call=_call_repeat, fits=_fits_repeat)


def _refuses_concat(t: Tensor) -> str:
    """Allow gaps in sources."""
    if t.type.is_quantized:
        return f"dst '{t.name}' is quantised"
    return wrong_type(t, *[{t.type}] * 3) or gaps(t, 0)


def _call_concat(plan: HostPlan, t: Tensor) -> None:
    params = (t.type.type_size, t.param_i32(0))
    plan.add(kernels.copy.concat_rows.address, t, (t, source(t, 0), source(t, 1)), params, **by_elements(t))


declare(Op.CONCAT, refuses=_refuses_concat, call=_call_concat, n_sources=2)


# -- GET_ROWS, SET_ROWS --------------------------------------------------------------------


def _refuses_get_rows(t: Tensor) -> str:
    if source(t, 0).type is Type.I32:
        return wrong_type(t, I32, I32, I32) or gaps(t, 0, 1)
    return wrong_type(t, F32, WEIGHTS, I32) or gaps(t, 0, 1)


def _call_get_rows(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    raw = src.row_size if src.type is t.type else 0
    params = (dequantiser(src), raw)
    plan.add(kernels.rows.get_rows.address, t, (t, src, source(t, 1)), params, **by_rows(t))


def _work_of_get_rows(node: Tensor, used_experts: UsedExperts) -> Work:
    """Of a table, only the selected rows are read."""
    table = source(node, 0)
    moved = node.nbytes + table.row_size * node.nrows + sum(rows_bytes(x) for x in node.src[1:] if x is not None)
    return Work(flops=float(node.numel), moved_bytes=float(moved))


def _fits_get_rows(t: Tensor) -> bool:
    a, b = source(t, 0), source(t, 1)
    return t.ne == (a.ne[0], *b.ne[:3]) and a.ne[2:] == b.ne[1:3]


declare(
    Op.GET_ROWS,
    refuses=_refuses_get_rows,
    call=_call_get_rows,
    n_sources=2,
    work=_work_of_get_rows,
    fits=_fits_get_rows,
    chooses=Choice(indices=1, chosen=0),
)


def _refuses_set_rows(t: Tensor) -> str:
    if source(t, 0).type is t.type and t.type in FLOATS | I32:
        return wrong_type(t, {t.type}, {t.type}, _ROW_NUMBERS) or gaps(t, 0, 1)
    return wrong_type(t, _WRITABLE - I32, FLOATS, _ROW_NUMBERS) or gaps(t, 0, 1)


def _call_set_rows(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    plan.need_thread_bytes(4 * src.ne[0])
    raw = src.row_size if src.type is t.type else 0
    plan.add(kernels.rows.set_rows.address, t, (t, src, source(t, 1)), (_quantiser(t), raw), **by_rows(src))


declare(
    Op.SET_ROWS,
    refuses=_refuses_set_rows,
    call=_call_set_rows,
    n_sources=2,
    work=in_other_kernel,
    chooses=Choice(indices=1, chosen=-1),
)
