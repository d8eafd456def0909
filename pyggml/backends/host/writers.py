"""Writes ops into a `HostPlan`: kernel, tensors, parameters, and whether a single thread runs it.

Imported when the first plan is made, because the kernels import Numba. `WRITERS` has an entry for every op that
`support.py` accepts.
"""

from __future__ import annotations

import math

from pyggml.kernels.cpu import (
    activations,
    attention,
    coded,
    copy,
    elementwise,
    matmul,
    norms,
    reduce,
    rope,
    routing,
    rows,
    softmax,
    sort,
    words,
)
from pyggml.kernels.cpu.dequantise import dequantise_row
from pyggml.kernels.cpu.quantise import quantiser

from ...ops.modes import RopeType
from ...tensor import Tensor
from ...types import Op, Type
from .plan import HostPlan, Layout
from .rare_writers import RARE_WRITERS
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

__all__ = ["WRITERS"]

# -- element by element ----------------------------------------------------------------


def _map(code: int) -> Writer:
    def write(plan: HostPlan, t: Tensor) -> None:
        params = (code, *(t.param_i32(i) for i in range(4)))
        plan.add(elementwise.map_rows.address, t, flat(plan, t, source(t, 0)), params, **by_elements(t))

    return write


def _unary(plan: HostPlan, t: Tensor) -> None:
    params = tuple(t.param_i32(i) for i in range(5))
    plan.add(elementwise.map_rows.address, t, flat(plan, t, source(t, 0)), params, **by_elements(t))


def _glu(plan: HostPlan, t: Tensor) -> None:
    gate, value = source(t, 0), optional(t, 1)
    gate_at = value_at = 0
    if value is None:  # both in one row, gate first unless swapped
        half = 4 * t.ne[0]
        gate_at, value_at = (half, 0) if t.param_i32(1) else (0, half)
    params = (t.param_i32(0), gate_at, value_at, t.param_i32(2), t.param_i32(3))
    plan.add(elementwise.glu_rows.address, t, (t, gate, gate if value is None else value), params, **by_elements(t))


def _add(plan: HostPlan, t: Tensor) -> None:
    a, b = source(t, 0), source(t, 1)
    if t.type is Type.F32 and b.type is Type.F32:
        _join(elementwise.ADD)(plan, t)
    else:
        plan.add(copy.add_elements.address, t, (t, a, b), **by_elements(t))


def _fill(plan: HostPlan, t: Tensor) -> None:
    if t.type is Type.F32:
        _map(elementwise.FILL)(plan, t)
    else:
        plan.add(copy.fill_elements.address, t, (t,), (t.param_i32(0),), **by_elements(t))


def _join(code: int) -> Writer:
    def write(plan: HostPlan, t: Tensor) -> None:
        a, b = source(t, 0), source(t, 1)
        tensors = flat(plan, t, a, b) if a.ne == b.ne else (t, a, b)
        plan.add(elementwise.join_rows.address, t, tensors, (code,), **by_elements(t))

    return write


# -- products -----------------------------------------------------------------------------


def _prepare_rows(plan: HostPlan, t: Tensor, weights: Tensor, x: Tensor) -> tuple[tuple[str, int] | None, int]:
    """Prepare activations (quantised or as floats); return their slot (None: unchanged) and the bytes of a row."""
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
    key = ("groups", plan.address_of(ids), ids.ne, ids.nb, n_expert)
    slot = plan.prepared(key)
    if slot is None:
        n_pairs = ids.ne[0] * ids.ne[1]
        slot = plan.new_slot("groups", routing.routing_bytes(n_expert, n_pairs), key, ids)
        start = plan.add(
            routing.group_by_expert.address,
            t,
            (None, ids),
            (n_expert,),
            serial=True,
            cost=n_pairs / ELEMENTS_PER_S,
            writes=(plan.slot_range(slot),),
        )
        plan.fix(start + words.SCRATCH, slot)
    return slot


def _product(plan: HostPlan, t: Tensor) -> None:
    weights, x, ids = source(t, 0), source(t, 1), optional(t, 2) if t.op is Op.MUL_MAT_ID else None
    groups = None if ids is None else _group(plan, t, ids, weights.ne[2])
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
    )
    n_products = weights.ne[0] * t.numel
    reads = [plan.slot_range(s) for s in (slot, groups) if s is not None]
    start = plan.add(
        matmul.mul_mat.address,
        t,
        (t, weights, x),
        params,
        serial=n_products < SERIAL_PRODUCTS,
        cost=n_products / PRODUCTS_PER_S,
        reads=reads,
    )
    if slot is not None:
        plan.fix(start + matmul.X_BASE, slot)
    if groups is not None:
        plan.fix(start + matmul.GROUPS, groups)


# -- rows as wholes ------------------------------------------------------------------------


def _norm(kind: int) -> Writer:
    def write(plan: HostPlan, t: Tensor) -> None:
        plan.add(norms.norm_rows.address, t, (t, source(t, 0)), (kind, t.param_i32(0)), **by_rows(t))

    return write


def _reduce(kind: int) -> Writer:
    def write(plan: HostPlan, t: Tensor) -> None:
        x = source(t, 0)
        params = (kind, bits(-math.inf), t.param_i32(0))
        plan.add(reduce.reduce_rows.address, t, (t, x), params, **by_rows(x))

    return write


def _sum(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    plan.add(reduce.sum_all.address, t, (t, x), serial=True, cost=x.numel / ELEMENTS_PER_S)


def _slopes(n_head: int, max_bias: float) -> tuple[int, int, int]:
    """Return ALiBi's two bases, and the number of heads that use the first."""
    max_bias = max(0.0, max_bias)
    n_head_log2 = 1 << max(0, n_head.bit_length() - 1)
    return bits(2.0 ** (-max_bias / n_head_log2)), bits(2.0 ** (-max_bias / 2.0 / n_head_log2)), n_head_log2


def _soft_max(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    params = (t.param_i32(0), t.param_i32(1), *_slopes(x.ne[2], t.param_f32(1)))
    plan.add(softmax.soft_max_rows.address, t, (t, x, optional(t, 1), optional(t, 2)), params, **by_rows(t))


def _attention(plan: HostPlan, t: Tensor) -> None:
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
        dequantise_row.address,
    )
    n_products = q.nrows * k.ne[1] * (q.ne[0] + v.ne[0])
    plan.add(
        attention.flash_attention.address,
        t,
        (t, q, k, v, optional(t, 3), optional(t, 4)),
        params,
        serial=n_products < SERIAL_PRODUCTS,
        cost=n_products / PRODUCTS_PER_S,
    )


# -- ROPE ---------------------------------------------------------------------------------------


def _yarn_range(n_dims: int, n_ctx_orig: int, base: float, beta_fast: float, beta_slow: float) -> tuple[float, float]:
    """Return the pairs between which YaRN mixes interpolated and extrapolated angles.

    Notes
    -----
    Mirrors `ggml_rope_yarn_corr_dims`.
    """

    def pair(n_rotations: float) -> float:
        return n_dims * math.log(n_ctx_orig / (n_rotations * 2 * math.pi)) / (2 * math.log(base))

    return max(0.0, math.floor(pair(beta_fast))), min(n_dims - 1.0, math.ceil(pair(beta_slow)))


#: How pairs choose among several positions, by mode; other modes have one position.
_AXES: dict[int, int] = {
    RopeType.MROPE: rope.IN_SECTIONS,
    RopeType.IMROPE: rope.IN_TURNS,
    RopeType.VISION: rope.IN_NEW_SECTIONS,
}


def _angles(plan: HostPlan, t: Tensor, n_pair: int) -> tuple[str, int]:
    positions, divisors = source(t, 1), optional(t, 2)
    axes = _AXES.get(t.param_i32(2), rope.ONE)
    sections = (0, 0, 0, 0) if axes == rope.ONE else tuple(t.param_i32(11 + i) for i in range(4))
    key = ("angles", plan.address_of(positions), positions.ne, positions.nb, t.op_params[1:2] + t.op_params[4:11],
           axes, sections, None if divisors is None else plan.address_of(divisors))  # fmt: skip
    slot = plan.prepared(key)
    if slot is not None:
        return slot
    n_dims, n_token = t.param_i32(1), t.ne[2]
    base, freq_scale, ext_factor, magnitude, beta_fast, beta_slow = (t.param_f32(i) for i in range(5, 11))
    low = high = 0.0
    if ext_factor:
        low, high = _yarn_range(n_dims, t.param_i32(4), base, beta_fast, beta_slow)
        magnitude *= 1.0 + 0.1 * math.log(1.0 / freq_scale)
    slot = plan.new_table(8 * n_pair * n_token, key, positions)
    factors = (base ** (-2.0 / n_dims), freq_scale, ext_factor, magnitude, low, high)
    start = plan.add(
        rope.rope_angles.address,
        t,
        (None, positions, divisors),
        (n_pair, *(bits(f) for f in factors), axes, *sections),
        serial=n_token * n_pair < SERIAL_ELEMENTS // 16,
        cost=40 * n_token * n_pair / ELEMENTS_PER_S,
        writes=(plan.slot_range(slot),),
    )
    plan.fix(start + words.SCRATCH, slot)
    return slot


def _rope(sine_sign: float) -> Writer:
    def write(plan: HostPlan, t: Tensor) -> None:
        mode = t.param_i32(2)
        n_turned = t.ne[0] if mode == RopeType.VISION else t.param_i32(1)
        slot = _angles(plan, t, n_turned // 2)
        plan.need_thread_bytes(0 if t.type is Type.F32 else 4 * t.ne[0])
        params = (n_turned, mode != RopeType.NORMAL, t.param_i32(15), bits(sine_sign))
        start = plan.add(
            rope.rope_rows.address, t, (t, source(t, 0)), params, reads=(plan.slot_range(slot),), **by_rows(t)
        )
        plan.fix(start + words.SCRATCH, slot)

    return write


# -- choosing and moving ----------------------------------------------------------------------------


def _quantiser(t: Tensor) -> int:
    """Return the address of the function that quantises a node's rows; 0 if the type is not quantised."""
    return int(quantiser(t.type).address) if t.type.is_quantized else 0


def _dequantiser(t: Tensor) -> int:
    """Return the address of the function that dequantises a tensor's rows."""
    kernel = coded.dequantise_kernel(t.type) if t.type in coded.TYPES else dequantise_row
    return int(kernel.address)


def _get_rows(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    raw = src.row_size if src.type is t.type else 0
    plan.add(rows.get_rows.address, t, (t, src, source(t, 1)), (_dequantiser(src), raw), **by_rows(t))


def _set_rows(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    plan.need_thread_bytes(4 * src.ne[0])
    raw = src.row_size if src.type is t.type else 0
    plan.add(rows.set_rows.address, t, (t, src, source(t, 1)), (_quantiser(t), raw), **by_rows(src))


def _add_id(plan: HostPlan, t: Tensor) -> None:
    plan.add(rows.add_id_rows.address, t, (t, source(t, 0), source(t, 1), source(t, 2)), **by_rows(t))


def _copy(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    tensors: tuple[Tensor | Layout, ...] = (t, src)
    dense = all(x.nb[0] == x.type.type_size or x.ne[0] == 1 for x in (t, src))
    same_type, same_shape = src.type is t.type, src.ne == t.ne
    size = t.type.type_size if same_type else 0
    if src.is_contiguous() and t.is_contiguous() and (same_type or not same_shape):
        tensors = flat(plan, t, src)
        how, size = (copy.RAW_ROWS, t.nbytes) if same_type else (copy.CONVERTED_ROWS, 0)
        plan.need_thread_bytes(0 if same_type else 4 * t.numel)
    elif same_shape and dense:
        how, size = (copy.RAW_ROWS, t.row_size) if same_type else (copy.CONVERTED_ROWS, 0)
        plan.need_thread_bytes(4 * t.ne[0])
    else:
        how = copy.STRIDED if same_shape else copy.RESHAPED
    plan.add(
        copy.copy_rows.address,
        t,
        tensors,
        (how, size, 0 if same_type else _dequantiser(src), _quantiser(t)),
        **by_elements(t),
    )


def _repeat(plan: HostPlan, t: Tensor) -> None:
    plan.add(copy.repeat_rows.address, t, (t, source(t, 0)), (t.type.type_size,), **by_elements(t))


def _concat(plan: HostPlan, t: Tensor) -> None:
    params = (t.type.type_size, t.param_i32(0))
    plan.add(copy.concat_rows.address, t, (t, source(t, 0), source(t, 1)), params, **by_elements(t))


def _argsort(plan: HostPlan, t: Tensor) -> None:
    plan.need_thread_bytes(12 * sort.STACK)
    plan.add(sort.argsort_rows.address, t, (t, source(t, 0)), (t.param_i32(0),), **by_rows(t))


def _top_k(plan: HostPlan, t: Tensor) -> None:
    src = source(t, 0)
    plan.need_thread_bytes(4 * src.ne[0])
    plan.add(sort.top_k_rows.address, t, (t, src), **by_rows(src))


WRITERS: dict[Op, Writer] = {
    Op.ADD: _add,
    Op.SUB: _join(elementwise.SUB),
    Op.MUL: _join(elementwise.MUL),
    Op.DIV: _join(elementwise.DIV),
    Op.ADD_ID: _add_id,
    Op.SQR: _map(elementwise.SQR),
    Op.SQRT: _map(elementwise.SQRT),
    Op.LOG: _map(elementwise.LOG),
    Op.SIN: _map(elementwise.SIN),
    Op.COS: _map(elementwise.COS),
    Op.SCALE: _map(elementwise.SCALE),
    Op.CLAMP: _map(elementwise.CLAMP),
    Op.LEAKY_RELU: _map(elementwise.LEAKY_RELU),
    Op.FILL: _fill,
    Op.UNARY: _unary,
    Op.GLU: _glu,
    Op.MUL_MAT: _product,
    Op.MUL_MAT_ID: _product,
    Op.RMS_NORM: _norm(norms.RMS_NORM),
    Op.NORM: _norm(norms.NORM),
    Op.L2_NORM: _norm(norms.L2_NORM),
    Op.SUM_ROWS: _reduce(reduce.SUM_ROWS),
    Op.MEAN: _reduce(reduce.MEAN),
    Op.CUMSUM: _reduce(reduce.CUMSUM),
    Op.ARGMAX: _reduce(reduce.ARGMAX),
    Op.DIAG_MASK_INF: _reduce(reduce.DIAG_MASK),
    Op.SUM: _sum,
    Op.SOFT_MAX: _soft_max,
    Op.FLASH_ATTN_EXT: _attention,
    Op.ROPE: _rope(1.0),
    Op.ROPE_BACK: _rope(-1.0),
    Op.GET_ROWS: _get_rows,
    Op.SET_ROWS: _set_rows,
    Op.CPY: _copy,
    Op.CONT: _copy,
    Op.DUP: _copy,
    Op.REPEAT: _repeat,
    Op.CONCAT: _concat,
    Op.ARGSORT: _argsort,
    Op.TOP_K: _top_k,
    **RARE_WRITERS,
}
