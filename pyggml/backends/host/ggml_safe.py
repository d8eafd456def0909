"""Finds nodes that ggml's CPU backend claims to support but at which it ends the process.

Its `supports_op` accepts nearly everything, and its kernels assert types, strides and parameters. Allowed is what those kernels
were compared with. Other devices refuse such nodes themselves.
"""

from __future__ import annotations

from ...ops.modes import skips_ids
from ...opset import reason_unsupported
from ...tensor import Tensor
from ...types import Op, Type

__all__ = ["is_safe_on_cpu"]

_FLOATS = {Type.F32, Type.F16, Type.BF16}
#: Formats of activations inside kernels; no weights have them.
_INNER = {Type.Q8_1, Type.Q8_K}
#: Kernels assume that row i is at ``i * nb[1]``.
_ROW_BY_ROW = {
    Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS, Op.UNARY, Op.GLU, Op.CLAMP, Op.ARGSORT, Op.TOP_K,
}  # fmt: skip
#: Kernels assume elements without gaps.
_DENSE = {Op.SCALE, Op.LEAKY_RELU, Op.SOFT_MAX, Op.CUMSUM, Op.DIAG_MASK_INF}
#: Ops whose kernels were checked.
_READ = _ROW_BY_ROW | _DENSE | {
    Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.FILL, Op.RMS_NORM, Op.NORM, Op.L2_NORM, Op.SUM_ROWS, Op.MEAN,
    Op.SUM, Op.CPY, Op.CONT, Op.DUP, Op.ARGMAX, Op.REPEAT, Op.CONCAT,
    Op.MUL_MAT, Op.MUL_MAT_ID, Op.ADD_ID, Op.GET_ROWS, Op.SET_ROWS, Op.ROPE, Op.FLASH_ATTN_EXT,
}  # fmt: skip
_ROPE_MODES = {0, 2}


def is_safe_on_cpu(node: Tensor) -> bool:
    """Return whether ggml's CPU kernels accept a node's types, strides and parameters."""
    if node.op.is_empty:
        return True
    if node.op not in _READ or not _has_known_parameters(node):
        return False
    if node.op in (Op.MUL_MAT, Op.MUL_MAT_ID, Op.GET_ROWS) and not _is_plain_product(node):
        return False
    if node.op in (Op.CPY, Op.CONT, Op.DUP):
        return _copy(node)
    used = [t for t in (node, *node.src) if t is not None]
    if any(t.nb[0] != t.type.type_size for t in used):
        return False  # asserted, even of rows of one element
    if node.op is Op.SET_ROWS:
        return not reason_unsupported(node) and _first(node).type is Type.F32
    if node.op in (Op.MUL_MAT, Op.MUL_MAT_ID, Op.GET_ROWS) and _first(node).type.is_quantized:
        return True
    if node.op in _ROW_BY_ROW | _DENSE and not all(map(_has_rows_at_one_distance, used)):
        return False
    if node.op in _DENSE and not all(t.is_contiguous() for t in used):
        return False
    return not reason_unsupported(node)


def _has_known_parameters(node: Tensor) -> bool:
    """Return whether the parameters are those that kernels assert, or have a case for."""
    match node.op:
        case Op.ROPE:
            return node.param_i32(2) in _ROPE_MODES
        case Op.NORM | Op.RMS_NORM | Op.L2_NORM:
            return node.param_f32(0) >= 0.0  # not NaN either
        case Op.DIAG_MASK_INF:
            return node.param_i32(0) >= 0
        case Op.ARGSORT:
            return node.param_i32(0) in (0, 1)
    return True


def _has_rows_at_one_distance(t: Tensor) -> bool:
    """Return whether every row is ``nb[1]`` bytes after the previous one, also if dimension 1 has one row."""
    return all(n == 1 for n in t.ne[1:]) or (
        t.ne[2] * t.ne[3] == 1 or (t.nb[2] == t.nb[1] * t.ne[1] and (t.ne[3] == 1 or t.nb[3] == t.nb[2] * t.ne[2]))
    )


def _first(node: Tensor) -> Tensor:
    src = node.src[0]
    assert src is not None
    return src


def _is_plain_product(node: Tensor) -> bool:
    weight, other = node.src[0], node.src[1]
    assert weight is not None
    assert other is not None
    if weight.type in _INNER or weight.nb[0] != weight.type.type_size or other.nb[0] != other.type.type_size:
        return False
    if node.op is Op.MUL_MAT_ID:
        ids = node.src[2]
        return not skips_ids(node) and other.type is Type.F32 and ids is not None and ids.nb[0] == ids.type.type_size
    return True


def _copy(node: Tensor) -> bool:
    """Mirrors the cases that `ggml_compute_forward_dup` supports."""
    src, dst = _first(node).type, node.type
    if src is dst:
        return not reason_unsupported(node)
    if src in _FLOATS and dst.is_quantized:
        return not reason_unsupported(node) and node.is_contiguous() and _first(node).nb[0] == src.type_size
    if src.is_quantized:
        return dst is Type.F32 and not reason_unsupported(node)
    if Type.I32 in (src, dst):
        return Type.F32 in (src, dst)
    return src in _FLOATS and dst in _FLOATS
