"""`Ledger`: statistics, records and virtual time of llama.cpp's scheduler, from the calls of its devices; in the child.

Devices receive calls: bytes written, read and copied, graphs to compute, waits. From these the ledger derives the
split, the reason and the virtual time of each copy, and reports them through `RunLog` like pyggml's own scheduler. The
calls contain enough: an input copy is named ``SIM0#blk.0.ffn_up_exps.weight#0``, splits of a graph are consecutive in
memory, and an expert weight is sent in parts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np

from ..backend import Device
from ..backends.host.machine import bytes_at
from ..backends.sim.device import SimDevice
from ..buffer import Buffer
from ..clock import VirtualClock
from ..graph import GraphView
from ..opset import expert_sources
from ..record import (
    AssignRecord,
    CopyReason,
    CopyRecord,
    Identity,
    MicroBatchRecord,
    Observers,
    Record,
    SplitInput,
    SplitRecord,
    Statistics,
    UsedExpertsRecord,
    WaitRecord,
)
from ..sched.experts import used_experts
from ..sched.ids import IdsSource
from ..sched.log import RunLog, Wait
from ..sched.state import Assignment, is_computed
from ..sched.state import Machine as SchedMachine
from ..sched.transfer import Transfer
from ..tensor import Tensor
from ..types import BufferUsage, Type

__all__ = ["Compute", "ComputedBatch", "Ledger", "copied_name"]

#: Split number of records whose split is not known before its launch.
_NEXT = -1
_POINTER_BYTES = 8


@dataclass(frozen=True, slots=True)
class ComputedBatch:
    """The result of one micro-batch; see `pyggml.session.BatchRecord`."""

    n_tokens: int
    n_outputs: int
    n_past: int
    splits: dict[str, int]  #: by backend
    n_inputs: int
    n_nodes: int
    is_reused: bool
    seconds: float
    bytes_copied: int
    bytes_full: int
    virtual_s: float | None


@dataclass(frozen=True, slots=True)
class _Sent:
    """Stands for a `Transfer`: what `RunLog` reads of one."""

    source: Tensor
    backend_id: int


@dataclass(frozen=True, slots=True)
class _Named:
    """Stands for a `Backend`: what `RunLog` reads of one."""

    name: str
    device: Device


class _NoCauses:
    """Stands for an `Assignment`: llama.cpp has no causes."""

    def cause_counts(self, _: GraphView) -> tuple[tuple[str, int], ...]:
        return ()


class _Ids(IdsSource):
    """Knows the number of experts that ids choose, by name; an input copy has its source's name."""

    def __init__(self) -> None:
        super().__init__()
        self.n_used: dict[str, int] = {}

    def count(self, node: Tensor) -> float:
        """Return the number of experts that a node reads: as copied, else by the default routing."""
        _, ids = expert_sources(node)
        known = self.n_used.get(copied_name(ids.name) or ids.name)
        return super().count(node) if known is None else known


class _Tally(NamedTuple):
    """The splits of a graph by backend, the number of their inputs, and its nodes."""

    splits: dict[str, int]
    n_inputs: int
    n_nodes: int


@dataclass(frozen=True, slots=True)
class Compute:
    """What a compute of a reused graph leaves in a ledger before it is finished."""

    first: tuple[int, int]
    next_nodes: int
    is_over: bool
    splits: list[_Split]
    made: list[set[str]]
    tally: _Tally


@dataclass(slots=True)
class _Split:
    backend_id: int
    views: list[GraphView] = field(default_factory=list)
    inputs: list[tuple[Tensor, CopyReason, int]] = field(default_factory=list)


class _Mark(NamedTuple):
    """Values of the counters at one time."""

    time_s: float
    virtual_s: float
    bytes_copied: int
    bytes_full: int


def copied_name(name: str) -> str | None:
    """Return the source's name of an input copy; None for any other tensor.

    Notes
    -----
    Only here a name decides. The library's scheduler makes a copy with `ggml_dup_tensor_layout` and keeps in itself what
    it is a copy of; a device gets the tensor, which refers to no source, and an address of host memory. Its name,
    "backend#source#number", is all that tells (`ggml_backend_sched_split_graph`).

    Examples
    --------
    >>> copied_name("SIM0#blk.0.ffn_up_exps.weight#0"), copied_name("ffn_out-0"), copied_name("a#b")
    ('blk.0.ffn_up_exps.weight', None, None)
    """
    parts = name.split("#")
    return "#".join(parts[1:-1]) if len(parts) >= 3 else None


class Ledger:
    """Receives the devices' calls and reports them.

    Parameters
    ----------
    devices : sequence of Device
        In llama.cpp's order, the CPU last.
    host_at : callable
        Returns the stand-in for the host buffer at an address.
    clock : VirtualClock or None
        Virtual clock of the same devices.
    takes_records : bool
        Whether to keep records.
    n_copies : int
        Events of each scheduler and device (`GGML_SCHED_MAX_COPIES`).

    Attributes
    ----------
    stats : Statistics
        As a `Scheduler` keeps it.
    batches : list of ComputedBatch
        Micro-batches of the latest decode.
    splits : list of (str, int)
        Backend of each split of the latest graph, and the number of its copied inputs.
    """

    n_copies = 4

    def __init__(
        self, devices: Sequence[Device], host_at: Any, *, clock: VirtualClock | None, takes_records: bool
    ) -> None:
        self.names = [d.name for d in devices]
        self._devices = devices
        self.cpu = len(devices) - 1
        self._host_at = host_at
        self.stats, self.clock, self._ids = Statistics(), clock, _Ids()
        self.records: list[Record] = []
        self.takes_records = takes_records
        self._pending: list[Record] = []  # of the split that is launched next
        machine = cast(SchedMachine, _Machine([_Named(d.name, d) for d in devices]))
        observers = Observers([_Taker(self._pending)]) if takes_records else None
        self._log = RunLog(machine, self.stats, observers, clock, self._ids)
        self.batches: list[ComputedBatch] = []
        self._expected: list[tuple[int, int, int]] = []  # tokens, past, outputs of micro-batches to come
        self._splits: list[_Split] = []
        self._tally: _Tally | None = None  # of those of a compute before, or counted when it is finished
        self._body: list[Record] = []  # records of the current compute
        self._n_graphs = self._n_runs = 0
        self._inputs: list[tuple[Tensor, CopyReason, int]] = []
        self._made: list[set[str]] = []  # names of nodes computed so far
        self._next_nodes = 0  # address of the nodes of this graph's next split
        self._first: tuple[int, int] = (0, 0)
        self._is_reused = False
        self._is_computing = self._looks_away = self._is_over = False
        self._experts: tuple[str, int] | None = None  # weight that is being sent in parts, and its split
        self._ids_read: tuple[Tensor, int] | None = None
        self._used: set[int] = set()
        self._reasons: dict[Tensor, CopyReason] = {}
        self._sources: dict[tuple[Tensor, int], Tensor] = {}  # of copies from host memory, by their place and address
        self._mark = self._start = self._counters()

    # -- the session's side --------------------------------------------------

    def now(self) -> float:
        """Return the host's time in seconds; 0 if no records are kept."""
        return self._log.now()

    def begin(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """Begin a decode of micro-batches: tokens, tokens in the cache before, and outputs of each."""
        self.batches, self._expected = [], list(parts)
        self._mark = self._counters()

    def end(self) -> None:
        """End a decode: llama.cpp has waited for all work."""
        self._mark = self._counters()
        self._finish()
        self._inputs, self._experts = [], None  # of a split that was not launched

    def forget(self) -> None:
        """Forget tensors in host memory, because a buffer was freed or added."""
        self._sources.clear()
        self._reasons.clear()

    def take_records(self) -> list[Record]:
        """Return the records since the last call."""
        records, self.records = self.records + self._pending, []
        self._pending.clear()
        return records

    def counters(self) -> list[tuple[Any, str]]:
        """Return what calls count: an object and the name of the attribute, or a dict and the key."""
        stats = self.stats
        found: list[tuple[Any, str]] = [(stats.bytes_by_reason, reason) for reason in stats.bytes_by_reason]
        found += [(stats, name) for name in Statistics.__slots__ if name != "bytes_by_reason"]
        return found + [c for d in self._devices if isinstance(d, SimDevice) for c in d.counters()]

    def compute(self) -> Compute | None:
        """Return what the current compute has left, if it is one of a reused graph."""
        if not self._is_reused or self._inputs or self._experts is not None:
            return None
        return Compute(self._first, self._next_nodes, self._is_over, self._splits, self._made, self._count())

    def repeats(self, compute: Compute) -> bool:
        """Begin a compute as one before left it; False, and nothing is changed, if another graph was computed last."""
        if self._is_computing or compute.first != self._first:
            return False
        self._begin(0, 0)
        self._is_reused, self._first, self._next_nodes = True, compute.first, compute.next_nodes
        self._is_over, self._splits, self._made = compute.is_over, compute.splits, compute.made
        self._tally = compute.tally
        return True

    def place(self) -> tuple[int, int]:
        """Return the indices of the current micro-batch and split."""
        if self._is_computing and not self._is_over:
            return len(self.batches), len(self._splits)
        return len(self.batches) + int(self._is_computing), 0

    def count_splits(self) -> tuple[dict[str, int], int]:
        """Return the splits of the latest graph by backend, and the number of their inputs."""
        tally = self._tally or self._count()
        return tally.splits, tally.n_inputs

    def _count(self) -> _Tally:
        by_name = dict(Counter(self.names[split.backend_id] for split in self._splits))
        n_nodes = sum(len(view) for split in self._splits for view in split.views)
        return _Tally(by_name, sum(len(s.inputs) for s in self._splits), n_nodes)

    @contextmanager
    def looks_away(self) -> Iterator[None]:
        """Ignore reads within the block, which are not the scheduler's."""
        self._looks_away = True
        try:
            yield
        finally:
            self._looks_away = False

    @property
    def _is_idle(self) -> bool:
        """Return whether calls do not belong to a decode."""
        return self._looks_away or not (self._expected or self._is_computing)

    def _counters(self) -> _Mark:
        virtual_s = 0.0 if self.clock is None else self.clock.host_s
        return _Mark(time.perf_counter(), virtual_s, self.stats.bytes_copied, self.stats.bytes_full)

    # -- copies --------------------------------------------------------------

    def wrote(
        self, index: int, dst: Tensor, address: int, offset: int, size: int, start_s: float, *, is_async: bool
    ) -> None:
        """Receive a copy from host memory."""
        name = copied_name(dst.name)
        if name is None or self._is_idle:
            return
        source = self._sources.get((dst, address))
        if source is None:
            source = self._sources[dst, address] = self._source(dst, name, self._host_at(address))
        if is_async and source.buffer is not None and source.buffer.usage is BufferUsage.WEIGHTS:
            self._sent_experts(index, source, offset, size, start_s)
            return
        self._copied(index, self.cpu, source, offset, size, start_s, is_async=is_async)

    def moved(
        self, src_index: int | None, dst_index: int, src: Tensor, dst: Tensor, start_s: float, *, is_async: bool
    ) -> None:
        """Receive a copy of a tensor from another device or the same (None: the device of the memory)."""
        name = copied_name(dst.name)
        if name is None or src_index is None:
            return
        self._copied(
            dst_index, src_index, self._source(dst, name, src.buffer), 0, src.nbytes, start_s, is_async=is_async
        )

    def read(self, index: int, src: Tensor, address: int, size: int, start_s: float, *, is_async: bool) -> None:
        """Receive a copy to host memory: a split's input, or results and ids for the host."""
        if self._is_idle:
            return
        if not is_async:
            self._copied(self.cpu, index, src, 0, size, start_s, is_async=False)
            return
        if src.type is Type.I32:
            self._ids_read, self._experts = (src, address), None
        else:
            self._is_over = True  # these are the results
        self._log_read(index, src, start_s)

    def _log_read(self, index: int, src: Tensor, start_s: float) -> None:
        n_waits, n_records = self.stats.n_waits, len(self._pending)
        self._log.was_read(None, src, index, start_s)
        self.stats.n_waits = n_waits  # the wait is reported by its own call
        if self.takes_records:
            del self._pending[n_records]

    def _source(self, dst: Tensor, name: str, buffer: Buffer | None) -> Tensor:
        """Return the source of an input copy, for reports."""
        source = Tensor(dst.type, dst.ne, dst.nb, name=name, flags=dst.flags)
        source.buffer = buffer
        return source

    def _reason(self, source: Tensor) -> CopyReason:
        if source.buffer is not None and source.buffer.usage is BufferUsage.WEIGHTS:
            return "weight"
        return "activation" if any(source.name in names for names in self._made) else "input"

    def _copied(
        self, dst: int, src: int, source: Tensor, offset: int, size: int, start_s: float, *, is_async: bool
    ) -> None:
        reason = self._reasons.get(source)
        if reason is None:
            reason = self._reasons[source] = self._reason(source)
        self._inputs.append((source, reason, src))
        sent = cast(Transfer, _Sent(source, dst))
        self._log.copied(sent, _NEXT, src, reason, start_s, offset, size, source.nbytes, is_async=is_async)

    def _sent_experts(self, index: int, weight: Tensor, offset: int, size: int, start_s: float) -> None:
        """Report sent experts; before the first part of a weight, also which experts are used."""
        key = weight.name, len(self._splits)
        if self._experts != key:
            self._experts = key
            self._inputs.append((weight, "experts", self.cpu))
            ids = self._read_ids()
            if ids is not None:
                self._ids.n_used[ids.name] = len(self._used)
            self._log.experts(_NEXT, weight, ids, self._used, is_added=False)
        sent = cast(Transfer, _Sent(weight, index))
        self._log.copied(sent, _NEXT, self.cpu, "experts", start_s, offset, size, weight.nbytes, is_async=True)

    def _read_ids(self) -> Tensor | None:
        """Return the ids that llama.cpp read last, and keep the experts that they name."""
        if self._ids_read is None:
            self._used = set()
            return None
        ids, address = self._ids_read
        if address:
            words = np.frombuffer(bytes_at(address, ids.nbytes), np.int32).tolist()
            strides = ids.nb[0] // 4, ids.nb[1] // 4
            self._used = used_experts(words, n_used=ids.ne[0], n_token=ids.ne[1], strides=strides)
            self._ids_read = ids, 0
        return _renamed(ids, copied_name(ids.name) or ids.name)

    # -- launches and waits --------------------------------------------------

    def launched(self, backend_id: int, view: GraphView, nodes: int, uid: int, start_s: float) -> None:
        """Receive a graph given to a backend: a split or a part of one; see `Translator.view`."""
        if self._is_idle:
            return
        if nodes != self._next_nodes or not self._is_computing:
            self._finish()
            self._begin(nodes, uid)
        if not self._splits or backend_id != self._splits[-1].backend_id or self._inputs:
            self._splits.append(_Split(backend_id))
        split = self._splits[-1]
        split.views.append(view)
        split.inputs += self._inputs
        self._inputs = []
        self._experts = None
        self._next_nodes = nodes + _POINTER_BYTES * len(view)
        names = view.memo.get("names")
        if names is None:
            names = view.memo["names"] = {n.name for n in view.nodes}
        self._made.append(names)
        i_split = len(self._splits) - 1
        self._log.launched(i_split, backend_id, view, cast(Assignment, _NO_CAUSES), start_s)
        if self.takes_records:
            self._body += [_placed(record, i_split) for record in self._pending]
            self._pending.clear()
        self._mark = self._counters()

    def waited(self, what: Wait, backend_id: int, copy: int | None, start_s: float) -> None:
        """Receive a wait of the host for a backend or its event, or of a backend for its event."""
        if not self._is_idle:
            self._log.waited(None, what, backend_id, copy, start_s)

    def recorded_event(self, backend_id: int, copy: int, start_s: float) -> None:
        """Receive an event recorded after a split."""
        if self._is_idle:
            return
        self._log.recorded_event(max(len(self._splits) - 1, 0), backend_id, copy, start_s)

    # -- computes ------------------------------------------------------------

    def _begin(self, nodes: int, uid: int) -> None:
        self._is_reused = uid != 0 and (nodes, uid) == self._first
        self._first = nodes, uid
        self._is_computing, self._is_over = True, False
        self._splits, self._made, self._body, self._tally = [], [], [], None
        self._ids.n_used.clear()
        self._start = self._mark

    def _finish(self) -> None:
        """End the current compute, if any: its batch, its plan, its records."""
        if not self._is_computing:
            return
        self._is_computing = False
        n_tokens, n_past, n_outputs = self._expected.pop(0) if self._expected else (0, 0, 0)
        start, end = self._start, self._mark
        by_name, n_inputs, n_nodes = self._tally or self._count()
        self.batches.append(
            ComputedBatch(
                n_tokens, n_outputs, n_past, by_name, n_inputs, n_nodes, self._is_reused, end.time_s - start.time_s,
                end.bytes_copied - start.bytes_copied, end.bytes_full - start.bytes_full, None if self.clock is None else end.virtual_s - start.virtual_s,
            )
        )  # fmt: skip
        if self.takes_records:
            self._n_graphs += not self._is_reused
            self._n_runs += 1
            of = Identity(i_graph=self._n_graphs - 1, i_run=self._n_runs - 1, i_clock=0)
            plan = [] if self._is_reused else self._plan()
            made = [MicroBatchRecord(n_tokens, n_past, n_outputs), *plan, *self._body]
            self.records += [replace(record, **of) for record in made]
            self._body = []

    def _plan(self) -> list[Record]:
        """Return records of the nodes' backends and of the splits."""
        assigned: list[Record] = []
        splits: list[Record] = []
        i_start = 0
        readers: dict[tuple[int, str], list[Tensor]] = {}  # a copy is made once, and later splits may read it, too
        for split in self._splits:
            for view in split.views:
                for node in view.nodes:
                    for source in node.src:
                        copied = None if source is None else copied_name(source.name)
                        if copied is not None:
                            readers.setdefault((split.backend_id, copied), []).append(node)
        for i, split in enumerate(self._splits):
            nodes = [n for view in split.views for n in view.nodes]
            computed = [n for n in nodes if is_computed(n)]
            name = self.names[split.backend_id]
            assigned += [AssignRecord(n.name, n.op_desc, name, "") for n in computed]
            inputs = tuple(
                self._input(t, kind, src, readers.get((split.backend_id, t.name), [])) for t, kind, src in split.inputs
            )
            first = computed[0] if computed else None
            splits.append(
                SplitRecord(
                    i, name, i_start, i_start + len(nodes), len(computed), "" if first is None else first.name,
                    "" if first is None else first.op_desc, "", inputs,
                )
            )  # fmt: skip
            i_start += len(nodes)
        return assigned + splits

    def _input(self, tensor: Tensor, kind: CopyReason, src: int, readers: list[Tensor]) -> SplitInput:
        buffer = tensor.buffer
        return SplitInput(
            tensor.name, kind, self.names[src], "", "" if buffer is None else buffer.buft.name, tensor.type.ggml_name,
            tuple(tensor.ne), tensor.nbytes, readers[0].name if readers else "", readers[0].op_desc if readers else "",
            "", len(readers),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Machine:
    backends: list[_Named]


class _Taker:
    """Appends each record to a list."""

    def __init__(self, into: list[Record]) -> None:
        self.into = into

    def record(self, record: Record) -> None:
        """Append a record."""
        self.into.append(record)


_NO_CAUSES = _NoCauses()


def _placed(record: Record, i_split: int) -> Record:
    """Return a record with the number of its split."""
    if isinstance(record, CopyRecord | UsedExpertsRecord) and record.split == _NEXT:
        return replace(record, split=i_split)
    if isinstance(record, WaitRecord) and record.split is None:
        return replace(record, split=i_split)
    return record


def _renamed(tensor: Tensor, name: str) -> Tensor:
    """Return an equal tensor with another name."""
    made = Tensor(tensor.type, tensor.ne, tensor.nb, name=name)
    made.buffer = tensor.buffer
    return made
