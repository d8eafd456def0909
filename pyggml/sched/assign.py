"""Passes 1 to 4: which backend runs each node.

Each pass is a function from graph and machine to entries in an `Assignment`; nothing else changes. The order of the
backends is their priority; the last is a CPU that can run what no other can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..backend import Backend
from ..errors import UnsupportedOpError
from ..graph import Graph
from ..tensor import Tensor
from ..types import BufferUsage, Op, TensorFlag
from .state import Assignment, Cause, Machine

__all__ = ["OffloadOp", "assign", "assign_from_location", "expand", "inherit", "upgrade"]

#: Whether a backend wants an op whose weights lie in host memory; None: nothing is ever offloaded.
OffloadOp = Callable[[Backend, Tensor], bool]


def assign(graph: Graph, asg: Assignment, machine: Machine, offload_op: OffloadOp | None) -> None:
    """Run passes 1 to 4.

    Raises
    ------
    UnsupportedOpError
        No backend can run a node, or the one that holds its memory cannot.
    """
    assign_from_location(graph, asg, machine, offload_op)
    expand(graph.nodes, asg, machine)
    upgrade(graph.nodes, asg, machine)
    inherit(graph.nodes, asg, machine)


# pass 1: ops whose memory, or whose weights' memory, is known


def assign_from_location(graph: Graph, asg: Assignment, machine: Machine, offload_op: OffloadOp | None) -> None:
    """Assign what is in memory already, inputs, and ops with weights.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 1: leafs first, then nodes; what the user pinned stays.
    """
    for tensors in (graph.leafs, graph.nodes):
        for tensor in tensors:
            if tensor not in asg.ids:
                found = _from_location(tensor, machine, offload_op)
                if found is not None:
                    asg.set(tensor, *found)


def _from_location(tensor: Tensor, machine: Machine, offload_op: OffloadOp | None) -> tuple[int, Cause] | None:
    """Return the backend that a tensor's location tells, and why.

    Notes
    -----
    Mirrors `ggml_backend_sched_backend_id_from_cur`. Upstream's separate look at ``view_src`` (1.vsrc) never decides:
    the first look follows ``view_src`` already.
    """
    root = tensor.view_src
    storage = tensor.buffer if root is None else root.buffer
    if storage is not None:
        backend_id = _from_buffer(tensor, tensor, machine)
        if backend_id is None:
            raise UnsupportedOpError(
                tensor.name,
                tensor.op.name,
                tuple(b.name for b in machine.backends),
                reason=f"it is already in a buffer of {storage.buft.name}, and none that uses this can run it",
                hint="place the tensor where the op can run",
            )
        return backend_id, Cause.DST
    if tensor.flags & TensorFlag.INPUT:
        return machine.cpu, Cause.INPUT
    # the weights of these ops are too small to decide
    if tensor.op is Op.ROPE or tensor.op is Op.FLASH_ATTN_EXT:
        return None
    for i, src in enumerate(tensor.src):
        if src is None:
            continue
        buffer = src.buffer
        if buffer is None or buffer.usage is not BufferUsage.WEIGHTS:
            continue
        backend_id = _from_buffer(src, tensor, machine)
        if offload_op is not None and backend_id == machine.cpu and buffer.is_host:
            for b in range(machine.cpu):
                backend = machine.backends[b]
                if backend.supports_op(tensor) and offload_op(backend, tensor):
                    return b, Cause.OFFLOADED
        return None if backend_id is None else (backend_id, Cause.weight(i))
    return None


def _from_buffer(tensor: Tensor, op: Tensor, machine: Machine) -> int | None:
    """Return the first backend that can use a tensor's buffer and run an op.

    Notes
    -----
    Mirrors `ggml_backend_sched_backend_from_buffer`.
    """
    root = tensor.view_src
    buffer = tensor.buffer if root is None else root.buffer
    if buffer is not None:
        for b in machine.users_of(buffer.buft):
            if machine.backends[b].supports_op(op):
                return b
    return None


# pass 2: neighbours


def expand(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Give unassigned nodes the backend of their neighbours.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 2: the sweeps down and up are made twice, at first with the CPU as a
    barrier, so that it takes only what lies between its own nodes.
    """
    computed = [node for node in nodes if not node.op.is_view]
    for barrier in (machine.cpu, None):
        _sweep(computed, asg, machine.backends, barrier)
        _sweep(reversed(computed), asg, machine.backends, barrier)


def _sweep(nodes: Iterable[Tensor], asg: Assignment, backends: Sequence[Backend], barrier: int | None) -> None:
    current: int | None = None
    ids = asg.ids
    for node in nodes:
        assigned = ids.get(node)
        if assigned is not None:
            current = None if assigned == barrier else assigned
        elif current is not None and backends[current].supports_op(node):
            asg.set(node, current, Cause.EXPANDED)


# pass 3: better backends for the same memory, and the best for what is left


def upgrade(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Move nodes to a backend of higher priority that uses the same memory; assign the rest by their sources.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 3.
    """
    for node in nodes:
        if node.op.is_view:
            continue
        assigned = asg.ids.get(node)
        if assigned is None:
            best = _best_by_sources(node, asg, machine)
            if best is not None:
                asg.set(node, best, Cause.BEST)
        elif assigned > 0:
            _upgrade_node(node, assigned, asg, machine)


def _best_by_sources(node: Tensor, asg: Assignment, machine: Machine) -> int | None:
    """Return the first backend among those that can use most of a node's sources where they are."""
    best, n_best = None, -1
    for b, backend in enumerate(machine.backends):
        if not backend.supports_op(node):
            continue
        n = 0
        for src in node.src:
            if src is None or (src not in asg.ids and (src.view_src is None or src.view_src not in asg.ids)):
                continue
            n += machine.buffer_supported(src, b, asg)
        if n > n_best:
            best, n_best = b, n
    return best


def _upgrade_node(node: Tensor, assigned: int, asg: Assignment, machine: Machine) -> None:
    bufts = machine.bufts
    for b in range(assigned):
        if (
            bufts[b] is bufts[assigned]
            and machine.backends[b].supports_op(node)
            and all(src is None or machine.buffer_supported(src, b, asg) for src in node.src)
        ):
            asg.set(node, b, Cause.UPGRADED)
            return


# pass 4: what is left follows its view or its user


def inherit(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Assign views with what they view, and remaining sources with the node that uses them.

    Raises
    ------
    UnsupportedOpError
        No backend can run a node.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 4.
    """
    ids = asg.ids
    for node in nodes:
        current = ids.get(node)
        if current is None and node.view_src is not None:
            current = ids.get(node.view_src)
            if current is not None:
                asg.set(node, current, Cause.VIEWED)
        for src in node.src:
            if src is None or src in ids:
                continue
            viewed = src.view_src is not None
            at = ids.get(src.view_src) if src.view_src is not None else current
            if at is not None:
                asg.set(src, at, Cause.VIEWED if viewed else Cause.USED)
        if current is None:
            _assign_first(node, asg, machine)


def _assign_first(node: Tensor, asg: Assignment, machine: Machine) -> None:
    for b, backend in enumerate(machine.backends):
        if backend.supports_op(node):
            asg.set(node, b, Cause.EXPANDED)
            return
    raise UnsupportedOpError(
        node.name,
        node.op_desc,
        tuple(b.name for b in machine.backends),
        reason=f"{node.type.ggml_name} from {', '.join(s.type.ggml_name for s in node.src if s is not None) or 'nothing'}",
    )
