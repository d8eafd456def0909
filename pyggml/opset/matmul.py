"""Products: MUL_MAT, MUL_MAT_ID, OUT_PROD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyggml.kernels.cpu import words

from ..hardware.formulas import Kind, Work
from ..ops.modes import skips_ids
from ..tensor import Tensor
from ..types import Op, Type
from . import kernels
from .calls import ELEMENTS_PER_S, SERIAL_ELEMENTS, by_products, dequantiser, with_sources
from .checks import F32, FLOATS, I32, QUANTISED, WEIGHTS, gaps, source, wrong_type
from .declaration import Choice, Role, UsedExperts, declare
from .work import by_kind, moved_bytes, rows_bytes

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan


def _refuses(t: Tensor) -> str:
    """Take any floats with float weights, F32 with quantised ones."""
    activations = FLOATS if t.src[0] is not None and t.src[0].type in FLOATS else F32
    return wrong_type(t, F32, WEIGHTS, activations, *(I32,) * (t.op is Op.MUL_MAT_ID)) or gaps(t, 0, 1, 2)


def _prepare_rows(plan: HostPlan, t: Tensor, weights: Tensor, x: Tensor) -> tuple[tuple[str, int] | None, int]:
    """Prepare activations (quantised or as floats); return their slot (None: unchanged) and the bytes of a row."""
    activations, matmul = kernels.activations, kernels.matmul
    k = x.ne[0]
    if weights.type in matmul.FLOAT_TYPES:
        if x.type is Type.F32:
            return None, 0
        row_bytes, params = 4 * k, (activations.MODE_F32, 0, 0)
    else:
        row_bytes = activations.quantised_row_bytes(k)
        quantise = matmul.QUANTISE_KERNELS[weights.type].address
        params = (activations.MODE_BYTES, matmul.OFFSET[weights.type], quantise)
    key = ("rows", plan.address_of(x), x.ne, x.nb, x.type, params)
    slot = plan.prepared(key)
    if slot is None:
        n = x.nrows
        slot = plan.new_slot("rows", n * row_bytes, key, x)
        start = plan.add(
            activations.prepare_activations.address,
            t,
            (None, x),
            params,
            serial=n == 1 or n * k < 2 * SERIAL_ELEMENTS,
            cost=n * k / ELEMENTS_PER_S,
            writes=(plan.slot_range(slot),),
        )
        plan.fix(start + words.SCRATCH, slot)
    return slot, row_bytes


def _group(plan: HostPlan, t: Tensor, ids: Tensor, n_expert: int) -> tuple[str, int]:
    skips = skips_ids(t)
    key = ("groups", plan.address_of(ids), ids.ne, ids.nb, n_expert, skips)
    slot = plan.prepared(key)
    if slot is None:
        n_pairs = ids.ne[0] * ids.ne[1]
        slot = plan.new_slot("groups", kernels.routing.routing_bytes(n_expert, n_pairs), key, ids)
        start = plan.add(
            kernels.routing.group_by_expert.address,
            t,
            (None, ids),
            (n_expert, int(skips)),
            serial=True,
            cost=n_pairs / ELEMENTS_PER_S,
            writes=(plan.slot_range(slot),),
        )
        plan.fix(start + words.SCRATCH, slot)
    return slot


def _call(plan: HostPlan, t: Tensor) -> None:
    matmul = kernels.matmul
    weights, x = source(t, 0), source(t, 1)
    groups = _group(plan, t, source(t, 2), weights.ne[2]) if t.op is Op.MUL_MAT_ID else None
    slot, row_bytes = _prepare_rows(plan, t, weights, x)
    is_float = weights.type in matmul.FLOAT_TYPES
    plan.need_thread_bytes(matmul.thread_bytes(weights.type, weights.ne[0]))
    params = (
        -1,
        row_bytes,
        -1,
        matmul.FEW_TOKENS.get(weights.type, matmul.FEW_TOKENS_ELSE),
        *matmul.kernels_of(weights.type),
        t.ne[1],
        is_float,
        -1,
    )
    n_products = weights.ne[0] * t.numel
    how = by_products(n_products)
    reads = [plan.slot_range(s) for s in (slot, groups) if s is not None]
    moved = None if how["serial"] or groups is not None else plan.move(t, (weights, x), reads)
    start = plan.add(matmul.mul_mat.address, t, (t, weights, x), params, reads=reads, moved=moved, **how)
    if slot is not None:
        plan.fix(start + matmul.X_BASE, slot)
    if groups is not None:
        plan.fix(start + matmul.GROUPS, groups)
    if moved is not None and moved.slot is not None:
        plan.fix(start + matmul.OUT_BASE, moved.slot)
        result = (plan.slot_range(moved.slot),)
        start = plan.add(matmul.place_product.address, t, (t,), (t.nbytes,), serial=True, reads=result)
        plan.fix(start + words.SCRATCH, moved.slot)


def _work(node: Tensor, used_experts: UsedExperts) -> Work:
    weight, x = source(node, 0), source(node, 1)
    is_expert = node.op is Op.MUL_MAT_ID
    is_view = not weight.op.is_empty or weight.view_src is not None
    if is_view and not is_expert:  # K or V: attention without flash; a bank of experts is a view, too
        return Work(Kind.ATTENTION, 2.0 * weight.ne[0] * node.numel, float(rows_bytes(weight)), n_tokens=x.ne[1])
    return _product(node, used_experts) if is_expert else _dense_product(node)


@by_kind
def _dense_product(node: Tensor) -> Work:
    return _product(node, None)


def _product(node: Tensor, used_experts: UsedExperts | None) -> Work:
    weight, x = source(node, 0), source(node, 1)
    columns, read = node.numel / weight.ne[1], float(rows_bytes(weight))
    n_matrix, n_tokens = float(weight.ne[2] * weight.ne[3]), x.nrows
    if used_experts is not None:
        used = min(used_experts(node), weight.ne[2])
        read *= used / max(weight.ne[2], 1)
        n_matrix, n_tokens = used, node.ne[2]
        if skips_ids(node):  # at most: each expert that is left serves every token
            columns = min(columns, used * n_tokens)
    elif n_matrix > 1:
        n_tokens = x.ne[1]
    flops = 2.0 * weight.ne[0] * weight.ne[1] * columns
    moved = 4.0 * columns * (0.75 * weight.ne[0] + 1.5 * weight.ne[1])
    return Work(
        Kind.PRODUCT, flops, read, moved, type=weight.type, columns=columns, matrices=n_matrix, n_tokens=n_tokens,
        is_expert=used_experts is not None,
    )  # fmt: skip


def _fits(t: Tensor) -> bool:
    a, b = source(t, 0), source(t, 1)
    fits = t.ne == (a.ne[1], *b.ne[1:]) and a.ne[0] == b.ne[0]
    return fits and all(n and m % n == 0 for n, m in zip(a.ne[2:], b.ne[2:], strict=True))


def _fits_id(t: Tensor) -> bool:
    a, b, ids = source(t, 0), source(t, 1), source(t, 2)
    return t.ne == (a.ne[1], ids.ne[0], b.ne[2], 1) and a.ne[0] == b.ne[0] and ids.ne[1] == b.ne[2]


declare(Op.MUL_MAT, refuses=_refuses, call=_call, n_sources=2, work=_work, fits=_fits, role=Role.PRODUCT)
declare(
    Op.MUL_MAT_ID,
    refuses=_refuses,
    call=_call,
    n_sources=3,
    work=_work,
    fits=_fits_id,
    chooses=Choice(indices=2, chosen=0, dim=2, is_expert=True, used_only=True),
    role=Role.PRODUCT,
)


# -- OUT_PROD ------------------------------------------------------------------------------


def _call_outer(plan: HostPlan, t: Tensor) -> None:
    a = source(t, 0)
    n_products = t.numel * a.ne[1]
    plan.need_thread_bytes(0 if a.type is Type.F32 else 4 * t.ne[0])
    how = by_products(n_products, 4)
    plan.add(kernels.shape.out_prod_rows.address, t, with_sources(t, 2), (dequantiser(a),), **how)


def _work_outer(node: Tensor, used_experts: UsedExperts) -> Work:
    """Rows of a times rows of b, summed over the common dimension."""
    flops = 2.0 * source(node, 0).ne[1] * node.numel
    return Work(Kind.PRODUCT, flops, moved_bytes(node), type=Type.F32, columns=node.ne[1], n_tokens=node.ne[1])


declare(
    Op.OUT_PROD,
    refuses=lambda t: wrong_type(t, F32, FLOATS | QUANTISED, F32) or gaps(t, 0, 1),
    call=_call_outer,
    n_sources=2,
    work=_work_outer,
)
