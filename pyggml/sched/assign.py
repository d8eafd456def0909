"""Passes 1 to 4: which backend runs each node.

Each pass is a function from graph and machine to entries in an `Assignment`; nothing else changes. The order of the
backends is their priority; the last is a CPU that can run what no other can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..backend import Backend, unsupported_op
from ..buffer import Buffer
from ..graph import Graph
from ..tensor import Tensor
from ..types import BufferUsage, Op, TensorFlag
from .state import CAUSES_OF_WEIGHTS, Assignment, Cause, Machine, OpCheck, is_computed

__all__ = ["OffloadOp", "assign", "assign_from_location", "expand", "inherit", "settle", "upgrade"]

#: Whether a backend takes an op with host weights; None: nothing is offloaded.
OffloadOp = Callable[[Backend, Tensor], bool]


def assign(graph: Graph, asg: Assignment, machine: Machine, offload_op: OffloadOp | None) -> None:
    """Run passes 1 to 4.

    Raises
    ------
    UnsupportedOpError
        No backend can run a node, or the one that holds its memory or was pinned cannot.
    """
    assign_from_location(graph, asg, machine, offload_op)
    expand(graph.nodes, asg, machine)
    upgrade(graph.nodes, asg, machine)
    inherit(graph.nodes, asg, machine)
    if machine.repairs.unsupported_ops:
        settle(graph.nodes, asg, machine)


# pass 1: ops whose memory, or whose weights' memory, is known

#: Ops whose weights are too small to decide.
_HAS_SMALL_WEIGHTS = (Op.ROPE, Op.FLASH_ATTN_EXT)


def assign_from_location(graph: Graph, asg: Assignment, machine: Machine, offload_op: OffloadOp | None) -> None:
    """Assign tensors that are already in memory, inputs, and ops with weights.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 1, and `ggml_backend_sched_backend_id_from_cur`: leafs first, then
    nodes; pinned tensors stay. Upstream's separate rule for ``view_src`` (1.vsrc) has no effect, because the first rule
    follows ``view_src`` already.
    """
    ids, causes = asg.ids, asg.causes
    supports_op, is_input, weights = machine.op_checks, int(TensorFlag.INPUT), BufferUsage.WEIGHTS
    has_pins = asg.has_pins
    for tensors in (graph.leafs, graph.nodes):
        for tensor in tensors:
            if has_pins and tensor in ids:
                continue
            root = tensor.view_src
            storage = tensor.buffer if root is None else root.buffer
            if storage is not None:
                ids[tensor] = _from_own_buffer(tensor, storage, machine, supports_op)
                causes[tensor] = Cause.DST
            elif tensor.flags & is_input:
                ids[tensor] = machine.cpu
                causes[tensor] = Cause.INPUT
            else:
                for src in tensor.src:
                    if src is not None and (buffer := src.buffer) is not None and buffer.usage is weights:
                        if tensor.op not in _HAS_SMALL_WEIGHTS:
                            found = _from_weight(tensor, src, buffer, machine, supports_op, offload_op)
                            if found is not None:
                                ids[tensor], causes[tensor] = found
                        break


def _from_own_buffer(tensor: Tensor, buffer: Buffer, machine: Machine, supports_op: Sequence[OpCheck]) -> int:
    """Return the first backend that can use the tensor's buffer and run its op."""
    for b in machine.users[buffer.buft]:
        if supports_op[b](tensor):
            return b
    raise unsupported_op(
        tensor,
        machine.backends,
        reason=f"it is already in a buffer of {buffer.buft.name}, and none that uses this can run it",
        hint="place the tensor where the op can run",
    )


def _from_weight(
    node: Tensor,
    weight: Tensor,
    buffer: Buffer,
    machine: Machine,
    supports_op: Sequence[OpCheck],
    offload_op: OffloadOp | None,
) -> tuple[int, Cause] | None:
    """Return the backend by a node's first weight, and the cause: a device that offloads it, or the weight's backend.

    Notes
    -----
    Mirrors `ggml_backend_sched_backend_from_buffer` and its use in `ggml_backend_sched_backend_id_from_cur`.
    """
    storage = weight.storage
    users = () if storage is None else machine.users[storage.buft]
    backend_id: int | None = None
    for b in users:
        if supports_op[b](node):
            backend_id = b
            break
    if offload_op is not None and backend_id == machine.cpu and buffer.is_host:
        for b in range(machine.cpu):
            if supports_op[b](node) and offload_op(machine.backends[b], node):
                return b, Cause.OFFLOADED
    return None if backend_id is None else (backend_id, Cause.weight(node.src.index(weight)))


# pass 2: neighbours


def expand(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Give unassigned nodes the backend of their neighbours.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 2: sweeps down and up are made twice, first with the CPU as a
    barrier, so that it takes only nodes between its own. Only unassigned nodes change, so only they are visited.
    """
    ids = asg.ids
    computed = [node for node in nodes if not node.op.is_view]
    left = [i for i, node in enumerate(computed) if node not in ids]
    supports_op = machine.op_checks
    for barrier in (machine.cpu, None):
        for step in (1, -1):  # down, then up
            left = _sweep(computed, left[::step], step, asg, supports_op, barrier)[::step]


def _sweep(
    computed: Sequence[Tensor],
    left: Sequence[int],
    step: int,
    asg: Assignment,
    supports_op: Sequence[OpCheck],
    barrier: int | None,
) -> list[int]:
    """Assign nodes that follow one of a backend that supports them; return the positions of those still unassigned.

    Parameters
    ----------
    left : sequence of int
        Positions of the unassigned nodes, in the order of the sweep.
    step : int
        From a node to the next: 1 or -1.
    """
    ids, causes = asg.ids, asg.causes
    still_left: list[int] = []
    current: int | None = None  # the backend to continue
    previous = -step if step > 0 else len(computed)
    for i in left:
        if i != previous + step:  # between them are assigned nodes
            current = ids[computed[i - step]]
            if current == barrier:
                current = None
        previous = i
        node = computed[i]
        if current is not None and supports_op[current](node):
            ids[node] = current
            causes[node] = Cause.EXPANDED
        else:
            still_left.append(i)
    return still_left


# pass 3: better backends for the same memory, and the best for unassigned nodes


def upgrade(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Move nodes to a backend of higher priority that uses the same memory; assign the rest by their sources.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 3.
    """
    bufts = machine.bufts
    has_better = [any(bufts[b] is buft for b in range(i)) for i, buft in enumerate(bufts)]
    ids = asg.ids
    computed = [node for node in nodes if not node.op.is_view]
    if not any(has_better) and all(map(ids.__contains__, computed)):
        return
    for node in computed:
        assigned = ids.get(node)
        if assigned is None:
            best = _best_by_sources(node, asg, machine)
            if best is not None:
                asg.set(node, best, Cause.BEST)
        elif has_better[assigned]:
            _upgrade_node(node, assigned, asg, machine)


def _best_by_sources(node: Tensor, asg: Assignment, machine: Machine) -> int | None:
    """Return the first backend among those that can use most of a node's sources where they are."""
    best, n_best = None, -1
    for b, supports_op in enumerate(machine.op_checks):
        if not supports_op(node):
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
    bufts, supports_op = machine.bufts, machine.op_checks
    for b in range(assigned):
        if (
            bufts[b] is bufts[assigned]
            and supports_op[b](node)
            and all(src is None or machine.buffer_supported(src, b, asg) for src in node.src)
        ):
            asg.set(node, b, Cause.UPGRADED)
            return


# pass 4: remaining tensors follow their view or their reader


def inherit(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Assign views to the backend of their source, and remaining sources to that of the node that reads them.

    Raises
    ------
    UnsupportedOpError
        No backend can run a node.

    Notes
    -----
    Mirrors `ggml_backend_sched_split_graph`, pass 4.
    """
    ids, causes = asg.ids, asg.causes
    for node in nodes:
        current = ids.get(node)
        if current is None and node.view_src is not None:
            current = ids.get(node.view_src)
            if current is not None:
                ids[node] = current
                causes[node] = Cause.VIEWED
        for src in node.src:
            if src in ids or src is None:
                continue
            viewed = src.view_src
            at = current if viewed is None else ids.get(viewed)
            if at is not None:
                ids[src] = at
                causes[src] = Cause.USED if viewed is None else Cause.VIEWED
        if current is None:
            _assign_first(node, asg, machine)


def _assign_first(node: Tensor, asg: Assignment, machine: Machine) -> None:
    for b, supports_op in enumerate(machine.op_checks):
        if supports_op(node):
            asg.set(node, b, Cause.EXPANDED)
            return
    raise unsupported_op(node, machine.backends)


# after pass 4: tensors that were assigned without asking the backend

#: The passes asked the backend before they gave these causes.
_WAS_ASKED = frozenset({Cause.DST, Cause.OFFLOADED, Cause.EXPANDED, Cause.BEST, Cause.UPGRADED, *CAUSES_OF_WEIGHTS})


def settle(nodes: Sequence[Tensor], asg: Assignment, machine: Machine) -> None:
    """Verify that each node's backend can run it; move a node whose backend cannot write to the memory of its result.

    Raises
    ------
    UnsupportedOpError
        A node was pinned to a backend that cannot run it, or no backend that uses the memory of its result can run it.

    Notes
    -----
    Differs: upstream runs pinned nodes and nodes that follow their view without asking the backend
    (`Repairs.unsupported_ops`).
    """
    causes, supports_op = asg.causes, machine.op_checks
    for node in nodes:
        root = node.view_src
        if root is None and causes[node] in _WAS_ASKED:
            continue
        if root is not None and node.op.is_empty and asg.ids.get(root, asg.ids[node]) != asg.ids[node]:
            asg.set(node, asg.ids[root], Cause.VIEWED)  # it was pinned to another backend than the memory that it views
            continue
        if not is_computed(node):
            continue
        b = asg.ids[node]
        if root is not None and root.buffer is not None and not root.buffer.is_writable:
            raise unsupported_op(
                node,
                (machine.backends[b],),
                reason=f"it writes into '{root.name}', which is in read-only memory of {root.buffer.buft.name}",
                hint="compute into a new tensor, or copy it into one first",
            )
        is_supported = causes[node] in _WAS_ASKED or supports_op[b](node)
        users = () if root is None else _users_of(root, asg, machine)
        if is_supported and (not users or b in users):
            continue
        if causes[node] is Cause.USER:
            reason = (
                "it was pinned there"
                if not is_supported
                else _elsewhere(node, asg, machine, "it was pinned there, and")
            )
            raise unsupported_op(
                node, (machine.backends[b],), reason=reason, hint="pin it to a backend that can, or not at all"
            )
        able = [i for i in (users or range(len(machine.backends))) if supports_op[i](node)]
        if not able and not any(supports(node) for supports in supports_op):
            raise unsupported_op(node, machine.backends)
        if not able:
            raise unsupported_op(
                node,
                [machine.backends[i] for i in users] or machine.backends,
                reason=_elsewhere(node, asg, machine, "") if users else "",
                hint="compute into a new tensor, or pin what it writes to a backend that can run it" if users else "",
            )
        asg.set(node, able[0], Cause.VIEWED if users else Cause.EXPANDED)


def _users_of(root: Tensor, asg: Assignment, machine: Machine) -> tuple[int, ...]:
    """Return the backends that can use a tensor's memory, its own first; empty if it has none yet."""
    at = asg.ids.get(root)
    if root.buffer is not None:
        users = machine.users[root.buffer.buft]
    elif at is not None:
        users = machine.users[machine.bufts[at]]
    else:
        return ()
    return (at, *(b for b in users if b != at)) if at in users else users


def _elsewhere(node: Tensor, asg: Assignment, machine: Machine, first: str) -> str:
    root = node.view_src
    assert root is not None
    at = asg.ids.get(root)
    buft = machine.bufts[at] if root.buffer is None and at is not None else root.buffer and root.buffer.buft
    return (
        f"{first} it writes into '{root.name}', which is in memory of {buft.name if buft else 'another device'}".strip()
    )
