"""Writers of rarer ops: placing and padding elements, sums over groups, recurrent layers.

Merged into `writers.WRITERS`.
"""

from __future__ import annotations

from pyggml.kernels.cpu import (
    copy,
    elementwise,
    hyper_connections,
    indexer,
    linear_attention,
    norms,
    recurrent,
    reduce,
    shape,
)
from pyggml.kernels.cpu.dequantise import dequantise_row

from ...ops.modes import TriType
from ...tensor import Tensor
from ...types import Op, Type
from .plan import HostPlan, Layout
from .writing import (
    ELEMENTS_PER_S,
    PRODUCTS_PER_S,
    SERIAL_ELEMENTS,
    SERIAL_PRODUCTS,
    Writer,
    bits,
    by_elements,
    by_rows,
    flat,
    optional,
    source,
)

__all__ = ["RARE_WRITERS"]

#: A distance from the diagonal larger than any element's.
_FAR = 1 << 40
#: The columns that a row of TRI keeps, relative to the row's number: first, end.
_KEPT = {
    TriType.UPPER_DIAG: (0, _FAR),
    TriType.UPPER: (1, _FAR),
    TriType.LOWER_DIAG: (-_FAR, 1),
    TriType.LOWER: (-_FAR, 0),
}


def _add1(plan: HostPlan, t: Tensor) -> None:
    plan.add(elementwise.join_rows.address, t, (t, source(t, 0), source(t, 1)), (elementwise.ADD,), **by_elements(t))


def _write_into(plan: HostPlan, t: Tensor) -> None:
    """ACC, SET: copy src0 unless in place, then write src1 into a part of it."""
    a, b = source(t, 0), source(t, 1)
    if plan.address_of(a) != plan.address_of(t):
        plan.add(copy.copy_rows.address, t, flat(plan, t, a), (copy.RAW_ROWS, t.nbytes, 0, 0), **by_elements(t))
    nb = (t.type.type_size, t.param_i32(0), t.param_i32(1), t.param_i32(2))
    nbytes = t.type.type_size + sum((n - 1) * stride for n, stride in zip(b.ne, nb, strict=True))
    part = Layout(plan.address_of(t) + t.param_i32(3), t.type, b.ne, nb, nbytes)
    if t.op is Op.ACC:
        plan.add(elementwise.join_rows.address, t, (part, part, b), (elementwise.ADD,), **by_elements(b))
    else:
        plan.add(copy.copy_rows.address, t, (part, b), (copy.RAW_ROWS, b.row_size, 0, 0), **by_elements(b))


def _diag_mask_zero(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    plan.add(reduce.reduce_rows.address, t, (t, x), (reduce.DIAG_MASK, bits(0.0), t.param_i32(0)), **by_rows(x))


def _group_norm(plan: HostPlan, t: Tensor) -> None:
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
        plan.add(norms.norm_rows.address, t, layouts, (norms.NORM, t.param_i32(1)), **by_elements(t))


def _pad(plan: HostPlan, t: Tensor) -> None:
    params = (*(t.param_i32(2 * i) for i in range(4)), t.param_i32(8))
    plan.add(shape.pad_rows.address, t, (t, source(t, 0)), params, **by_rows(t))


def _roll(plan: HostPlan, t: Tensor) -> None:
    plan.add(shape.roll_rows.address, t, (t, source(t, 0)), [t.param_i32(i) for i in range(4)], **by_rows(t))


def _tri(plan: HostPlan, t: Tensor) -> None:
    plan.add(shape.triangle_rows.address, t, (t, source(t, 0)), _KEPT[TriType(t.param_i32(0))], **by_rows(t))


def _diag(plan: HostPlan, t: Tensor) -> None:
    plan.add(shape.diagonal_rows.address, t, (t, source(t, 0)), **by_rows(t))


def _arange(plan: HostPlan, t: Tensor) -> None:
    plan.add(shape.arange_row.address, t, (t,), (t.param_i32(0), t.param_i32(2)), serial=True)


def _count_equal(plan: HostPlan, t: Tensor) -> None:
    a = source(t, 0)
    plan.add(shape.count_equal.address, t, (t, a, source(t, 1)), serial=True, cost=a.numel / ELEMENTS_PER_S)


def _out_prod(plan: HostPlan, t: Tensor) -> None:
    a = source(t, 0)
    n_products = t.numel * a.ne[1]
    plan.need_thread_bytes(0 if a.type is Type.F32 else 4 * t.ne[0])
    plan.add(
        shape.out_prod_rows.address,
        t,
        (t, a, source(t, 1)),
        (dequantise_row.address,),
        serial=n_products < SERIAL_PRODUCTS,
        cost=4 * n_products / PRODUCTS_PER_S,
    )


# -- recurrent layers ----------------------------------------------------------------------


def _ssm_conv(plan: HostPlan, t: Tensor) -> None:
    n = t.numel * source(t, 1).ne[0]
    plan.add(
        recurrent.ssm_conv.address,
        t,
        (t, source(t, 0), source(t, 1)),
        serial=n < SERIAL_ELEMENTS,
        cost=n / ELEMENTS_PER_S,
    )


def _ssm_scan(plan: HostPlan, t: Tensor) -> None:
    n = source(t, 0).ne[0] * source(t, 1).numel
    plan.add(
        recurrent.ssm_scan.address,
        t,
        (t, *(source(t, i) for i in range(7))),
        (t.param_i32(0),),
        serial=n < SERIAL_ELEMENTS,
        cost=n / ELEMENTS_PER_S,
    )


def _gated_delta_net(plan: HostPlan, t: Tensor) -> None:
    v = source(t, 2)
    n = v.ne[0] * v.numel
    plan.need_thread_bytes(4 * v.ne[0] * (v.ne[0] + 1))
    plan.add(
        recurrent.gated_delta_net.address,
        t,
        (t, *(source(t, i) for i in range(6))),
        (t.param_i32(0),),
        serial=n < SERIAL_ELEMENTS,
        cost=3 * n / ELEMENTS_PER_S,
    )


def _solve_tri(plan: HostPlan, t: Tensor) -> None:
    n_products = t.numel * t.ne[1] // 2
    plan.add(
        recurrent.solve_tri.address,
        t,
        (t, source(t, 0), source(t, 1)),
        serial=n_products < SERIAL_PRODUCTS,
        cost=4 * n_products / PRODUCTS_PER_S,
    )


def _lightning_indexer(plan: HostPlan, t: Tensor) -> None:
    q, k = source(t, 0), source(t, 1)
    n_products = q.numel * k.ne[2]
    plan.need_thread_bytes(4 * k.ne[0])
    plan.add(
        indexer.lightning_indexer.address,
        t,
        (t, *(source(t, i) for i in range(4))),
        (dequantise_row.address,),
        serial=n_products < SERIAL_PRODUCTS,
        cost=4 * n_products / PRODUCTS_PER_S,
    )


_LINEAR = {
    Op.RWKV_WKV6: (linear_attention.rwkv_wkv6, 6),
    Op.RWKV_WKV7: (linear_attention.rwkv_wkv7, 7),
    Op.GATED_LINEAR_ATTN: (linear_attention.gated_linear_attn, 5),
}


def _linear_attention(plan: HostPlan, t: Tensor) -> None:
    kernel, n_source = _LINEAR[t.op]
    n = source(t, 1).ne[0] * source(t, 1).numel
    plan.add(
        kernel.address,
        t,
        (t, *(source(t, i) for i in range(n_source))),
        (source(t, n_source - 1).ne[1], t.param_i32(0)),
        serial=n < SERIAL_ELEMENTS,
        cost=3 * n / ELEMENTS_PER_S,
    )


def _dsv4_hc_comb(plan: HostPlan, t: Tensor) -> None:
    n = t.numel * t.param_i32(1)
    plan.add(
        hyper_connections.dsv4_hc_comb.address,
        t,
        (t, *(source(t, i) for i in range(3))),
        (t.param_i32(0), t.param_i32(1)),
        serial=n < SERIAL_ELEMENTS,
        cost=n / ELEMENTS_PER_S,
    )


def _dsv4_hc_pre(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    params = (t.param_i32(0), 1) if t.param_i32(1) else (bits(1.0), 0)  # before ggml 0.26 no scale was set
    plan.add(hyper_connections.dsv4_hc_pre.address, t, (t, x, source(t, 1)), params, **by_elements(x))


def _dsv4_hc_post(plan: HostPlan, t: Tensor) -> None:
    comb = optional(t, 3)
    tensors = (t, *(source(t, i) for i in range(3)), *([comb] if comb is not None else []))
    plan.add(hyper_connections.dsv4_hc_post.address, t, tensors, (comb is not None,), **by_elements(t))


RARE_WRITERS: dict[Op, Writer] = {
    Op.ADD1: _add1,
    Op.ACC: _write_into,
    Op.SET: _write_into,
    Op.DIAG_MASK_ZERO: _diag_mask_zero,
    Op.GROUP_NORM: _group_norm,
    Op.PAD: _pad,
    Op.ROLL: _roll,
    Op.TRI: _tri,
    Op.DIAG: _diag,
    Op.ARANGE: _arange,
    Op.COUNT_EQUAL: _count_equal,
    Op.OUT_PROD: _out_prod,
    Op.SSM_CONV: _ssm_conv,
    Op.SSM_SCAN: _ssm_scan,
    Op.GATED_DELTA_NET: _gated_delta_net,
    Op.SOLVE_TRI: _solve_tri,
    Op.LIGHTNING_INDEXER: _lightning_indexer,
    **dict.fromkeys(_LINEAR, _linear_attention),
    Op.DSV4_HC_COMB: _dsv4_hc_comb,
    Op.DSV4_HC_PRE: _dsv4_hc_pre,
    Op.DSV4_HC_POST: _dsv4_hc_post,
}
