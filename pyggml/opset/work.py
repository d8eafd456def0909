"""What cost rules share: the bytes that a node moves.

Kernels do several nodes in one go: a norm with its weight, what follows a product (a bias, a gate, a rotation, a write into the cache), a router.
What those move is charged once, with the product or the norm, as the rates of `pyggml.hardware.rates` were fitted so. Rules follow
`ggml_cuda_try_fuse` and the like of Vulkan and Metal, by ops alone: where a backend does not fuse, a launch more is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..hardware.formulas import Work
from ..tensor import Tensor

__all__ = ["NOTHING", "by_kind", "in_other_kernel", "made_by", "moved_bytes", "one_pass", "rows_bytes"]

NOTHING = Work(n_kernels=0)
#: Most kinds of nodes for which an answer is kept.
_MOST_KINDS = 1 << 14

_Answer = TypeVar("_Answer")


def by_kind(answer: Callable[[Tensor], _Answer]) -> Callable[[Tensor], _Answer]:
    """Keep the answers about nodes, which depend on op, parameters, and the layouts of node and sources alone."""
    known: dict[tuple[object, ...], _Answer] = {}

    def ask(node: Tensor) -> _Answer:
        kind = node.op, node._op_params, node.layout_id, *[src if src is None else src.layout_id for src in node.src]
        found = known.get(kind)
        if found is None:
            if len(known) >= _MOST_KINDS:
                known.clear()
            found = known[kind] = answer(node)
        return found

    return ask


def one_pass(node: Tensor, used_experts: Any) -> Work:
    """One operation for each element of the result."""
    return _one_pass(node)


@by_kind
def _one_pass(node: Tensor) -> Work:
    return Work(flops=float(node.numel), moved_bytes=moved_bytes(node))


def in_other_kernel(node: Tensor, used_experts: Any) -> Work:
    """Nothing: the kernel of the product before it, or of the router that it is part of, does it."""
    return NOTHING


def made_by(src: Tensor) -> Tensor:
    """Return what made a tensor, through views."""
    while src.op.is_view and src.src[0] is not None:
        src = src.src[0]
    return src


@by_kind
def moved_bytes(node: Tensor) -> float:
    """Return the bytes that a node reads and writes."""
    return float(node.nbytes + sum(rows_bytes(src) for src in node.src if src is not None))


def rows_bytes(src: Tensor) -> int:
    """Return the bytes of a tensor's rows, which a view may spread."""
    return min(src.nbytes, src.type.row_size(src.ne[0]) * src.nrows)
