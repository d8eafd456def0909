"""`RunLog`: receives every copy, wait and launch of a compute, and passes it to statistics, observers and the virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Literal, cast

from ..clock import Span, VirtualClock
from ..graph import GraphView
from ..opset import EXPERT_OPS
from ..record import (
    UNKNOWN,
    AllocPurpose,
    AllocRecord,
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyReason,
    CopyRecord,
    EventRecord,
    Identity,
    Observers,
    ReadRecord,
    Statistics,
    UsedExpertsRecord,
    WaitRecord,
)
from ..tensor import Tensor
from .state import is_computed

if TYPE_CHECKING:
    from ..buffer import Buffer, BufferType
    from ..graph import Graph
    from .compute import SplitRun
    from .ids import IdsSource
    from .resources import CopyQueue, Mark
    from .state import Assignment, Machine
    from .transfer import Feed, Transfer

__all__ = ["RunLog"]

Wait = Literal["synchronize", "event_synchronize", "event_wait"]


class RunLog:
    """Always counts; calls observers and advances the virtual clock if there are any.

    Parameters
    ----------
    machine : Machine
        The backends to which indices refer.
    stats : Statistics
        The scheduler's counts.
    observers : Observers or None
        Called for everything.
    clock : VirtualClock or None
        Calculates the times on simulated devices.
    ids : IdsSource or None
        Returns how many experts a node reads, for its cost.
    of : Identity, optional
        The graph, run and clock of its records.

    Attributes
    ----------
    now : callable
        Returns the host's time in seconds; 0 without observers of records.
    only_counts : bool
        Whether there are neither observers nor a clock.
    """

    __slots__ = (
        "_announced",
        "_n_announced",
        "_names",
        "_on_sent",
        "clock",
        "ids",
        "machine",
        "now",
        "observers",
        "of",
        "only_counts",
        "records",
        "stats",
    )

    def __init__(
        self,
        machine: Machine,
        stats: Statistics,
        observers: Observers | None,
        clock: VirtualClock | None,
        ids: IdsSource | None = None,
        of: Identity | None = None,
    ) -> None:
        self.machine = machine
        self.stats = stats
        self.observers = observers
        self.clock = clock
        self.ids = ids
        #: which graph and run records are of
        self.of: Identity = UNKNOWN if of is None else of
        self._announced: dict[tuple[int, str], int] = {}  # split and weight: number of the latest used experts
        self._n_announced = 0
        #: those of them that take records, if there are any
        self.records = observers if observers is not None and observers.takes_records else None
        self._names = () if self.records is None else tuple(b.name for b in machine.backends)
        self._on_sent = () if observers is None else observers.on_sent
        self.only_counts = observers is None and clock is None
        self.now: Callable[[], float] = float if self.records is None else perf_counter  # float() is 0.0

    def _moment(self) -> Span | None:
        """Return the host's virtual time, for events without duration."""
        return None if self.clock is None else Span(self.clock.host_s, self.clock.host_s)

    # -- the run itself ------------------------------------------------------

    def began(self, run: SplitRun) -> None:
        """Report that a compute starts."""
        if self.observers is not None:
            for tell in self.observers.on_begin:
                tell(run)

    def will_launch(self, run: SplitRun, i_split: int) -> None:
        """Report that a split is about to be launched."""
        if self.observers is not None:
            for tell in self.observers.before_launch:
                tell(run, i_split)

    def has_launched(self, run: SplitRun, i_split: int) -> None:
        """Report that a split was launched."""
        if self.observers is not None:
            for tell in self.observers.after_launch:
                tell(run, i_split)

    # -- effects -------------------------------------------------------------

    def copied(
        self,
        transfer: Feed,
        i_split: int,
        src: int,
        reason: CopyReason,
        start_s: float,
        offset: int,
        n_bytes: int,
        tensor_bytes: int,
        *,
        is_async: bool,
        number: int = 0,
        is_own: bool = False,
    ) -> None:
        """Report bytes of a transfer that were copied to its input copy, or to a policy's own memory.

        Parameters
        ----------
        src : int
            The backend of the source.
        tensor_bytes : int
            Bytes of a full copy; 0 for a further part of a counted copy.
        number : int
            The number of the queue; 0: the backend's own stream.
        """
        dst = transfer.backend_id
        if self.only_counts and src != dst:
            self.stats.count_copy(n_bytes, tensor_bytes, reason)
            return
        if self._on_sent and not is_own:
            for tell in self._on_sent:
                tell(cast("Transfer", transfer), offset, n_bytes)  # what is not sent to own memory is one
        if src == dst:
            self.stats.count_in_device(n_bytes, tensor_bytes, reason)
        else:
            self.stats.count_copy(n_bytes, tensor_bytes, reason)
        span = None
        if self.clock is not None:
            backends = self.machine.backends
            slow_src, slow_dst = backends[src].device.link_slowdown(), backends[dst].device.link_slowdown()
            span = self.clock.copy(
                src, dst, n_bytes, is_async=is_async, is_pinned=self.is_pinned(transfer.source.storage), slow_src=slow_src,
                slow_dst=slow_dst, queue=number,
            )  # fmt: skip
        if self.records is not None:
            self.records.record(
                CopyRecord(
                    i_split, transfer.source.name, self._names[src], self._names[dst], offset, n_bytes, tensor_bytes,
                    reason, start_s, perf_counter(), span, self._engines(src, dst),
                    -1 if is_own else self._announced.get((i_split, transfer.source.name), -1), **self.of,
                )
            )  # fmt: skip

    def marked(self, backend_id: int, queue: CopyQueue | None, mark: Mark) -> None:
        """Note when a stream gets to a mark; an own event of a policy's queues and memory, not of upstream's."""
        if self.clock is not None:
            mark.virtual_s = self.clock.ready_s(backend_id, 0 if queue is None else queue.number)

    def waited_for_mark(
        self, i_split: int, backend_id: int, queue: CopyQueue | None, mark: Mark, start_s: float
    ) -> None:
        """Report that a stream, or without events the host, waits for a mark."""
        self.stats.n_waits += 1
        span: Span | None = None
        is_host = mark.event is None
        if self.clock is not None:
            number = 0 if queue is None else queue.number
            span = self.clock.wait_until(None if is_host else backend_id, mark.virtual_s, number)
        if self.records is not None:
            what: Wait = "synchronize" if is_host else "event_wait"
            name = self._names[backend_id]
            self.records.record(WaitRecord(i_split, what, name, start_s, perf_counter(), span, **self.of))

    def waited_for_queue(self, queue: CopyQueue) -> None:
        """Advance the host's virtual time until a queue is done."""
        if self.clock is not None:
            self.clock.wait_until(None, self.clock.ready_s(queue.of, queue.number))

    def copy_seconds(self, tensor: Tensor, src: int, dst: int, n_bytes: int) -> float | None:
        """Return how long a copy of bytes of a tensor takes on idle links; None without a clock."""
        if self.clock is None:
            return None
        link = self.clock.peer_link(src, dst)
        if link is not None:
            return link.seconds(n_bytes)
        return self.clock.copy_seconds(dst, n_bytes, is_pinned=src != self.clock.cpu or self.is_pinned(tensor.storage))

    def _engines(self, src: int, dst: int) -> tuple[str, ...]:
        """Return the names of the copy engines between two backends, as the virtual clock has them."""
        if self.clock is None:
            return ()
        return tuple(f"{self._names[b]} copy engine {engine}" for b, engine in self.clock.engines(src, dst))

    def is_pinned(self, storage: Buffer | None) -> bool:
        """Return whether memory is pinned host memory."""
        return storage is not None and storage.is_host and storage.buft.device is not self.machine.backends[-1].device

    def experts(self, i_split: int, weight: Tensor, ids: Tensor | None, experts: set[int], *, is_added: bool) -> None:
        """Report the experts that are about to be copied; added experts do not count as another copy."""
        if not is_added:
            self.stats.count_experts(weight.nbytes)
        if self.records is not None:
            used = tuple(sorted(experts))
            name = "" if ids is None else ids.name
            whole = 0 if is_added else weight.nbytes
            number = self._announced[i_split, weight.name] = self._n_announced
            self._n_announced += 1
            self.records.record(
                UsedExpertsRecord(
                    i_split, weight.name, name, used, weight.ne[2], weight.nb[2], whole, number, **self.of
                )
            )

    def was_read(self, i_split: int | None, tensor: Tensor, backend_id: int, start_s: float) -> None:
        """Report that the host waited for a backend and read a tensor."""
        self.waited(i_split, "synchronize", backend_id, None, start_s)
        span = None
        if self.clock is not None:
            span = self.clock.copy(
                backend_id, self.clock.cpu, tensor.nbytes, is_async=False, is_pinned=False,
                slow_src=self.machine.backends[backend_id].device.link_slowdown(),
            )  # fmt: skip
        if self.records is not None:
            end_s, engines = perf_counter(), self._engines(backend_id, len(self.machine.backends) - 1)
            self.records.record(
                ReadRecord(
                    tensor.name, self._names[backend_id], tensor.nbytes, start_s, end_s, span, engines, **self.of
                )
            )

    def waited(self, i_split: int | None, what: Wait, backend_id: int, copy: int | None, start_s: float) -> None:
        """Report a wait: of the host for a backend or its event, or of a backend for its event."""
        self.stats.n_waits += 1
        span: Span | None = None
        clock = self.clock
        if clock is not None:
            if copy is None:
                span = clock.synchronize(backend_id)
            elif what == "event_wait":
                span = clock.event_wait(backend_id, backend_id, copy)
            else:
                span = clock.event_synchronize(backend_id, copy)
        if self.records is not None:
            self.records.record(
                WaitRecord(i_split, what, self._names[backend_id], start_s, perf_counter(), span, copy, **self.of)
            )

    def recorded_event(self, i_split: int, backend_id: int, copy: int, start_s: float) -> None:
        """Report that a backend's event was recorded."""
        span = None if self.clock is None else self.clock.event_record(backend_id, copy)
        if self.records is not None:
            self.records.record(
                EventRecord(i_split, self._names[backend_id], copy, start_s, perf_counter(), span, **self.of)
            )

    def launched(self, i_split: int, backend_id: int, graph: GraphView, asg: Assignment, start_s: float) -> None:
        """Report that nodes were submitted to a backend."""
        self.stats.n_launches += 1
        span = None
        if self.clock is not None:
            span = self.clock.spend(backend_id, self.seconds_of(self.clock, backend_id, graph))
        if self.records is not None:
            end_s = perf_counter()
            first = graph.graph.nodes[graph.i_start].name if len(graph) else ""
            causes = graph.memo.get("causes")
            if causes is None:
                causes = graph.memo["causes"] = asg.cause_counts(graph)
            self.records.record(
                ComputeRecord(
                    i_split, self._names[backend_id], len(graph), first, start_s, end_s, span, causes, **self.of
                )
            )

    def called_back(self, i_split: int, tensor: Tensor, start_s: float, *, asked: bool, answer: bool) -> None:
        """Report that the eval callback was called."""
        if self.records is not None:
            end_s, span = perf_counter(), self._moment()
            self.records.record(CallbackRecord(i_split, tensor.name, asked, answer, start_s, end_s, span, **self.of))

    def assigned(self, graph: Graph, asg: Assignment, start_s: float) -> None:
        """Report the backend of each node of a graph, and why."""
        if self.records is None:
            return
        end_s, span = perf_counter(), self._moment()
        for node in graph.nodes:
            if is_computed(node):
                cause = asg.cause(node)
                name = "" if cause is None else cause.value
                backend = self._names[asg.ids[node]]
                self.records.record(
                    AssignRecord(node.name, node.op_desc, backend, name, start_s, end_s, span, **self.of)
                )

    def holds(
        self,
        purpose: AllocPurpose,
        held: Iterable[tuple[int, BufferType, int]],
        start_s: float,
        *,
        graph: str = "",
    ) -> None:
        """Report the memory that is held from now on: backends, buffer types, and bytes."""
        if self.records is None:
            return
        end_s, span = perf_counter(), self._moment()
        for backend_id, buft, size in held:
            name = self._names[backend_id]
            self.records.record(AllocRecord(graph, name, buft.name, size, purpose, start_s, end_s, span, **self.of))

    def seconds_of(self, clock: VirtualClock, backend_id: int, graph: GraphView) -> float:
        """Return how long nodes take; all but the products with used experts is worked out once for a range."""
        kept = graph.memo.get("work")
        if kept is None or kept[0] is not clock:
            nodes, by_ids = graph.nodes, EXPERT_OPS
            products = [n for n in nodes if n.op in by_ids]
            others = [n for n in nodes if n.op not in by_ids] if products else nodes
            fixed_s = clock.seconds(backend_id, others, self._count_experts)
            kept = graph.memo["work"] = (clock, fixed_s, products, {})
        fixed: float = kept[1]
        if not kept[2]:
            return fixed
        by_counts: dict[tuple[float, ...], float] = kept[3]
        counts = tuple(map(self._count_experts, kept[2]))
        seconds = by_counts.get(counts)
        if seconds is None:
            seconds = by_counts[counts] = fixed + clock.seconds(backend_id, kept[2], self._count_experts)
        return seconds

    def _count_experts(self, node: Tensor) -> float:
        """Return how many experts a node reads."""
        assert self.ids is not None
        return self.ids.count(node)
