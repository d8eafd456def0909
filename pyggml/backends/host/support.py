"""`reason_unsupported`: why the host's kernels cannot run a node. Needs neither kernels nor Numba."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from ...ops.modes import RopeType
from ...tensor import Tensor
from ...types import GluOp, Op, Type, UnaryOp

__all__ = ["plans_op", "reason_malformed", "reason_unsupported", "supports_op"]

_FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})
#: Types to which and from which rows of floats can be converted.
_QUANTISED = frozenset({
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
    Type.MXFP4, Type.IQ4_NL,
})  # fmt: skip
#: Types that are read but never written.
_CODED = frozenset({
    Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.IQ1_M, Type.IQ1_S, Type.TQ1_0,
    Type.TQ2_0, Type.NVFP4, Type.Q1_0, Type.Q2_0,
})  # fmt: skip
_WEIGHTS = _FLOATS | _QUANTISED | _CODED
_WRITABLE = _FLOATS | _QUANTISED | {Type.I32}
_KV_TYPES = _FLOATS | _QUANTISED


def _types(t: Tensor, *allowed: frozenset[Type] | set[Type]) -> str:
    """Return why the type of dst or a source is not allowed; empty if all are. Missing sources are ignored."""
    tensors = [t, *t.src]
    for i, types in enumerate(allowed):
        x = tensors[i] if i < len(tensors) else None
        if x is not None and x.type not in types:
            what = "dst" if i == 0 else f"src{i - 1}"
            return f"{what} '{x.name}' is {x.type.ggml_name}, not {' or '.join(sorted(y.ggml_name for y in types))}"
    return ""


def _dense_rows(t: Tensor, *which: int) -> str:
    """Require contiguous rows in dst (0) and sources (1, 2, ...)."""
    tensors = [t, *t.src]
    for i in which:
        x = tensors[i] if i < len(tensors) else None
        if x is not None and x.nb[0] != x.type.type_size and x.ne[0] != 1:
            return f"{'dst' if i == 0 else f'src{i - 1}'} '{x.name}' has gaps within its rows (nb {x.nb})"
    return ""


_F32 = frozenset({Type.F32})
_I32 = frozenset({Type.I32})
_ROPED = frozenset({Type.F32, Type.F16})
_ROPE_MODES = frozenset(int(mode) for mode in RopeType)


def _elementwise(t: Tensor) -> str:
    return _types(t, _F32, _F32) or _dense_rows(t, 0, 1)


def _binary(t: Tensor) -> str:
    return _types(t, _F32, _F32, _F32) or _dense_rows(t, 0, 1)


def _add(t: Tensor) -> str:
    if t.type is Type.F32:
        return _binary(t)
    return _types(t, _FLOATS, {t.type}, _F32 | {t.type}) or _dense_rows(t, 0, 1)


def _fill(t: Tensor) -> str:
    return _types(t, _ROPED, {t.type}) or _dense_rows(t, 0, 1)


def _unary(t: Tensor) -> str:
    if t.param_i32(0) not in list(UnaryOp):
        return f"unknown unary op {t.param_i32(0)}"
    return _elementwise(t)


def _glu(t: Tensor) -> str:
    if t.param_i32(0) not in list(GluOp):
        return f"unknown GLU op {t.param_i32(0)}"
    return _types(t, _F32, _F32, _F32) or _dense_rows(t, 0, 1, 2)


def _activations(t: Tensor) -> frozenset[Type]:
    """Return the types of activations: any floats for float weights, F32 for quantised ones."""
    return _FLOATS if t.src[0] is not None and t.src[0].type in _FLOATS else _F32


def _product(t: Tensor) -> str:
    return _types(t, _F32, _WEIGHTS, _activations(t)) or _dense_rows(t, 0, 1, 2)


def _product_id(t: Tensor) -> str:
    return _types(t, _F32, _WEIGHTS, _activations(t), _I32) or _dense_rows(t, 0, 1, 2)


def _add_id(t: Tensor) -> str:
    return _types(t, _F32, _F32, _F32, _I32) or _dense_rows(t, 0, 1, 2)


def _get_rows(t: Tensor) -> str:
    src0 = t.src[0]
    if src0 is not None and src0.type is Type.I32:
        return _types(t, _I32, _I32, _I32) or _dense_rows(t, 0, 1)
    return _types(t, _F32, _WEIGHTS, _I32) or _dense_rows(t, 0, 1)


def _set_rows(t: Tensor) -> str:
    src0 = t.src[0]
    if src0 is not None and src0.type is t.type and t.type in _FLOATS | {Type.I32}:
        return _types(t, {t.type}, {t.type}, {Type.I32, Type.I64}) or _dense_rows(t, 0, 1)
    return _types(t, _WRITABLE - {Type.I32}, _FLOATS, {Type.I32, Type.I64}) or _dense_rows(t, 0, 1)


def _copy(t: Tensor) -> str:
    src0 = t.src[0]
    assert src0 is not None
    if src0.type is t.type:
        if t.type.is_quantized and src0.ne != t.ne and not (src0.is_contiguous() and t.is_contiguous()):
            return "a quantised tensor cannot be copied to another shape with gaps"
        return _dense_rows(t, 0, 1) if t.type.is_quantized else ""
    reason = _types(t, _WRITABLE, _WRITABLE | _CODED)
    if not reason and (t.type.is_quantized or src0.type.is_quantized):
        reason = "rows of different lengths" if src0.ne[0] != t.ne[0] or src0.ne != t.ne else _dense_rows(t, 0, 1)
    return reason


def _rope(t: Tensor) -> str:
    mode, n_dims, first, n = t.param_i32(2), t.param_i32(1), t.param_i32(15), t.ne[0]
    if mode not in _ROPE_MODES:
        return f"rope mode {mode} is none of {', '.join(f'{m.value} ({m.name})' for m in RopeType)}"
    if n_dims <= 0 or n_dims % 2 or first < 0 or first % 2 or first + n_dims > n:
        return f"rope cannot turn {n_dims} of {n} elements from {first} on: all must be even, and fit"
    base, scale, extrapolated, *rest = (t.param_f32(i) for i in range(5, 11))
    if not (base > 0 and all(map(isfinite, (base, scale, extrapolated, *rest)))):
        return f"rope needs a base frequency above 0 and finite numbers, not {base:g}, {scale:g}, {extrapolated:g}"
    if extrapolated and not (t.param_i32(4) > 0 and scale > 0 and min(rest[1:]) > 0 and base != 1):
        return f"YaRN needs a trained context ({t.param_i32(4)}), a scale ({scale:g}) and betas above 0"
    if mode & RopeType.MROPE:
        sections = [t.param_i32(11 + i) for i in range(4)]
        if min(sections) < 0 or not any(sections[:3]) or sum(sections) > n:
            return f"rope sections {sections} do not divide {n // 2} pairs"
    if mode == RopeType.VISION and (2 * n_dims != n or first):
        return f"rope mode 24 (VISION) turns whole rows: n_dims {n_dims} is not half of {n}, or an offset is set"
    factors = t.src[2] if len(t.src) > 2 else None
    if factors is not None and mode == RopeType.VISION and factors.ne[0] < n_dims:
        return f"rope mode 24 (VISION) needs a frequency factor for each of {n_dims} pairs, src2 has {factors.ne[0]}"
    return _types(t, _ROPED, {t.type}, _I32, _F32) or _dense_rows(t, 0, 1)


def _soft_max(t: Tensor) -> str:
    return _types(t, _F32, _F32, {Type.F32, Type.F16}, _F32) or _dense_rows(t, 0, 1, 2)


def _attention(t: Tensor) -> str:
    return _types(t, _F32, _F32, _KV_TYPES, _KV_TYPES, {Type.F16}, _F32) or _dense_rows(t, 0, 1, 2, 3, 4)


def _sort(t: Tensor) -> str:
    return _types(t, _I32, _F32) or _dense_rows(t, 0, 1)


def _same_bytes(t: Tensor) -> str:
    if t.type.is_quantized:
        return f"dst '{t.name}' is quantised"
    if t.op is Op.CONCAT:  # sources may have gaps
        return _types(t, *[{t.type}] * 3) or _dense_rows(t, 0)
    return _types(t, *[{t.type}] * 2) or _dense_rows(t, 0, 1)


def _write_into(t: Tensor) -> str:
    b = t.src[1]
    assert b is not None
    nb = (t.type.type_size, *(t.param_i32(i) for i in range(3)))
    end = t.param_i32(3) + t.type.type_size + sum((n - 1) * stride for n, stride in zip(b.ne, nb, strict=True))
    if end > t.nbytes or t.param_i32(3) < 0 or min(nb) < 0:
        return f"the part to be written ends at byte {end} of {t.nbytes}"
    kinds = _F32 if t.op is Op.ACC else _F32 | _I32
    if not t.is_contiguous() or t.src[0] is None or not t.src[0].is_contiguous():
        return "dst or src0 has gaps"
    return _types(t, kinds, {t.type}, {t.type}) or _dense_rows(t, 2)


def _contiguous(t: Tensor) -> str:
    """Require contiguous F32 tensors."""
    for i, x in enumerate((t, *t.src)):
        if x is not None and not x.is_contiguous():
            return f"{'dst' if i == 0 else f'src{i - 1}'} '{x.name}' has gaps (nb {x.nb})"
    if t.op is Op.GROUP_NORM and t.param_i32(0) < 1:
        return f"{t.param_i32(0)} groups cannot be"
    return _types(t, *[_F32] * (len(t.src) + 1))


def _count_equal(t: Tensor) -> str:
    a, b = t.src[:2]
    same = a is not None and b is not None and a.ne == b.ne
    return _types(t, {Type.I64}, _I32, _I32) if same else "src0 and src1 have different shapes"


def _out_prod(t: Tensor) -> str:
    return _types(t, _F32, _FLOATS | _QUANTISED, _F32) or _dense_rows(t, 0, 1)


def _indexer(t: Tensor) -> str:
    return _types(t, _F32, _F32, _FLOATS | _QUANTISED, _F32, {Type.F16}) or _dense_rows(t, 0, 1, 2, 3, 4)


def _state(t: Tensor) -> str:
    """SSM_CONV, SSM_SCAN, GATED_DELTA_NET: F32 except ids, contiguous rows."""
    n = len(t.src)
    kinds = [_F32] * (n + 1)
    if t.op is Op.SSM_SCAN:
        kinds[7] = _I32
        groups, heads, rates = t.src[4], t.src[1], t.src[3]
        assert groups is not None
        assert heads is not None
        assert rates is not None
        if not groups.ne[1] or heads.ne[1] % groups.ne[1] or (rates.ne[0] != 1 and t.param_i32(0) != 1):
            return f"{heads.ne[1]} heads do not divide into {groups.ne[1]} groups, or Mamba-1 keeps several states"
    return _types(t, *kinds) or _dense_rows(t, *range(n + 1))


def _linear_attention(t: Tensor) -> str:
    """RWKV_WKV6, RWKV_WKV7, GATED_LINEAR_ATTN: contiguous F32, and equally many tokens of each sequence."""
    *tokens, state = [x for x in t.src if x is not None]
    n, n_head, n_token, _ = tokens[1].ne
    if t.op is Op.RWKV_WKV6 and tokens.pop(3).numel < n * n_head:
        return f"src3 has not a bonus for each of {n * n_head} channels"
    if any(x.ne != (n, n_head, n_token, 1) for x in tokens):
        return f"sources have not the shape of src1, {list(tokens[1].ne)}"
    if not state.ne[1] or n_token % state.ne[1] or state.numel != n * n * n_head * state.ne[1]:
        return f"{n_token} tokens do not divide into the {state.ne[1]} sequences of the states {list(state.ne)}"
    want = (n * n_head, n_token + n * state.ne[1], 1, 1)
    return _contiguous(t) if t.ne == want else f"dst is {list(t.ne)}, not {list(want)}"


def _hyper_connections(t: Tensor) -> str:
    """DSV4_HC_COMB, DSV4_HC_PRE, DSV4_HC_POST: F32 with contiguous rows."""
    x, y, post, comb = ([*t.src, None, None, None])[:4]
    assert x is not None
    assert y is not None
    n, n_stream, n_token = x.ne[0], (x if t.op is Op.DSV4_HC_PRE else y).ne[1], t.ne[2]
    rows: tuple[int, ...] = (0, 1, 2)
    if t.op is Op.DSV4_HC_COMB:
        rows = (0,)
        fits = (
            post is not None
            and x.ne == (24, n_token, 1, 1)
            and y.ne[0] >= 3
            and post.ne[0] == 24
            and t.param_i32(1) > 0
        )
        fits = fits and t.ne == (4, 4, n_token, 1) and t.is_contiguous()
    elif t.op is Op.DSV4_HC_PRE:
        gated = bool(t.param_i32(1))
        rows = (0, 1, 2) if gated else (0, 1)
        fits = y.ne == (x.ne if gated else (*x.ne[1:3], 1, 1)) and t.ne == (n, x.ne[2], 1, 1) and x.ne[3] == 1
    else:
        fits = post is not None and post.ne == (n_stream, n_token, 1, 1) and t.ne == y.ne == (n, n_stream, n_token, 1)
        fits = fits and x.ne == (n, n_token, 1, 1)
        fits = fits and (comb is None or comb.ne == (n_stream, n_stream, n_token, 1))
    if not fits:
        return "shapes of sources do not fit"
    return _types(t, *[_F32] * 5) or _dense_rows(t, *rows)


_CHECKS: dict[Op, Callable[[Tensor], str]] = {
    **dict.fromkeys((Op.SUB, Op.MUL, Op.DIV), _binary),
    Op.ADD: _add,
    Op.FILL: _fill,
    **dict.fromkeys(
        (Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS, Op.SCALE, Op.CLAMP, Op.LEAKY_RELU, Op.RMS_NORM, Op.NORM,
         Op.L2_NORM, Op.SUM_ROWS, Op.MEAN, Op.CUMSUM, Op.DIAG_MASK_INF, Op.SUM), _elementwise,
    ),
    **dict.fromkeys((Op.CPY, Op.CONT, Op.DUP), _copy),
    **dict.fromkeys((Op.ARGSORT, Op.TOP_K, Op.ARGMAX), _sort),
    **dict.fromkeys((Op.REPEAT, Op.CONCAT), _same_bytes),
    **dict.fromkeys((Op.DIAG_MASK_ZERO, Op.PAD, Op.ROLL, Op.TRI, Op.DIAG, Op.ARANGE), _elementwise),
    **dict.fromkeys((Op.ACC, Op.SET), _write_into),
    **dict.fromkeys((Op.SSM_CONV, Op.SSM_SCAN, Op.GATED_DELTA_NET), _state),
    **dict.fromkeys((Op.GROUP_NORM, Op.SOLVE_TRI), _contiguous),
    Op.LIGHTNING_INDEXER: _indexer,
    **dict.fromkeys((Op.RWKV_WKV6, Op.RWKV_WKV7, Op.GATED_LINEAR_ATTN), _linear_attention),
    **dict.fromkeys((Op.DSV4_HC_COMB, Op.DSV4_HC_PRE, Op.DSV4_HC_POST), _hyper_connections),
    Op.ADD1: _binary,
    Op.COUNT_EQUAL: _count_equal,
    Op.OUT_PROD: _out_prod,
    Op.UNARY: _unary,
    Op.GLU: _glu,
    Op.MUL_MAT: _product,
    Op.MUL_MAT_ID: _product_id,
    Op.ADD_ID: _add_id,
    Op.GET_ROWS: _get_rows,
    Op.SET_ROWS: _set_rows,
    Op.ROPE: _rope,
    Op.ROPE_BACK: _rope,
    Op.SOFT_MAX: _soft_max,
    Op.FLASH_ATTN_EXT: _attention,
}  # fmt: skip


def reason_unsupported(tensor: Tensor) -> str:
    """Return why the kernels cannot run a node; empty if they can."""
    if tensor.op.is_empty:
        return ""
    check = _CHECKS.get(tensor.op)
    if check is None:
        return f"there is no kernel for {tensor.op.name}"
    n = _N_SOURCES.get(tensor.op, 1)
    if len(tensor.src) < n or None in tensor.src[:n]:
        return f"it has not the {n} sources that it needs"
    return check(tensor)


def supports_op(tensor: Tensor) -> bool:
    """Return whether the kernels can run a node; views and nodes without COMPUTE count as supported."""
    return not reason_unsupported(tensor)


def plans_op(tensor: Tensor) -> bool:
    """Return whether a device that only plans counts as able to run a node.

    Ops without any kernel in pyggml, such as CONV_2D, count as supported, because ggml's backends run them.

    Notes
    -----
    Mirrors `ggml_backend_cpu_device_supports_op`, which accepts every op that it does not name.
    """
    return tensor.op not in _CHECKS or supports_op(tensor)


# -- nodes that were not made by builders ------------------------------------------

#: Number of required sources, if it is not 1.
_N_SOURCES = {
    **dict.fromkeys(
        (Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.ADD1, Op.ACC, Op.SET, Op.CONCAT, Op.MUL_MAT, Op.OUT_PROD, Op.GET_ROWS, Op.ROPE,
         Op.ROPE_BACK, Op.SOLVE_TRI, Op.COUNT_EQUAL, Op.SSM_CONV, Op.SET_ROWS, Op.DSV4_HC_PRE), 2,
    ),
    **dict.fromkeys((Op.MUL_MAT_ID, Op.ADD_ID, Op.FLASH_ATTN_EXT, Op.DSV4_HC_COMB, Op.DSV4_HC_POST), 3),
    Op.LIGHTNING_INDEXER: 4,
    Op.GATED_LINEAR_ATTN: 5,
    **dict.fromkeys((Op.GATED_DELTA_NET, Op.RWKV_WKV6), 6),
    **dict.fromkeys((Op.SSM_SCAN, Op.RWKV_WKV7), 7),
    Op.ARANGE: 0,
}  # fmt: skip
#: Ops whose result has the shape of their first source.
_SHAPE_OF_SOURCE = frozenset({
    Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.ADD1, Op.ACC, Op.SET, Op.ADD_ID, Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS, Op.SCALE,
    Op.CLAMP, Op.LEAKY_RELU, Op.FILL, Op.RMS_NORM, Op.NORM, Op.L2_NORM, Op.GROUP_NORM, Op.CUMSUM, Op.UNARY, Op.SOFT_MAX,
    Op.ROPE, Op.ROPE_BACK, Op.DIAG_MASK_INF, Op.DIAG_MASK_ZERO, Op.ARGSORT, Op.TRI, Op.ROLL,
})  # fmt: skip


def reason_malformed(t: Tensor) -> str:
    """Return why a node is malformed: missing sources, wrong shapes, or read-only memory; empty if it is not.

    Called once for each node of a plan, because kernels do not check shapes.
    """
    root = t.view_src
    if root is not None and root.buffer is not None and not root.buffer.is_writable:
        return f"it writes into '{root.name}', which is in read-only memory of {root.buffer.buft.name}"
    a, b, c = ([*t.src, None, None, None])[:3]
    want: tuple[int, ...] = t.ne
    if a is None:
        return ""
    fits = True
    if t.op in _SHAPE_OF_SOURCE:
        want = a.ne
    elif t.op in (Op.SUM_ROWS, Op.MEAN):
        want = (1, *a.ne[1:])
    elif t.op in (Op.CPY, Op.CONT, Op.DUP):
        fits = t.numel == a.numel
    elif t.op is Op.REPEAT:
        fits = not any(d % s if s else d for d, s in zip(t.ne, a.ne, strict=True))
    elif t.op is Op.MUL_MAT and b is not None:
        want, fits = (a.ne[1], *b.ne[1:]), a.ne[0] == b.ne[0]
        fits = fits and all(n and m % n == 0 for n, m in zip(a.ne[2:], b.ne[2:], strict=True))
    elif t.op is Op.MUL_MAT_ID and b is not None and c is not None:
        want, fits = (a.ne[1], c.ne[0], b.ne[2], 1), a.ne[0] == b.ne[0] and c.ne[1] == b.ne[2]
    elif t.op is Op.GET_ROWS and b is not None:
        want, fits = (a.ne[0], *b.ne[:3]), a.ne[2:] == b.ne[1:3]
    elif t.op is Op.GLU:
        want = a.ne if b is not None else (a.ne[0] // 2, *a.ne[1:])
    if t.op in (Op.ADD, Op.SUB, Op.MUL, Op.DIV) and b is not None:
        fits = all(n and m % n == 0 for n, m in zip(b.ne, t.ne, strict=True))
    return "" if fits and t.ne == want else f"shape {list(t.ne)} does not follow from its sources'"
