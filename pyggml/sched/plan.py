"""`Plan`: the splits of a graph, and every transfer that computing it needs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..backend import Backend
from ..dialect import Repairs
from ..graph import Graph
from ..opset import expert_sources, ids_of, uses_experts
from ..record import CopyReason
from ..tensor import Tensor
from ..types import BufferUsage, TensorFlag
from .state import Assignment, Copies, Machine, Split, is_computed
from .transfer import Feed, RunSlot, Transfer, is_host_weight

if TYPE_CHECKING:
    from .resources import CopyQueue, Resources
    from .tape import Tape

__all__ = ["Plan", "Transfers", "input_kind"]


def input_kind(split: Split, tensor: Tensor, copy: Tensor) -> CopyReason:
    """Return the kind of a split's input; all others ask its `Transfer`.

    ``"experts"``: a host weight of which the used experts are enough, because the split's first node chooses experts
    from its input copy (`uses_experts`).

    Notes
    -----
    Mirrors the conditions of the used-expert path in `ggml_backend_sched_compute_splits`, since 0.27 those of
    `llama_context::sched_copy_experts`: only the first node is looked at.
    """
    if tensor.flags & TensorFlag.INPUT:
        return "input"
    buffer = tensor.buffer
    if buffer is None or buffer.usage is not BufferUsage.WEIGHTS:
        return "activation"
    if buffer.is_host and len(split.graph):
        node = split.graph.graph.nodes[split.graph.i_start]
        choice = uses_experts(node.op)
        if choice is not None and node.src[choice.chosen] is copy:
            return "experts"
    return "weight"


@dataclass(frozen=True, slots=True)
class Transfers:
    """Every copy that computing a plan needs.

    Attributes
    ----------
    by_split : sequence of sequence of Transfer
        By split, its inputs in the order of copying.
    further : mapping of int to sequence of Transfer
        By split, later readers of an expert weight's input copy; offered with the experts that they lack.
    overwritten : mapping of int to sequence of Transfer
        By split, inputs of earlier splits whose source its nodes write although later splits read the input copy.
    written_ids : mapping of int to set of Tensor
        By split, memory of ids that its nodes write.
    """

    by_split: Sequence[Sequence[Transfer]]
    further: Mapping[int, Sequence[Transfer]]
    overwritten: Mapping[int, Sequence[Transfer]]
    written_ids: Mapping[int, set[Tensor]]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that was decided about one graph, before anything is computed; what the cut returns.

    It does not change after that. Records, reports, checks, policies and computes read it.

    Attributes
    ----------
    graph : Graph
        The graph; sources of its nodes are replaced by input copies where necessary.
    assignment : Assignment
        The backend of each tensor, and why.
    splits : sequence of Split
        In the order of computation.
    copies : mapping
        Copies of split inputs and of graph inputs: by tensor, then backend id, one for each pipeline copy.
    graph_inputs : sequence of Tensor
        Inputs that have pipeline copies.
    replaced_sources : sequence of (Tensor, int, Tensor)
        Node, index and former source, for every source that now is a copy.
    n_copies, cur_copy : int
        Number of pipeline copies, and the one that the graph uses.
    """

    machine: Machine
    graph: Graph
    assignment: Assignment
    splits: Sequence[Split]
    copies: Copies
    graph_inputs: Sequence[Tensor]
    replaced_sources: Sequence[tuple[Tensor, int, Tensor]]
    n_copies: int
    cur_copy: int
    resources: Resources = field(repr=False)
    slot: RunSlot = field(default_factory=RunSlot, repr=False)
    tapes: dict[Repairs, Tape] = field(default_factory=dict, repr=False)  #: of computes of it, if there is no precedent

    @property
    def backends(self) -> Sequence[Backend]:
        """The scheduler's backends, in order of priority; the last is a CPU."""
        return self.machine.backends

    @cached_property
    def all_transfers(self) -> Transfers:
        """The copies that computing it needs; made when first asked for, once the backends have reordered the splits."""
        return _make_transfers(self)

    @property
    def transfers(self) -> Sequence[Sequence[Transfer]]:
        """By split, its inputs in the order of copying."""
        return self.all_transfers.by_split

    def copy_of(self, source: Tensor, backend_id: int) -> Tensor:
        """Return the copy of a split's input on a backend."""
        return self.copies[source][backend_id][self.cur_copy]

    def expert_transfers(self) -> list[Transfer]:
        """Return the transfers of kind "experts", in the order of computation."""
        return [t for own in self.transfers for t in own if t.kind == "experts"]

    # -- for policies --------------------------------------------------------

    def memory(self, backend: Backend, n_bytes: int, name: str) -> Tensor:
        """Return device memory for a policy: the same for a name in all plans; if it grows, its content is lost.

        It counts in the planner's and the session's ``memory()``, and is freed with the scheduler.

        Returns
        -------
        Tensor
            Of type I8, in the backend's default buffer type.

        Raises
        ------
        OutOfMemoryError
            The device has too little memory left.
        """
        return self.resources.memory(self.machine.index(backend), n_bytes, name)

    def lend(self, backend: Backend, tensor: Tensor, *, has_queues: bool = False) -> None:
        """Allow sends to memory that the policy has allocated itself: a tensor on the backend's device.

        Parameters
        ----------
        has_queues : bool
            Whether queues also use it; otherwise all uses are in the backend's stream, and no marks are made.
        """
        self.resources.lend(self.machine.index(backend), tensor, has_queues=has_queues)

    def feed(self, source: Tensor, backend: Backend, *, kind: CopyReason = "experts") -> Feed:
        """Return a `Feed`, which sends a tensor in host memory that is not an input of a split to the policy's own memory."""
        return Feed(
            self.slot,
            self.machine,
            source,
            source_id=self.machine.cpu,
            backend_id=self.machine.index(backend),
            kind=kind,
        )

    def queue(self, backend: Backend, number: int = 1) -> CopyQueue:
        """Return another stream of a backend's device, for copies while it computes; the same for a number in all plans."""
        return self.resources.queue(self.machine.index(backend), number)


def _make_transfers(plan: Plan) -> Transfers:
    machine, asg = plan.machine, plan.assignment
    readers: dict[Tensor, Tensor] = {}  # copy -> the first node that reads it
    for node, j, _ in plan.replaced_sources:
        copy = node.src[j]
        if copy is not None:
            readers.setdefault(copy, node)
    made: list[list[Transfer]] = []
    of_copy: dict[tuple[Tensor, int], Transfer] = {}
    firsts: dict[Tensor, Transfer] = {}  # copy of an expert weight -> its transfer
    for i, split in enumerate(plan.splits):
        b = split.backend_id
        own: list[Transfer] = []
        for tensor in _copy_order(split, machine):
            copy = plan.copy_of(tensor, b)
            kind = input_kind(split, tensor, copy)
            first = split.graph.graph.nodes[split.i_start] if kind == "experts" else readers.get(copy)
            transfer = Transfer(
                plan.slot, machine, tensor, copy, source_id=asg.ids[tensor], backend_id=b, split=i, position=len(own),
                node=first, kind=kind,
                ids_tensor=expert_sources(first)[1] if kind == "experts" and first is not None else None,
            )  # fmt: skip
            own.append(transfer)
            of_copy[tensor, b] = transfer
            if kind == "experts":
                firsts[copy] = transfer
        made.append(own)
    overwritten: dict[int, list[Transfer]] = {}
    if machine.repairs.stale_copies:
        for i, sources in _overwritten_sources(plan).items():
            overwritten[i] = [of_copy[key] for key in sources]
    further, written_ids = _readers_of_experts(plan, firsts) if firsts else ({}, {})
    return Transfers(made, further, overwritten, written_ids)


def _overwritten_sources(plan: Plan) -> dict[int, list[tuple[Tensor, int]]]:
    """Return, by split, the sources that its nodes write although later splits read their copy.

    Returns
    -------
    dict
        Source, and the backend of the copy.

    Notes
    -----
    Differs: upstream copies a tensor once to a backend, and later readers there read the old value
    (`Repairs.stale_copies`).
    """
    roots = {source.view_src or source for source in plan.copies}
    writers = [node for node in plan.graph.nodes if node.view_src in roots and is_computed(node)]
    found: dict[int, list[tuple[Tensor, int]]] = {}
    if not writers:
        return found
    split_of = {node: i for i, split in enumerate(plan.splits) for node in split.graph.nodes}
    users: dict[tuple[Tensor, int], list[int]] = {}
    for node, _, source in plan.replaced_sources:
        users.setdefault((source, plan.assignment.ids[node]), []).append(split_of[node])
    by_root: dict[Tensor | None, list[tuple[tuple[Tensor, int], int, int]]] = {}
    for copied, readers in users.items():
        by_root.setdefault(copied[0].view_src or copied[0], []).append((copied, min(readers), max(readers)))
    for writer in writers:
        i = split_of[writer]
        found_here = [copied for copied, first, last in by_root.get(writer.view_src, ()) if first < i < last]
        if found_here:
            found.setdefault(i, []).extend(found_here)
    return found


def _copy_order(split: Split, machine: Machine) -> Sequence[Tensor]:
    """Return a split's inputs in the order of copying (`Dialect.host_weights_last`)."""
    if not machine.dialect.host_weights_last or len(split.inputs) < 2:
        return split.inputs
    return sorted(split.inputs, key=is_host_weight)


def _readers_of_experts(
    plan: Plan, firsts: Mapping[Tensor, Transfer]
) -> tuple[dict[int, list[Transfer]], dict[int, set[Tensor]]]:
    """Find the later readers of expert copies, by split, and the splits that write ids; note which weights are written."""
    users = [(node, j, src) for node, j, src in plan.replaced_sources if node.src[j] in firsts]
    ids_roots = {_root(ids) for node, j, _ in users if (ids := ids_of(node, j)) is not None}
    # ids that are copies change when their source is written, too (`Repairs.stale_copies`)
    copied_from: dict[Tensor, list[Tensor]] = {}
    for source, by_backend in plan.copies.items():
        for made in by_backend.values():
            copy = made[plan.cur_copy]
            if copy in ids_roots and copy is not source:
                copied_from.setdefault(_root(source), []).append(copy)
    watched = ids_roots | copied_from.keys()
    starts = [split.i_start for split in plan.splits]
    nodes = plan.graph.nodes
    changed = {n.view_src for n in nodes if n.view_src is not None and not n.op.is_empty}
    for transfer in firsts.values():
        transfer.is_written = _root(transfer.source) in changed
    writes: dict[int, set[Tensor]] = {}
    for i_node in [i for i, n in enumerate(nodes) if (n.view_src or n) in watched]:
        root = nodes[i_node].view_src or nodes[i_node]
        if not nodes[i_node].op.is_empty:
            written = writes.setdefault(bisect_right(starts, i_node) - 1, set())
            written.update((root, *copied_from.get(root, ())))
    further: dict[int, list[Transfer]] = {}
    shared: Tensor | None
    if len(users) > len(firsts):  # otherwise no copy is shared
        for i, split in enumerate(plan.splits):
            inside = set(split.graph.nodes)
            for node, j, weight in users:
                shared = node.src[j]
                if node not in inside or shared is None:
                    continue
                first = firsts[shared]
                if first.split == i and node is split.graph.nodes[0]:
                    continue
                ids = ids_of(node, j)
                is_known = ids is not None and _root(ids) not in writes.get(i, ())
                first.has_later_readers = True
                more = Transfer(
                    plan.slot, plan.machine, weight, shared, source_id=first.source_id, backend_id=first.backend_id, split=i,
                    position=len(plan.splits[i].inputs), node=node, kind="experts", is_further=True,
                    ids_tensor=ids if is_known else None,
                )  # fmt: skip
                more.has_later_readers = True
                further.setdefault(i, []).append(more)
    return further, writes


def _root(tensor: Tensor) -> Tensor:
    """Return the tensor that owns the memory."""
    return tensor if tensor.view_src is None else tensor.view_src
