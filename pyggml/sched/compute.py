"""Computes splits: copy the inputs, wait as little as is safe, launch, and record an event."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..backend import Backend, Event
from ..buffer import tensor_copy
from ..dialect import Repairs
from ..errors import SchedError
from ..graph import GraphView
from ..record import CopyReason
from ..tensor import Tensor
from .ids import IdsSource
from .log import RunLog
from .plan import Plan
from .policies import CopyPolicy
from .ranges import Ranges
from .resources import CopyQueue, Mark, Resources
from .state import Assignment, Machine
from .transfer import Feed, Transfer

__all__ = ["EvalCallback", "SplitRun", "compute_splits"]

#: Called with a node and True, it returns whether the node's data is wanted. If so, it is called again with False after
#: the node is computed; returning False then ends the split.
EvalCallback = Callable[[Tensor, bool], bool]


class SplitRun:
    """One compute of an allocated graph: its data, its waits, and its reports.

    Every wait is a method with the name of its place in the code (``place``), so that a test can use a subclass that
    leaves one out (`Scheduler.run_type`).

    Attributes
    ----------
    plan : Plan
        Splits and transfers.
    log : RunLog
        Passes every copy, wait and launch to statistics, clock and observers.
    ids : IdsSource
        Returns the experts that a micro-batch uses.
    repairs : Repairs
        Which of upstream's errors are corrected for this policy.
    i_split : int
        The split that is being computed.
    """

    __slots__ = (
        "_counts", "_forked", "_joins", "_present", "asg", "cur_copy", "eval_callback", "events", "i_split", "ids", "log", "machine",
        "plan", "policy", "repairs", "resources",
    )  # fmt: skip

    def __init__(
        self,
        plan: Plan,
        *,
        cur_copy: int,
        events: Sequence[Sequence[Event | None]],
        policy: CopyPolicy,
        repairs: Repairs,
        ids: IdsSource,
        eval_callback: EvalCallback | None,
        log: RunLog,
        resources: Resources,
    ) -> None:
        self.plan = plan
        self.machine: Machine = plan.machine
        self.asg: Assignment = plan.assignment
        self.cur_copy, self.events = cur_copy, events
        self.policy, self.repairs, self.ids = policy, repairs, ids
        self.eval_callback, self.log, self.resources = eval_callback, log, resources
        self.i_split = 0
        self._counts = log.stats if log.only_counts else None
        self._present: dict[Tensor, Ranges] = {}  # copied bytes of input copies that several nodes read
        self._forked: set[CopyQueue] = set()  # queues that wait for all submitted work of this split's backend
        self._joins: set[CopyQueue] = set()  # queues that this split must wait for

    def original_of(self, tensor: Tensor) -> Tensor:
        """Return the source of an input copy; any other tensor is returned itself."""
        for transfers in self.plan.transfers:
            for transfer in transfers:
                if transfer.copy is tensor:
                    return transfer.source
        return tensor

    def causes_of(self, tensor: Tensor) -> tuple[str, ...]:
        """Return why a tensor is on its backend, as text for errors."""
        cause = self.asg.cause(tensor)
        return () if cause is None else (f"'{tensor.name}': {cause.text} ({cause.value})",)

    # -- waits ---------------------------------------------------------------

    def synchronize(self, i_split: int, backend_id: int, place: str) -> None:
        """Make the host wait for all work of a backend."""
        log, counts = self.log, self._counts
        if counts is not None:
            self.machine.backends[backend_id].synchronize()
            counts.n_waits += 1
            return
        start_s = log.now()
        self.machine.backends[backend_id].synchronize()
        log.waited(i_split, "synchronize", backend_id, None, start_s)

    def host_wait(self, i_split: int, backend_id: int, place: str) -> None:
        """Make the host wait until a backend's last use of this pipeline copy is done."""
        event = self.events[backend_id][self.cur_copy]
        if event is None:
            SplitRun.synchronize(self, i_split, backend_id, place)
            return
        start_s = self.log.now()
        event.synchronize()
        self.log.waited(i_split, "event_synchronize", backend_id, self.cur_copy, start_s)

    def stream_wait(self, i_split: int, backend_id: int, place: str) -> None:
        """Make a backend wait until its last use of this pipeline copy is done; without events the host waits."""
        event = self.events[backend_id][self.cur_copy]
        if event is None:
            SplitRun.synchronize(self, i_split, backend_id, place)
            return
        start_s = self.log.now()
        self.machine.backends[backend_id].event_wait(event)
        self.log.waited(i_split, "event_wait", backend_id, self.cur_copy, start_s)

    def read_wait(self, backend_id: int) -> None:
        """Make the host wait for the data that it reads."""
        self.machine.backends[backend_id].synchronize()

    def mark_wait(self, backend_id: int, queue: CopyQueue | None, mark: Mark, place: str) -> None:
        """Make a stream of a backend or queue wait for a mark of another; without events the host waits."""
        stream = self._stream(backend_id, queue)
        if mark.stream is None or mark.stream is stream:
            return
        start_s = self.log.now()
        if mark.event is None:
            mark.stream.synchronize()
        else:
            stream.event_wait(mark.event)
        self.log.waited_for_mark(self.i_split, backend_id, queue, mark, start_s)

    # -- reading -------------------------------------------------------------

    def read(self, i_split: int, tensor: Tensor, backend_id: int, address: int | None) -> None:
        """Read a tensor of a backend to host memory, and wait for it; without an address only report the read."""
        start_s = self.log.now()
        if address is not None:
            self.machine.backends[backend_id].get_tensor_async(tensor, address, 0, tensor.nbytes)
        self.read_wait(backend_id)
        self.log.was_read(i_split, tensor, backend_id, start_s)

    # -- launches ------------------------------------------------------------

    def launch(self, i_split: int, backend_id: int, graph: GraphView) -> None:
        """Submit nodes of a split to its backend."""
        start_s = self.log.now()
        self.machine.backends[backend_id].graph_compute(graph)
        self.log.launched(i_split, backend_id, graph, self.asg, start_s)

    # -- transfers -----------------------------------------------------------

    def copy(self, source: Tensor, copy: Tensor) -> None:
        """Copy a tensor without streams."""
        tensor_copy(source, copy)

    def report_whole(
        self, transfer: Transfer, i_split: int, reason: CopyReason, start_s: float, *, is_async: bool
    ) -> None:
        """Report that a transfer's whole source was copied."""
        n = transfer.source.nbytes
        if transfer.has_later_readers:
            self._note(transfer, 0, n)
        self.log.copied(transfer, i_split, transfer.source_id, reason, start_s, 0, n, n, is_async=is_async)

    def report(
        self, transfer: Feed, i_split: int, src: int, reason: CopyReason, start_s: float, offset: int, size: int,
        tensor_bytes: int, *, is_async: bool, queue: CopyQueue | None, is_own: bool,
    ) -> None:  # fmt: skip
        """Report that bytes of a transfer were sent to the input copy or to the policy's own memory."""
        if not is_own and isinstance(transfer, Transfer) and transfer.has_later_readers:
            self._note(transfer, offset, size)
        self.log.copied(
            transfer, i_split, src, reason, start_s, offset, size, tensor_bytes,
            is_async=is_async, number=0 if queue is None else queue.number, is_own=is_own,
        )  # fmt: skip

    def _note(self, transfer: Transfer, offset: int, size: int) -> None:
        self._present.setdefault(transfer.copy, Ranges()).add(offset, offset + size)

    def missing(self, further: Transfer) -> set[int]:
        """Return the experts that a later reader of an input copy needs and lacks."""
        present = self._present.setdefault(further.copy, Ranges())
        weight = further.source
        if present.first_hole(0, weight.nbytes) is None:
            return set()
        ids = further.ids_tensor
        if ids is None:
            needed = set(range(weight.ne[2]))
        elif ids.is_empty:
            return set()
        else:
            needed = self.ids.used(self, further.split, ids, further.backend_id, weight)
        size = weight.nbytes - (weight.ne[2] - 1) * weight.nb[2]
        return {e for e in needed if present.first_hole(e * weight.nb[2], e * weight.nb[2] + size) is not None}

    # -- queues and memory of the policy's own -------------------------------

    def before_send(
        self, transfer: Feed, other: Tensor | None, queue: CopyQueue | None, *, is_read: bool = False
    ) -> Backend:
        """Wait as the target and source require, and return the stream to send with."""
        if other is None and queue is None:
            return transfer.backend
        b = transfer.backend_id
        if queue is not None:
            if queue.of != b:
                raise SchedError(f"{queue!r} is no queue of {transfer.backend.name}", hint="Plan.queue(backend)")
            if (other is None or is_read) and queue not in self._forked:
                self._forked.add(queue)
                self._let_wait(b, None, queue, "fork")
        if other is not None:
            own = self.resources.owned.get(other)
            if own is None:
                raise SchedError(f"'{other.name}' is not memory of the policy's own", hint="ask for it: Plan.memory")
            if own.has_queues:
                self.mark_wait(b, queue, own.written, "own_written")
                if not is_read:
                    self.mark_wait(b, queue, own.read, "own_read")
            elif queue is not None:
                raise SchedError(f"'{other.name}' was lent without queues, and {queue!r} is to use it")
        return self._stream(b, queue)

    def send_for(self, src_id: int, backend_id: int, queue: CopyQueue | None) -> Backend:
        """Make a device that copies to another wait until the receiving stream is there, and return its stream."""
        mark = self.resources.mark(f"peer {src_id}", queue if queue is not None else backend_id)
        self._record(backend_id, queue, mark)
        self.mark_wait(src_id, None, mark, "peer")
        return self.machine.backends[src_id]

    def after_send(
        self, transfer: Feed, other: Tensor | None, queue: CopyQueue | None, *, is_read: bool = False
    ) -> None:
        """Mark the memory that a send used, for its next users."""
        if other is not None:
            own = self.resources.owned[other]
            if not own.has_queues:
                return
            mark = own.read if is_read else own.written
            self.mark_wait(transfer.backend_id, queue, mark, "own_order")  # one mark stands for all before it
            self._record(transfer.backend_id, queue, mark)
        if queue is not None and (other is None or is_read):
            self._joins.add(queue)

    def join_queues(self, backend_id: int) -> None:
        """Make the split's backend wait for the queues that send to it."""
        for queue in sorted(self._joins, key=lambda q: q.number):
            mark = self.resources.mark("join", queue)
            self._record(backend_id, queue, mark)
            self.mark_wait(backend_id, None, mark, "join")
        self._joins.clear()
        self._forked.clear()

    def _let_wait(self, backend_id: int, stream: CopyQueue | None, waiting: CopyQueue, what: str) -> None:
        """Make a queue wait for all submitted work of another stream."""
        mark = self.resources.mark(what, waiting)
        self._record(backend_id, stream, mark)
        self.mark_wait(backend_id, waiting, mark, what)

    def _record(self, backend_id: int, queue: CopyQueue | None, mark: Mark) -> None:
        mark.stream = self._stream(backend_id, queue)
        if mark.event is not None:
            mark.stream.event_record(mark.event)
        self.log.marked(backend_id, queue, mark)

    def _stream(self, backend_id: int, queue: CopyQueue | None) -> Backend:
        return self.machine.backends[backend_id] if queue is None else queue.backend


def compute_splits(run: SplitRun) -> None:
    """Compute all splits of an allocated graph.

    Raises
    ------
    ComputeError
        A backend failed; no later split was computed, and no event recorded for the one that failed.
    ExpertIdError
        An id is out of range; nothing was computed after the ids were read.

    Notes
    -----
    Mirrors `ggml_backend_sched_compute_splits`.
    """
    plan, dialect, log, policy = run.plan, run.machine.dialect, run.log, run.policy
    repairs, transfers = run.repairs, plan.all_transfers
    is_observed = log.observers is not None
    before_split = policy.before_split if policy.overrides("before_split") else None
    after_split = policy.after_split if policy.overrides("after_split") else None
    run.ids.begin()
    log.began(run)
    previous: int | None = None
    plan.slot.run = run
    try:
        for i_split, split in enumerate(plan.splits):
            run.i_split = i_split
            b = split.backend_id
            if before_split is not None:
                before_split(i_split)
            if dialect.wait_previous_split and not split.inputs and previous is not None and previous != b:
                # the allocator may have given both splits the same memory
                run.host_wait(i_split, previous, "previous_split")
            for transfer in transfers.by_split[i_split]:
                _transfer(run, transfer)
            if repairs.shared_experts:
                for further in transfers.further.get(i_split, ()):
                    missing = run.missing(further)
                    if missing:
                        further.offer(policy.copy, missing)
            if run._joins:
                run.join_queues(b)
            if is_observed:
                log.will_launch(run, i_split)
            if run.eval_callback is None:
                run.launch(i_split, b, split.graph)
            else:
                _launch_in_parts(run, i_split, run.eval_callback)
            if is_observed:
                log.has_launched(run, i_split)
            if repairs.stale_ids and i_split in transfers.written_ids:
                run.ids.forget(transfers.written_ids[i_split])
            for transfer in transfers.overwritten.get(i_split, ()):
                _copy_again(run, i_split, transfer)
            if after_split is not None:
                after_split(i_split)
            event = run.events[b][run.cur_copy]
            if event is not None and (split.inputs or dialect.record_every_split):
                start_s = log.now()
                run.machine.backends[b].event_record(event)
                log.recorded_event(i_split, b, run.cur_copy, start_s)
            previous = b
    finally:
        plan.slot.run = None


def _transfer(run: SplitRun, transfer: Transfer) -> None:
    """Copy an input to its split's backend: a user's input at once, any other with the policy."""
    i_split, b, source = transfer.split, transfer.backend_id, transfer.source
    storage = source.storage
    if storage is not None and storage.is_closed:
        storage.check_open(source)  # raises; copies only use its address
    if transfer.kind == "input":
        # at once: the user may overwrite an input as soon as compute_async returns
        run.host_wait(i_split, b, "input")
        start_s = run.log.now()
        run.copy(source, transfer.copy)
        run.report_whole(transfer, i_split, "input", start_s, is_async=False)
        return
    run.stream_wait(i_split, b, "copy")
    transfer.offer(run.policy.copy)


def _copy_again(run: SplitRun, i_split: int, transfer: Transfer) -> None:
    """Copy a source again that a split wrote, for later users of its input copy."""
    run.synchronize(i_split, run.plan.splits[i_split].backend_id, "again")
    run.synchronize(i_split, transfer.backend_id, "again")
    start_s = run.log.now()
    run.copy(transfer.source, transfer.copy)
    run.report_whole(transfer, i_split, "activation", start_s, is_async=False)


def _launch_in_parts(run: SplitRun, i_split: int, callback: EvalCallback) -> None:
    """Submit a split's nodes to its backend in parts that end where the eval callback needs data."""
    split = run.plan.splits[i_split]
    nodes = split.graph.nodes
    start = 0
    while start < len(nodes):
        end = start
        wanted = _call_back(run, i_split, callback, nodes[end], ask=True)
        while not wanted and end + 1 < len(nodes):
            end += 1
            wanted = _call_back(run, i_split, callback, nodes[end], ask=True)
        run.launch(i_split, split.backend_id, split.graph.view(start, end + 1))
        run.synchronize(i_split, split.backend_id, "part")
        if wanted and not _call_back(run, i_split, callback, nodes[end], ask=False):
            return
        start = end + 1


def _call_back(run: SplitRun, i_split: int, callback: EvalCallback, node: Tensor, *, ask: bool) -> bool:
    start_s = run.log.now()
    answer = callback(node, ask)
    run.log.called_back(i_split, node, start_s, asked=ask, answer=bool(answer))
    return answer
