"""Records of what the scheduler did, and the `Recorder` that takes them.

Reports, traces and timelines are made from records and from nothing else. A record is a value; whoever keeps it keeps
no memory alive but the names in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .notebook import Bar, html_table

if TYPE_CHECKING:
    from .clock import Span
    from .sched.compute import SplitRun
    from .sched.transfer import Transfer

__all__ = [
    "AllocPurpose",
    "AllocRecord",
    "AssignRecord",
    "CallbackRecord",
    "ComputeRecord",
    "CopyRecord",
    "EventRecord",
    "MicroBatchRecord",
    "Observer",
    "Observers",
    "ReadRecord",
    "Record",
    "Recorder",
    "Recording",
    "SplitInput",
    "SplitRecord",
    "Statistics",
    "UsedExpertsRecord",
    "WaitRecord",
]

#: Why bytes were copied: a user's input, a result of another backend, a whole weight, or the used experts of one.
CopyReason = Literal["input", "activation", "weight", "experts"]
#: What memory is for: a model's weights, its KV cache, what a scheduler places graphs in, or a copy policy's own.
AllocPurpose = Literal["weights", "kv_cache", "compute", "policy"]


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """Bytes of one split input that went to the split's backend, in one piece."""

    split: int
    tensor: str
    src: str  #: backend that the input is assigned to
    dst: str  #: backend of the split
    offset_bytes: int  #: in the tensor
    size_bytes: int
    tensor_bytes: int  #: what a whole copy would have moved
    reason: CopyReason
    start_s: float  #: of the host's clock, `time.perf_counter`
    end_s: float
    virtual: Span | None = None  #: on the virtual clock, if there is one
    engines: tuple[str, ...] = ()  #: copy engines of simulated devices that carry it, in virtual time


@dataclass(frozen=True, slots=True)
class UsedExpertsRecord:
    """The experts of one weight that a split needs; the records of their copies follow."""

    split: int
    tensor: str
    ids: str  #: the tensor they were read from
    used: tuple[int, ...]
    n_expert: int
    expert_bytes: int
    tensor_bytes: int  #: what a whole copy would have moved; 0 if experts are added to an earlier copy


@dataclass(frozen=True, slots=True)
class ComputeRecord:
    """Nodes of one split given to its backend (the whole split, or a part under an eval callback)."""

    split: int
    backend: str
    n_nodes: int
    first: str  #: name of the first node
    start_s: float
    end_s: float  #: when the call returned; the work may go on
    virtual: Span | None = None  #: of the work itself
    causes: tuple[tuple[str, int], ...] = ()  #: why its nodes are there, and how many for each cause


@dataclass(frozen=True, slots=True)
class WaitRecord:
    """Take note that the host, or a backend, waited."""

    split: int | None  #: None: at the end of a computing, or between two
    what: Literal["synchronize", "event_synchronize", "event_wait"]
    backend: str
    start_s: float
    end_s: float
    virtual: Span | None = None
    copy: int | None = None  #: of the event waited for; see `EventRecord`


@dataclass(frozen=True, slots=True)
class EventRecord:
    """A backend was told to mark what it was given so far, for others to wait for."""

    split: int
    backend: str
    copy: int  #: pipeline copy of the inputs that the event stands for
    start_s: float
    end_s: float
    virtual: Span | None = None  #: the moment at which the backend comes to the mark


@dataclass(frozen=True, slots=True)
class ReadRecord:
    """The host read a tensor from a backend: ids, or results."""

    tensor: str
    backend: str
    size_bytes: int
    start_s: float
    end_s: float
    virtual: Span | None = None
    engines: tuple[str, ...] = ()  #: as a copy's


@dataclass(frozen=True, slots=True)
class AllocRecord:
    """What is held of one buffer type for one purpose, from now on: after an allocation, a reserve, or giving it back."""

    graph: str  #: name of the last node of the graph that needed it; empty for weights and KV cache
    backend: str  #: whose memory it is; host memory is the last backend's
    buft: str
    size_bytes: int  #: in all; 0: it was given back
    purpose: AllocPurpose = "compute"
    start_s: float = 0.0
    end_s: float = 0.0
    virtual: Span | None = None  #: the moment: allocating takes no virtual time


@dataclass(frozen=True, slots=True)
class AssignRecord:
    """A node that will be computed, and why where; recorded when its graph is split."""

    tensor: str
    op: str
    backend: str
    cause: str  #: upstream's note, as `Cause` has it
    start_s: float = 0.0  #: of splitting the graph
    end_s: float = 0.0
    virtual: Span | None = None  #: the moment: deciding takes no virtual time


@dataclass(frozen=True, slots=True)
class SplitInput:
    """A tensor that a split needs on its backend and that is elsewhere."""

    tensor: str
    kind: CopyReason  #: experts: of this weight the used ones are enough
    src: str  #: backend that it is assigned to
    cause: str  #: why it is there, upstream's note
    buft: str  #: memory in which it lies already; empty if it has none yet
    type: str
    ne: tuple[int, ...]
    size_bytes: int  #: of all of it
    user: str  #: first node of the backend that reads it
    user_op: str
    user_cause: str  #: why that node is on the backend
    n_users: int


@dataclass(frozen=True, slots=True)
class SplitRecord:
    """One split of a graph; recorded when the graph is split, after the assignments of its nodes."""

    split: int
    backend: str
    i_start: int
    i_end: int
    n_nodes: int  #: that are computed
    first: str  #: name of the first of them
    op: str
    cause: str  #: why that one is on the backend, upstream's note
    inputs: tuple[SplitInput, ...]


@dataclass(frozen=True, slots=True)
class MicroBatchRecord:
    """A session turns to the next tokens; what follows is recorded for them."""

    n_tokens: int
    n_past: int  #: tokens in the cache before
    n_outputs: int  #: tokens whose logits are wanted


@dataclass(frozen=True, slots=True)
class CallbackRecord:
    """One call of the eval callback."""

    split: int
    tensor: str
    asked: bool  #: whether the data is wanted; else it was there
    answer: bool
    start_s: float
    end_s: float
    virtual: Span | None = None  #: the moment; the callback itself takes no virtual time


Record = (
    CopyRecord
    | UsedExpertsRecord
    | ReadRecord
    | ComputeRecord
    | WaitRecord
    | EventRecord
    | AllocRecord
    | AssignRecord
    | CallbackRecord
    | SplitRecord
    | MicroBatchRecord
)


class Recorder(Protocol):
    """Takes records, in the order in which things happened."""

    def record(self, record: Record) -> None:
        """Take one record; must not raise."""


class Observer:
    """Is told what a scheduler does, in the order in which it happens. Override what you want to be told; the rest costs nothing.

    Methods with a record are told after the effect. `on_begin`, `on_sent`, `before_launch` and `after_launch` see the run
    itself, and may raise `SchedError` to end it: the checks of ``PYGGML_CHECK`` are such an observer. No other method may
    raise. An object with a method ``record`` (`Recorder`) is an observer that takes every record.

    Notes
    -----
    After trio's `Instrument`.
    """

    def on_copy(self, record: CopyRecord) -> None:
        """Take note of bytes that were copied."""

    def on_experts(self, record: UsedExpertsRecord) -> None:
        """Take note of experts of a weight that are about to be copied."""

    def on_read(self, record: ReadRecord) -> None:
        """Take note that the host read a tensor."""

    def on_launch(self, record: ComputeRecord) -> None:
        """Take note of nodes that were given to a backend."""

    def on_wait(self, record: WaitRecord) -> None:
        """Take note that the host, or a backend, waited."""

    def on_event(self, record: EventRecord) -> None:
        """Take note of an event that was recorded."""

    def on_callback(self, record: CallbackRecord) -> None:
        """Take note of a call of the eval callback."""

    def on_assign(self, record: AssignRecord) -> None:
        """Take note of a node and its backend."""

    def on_split(self, record: SplitRecord) -> None:
        """Take note of one split of a graph that was cut."""

    def on_alloc(self, record: AllocRecord) -> None:
        """Take note of memory that was taken or given back."""

    def on_micro_batch(self, record: MicroBatchRecord) -> None:
        """Take note that what follows is for some tokens."""

    def on_begin(self, run: SplitRun) -> None:
        """Take note that a computing starts."""

    def on_sent(self, transfer: Transfer, offset: int, size: int) -> None:
        """Take note of bytes of a transfer's source that were sent to its copy."""

    def before_launch(self, run: SplitRun, i_split: int) -> None:
        """Look at a split that is about to be launched: all its copies were sent."""

    def after_launch(self, run: SplitRun, i_split: int) -> None:
        """Look at a split that was launched."""


_METHODS: dict[str, type[Any] | None] = {
    "on_copy": CopyRecord,
    "on_experts": UsedExpertsRecord,
    "on_read": ReadRecord,
    "on_launch": ComputeRecord,
    "on_wait": WaitRecord,
    "on_event": EventRecord,
    "on_callback": CallbackRecord,
    "on_assign": AssignRecord,
    "on_split": SplitRecord,
    "on_alloc": AllocRecord,
    "on_micro_batch": MicroBatchRecord,
    "on_begin": None,
    "on_sent": None,
    "before_launch": None,
    "after_launch": None,
}


class Observers:
    """Several observers, as the methods that they override: who is not asked for a kind of event is not called for it.

    Parameters
    ----------
    observers : iterable of Observer or Recorder

    Raises
    ------
    TypeError
        One has none of the methods.
    """

    __slots__ = ("_takers", "after_launch", "before_launch", "on_begin", "on_sent", "takes_records")

    def __init__(self, observers: Iterable[Observer | Recorder]) -> None:
        found: dict[str, list[Callable[..., None]]] = {name: [] for name in _METHODS}
        for observer in observers:
            told = 0
            record = getattr(observer, "record", None)
            for name, kind in _METHODS.items():
                own = getattr(observer, name, None)
                if own is not None and getattr(own, "__func__", None) is not getattr(Observer, name):
                    found[name].append(own)
                    told += 1
                if record is not None and kind is not None:
                    found[name].append(record)
                    told += 1
            if not told:
                raise TypeError(f"{observer!r} is not an observer: it overrides no method of pyggml.Observer")
        self._takers: dict[type[Any], tuple[Callable[[Any], None], ...]] = {
            kind: tuple(found[name]) for name, kind in _METHODS.items() if kind is not None
        }
        #: whether any of them takes a record of any kind
        self.takes_records = any(self._takers.values())
        self.on_begin, self.on_sent = tuple(found["on_begin"]), tuple(found["on_sent"])
        self.before_launch, self.after_launch = tuple(found["before_launch"]), tuple(found["after_launch"])

    def takes(self, kind: type[Any]) -> bool:
        """Whether anybody takes records of a kind."""
        return bool(self._takers[kind])

    def record(self, record: Record) -> None:
        """Hand a record to everybody who takes its kind."""
        for take in self._takers[type(record)]:
            take(record)


class Recording:
    """Keeps every record in a list.

    Examples
    --------
    >>> recording = Recording()
    >>> recording.record(AllocRecord("g", "CPU", "CPU", 64))
    >>> len(recording.records)
    1
    """

    __slots__ = ("records",)

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records: list[Record] = list(records)

    def record(self, record: Record) -> None:
        """Keep one record."""
        self.records.append(record)

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()

    def _kinds(self) -> Counter[str]:
        return Counter(type(r).__name__.removesuffix("Record") for r in self.records)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self._kinds().items())
        return f"<Recording of {len(self.records)} records{f': {kinds}' if kinds else ''}>"

    def _repr_html_(self) -> str:
        """Return how many records there are of each kind as a table, for notebooks."""
        rows = [(kind, f"{n:,}") for kind, n in self._kinds().items()]
        title = f"Recording of {len(self.records):,} records"
        return html_table(title, ("kind", "records"), rows, n_rows=len(rows), right=("records",))


class Statistics:
    """Counts of what was copied and computed; kept by the scheduler at all times, as they cost next to nothing.

    Attributes
    ----------
    n_copies, bytes_copied : int
        Copies to split backends, and their bytes.
    bytes_full : int
        Bytes that whole copies of the same inputs would have moved.
    bytes_by_reason : dict
        Bytes copied, by `CopyReason`.
    bytes_in_device : int
        Bytes that a policy copied within a device; of none of the other counts.
    n_launches, n_waits : int
        Graphs given to backends; waits of host and backends.
    """

    __slots__ = (
        "bytes_by_reason", "bytes_copied", "bytes_full", "bytes_in_device", "n_copies", "n_launches", "n_waits",
    )  # fmt: skip

    n_copies: int
    bytes_copied: int
    bytes_full: int
    bytes_in_device: int
    bytes_by_reason: dict[CopyReason, int]
    n_launches: int
    n_waits: int

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start counting anew."""
        self.n_copies = self.bytes_copied = self.bytes_full = self.bytes_in_device = 0
        self.n_launches = self.n_waits = 0
        self.bytes_by_reason = {"input": 0, "activation": 0, "weight": 0, "experts": 0}

    def count_copy(self, size_bytes: int, tensor_bytes: int, reason: CopyReason) -> None:
        """Count one copy; pieces of an expert weight count as a whole one by `count_experts`."""
        self.n_copies += 1
        self.bytes_copied += size_bytes
        self.bytes_by_reason[reason] += size_bytes
        if reason != "experts":
            self.bytes_full += tensor_bytes

    def count_in_device(self, size_bytes: int, tensor_bytes: int, reason: CopyReason) -> None:
        """Count one copy within a device, in place of one to it."""
        self.bytes_in_device += size_bytes
        if reason != "experts":
            self.bytes_full += tensor_bytes

    def count_experts(self, tensor_bytes: int) -> None:
        """Count what a whole copy of an expert weight would have moved."""
        self.bytes_full += tensor_bytes

    def __repr__(self) -> str:
        return (
            f"<Statistics: {self.bytes_copied:,} bytes in {self.n_copies} copies, {self.bytes_full:,} if whole, "
            f"{self.n_launches} launches>"
        )

    def _repr_html_(self) -> str:
        """Return the counts as a table, for notebooks; shares are of what whole copies would have moved."""
        whole = self.bytes_full
        counts = [*self.bytes_by_reason.items(), ("all", self.bytes_copied), ("if whole", whole)]
        rows = [(what, f"{n:,}", Bar(n / whole) if whole else "") for what, n in counts]
        title = f"{self.n_copies} copies, {self.n_launches} launches, {self.n_waits} waits"
        return html_table(title, ("copied", "bytes", "share"), rows, n_rows=len(rows), right=("bytes",))
