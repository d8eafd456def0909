"""Computing: copy each split's inputs, wait as little as is safe, launch, and mark the end by an event."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..backend import Event
from ..buffer import tensor_copy
from ..graph import GraphView
from ..record import CopyReason
from ..tensor import Tensor
from ..types import BufferUsage, TensorFlag
from .log import RunLog
from .policies import InputCopier, is_host_weight
from .state import Assignment, Copies, Machine, Split

__all__ = ["EvalCallback", "SplitRun", "compute_splits"]

#: Called with a node and True: is its data wanted? Then, if so, with False once it is there: False ends the split.
EvalCallback = Callable[[Tensor, bool], bool]


@dataclass(slots=True)
class SplitRun:
    """All that one computing of an allocated graph needs; what an `InputCopier` is given.

    Attributes
    ----------
    log : RunLog
        Is told of every copy, wait and launch.
    rewritten : mapping of int to sequence of (Tensor, int)
        By split, which sources its nodes write that were copied before to a backend where they are read again.
    """

    machine: Machine
    splits: Sequence[Split]
    copies: Copies
    asg: Assignment
    cur_copy: int
    events: Sequence[Sequence[Event | None]]
    copier: InputCopier
    eval_callback: EvalCallback | None
    log: RunLog
    rewritten: Mapping[int, Sequence[tuple[Tensor, int]]]

    def copy_of(self, tensor: Tensor, backend_id: int) -> Tensor:
        """Return the current copy of a split input on a backend."""
        return self.copies[tensor][backend_id][self.cur_copy]

    def original_of(self, tensor: Tensor) -> Tensor:
        """Return what a tensor is a copy of; itself if it is none."""
        for source, by_backend in self.copies.items():
            if any(tensor is made[self.cur_copy] for made in by_backend.values()):
                return source
        return tensor

    def copy_order(self, split: Split) -> Sequence[int]:
        """Return the indices of a split's inputs in the order of copying (`Dialect.host_weights_last`)."""
        order = range(len(split.inputs))
        if not self.machine.dialect.host_weights_last or len(order) < 2:
            return order
        return sorted(order, key=lambda i: is_host_weight(split.inputs[i]))

    def not_yet_copied(self, split: Split, i_input: int) -> list[Tensor]:
        """Return the inputs whose turn comes after one."""
        order = self.copy_order(split)
        return [split.inputs[i] for i in order[order.index(i_input) + 1 :]]

    def causes_of(self, tensor: Tensor) -> tuple[str, ...]:
        """Return why a tensor is where it is, as text for errors."""
        cause = self.asg.cause(tensor)
        return () if cause is None else (f"'{tensor.name}': {cause.text} ({cause.value})",)

    # -- waits ---------------------------------------------------------------

    def synchronize(self, i_split: int, backend_id: int) -> None:
        """Let the host wait for all work of a backend."""
        start_s = self.log.now()
        self.machine.backends[backend_id].synchronize()
        self.log.waited(i_split, "synchronize", backend_id, None, start_s)

    def host_wait(self, i_split: int, backend_id: int) -> None:
        """Let the host wait until a backend's last use of this pipeline copy is over."""
        event = self.events[backend_id][self.cur_copy]
        if event is None:
            self.synchronize(i_split, backend_id)
            return
        start_s = self.log.now()
        event.synchronize()
        self.log.waited(i_split, "event_synchronize", backend_id, self.cur_copy, start_s)

    def stream_wait(self, i_split: int, backend_id: int) -> None:
        """Let a backend wait until its last use of this pipeline copy is over; without events the host waits."""
        event = self.events[backend_id][self.cur_copy]
        if event is None:
            self.synchronize(i_split, backend_id)
            return
        start_s = self.log.now()
        self.machine.backends[backend_id].event_wait(event)
        self.log.waited(i_split, "event_wait", backend_id, self.cur_copy, start_s)


def compute_splits(run: SplitRun) -> None:
    """Compute all splits of an allocated graph.

    Raises
    ------
    ComputeError
        A backend failed; no later split was computed, and no event recorded for the one that failed.
    ExpertIdError
        Ids that choose no expert; nothing was computed after they were read.

    Notes
    -----
    Mirrors `ggml_backend_sched_compute_splits`.
    """
    run.copier.begin()
    dialect = run.machine.dialect
    check = run.log.copy_check
    if check is not None:
        check.begin()
    previous: int | None = None
    for i_split, split in enumerate(run.splits):
        b = split.backend_id
        if dialect.wait_previous_split and not split.inputs and previous is not None and previous != b:
            # the allocator may have given both splits the same memory
            run.host_wait(i_split, previous)
        for i_input in run.copy_order(split):
            _copy_input(run, i_split, i_input)
        run.copier.before_compute(run, i_split)
        if check is not None:
            check.before_launch(run, i_split)
        _launch(run, i_split)
        run.copier.after_compute(run, i_split)
        if check is not None:
            check.after_launch(run, i_split)
        for tensor, backend_id in run.rewritten.get(i_split, ()):
            _copy_again(run, i_split, tensor, backend_id)
        event = run.events[b][run.cur_copy]
        if event is not None and (split.inputs or dialect.record_every_split):
            start_s = run.log.now()
            run.machine.backends[b].event_record(event)
            run.log.recorded_event(i_split, b, run.cur_copy, start_s)
        previous = b


def _copy_input(run: SplitRun, i_split: int, i_input: int) -> None:
    split = run.splits[i_split]
    b = split.backend_id
    tensor = split.inputs[i_input]
    copy = run.copy_of(tensor, b)
    source = run.asg.ids[tensor]
    storage = tensor.storage
    if storage is not None:
        storage.check_open(tensor)  # its address is all that copiers use
    if tensor.flags & TensorFlag.INPUT:
        # at once: the user may overwrite an input as soon as compute_async returns
        run.host_wait(i_split, b)
        start_s = run.log.now()
        tensor_copy(tensor, copy)
        run.log.copied(i_split, tensor, source, b, "input", start_s, is_async=False)
        return
    run.stream_wait(i_split, b)
    if run.copier.copy_input(run, i_split, i_input):
        return
    is_weight = tensor.buffer is not None and tensor.buffer.usage is BufferUsage.WEIGHTS
    start_s = run.log.now()
    is_async = run.machine.backends[b].cpy_tensor_async(run.machine.backends[source], tensor, copy)
    if not is_async:
        run.synchronize(i_split, source)
        run.host_wait(i_split, b)
        start_s = run.log.now()
        tensor_copy(tensor, copy)
    reason: CopyReason = "weight" if is_weight else "activation"
    run.log.copied(i_split, tensor, source, b, reason, start_s, is_async=is_async)


def _copy_again(run: SplitRun, i_split: int, tensor: Tensor, backend_id: int) -> None:
    """Copy a source that a split wrote, for the later users of its copy."""
    run.synchronize(i_split, run.splits[i_split].backend_id)
    run.synchronize(i_split, backend_id)
    start_s = run.log.now()
    tensor_copy(tensor, run.copy_of(tensor, backend_id))
    source = run.asg.ids[tensor]
    run.log.copied(i_split, tensor, source, backend_id, "activation", start_s, is_async=False)


def _launch(run: SplitRun, i_split: int) -> None:
    """Give a split's nodes to its backend: all at once, or in parts that end where the eval callback wants data."""
    split = run.splits[i_split]
    callback = run.eval_callback
    if callback is None:
        _compute(run, i_split, split.graph)
        return
    nodes = split.graph.nodes
    start = 0
    while start < len(nodes):
        end = start
        wanted = _call_back(run, i_split, callback, nodes[end], ask=True)
        while not wanted and end + 1 < len(nodes):
            end += 1
            wanted = _call_back(run, i_split, callback, nodes[end], ask=True)
        _compute(run, i_split, split.graph.view(start, end + 1))
        run.synchronize(i_split, split.backend_id)
        if wanted and not _call_back(run, i_split, callback, nodes[end], ask=False):
            return
        start = end + 1


def _call_back(run: SplitRun, i_split: int, callback: EvalCallback, node: Tensor, *, ask: bool) -> bool:
    start_s = run.log.now()
    answer = callback(node, ask)
    run.log.called_back(i_split, node, start_s, asked=ask, answer=bool(answer))
    return answer


def _compute(run: SplitRun, i_split: int, graph: GraphView) -> None:
    backend_id = run.splits[i_split].backend_id
    start_s = run.log.now()
    run.machine.backends[backend_id].graph_compute(graph)
    run.log.launched(i_split, backend_id, graph, run.asg, start_s)
