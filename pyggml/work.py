"""What a node asks of a device, counted from shapes: operations and bytes. One rule an op; others pass over memory once."""

from __future__ import annotations

from collections.abc import Callable

from .cost import Work
from .tensor import Tensor
from .types import Op, Type

__all__ = ["RULES", "UsedExperts", "node_work"]

#: From MUL_MAT_ID to the number of distinct experts that its ids name.
UsedExperts = Callable[[Tensor], float]
Rule = Callable[[Tensor, UsedExperts], Work]


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
    return RULES.get(node.op, _pass)(node, used_experts)


def _pass(node: Tensor, used_experts: UsedExperts) -> Work:
    """One operation for each element of the result."""
    return Work(flops=float(node.numel), n_bytes=_moved(node))


def _product(node: Tensor, used_experts: UsedExperts) -> Work:
    weight, x = _src(node, 0), _src(node, 1)
    read = float(weight.nbytes)
    if node.op is Op.MUL_MAT_ID and weight.ne[2]:
        read *= min(used_experts(node), weight.ne[2]) / weight.ne[2]
    flops = 2.0 * weight.ne[0] * node.numel
    is_int8 = weight.type.is_quantized
    return Work(flops, read + x.nbytes + node.nbytes, is_int8, 2 if is_int8 else 1, is_f32=weight.type is Type.F32)


def _outer_product(node: Tensor, used_experts: UsedExperts) -> Work:
    """Rows of a times rows of b, summed over what they share."""
    return Work(2.0 * _src(node, 0).ne[1] * node.numel, _moved(node), is_f32=True)


def _flash_attention(node: Tensor, used_experts: UsedExperts) -> Work:
    q, k, v = (_src(node, i) for i in range(3))
    n_scores = q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1]
    flops = 2.0 * n_scores * (k.ne[0] + v.ne[0])
    return Work(flops, float(q.nbytes + k.nbytes + v.nbytes + node.nbytes))


def _gated_delta_net(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each token and element of the state: forget, read with k, learn, read with q; two operations each."""
    v = _src(node, 2)
    return Work(8.0 * v.ne[0] * v.numel, _moved(node), is_f32=True)


def _linear_attention(node: Tensor, used_experts: UsedExperts) -> Work:
    """WKV and gated linear attention: forget, learn and read, for each token and element of the state."""
    v = _src(node, 1)
    return Work(6.0 * v.ne[0] * v.numel, _moved(node), is_f32=True)


def _ssm_scan(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each token and element of the state: decay, an exponential, what is added, what is read."""
    s, x = _src(node, 0), _src(node, 1)
    return Work(7.0 * s.ne[0] * x.numel, _moved(node), is_f32=True)


def _ssm_conv(node: Tensor, used_experts: UsedExperts) -> Work:
    return Work(2.0 * _src(node, 1).ne[0] * node.numel, _moved(node), is_f32=True)


def _solve_tri(node: Tensor, used_experts: UsedExperts) -> Work:
    """Forward substitution: half of a product with the matrix."""
    return Work(float(_src(node, 0).ne[0] * node.numel), _moved(node), is_f32=True)


def _lightning_indexer(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each pair of a token and a key: a product by each head, weighted and added."""
    q = _src(node, 0)
    return Work(2.0 * (q.ne[0] + 1) * q.ne[1] * node.numel, _moved(node))


#: What an op takes, where that is more than passing over its sources and its result.
RULES: dict[Op, Rule] = {
    Op.MUL_MAT: _product,
    Op.MUL_MAT_ID: _product,
    Op.OUT_PROD: _outer_product,
    Op.FLASH_ATTN_EXT: _flash_attention,
    Op.GATED_DELTA_NET: _gated_delta_net,
    Op.GATED_LINEAR_ATTN: _linear_attention,
    Op.RWKV_WKV6: _linear_attention,
    Op.RWKV_WKV7: _linear_attention,
    Op.SSM_SCAN: _ssm_scan,
    Op.SSM_CONV: _ssm_conv,
    Op.SOLVE_TRI: _solve_tri,
    Op.LIGHTNING_INDEXER: _lightning_indexer,
}


def _src(node: Tensor, i: int) -> Tensor:
    src = node.src[i]
    assert src is not None
    return src


def _moved(node: Tensor) -> float:
    """Return the bytes that a node reads and writes."""
    return float(node.nbytes + sum(_touched(src, node) for src in node.src if src is not None))


def _touched(src: Tensor, node: Tensor) -> int:
    """Return the bytes of a source that are read: rows that are picked, not the table they are picked from."""
    if node.op is Op.GET_ROWS and src is node.src[0]:
        return src.row_size * node.nrows
    if node.op is Op.SET_ROWS and src is not node.src[0]:
        return 0
    return min(src.nbytes, src.type.row_size(src.ne[0]) * src.nrows)
