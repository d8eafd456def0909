"""With ``PYGGML_CHECK=1``, verifies assignment, splits and allocation: a wrong decision raises an error at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..alloc import Gallocr
from ..buffer import Buffer
from ..errors import SchedError
from ..tensor import Tensor
from ..types import Op, TensorFlag
from .plan import Plan
from .state import Assignment, Cause, SchedGraph, Split

__all__ = ["check_allocation", "check_assignment", "check_splits"]


def check_assignment(plan: Plan) -> None:
    """Verify passes 1 to 4: each node has a backend that supports its op, or was pinned in a strict scheduler.

    Raises
    ------
    SchedError
        A node does not; the text names node, backend and causes.
    """
    asg, machine = plan.assignment, plan.machine
    for node in plan.graph.nodes:
        backend_id = asg.get(node)
        if backend_id is None:
            raise SchedError(f"check: {node.op_desc} '{node.name}' has no backend")
        if node.op.is_view or (asg.cause(node) is Cause.USER and not machine.repairs.unsupported_ops):
            continue
        backend = machine.backends[backend_id]
        if not backend.supports_op(node):
            raise _error(f"{node.op_desc} '{node.name}' is on {backend.name}, which cannot run it", node, asg)
        for src in node.src:
            if src is not None and asg.get(src) is None and not _is_copy(src, asg):
                raise _error(f"source '{src.name}' of '{node.name}' has no backend", node, asg)


def check_splits(plan: Plan) -> None:
    """Verify pass 5: the splits are the whole graph, in order, and their backends can use all that their nodes read.

    Raises
    ------
    SchedError
        They are not, a node is before its source, or a source is neither usable nor copied by this or an earlier split.
    """
    graph = plan.graph
    _check_order(plan)
    at = 0
    copied: dict[Tensor, int] = {}  # copy -> backend that it is on
    for i, split in enumerate(plan.splits):
        if split.i_start != (at if i else 0) or split.i_end < split.i_start:
            raise SchedError(f"check: split {i} is {split!r}, after one that ends before node {at}")
        at = split.i_end
        for tensor in split.inputs:
            copy = plan.copy_of(tensor, split.backend_id)
            copied[copy] = split.backend_id
        for node in graph.nodes[split.i_start : split.i_end]:
            if not node.op.is_view:
                _check_node(i, split, node, plan, copied)
    if at != len(graph.nodes):
        raise SchedError(f"check: the splits end before node {at} of {len(graph.nodes)}")


def _check_order(plan: Plan) -> None:
    """Verify that no backend moved a node of its split before one of its sources."""
    waiting = set(plan.graph.nodes)
    for i, node in enumerate(plan.graph.nodes):
        waiting.discard(node)
        for src in node.src:
            if src in waiting:
                split = next(s for s in plan.splits if s.i_start <= i < s.i_end)
                name = plan.machine.backends[split.backend_id].name
                raise SchedError(f"check: {name}'s graph_optimize put '{node.name}' before its source '{src.name}'")


def _check_node(i_split: int, split: Split, node: Tensor, plan: Plan, copied: dict[Tensor, int]) -> None:
    asg, machine = plan.assignment, plan.machine
    if asg.get(node) != split.backend_id:
        where = machine.backends[split.backend_id].name
        raise _error(f"'{node.name}' lies in split {i_split} on {where} and is assigned to another backend", node, asg)
    for src in node.src:
        if src is None or copied.get(src) == split.backend_id:
            continue
        is_reachable = not _is_copy(src, asg) and machine.buffer_supported(src, split.backend_id, asg)
        is_trusted = asg.get(src) == split.backend_id and not (
            machine.repairs.pinned_weight and src.storage is not None
        )
        if not is_reachable and not is_trusted:
            where = machine.backends[split.backend_id].name
            raise _error(f"'{node.name}' in split {i_split} reads '{src.name}', which {where} cannot reach", node, asg)


def _is_copy(tensor: Tensor, asg: Assignment) -> bool:
    return asg.cause(tensor) in (Cause.COPIED, Cause.GRAPH_INPUT)


def _error(message: str, node: Tensor, asg: Assignment) -> SchedError:
    cause = asg.cause(node)
    return SchedError(f"check: {message}", causes=() if cause is None else (cause.value,))


# -- memory ------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Stay:
    """A tensor in a compute buffer, with the first and the last node that need it."""

    tensor: Tensor
    start: int
    end: int
    lo: int  #: first byte
    hi: int  #: first byte after it


def check_allocation(sched_graph: SchedGraph, galloc: Gallocr) -> None:
    """Verify that no two tensors that are needed at the same time overlap, and that all are inside their buffers.

    Raises
    ------
    SchedError
        Two overlap, or one is outside its buffer or has no memory.

    Notes
    -----
    A result may use the memory of a source that is not needed later, if its op computes in place.
    """
    chunks = {chunk for i in range(len(galloc.bufts)) for chunk in galloc.chunks(i)}
    by_chunk: dict[Buffer, list[_Stay]] = {}
    for tensor, (start, end) in _lives(sched_graph).items():
        buffer = tensor.buffer
        if tensor.data is None or buffer is None:
            raise SchedError(f"check: '{tensor.name}' has no memory")
        if buffer not in chunks or tensor.nbytes == 0:
            continue
        lo = tensor.data - buffer.base
        if lo < 0 or lo + tensor.nbytes > buffer.size:
            raise SchedError(f"check: '{tensor.name}' lies outside its buffer of {buffer.size:,} bytes, at {lo:,}")
        by_chunk.setdefault(buffer, []).append(_Stay(tensor, start, end, lo, lo + tensor.nbytes))
    for stays in by_chunk.values():
        _check_chunk(stays, galloc)


def _lives(sched_graph: SchedGraph) -> dict[Tensor, tuple[int, int]]:
    """Return, for each tensor that owns memory, the first and the last node that need it."""
    forever = len(sched_graph.nodes)
    starts: dict[Tensor, int] = {leaf: -1 for leaf in sched_graph.leafs if leaf.view_src is None}
    ends: dict[Tensor, int] = {}
    for i, node in enumerate(sched_graph.nodes):
        for tensor in (node, *node.src):
            if tensor is None:
                continue
            if node.op is Op.NONE and tensor is node and tensor.view_src is not None:
                continue  # a dependency made by the scheduler: its sources count
            root = tensor if tensor.view_src is None else tensor.view_src
            starts.setdefault(root, -1 if root.flags & TensorFlag.INPUT else i)
            ends[root] = i
    return {t: (start, forever if t.flags & TensorFlag.OUTPUT else ends.get(t, start)) for t, start in starts.items()}


def _check_chunk(stays: Sequence[_Stay], galloc: Gallocr) -> None:
    present: list[_Stay] = []
    for stay in sorted(stays, key=lambda s: s.start):
        present = [other for other in present if other.end >= stay.start]
        for other in present:
            if stay.lo >= other.hi or other.lo >= stay.hi or _takes_over(stay, other, galloc):
                continue
            raise SchedError(
                f"check: '{stay.tensor.name}' (bytes {stay.lo:,}..{stay.hi - 1:,}) overwrites '{other.tensor.name}' "
                f"(bytes {other.lo:,}..{other.hi - 1:,}), which is needed until node {other.end}"
            )
        present.append(stay)


def _takes_over(stay: _Stay, other: _Stay, galloc: Gallocr) -> bool:
    """Return whether a result was computed in place of a source that is not needed later."""
    return (
        other.end == stay.start
        and other.lo == stay.lo
        and other.tensor in stay.tensor.src
        and galloc.can_inplace(stay.tensor.op)
    )
