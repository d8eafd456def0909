"""`RunLog`: the one place that every copy, wait and launch of a computing passes; counts, records and clocks hang on it."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from ..clock import Span, VirtualClock
from ..graph import GraphView
from ..record import (
    AllocPurpose,
    AllocRecord,
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyReason,
    CopyRecord,
    EventRecord,
    ReadRecord,
    Recorder,
    Statistics,
    UsedExpertsRecord,
    WaitRecord,
)
from ..routing import DEFAULT_ROUTING
from ..tensor import Tensor
from ..types import Op
from .state import is_computed

if TYPE_CHECKING:
    from ..buffer import BufferType
    from ..graph import Graph
    from .check_copies import CopyCheck
    from .state import Assignment, Machine

__all__ = ["RunLog"]

Wait = Literal["synchronize", "event_synchronize", "event_wait"]


class RunLog:
    """Counts always; records and keeps virtual time only if asked to.

    Parameters
    ----------
    machine : Machine
        Whose backends are meant by indices.
    stats : Statistics
        The scheduler's counts.
    recorder : Recorder or None
        Takes a record of everything.
    clock : VirtualClock or None
        Is told of everything.
    """

    __slots__ = ("clock", "copy_check", "machine", "recorder", "stats", "used")

    def __init__(
        self, machine: Machine, stats: Statistics, recorder: Recorder | None, clock: VirtualClock | None
    ) -> None:
        self.machine = machine
        self.stats = stats
        self.recorder = recorder
        self.clock = clock
        self.used: dict[Tensor, int] = {}  #: experts read of each ids tensor
        self.copy_check: CopyCheck | None = None  #: with PYGGML_CHECK, is told of copies

    def now(self) -> float:
        """Return the host's time in seconds; 0 if nobody records."""
        return 0.0 if self.recorder is None else perf_counter()

    def _name(self, backend_id: int) -> str:
        return self.machine.backends[backend_id].name

    def _moment(self) -> Span | None:
        """Return the host's virtual time, for what takes none."""
        return None if self.clock is None else Span(self.clock.host_s, self.clock.host_s)

    def copied(
        self,
        i_split: int,
        tensor: Tensor,
        src: int,
        dst: int,
        reason: CopyReason,
        start_s: float,
        *,
        offset: int = 0,
        size: int | None = None,
        is_async: bool,
    ) -> None:
        """Take note of bytes of a split input that went to the split's backend."""
        n_bytes = tensor.nbytes if size is None else size
        if self.copy_check is not None:
            self.copy_check.put(tensor, dst, offset, n_bytes)
        self.stats.count_copy(n_bytes, tensor.nbytes, reason)
        span = None
        if self.clock is not None:
            slow_src, slow_dst = self._slowdown(src), self._slowdown(dst)
            span = self.clock.copy(
                src, dst, n_bytes, is_async=is_async, is_pinned=self._is_pinned(tensor), slow_src=slow_src,
                slow_dst=slow_dst,
            )  # fmt: skip
        if self.recorder is not None:
            self.recorder.record(
                CopyRecord(
                    i_split, tensor.name, self._name(src), self._name(dst), offset, n_bytes, tensor.nbytes, reason,
                    start_s, perf_counter(), span, self._engines(src, dst),
                )
            )  # fmt: skip

    def _engines(self, src: int, dst: int) -> tuple[str, ...]:
        """Return the names of the copy engines between two backends, as the virtual clock has them."""
        if self.clock is None:
            return ()
        return tuple(f"{self._name(b)} copy engine {engine}" for b, engine in self.clock.engines(src, dst))

    def _slowdown(self, backend_id: int) -> float:
        return self.machine.backends[backend_id].device.link_slowdown()

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.storage
        return storage is not None and storage.is_host and storage.buft.device is not self.machine.backends[-1].device

    def experts(self, i_split: int, weight: Tensor, ids: Tensor | None, experts: set[int], *, is_added: bool) -> None:
        """Take note of the experts that are about to be copied; added ones are no copy of their own."""
        if not is_added:
            self.stats.count_experts(weight.nbytes)
        if self.recorder is not None:
            used = tuple(sorted(experts))
            name = "" if ids is None else ids.name
            whole = 0 if is_added else weight.nbytes
            self.recorder.record(UsedExpertsRecord(i_split, weight.name, name, used, weight.ne[2], weight.nb[2], whole))

    def was_read(self, i_split: int | None, tensor: Tensor, backend_id: int, start_s: float) -> None:
        """Take note that the host waited for a backend and read a tensor."""
        self.waited(i_split, "synchronize", backend_id, None, start_s)
        span = None
        if self.clock is not None:
            span = self.clock.copy(
                backend_id, self.clock.cpu, tensor.nbytes, is_async=False, is_pinned=False,
                slow_src=self._slowdown(backend_id),
            )  # fmt: skip
        if self.recorder is not None:
            end_s, engines = perf_counter(), self._engines(backend_id, len(self.machine.backends) - 1)
            self.recorder.record(
                ReadRecord(tensor.name, self._name(backend_id), tensor.nbytes, start_s, end_s, span, engines)
            )

    def waited(self, i_split: int | None, what: Wait, backend_id: int, copy: int | None, start_s: float) -> None:
        """Take note of a wait: of the host for a backend or its event, or of a backend for its event."""
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
        if self.recorder is not None:
            self.recorder.record(WaitRecord(i_split, what, self._name(backend_id), start_s, perf_counter(), span, copy))

    def recorded_event(self, i_split: int, backend_id: int, copy: int, start_s: float) -> None:
        """Take note that a backend's event was recorded."""
        span = None if self.clock is None else self.clock.event_record(backend_id, copy)
        if self.recorder is not None:
            self.recorder.record(EventRecord(i_split, self._name(backend_id), copy, start_s, perf_counter(), span))

    def launched(self, i_split: int, backend_id: int, graph: GraphView, asg: Assignment, start_s: float) -> None:
        """Take note that nodes were given to a backend."""
        self.stats.n_launches += 1
        span = None
        if self.clock is not None:
            span = self.clock.spend(backend_id, self._seconds(self.clock, backend_id, graph))
        if self.recorder is not None:
            end_s = perf_counter()
            first = graph.graph.nodes[graph.i_start].name if len(graph) else ""
            causes = graph.memo.get("causes")
            if causes is None:
                causes = graph.memo["causes"] = asg.cause_counts(graph)
            self.recorder.record(
                ComputeRecord(i_split, self._name(backend_id), len(graph), first, start_s, end_s, span, causes)
            )

    def called_back(self, i_split: int, tensor: Tensor, start_s: float, *, asked: bool, answer: bool) -> None:
        """Take note that the eval callback was called."""
        if self.recorder is not None:
            end_s, span = perf_counter(), self._moment()
            self.recorder.record(CallbackRecord(i_split, tensor.name, asked, answer, start_s, end_s, span))

    def assigned(self, graph: Graph, asg: Assignment, start_s: float) -> None:
        """Take note of where each node of a graph will be computed, and why."""
        if self.recorder is None:
            return
        end_s, span = perf_counter(), self._moment()
        for node in graph.nodes:
            if is_computed(node):
                cause = asg.cause(node)
                name = "" if cause is None else cause.value
                backend = self._name(asg.ids[node])
                self.recorder.record(AssignRecord(node.name, node.op_desc, backend, name, start_s, end_s, span))

    def holds(
        self,
        purpose: AllocPurpose,
        held: Iterable[tuple[int, BufferType, int]],
        start_s: float,
        *,
        graph: str = "",
    ) -> None:
        """Take note of what is allocated from now on: backends whose memory it is, buffer types, and bytes."""
        if self.recorder is None:
            return
        end_s, span = perf_counter(), self._moment()
        for backend_id, buft, size in held:
            name = self._name(backend_id)
            self.recorder.record(AllocRecord(graph, name, buft.name, size, purpose, start_s, end_s, span))

    def _seconds(self, clock: VirtualClock, backend_id: int, graph: GraphView) -> float:
        """Return how long nodes take; all but the products with used experts is worked out once for a range."""
        kept = graph.memo.get("work")
        if kept is None or kept[0] is not clock:
            nodes = graph.nodes
            products = [n for n in nodes if n.op is Op.MUL_MAT_ID]
            others = (n for n in nodes if n.op is not Op.MUL_MAT_ID)
            kept = graph.memo["work"] = (clock, clock.seconds(backend_id, others, self._used_experts), products)
        fixed_s: float = kept[1]
        return fixed_s + clock.seconds(backend_id, kept[2], self._used_experts)

    def _used_experts(self, node: Tensor) -> float:
        """Return how many experts a MUL_MAT_ID reads: as copied, else as the default routing has it."""
        ids, weight = node.src[2], node.src[0]
        assert ids is not None
        assert weight is not None
        known = self.used.get(ids)
        if known is not None:
            return known
        return DEFAULT_ROUTING.used(weight.ne[2], ids.ne[0], ids.ne[1])
