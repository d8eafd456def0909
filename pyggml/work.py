"""What a node asks of a device, counted from shapes. One rule an op; others pass over memory once.

Kernels do several nodes in one go: a norm with its weight, what follows a product (a bias, a gate, a rotation, a write into the cache), a router.
What those move is charged once, with the product or the norm, as the rates of `pyggml.hardware.rates` were fitted so.
"""

from __future__ import annotations

from collections.abc import Callable

from .hardware.formulas import Kind, Work
from .tensor import Tensor
from .types import Op, Type

__all__ = ["RULES", "UsedExperts", "node_work"]

#: Returns the number of distinct experts that the ids of a MUL_MAT_ID name.
UsedExperts = Callable[[Tensor], float]
Rule = Callable[[Tensor, UsedExperts], Work]

_NORMS = {Op.NORM, Op.RMS_NORM, Op.L2_NORM, Op.GROUP_NORM}
#: Follow a product, whose work has their bytes, in the same kernel.
_AFTER_PRODUCT = {Op.GLU, Op.ADD_ID, Op.SET_ROWS}
#: Of a router, which is one kernel.
_ROUTER = {Op.SUM_ROWS, Op.DIV, Op.CLAMP}
_NOTHING = Work(n_kernels=0)


def node_work(node: Tensor, used_experts: UsedExperts) -> Work:
    """Return the work of computing a node.

    Parameters
    ----------
    node : Tensor
        With its sources; views, nodes without elements and what another node's kernel does take nothing.
    used_experts : callable
        Called for MUL_MAT_ID; only these experts of its weight are read.

    Notes
    -----
    Weights count once per node, however often a kernel reads them from its caches.
    """
    if node.op.is_empty or node.is_empty or _is_fused(node):
        return _NOTHING
    return RULES.get(node.op, _pass)(node, used_experts)


def _is_fused(node: Tensor) -> bool:
    """Whether the kernel of another node does this one.

    Notes
    -----
    After `ggml_cuda_try_fuse` and the like of Vulkan and Metal, by ops alone: where a backend does not fuse, a launch more is taken.
    """
    op, first = node.op, node.src[0]
    if op in _AFTER_PRODUCT or op in _ROUTER:
        return True
    if op is Op.MUL:
        return first is not None and first.op in _NORMS
    if op is Op.ADD:
        second = node.src[1]
        assert first is not None
        assert second is not None
        if second.op is Op.VIEW:
            return _is_of_experts(second)
        return first.op in _PRODUCTS and second.op is Op.NONE and second.nrows == 1
    if op is Op.SOFT_MAX:
        return (len(node.src) < 2 or node.src[1] is None) and node.ne[2] == 1  # of a router: it has no mask
    return False


def _is_of_experts(view: Tensor) -> bool:
    """Whether a view is one of the experts' results, which are added up in one kernel."""
    whole = view.src[0]
    return whole is not None and whole.ne[2] == view.ne[1] and whole.ne[0] == view.ne[0] and whole.ne[1] > 1


def _pass(node: Tensor, used_experts: UsedExperts) -> Work:
    """One operation for each element of the result."""
    return Work(flops=float(node.numel), moved_bytes=_moved(node))


def _rope(node: Tensor, used_experts: UsedExperts) -> Work:
    """Rotate what a product has just written, whose work has the bytes; after a norm it is part of its kernel."""
    is_normed = _made(_src(node, 0)).op is Op.MUL
    return Work(flops=4.0 * node.numel, n_kernels=0 if is_normed else 1)


def _norm(node: Tensor, used_experts: UsedExperts) -> Work:
    """Charge nothing for what a product has just written: its work has the bytes."""
    after = _made(_src(node, 0)).op in _PRODUCTS
    return Work(flops=float(node.numel), moved_bytes=0.0 if after else _moved(node))


def _made(src: Tensor) -> Tensor:
    """Return what made a tensor, through views."""
    while src.op.is_view and src.src[0] is not None:
        src = src.src[0]
    return src


def _product(node: Tensor, used_experts: UsedExperts) -> Work:
    weight, x = _src(node, 0), _src(node, 1)
    flops = 2.0 * weight.ne[0] * node.numel
    read = float(min(weight.nbytes, weight.type.row_size(weight.ne[0]) * weight.nrows))
    is_view = not weight.op.is_empty or weight.view_src is not None
    if is_view and node.op is not Op.MUL_MAT_ID:  # K or V: attention without flash; a bank of experts is a view, too
        return Work(Kind.ATTENTION, flops, read, n_tokens=x.ne[1])
    n_matrix, n_tokens = float(weight.ne[2] * weight.ne[3]), x.nrows
    is_expert = node.op is Op.MUL_MAT_ID
    if is_expert:
        used = min(used_experts(node), weight.ne[2])
        read *= used / max(weight.ne[2], 1)
        n_matrix, n_tokens = used, node.ne[2]
    elif n_matrix > 1:
        n_tokens = x.ne[1]
    columns = node.numel / weight.ne[1]
    moved = 4.0 * columns * (0.75 * weight.ne[0] + 1.5 * weight.ne[1])
    return Work(
        Kind.PRODUCT, flops, read, moved, type=weight.type, columns=columns, matrices=n_matrix, n_tokens=n_tokens,
        is_expert=is_expert,
    )  # fmt: skip


def _outer_product(node: Tensor, used_experts: UsedExperts) -> Work:
    """Rows of a times rows of b, summed over the common dimension."""
    flops = 2.0 * _src(node, 0).ne[1] * node.numel
    return Work(Kind.PRODUCT, flops, _moved(node), type=Type.F32, columns=node.ne[1], n_tokens=node.ne[1])


def _flash_attention(node: Tensor, used_experts: UsedExperts) -> Work:
    """Scores that a causal mask hides are skipped: of the last tokens, half of them on the average."""
    q, k, v = (_src(node, i) for i in range(3))
    seen = 1.0 - 0.5 * min(q.ne[1], k.ne[1]) / k.ne[1] if len(node.src) > 3 and node.src[3] is not None else 1.0
    flops = 2.0 * seen * q.ne[1] * q.ne[2] * q.ne[3] * k.ne[1] * (k.ne[0] + v.ne[0])
    read = _rows_bytes(k) + (0 if _is_part_of(v, k) else _rows_bytes(v))
    heads = seen * read * q.ne[2] / k.ne[2] if k.type.is_quantized and not _is_part_of(v, k) else 0.0
    return Work(Kind.ATTENTION, flops, seen * read, n_tokens=q.ne[1], heads_bytes=heads)


def _gated_delta_net(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each token and element of the state: forget, read with k, learn, read with q; two operations each."""
    v, state = _src(node, 2), _src(node, 5)
    return Work(Kind.STATE, 8.0 * v.ne[0] * v.numel, 2.0 * state.nbytes)


#: Operations for each token and element of the state: forget, learn, read; RWKV 6 has a bonus, RWKV 7 moves what it reads.
_LINEAR_FLOPS = {Op.GATED_LINEAR_ATTN: 5.0, Op.RWKV_WKV6: 7.0, Op.RWKV_WKV7: 9.0}


def _linear_attention(node: Tensor, used_experts: UsedExperts) -> Work:
    v = _src(node, 1)
    return Work(Kind.STATE, _LINEAR_FLOPS[node.op] * v.ne[0] * v.numel, _moved(node))


def _hyper_connections(node: Tensor, used_experts: UsedExperts) -> Work:
    """Multiply and add for each stream that is summed up; DSV4_HC_COMB divides its matrix by sums again and again."""
    if node.op is Op.DSV4_HC_COMB:
        return Work(flops=4.0 * node.param_i32(1) * node.numel, moved_bytes=_moved(node))
    if node.op is Op.DSV4_HC_PRE:
        return Work(flops=2.0 * _src(node, 0).numel, moved_bytes=_moved(node))
    n_sum = 1 + (node.ne[1] if len(node.src) > 3 and node.src[3] is not None else 1)
    return Work(flops=2.0 * n_sum * node.numel, moved_bytes=_moved(node))


def _ssm_scan(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each token and element of the state: decay, an exponential, what is added, what is read."""
    s, x = _src(node, 0), _src(node, 1)
    return Work(Kind.STATE, 7.0 * s.ne[0] * x.numel, _moved(node))


def _solve_tri(node: Tensor, used_experts: UsedExperts) -> Work:
    """Forward substitution: half of a product with the matrix."""
    return Work(Kind.STATE, float(_src(node, 0).ne[0] * node.numel), _moved(node))


def _lightning_indexer(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each pair of a token and a key: a product by each head, weighted and added."""
    q = _src(node, 0)
    return Work(Kind.ATTENTION, 2.0 * (q.ne[0] + 1) * q.ne[1] * node.numel, _moved(node), n_tokens=q.ne[2])


_PRODUCTS = {Op.MUL_MAT, Op.MUL_MAT_ID}
#: The operations of ops that do more than pass over their sources and result.
RULES: dict[Op, Rule] = {
    Op.MUL_MAT: _product,
    Op.MUL_MAT_ID: _product,
    Op.OUT_PROD: _outer_product,
    Op.FLASH_ATTN_EXT: _flash_attention,
    Op.GATED_DELTA_NET: _gated_delta_net,
    **dict.fromkeys(_LINEAR_FLOPS, _linear_attention),
    **dict.fromkeys((Op.DSV4_HC_COMB, Op.DSV4_HC_PRE, Op.DSV4_HC_POST), _hyper_connections),
    Op.SSM_SCAN: _ssm_scan,
    Op.SOLVE_TRI: _solve_tri,
    Op.LIGHTNING_INDEXER: _lightning_indexer,
    Op.ROPE: _rope,
    **dict.fromkeys(_NORMS, _norm),
}


def _rows_bytes(src: Tensor) -> float:
    """Return the bytes of a tensor's rows, which a view may spread."""
    return float(min(src.nbytes, src.type.row_size(src.ne[0]) * src.nrows))


def _is_part_of(v: Tensor, k: Tensor) -> bool:
    """Whether V is read from K, as in latent attention."""
    return v.view_src is not None and v.view_src is k.view_src and v.view_offs == k.view_offs


def _src(node: Tensor, i: int) -> Tensor:
    src = node.src[i]
    assert src is not None
    return src


def _moved(node: Tensor) -> float:
    """Return the bytes that a node reads and writes."""
    return float(node.nbytes + sum(_touched(src, node) for src in node.src if src is not None))


def _touched(src: Tensor, node: Tensor) -> int:
    """Return the bytes of a source that are read: only the selected rows of a table."""
    if node.op is Op.GET_ROWS and src is node.src[0]:
        return src.row_size * node.nrows
    if node.op is Op.SET_ROWS and src is not node.src[0]:
        return 0
    return min(src.nbytes, src.type.row_size(src.ne[0]) * src.nrows)
