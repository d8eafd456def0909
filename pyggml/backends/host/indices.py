"""Checks the indices with which nodes choose rows or experts.

A library or a remote server ends its process at an index out of range. So indices are read and checked before the nodes
that use them are submitted, unless they cannot be out of range: positions from ARGSORT or TOP_K.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...backend import Backend
from ...errors import ComputeError, ExpertIdError, PyggmlError
from ...opset import OPS, Choice, Role, role_of
from ...tensor import Tensor
from ...types import Op, TensorFlag, Type

__all__ = ["IndexUse", "bad_index_error", "cut_at_indices", "find_bad_index", "nodes_to_give"]

_PASS_ON = {Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE, Op.CONT, Op.DUP}


@dataclass(frozen=True, slots=True)
class IndexUse:
    """A node and its indices, which must be in ``0 .. limit - 1``."""

    node: Tensor
    indices: Tensor
    limit: int


def bad_index_error(node: Tensor, backend: str, position: int, value: int, limit: int) -> PyggmlError:
    """Return the error for an index out of range.

    Parameters
    ----------
    position : int
        Position of the index, counted over ``ne`` of the indices' tensor.
    """
    use = OPS[node.op].chooses
    assert use is not None
    indices, chosen = node.src[use.indices], _chosen(node, use)
    assert indices is not None
    if use.is_expert:
        token, slot = divmod(position, indices.ne[0])
        layer = re.search(r"(?:blk\.|-)(\d+)", chosen.name)
        return ExpertIdError(
            chosen.name, int(layer[1]) if layer else None, indices.name, backend, token, slot, value, limit
        )
    return ComputeError(
        backend,
        f"{node.op.name}: row index {value} is not in 0..{limit - 1}: '{indices.name}'[{position}]",
        node=node.name,
        hint="check what was written into the indices",
    )


def nodes_to_give(nodes: Sequence[Tensor], backend: Backend) -> list[Tensor]:
    """Return the nodes to submit to a library or a server: without empty ones and views of memory that it cannot use.

    Readers of such a view read a copy.
    """
    return [
        node
        for node in nodes
        if node.flags & TensorFlag.COMPUTE
        and not node.is_empty
        and not (node.op.is_view and node.storage is not None and not backend.supports_buft(node.storage.buft))
    ]


def cut_at_indices(nodes: Sequence[Tensor]) -> list[tuple[int, list[IndexUse]]]:
    """Return the first node of each part in which nodes are submitted, and the indices to check before it.

    The first part starts at 0. A new part starts at a node whose indices are computed by an earlier node of the part
    and may be out of range.
    """
    parts: list[tuple[int, list[IndexUse]]] = [(0, [])]
    made: set[Tensor] = set()  # memory that the part so far writes
    for i, node in enumerate(nodes):
        if node.op.is_empty or node.is_empty or not node.flags & TensorFlag.COMPUTE:
            continue
        use = _use_of(node)
        if use is not None:
            if (use.indices.view_src or use.indices) in made:
                parts.append((i, []))
                made = set()
            parts[-1][1].append(use)
        made.add(node.view_src or node)
    return [(start, _distinct(uses)) for start, uses in parts]


def _distinct(uses: list[IndexUse]) -> list[IndexUse]:
    """Return the uses without repeated indices with the same limit."""
    return list({(use.indices, use.limit): use for use in reversed(uses)}.values())[::-1]


def _use_of(node: Tensor) -> IndexUse | None:
    declared = OPS.get(node.op)
    if declared is None or declared.chooses is None:
        return None
    use = declared.chooses
    indices, limit = node.src[use.indices], _chosen(node, use).ne[use.dim]
    assert indices is not None
    bound = _bound(indices)
    if indices.is_empty or (bound is not None and bound <= limit):
        return None
    return IndexUse(node, indices, limit)


def _chosen(node: Tensor, use: Choice) -> Tensor:
    """Return the tensor that a node chooses from."""
    chosen = node if use.chosen < 0 else node.src[use.chosen]
    assert chosen is not None
    return chosen


def _bound(indices: Tensor) -> int | None:
    """Return an upper bound of indices from the op that computes them; None if it has none."""
    at: Tensor | None = indices
    while at is not None and at.op in _PASS_ON and at.type is indices.type:
        at = at.src[0]
    if at is None or role_of(at.op) is not Role.POSITIONS or at.src[0] is None:
        return None
    return at.src[0].ne[0]


def find_bad_index(indices: Tensor, limit: int) -> tuple[int, int] | None:
    """Return position and value of the first index out of range; None if there is none.

    Raises
    ------
    GraphError
        The indices have no memory.
    """
    import numpy as np

    raw = np.frombuffer(indices.tobytes(), np.uint8)
    dtype = np.dtype(np.int64 if indices.type is Type.I64 else np.int32)
    values = np.ndarray(indices.ne[::-1], dtype, raw, strides=indices.nb[::-1]).reshape(-1)
    if int(values.min()) >= 0 and int(values.max()) < limit:
        return None
    position = int(np.flatnonzero((values < 0) | (values >= limit))[0])
    return position, int(values[position])
