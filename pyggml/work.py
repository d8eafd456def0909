"""What a node asks of a device, counted from shapes: operations and bytes."""

from __future__ import annotations

from collections.abc import Callable

from .cost import Work
from .tensor import Tensor
from .types import Op, Type

__all__ = ["UsedExperts", "node_work"]

#: From MUL_MAT_ID to the number of distinct experts that its ids name.
UsedExperts = Callable[[Tensor], float]


def node_work(node: Tensor, used_experts: UsedExperts) -> Work:
    """Return what computing a node takes.

    Parameters
    ----------
    node : Tensor
        With its sources; views and nodes without elements take nothing.
    used_experts : callable
        Asked for MUL_MAT_ID, of whose weight only these experts are read.

    Notes
    -----
    Weights count once a node, however often a kernel reads them from its caches.
    """
    if node.op.is_empty or node.is_empty:
        return Work(n_kernels=0)
    if node.op is Op.MUL_MAT or node.op is Op.MUL_MAT_ID:
        return _product(node, used_experts)
    if node.op is Op.FLASH_ATTN_EXT:
        return _flash_attention(node)
    read = sum(_touched(src, node) for src in node.src if src is not None)
    return Work(flops=float(node.numel), n_bytes=float(node.nbytes + read))


def _product(node: Tensor, used_experts: UsedExperts) -> Work:
    weight, x = node.src[0], node.src[1]
    assert weight is not None
    assert x is not None
    read = float(weight.nbytes)
    if node.op is Op.MUL_MAT_ID and weight.ne[2]:
        read *= min(used_experts(node), weight.ne[2]) / weight.ne[2]
    flops = 2.0 * weight.ne[0] * node.numel
    is_int8 = weight.type.is_quantized
    return Work(flops, read + x.nbytes + node.nbytes, is_int8, 2 if is_int8 else 1, is_f32=weight.type is Type.F32)


def _flash_attention(node: Tensor) -> Work:
    q, k, v = node.src[0], node.src[1], node.src[2]
    assert q is not None
    assert k is not None
    assert v is not None
    n_scores = q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1]
    flops = 2.0 * n_scores * (k.ne[0] + v.ne[0])
    return Work(flops, float(q.nbytes + k.nbytes + v.nbytes + node.nbytes))


def _touched(src: Tensor, node: Tensor) -> int:
    """Return the bytes of a source that are read: rows that are picked, not the table they are picked from."""
    if node.op is Op.GET_ROWS and src is node.src[0]:
        return src.row_size * node.nrows
    if node.op is Op.SET_ROWS and src is not node.src[0]:
        return 0
    return min(src.nbytes, src.type.row_size(src.ne[0]) * src.nrows)
