"""With ``PYGGML_CHECK=1``, verifies assignment, splits and allocation: a wrong decision raises an error at once."""

from __future__ import annotations

from ..alloc import Gallocr
from ..alloc.lives import Stay, lives_of, overlaps, takes_over
from ..buffer import Buffer
from ..errors import SchedError
from ..tensor import Tensor
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


def check_allocation(sched_graph: SchedGraph, galloc: Gallocr) -> None:
    """Verify that no two tensors that are needed at the same time overlap, and that all are inside their buffers.

    Raises
    ------
    SchedError
        Two overlap, or one is outside its buffer or has no memory.

    Notes
    -----
    A result may use the memory of a source that is not needed later, if its op computes in place. A strict scheduler may
    let tensors overlap, as upstream does (`Repairs.reused_memory`).
    """
    chunks = {chunk for i in range(len(galloc.bufts)) for chunk in galloc.chunks(i)}
    by_chunk: dict[Buffer, list[Stay]] = {}
    for tensor, (start, end) in lives_of(sched_graph).items():
        buffer = tensor.buffer
        if tensor.data is None or buffer is None:
            raise SchedError(f"check: '{tensor.name}' has no memory")
        if buffer not in chunks or tensor.nbytes == 0:
            continue
        lo = tensor.data - buffer.base
        if lo < 0 or lo + tensor.nbytes > buffer.size:
            raise SchedError(f"check: '{tensor.name}' lies outside its buffer of {buffer.size:,} bytes, at {lo:,}")
        by_chunk.setdefault(buffer, []).append(Stay(tensor, start, end, lo, lo + tensor.nbytes))
    if not galloc.keeps_needed:
        return
    for stay, other in (pair for stays in by_chunk.values() for pair in overlaps(stays)):
        if not takes_over(stay, other, galloc.can_inplace):
            raise SchedError(
                f"check: '{stay.tensor.name}' (bytes {stay.lo:,}..{stay.hi - 1:,}) overwrites '{other.tensor.name}' "
                f"(bytes {other.lo:,}..{other.hi - 1:,}), which is needed until node {other.end}"
            )
