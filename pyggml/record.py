"""Records of what the scheduler did, and the `Recorder` that receives them.

Reports, traces and timelines are made only from records. A record contains names, so keeping it keeps no
tensor alive. All observers of a run get the same records and may not change them; they are not frozen, because that makes each four
times as expensive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from .notebook import Bar, html_table

if TYPE_CHECKING:
    from .clock import Span
    from .sched.compute import SplitRun
    from .sched.transfer import Transfer

__all__ = [
    "UNKNOWN",
    "AllocPurpose",
    "AllocRecord",
    "AssignRecord",
    "CallbackRecord",
    "ComputeRecord",
    "CopyRecord",
    "EventRecord",
    "Identified",
    "Identity",
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

#: Why bytes were copied: a user's input, a result of another backend, a whole weight, or the used experts of a weight.
CopyReason = Literal["input", "activation", "weight", "experts"]
#: The use of memory: a model's weights, its KV cache, a scheduler's compute buffers, or a copy policy's memory.
AllocPurpose = Literal["weights", "kv_cache", "compute", "policy"]


class Identity(TypedDict):
    """Which graph and which run something belongs to: the fields that every record has."""

    i_graph: int
    i_run: int
    i_clock: int


#: Identity of what no scheduler numbered, such as a plan that is only reported.
UNKNOWN: Identity = {"i_graph": -1, "i_run": -1, "i_clock": 0}


@dataclass(slots=True, kw_only=True)
class Identified:
    """What every record has: numbers that its scheduler gave.

    Attributes
    ----------
    i_graph : int
        The latest graph that was cut; -1 before the first, or if the graph is not known yet.
    i_run : int
        The compute that it belongs to, from its micro-batch's announcement on; -1 if it belongs to none.
    i_clock : int
        The virtual clock: virtual times of another one begin at zero again.
    """

    i_graph: int = -1
    i_run: int = -1
    i_clock: int = 0


@dataclass(slots=True)
class CopyRecord(Identified):
    """One copy of bytes of a split input to the split's backend."""

    split: int
    tensor: str
    src: str  #: backend that the input is assigned to
    dst: str  #: backend of the split
    offset_bytes: int  #: in the tensor
    size_bytes: int
    tensor_bytes: int  #: bytes of a whole copy
    reason: CopyReason
    start_s: float  #: of the host's clock, `time.perf_counter`
    end_s: float
    virtual: Span | None = None  #: on the virtual clock, if there is one
    engines: tuple[str, ...] = ()  #: copy engines of simulated devices that carry it, in virtual time
    i_experts: int = -1  #: the `UsedExpertsRecord` of the same run that it is of; -1: none


@dataclass(slots=True)
class UsedExpertsRecord(Identified):
    """The experts of one weight that a split needs; the records of their copies follow."""

    split: int
    tensor: str
    ids: str  #: the tensor they were read from
    used: tuple[int, ...]
    n_expert: int
    expert_bytes: int
    tensor_bytes: int  #: bytes of a whole copy; 0 if experts are added to an earlier copy
    i_experts: int = -1  #: its number in its run, by which copies refer to it


@dataclass(slots=True)
class ComputeRecord(Identified):
    """A launch: nodes of one split submitted to its backend (the whole split, or a part with an eval callback)."""

    split: int
    backend: str
    n_nodes: int
    first: str  #: name of the first node
    start_s: float
    end_s: float  #: when the call returned; the work may continue
    virtual: Span | None = None  #: of the work itself
    causes: tuple[tuple[str, int], ...] = ()  #: why its nodes are there, and how many for each cause


@dataclass(slots=True)
class WaitRecord(Identified):
    """A wait of the host or of a backend."""

    split: int | None  #: None: at the end of a compute, or between two
    what: Literal["synchronize", "event_synchronize", "event_wait"]
    backend: str
    start_s: float
    end_s: float
    virtual: Span | None = None
    copy: int | None = None  #: of the event waited for; see `EventRecord`


@dataclass(slots=True)
class EventRecord(Identified):
    """An event: a mark in a backend's stream that others can wait for."""

    split: int
    backend: str
    copy: int  #: the pipeline copy to which the event belongs
    start_s: float
    end_s: float
    virtual: Span | None = None  #: the moment at which the backend reaches the mark


@dataclass(slots=True)
class ReadRecord(Identified):
    """A read of the host from a backend: ids or results."""

    tensor: str
    backend: str
    size_bytes: int
    start_s: float
    end_s: float
    virtual: Span | None = None
    engines: tuple[str, ...] = ()  #: as a copy's


@dataclass(slots=True)
class AllocRecord(Identified):
    """The memory that is held from now on, for one buffer type and purpose: after an allocation, a reserve or a free."""

    graph: str  #: name of the last node of the graph that needed it; empty for weights and KV cache
    backend: str  #: the backend to which the memory belongs; host memory belongs to the last backend
    buft: str
    size_bytes: int  #: in total; 0: it was freed
    purpose: AllocPurpose = "compute"
    start_s: float = 0.0
    end_s: float = 0.0
    virtual: Span | None = None  #: the moment; allocating takes no virtual time


@dataclass(slots=True)
class AssignRecord(Identified):
    """The backend of a node that will be computed, and why; recorded when its graph is split."""

    tensor: str
    op: str
    backend: str
    cause: str  #: upstream's note, as `Cause` has it
    start_s: float = 0.0  #: of splitting the graph
    end_s: float = 0.0
    virtual: Span | None = None  #: the moment; deciding takes no virtual time


@dataclass(frozen=True, slots=True)
class SplitInput:
    """An input of a split: a tensor that its backend cannot use where it is."""

    tensor: str
    kind: CopyReason  #: experts: the used experts of this weight are enough
    src: str  #: backend to which it is assigned
    cause: str  #: why it is there, as upstream's note
    buft: str  #: its buffer type; empty if it has no memory yet
    type: str
    ne: tuple[int, ...]
    size_bytes: int  #: of all of it
    user: str  #: first node of the backend that reads it
    user_op: str
    user_cause: str  #: why that node is on the backend
    n_users: int
    ids_ne: tuple[int, ...] = ()  #: for kind "experts": dimensions of the ids that name them


@dataclass(slots=True)
class SplitRecord(Identified):
    """One split of a graph; recorded when the graph is split, after the assignments of its nodes."""

    split: int
    backend: str
    i_start: int
    i_end: int
    n_nodes: int  #: number of computed nodes
    first: str  #: name of the first computed node
    op: str
    cause: str  #: why that one is on the backend, upstream's note
    inputs: tuple[SplitInput, ...]
    causes: tuple[tuple[str, int], ...] = ()  #: why its computed nodes are there, and how many for each cause


@dataclass(slots=True)
class MicroBatchRecord(Identified):
    """A session starts a micro-batch; the records that follow belong to it."""

    n_tokens: int
    n_past: int  #: tokens in the cache before
    n_outputs: int  #: tokens whose logits are computed


@dataclass(slots=True)
class CallbackRecord(Identified):
    """One call of the eval callback."""

    split: int
    tensor: str
    asked: bool  #: whether the callback was asked if it needs the data; otherwise it got the data
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
    """Receives records, in the order in which things happen."""

    def record(self, record: Record) -> None:
        """Receive one record; must not raise."""


class Observer:
    """An object whose methods are called when a scheduler does something. Override the methods that you need; others cost nothing.

    Methods with a record are called after the effect. `on_begin`, `on_sent`, `before_launch` and `after_launch` get the
    compute itself and may raise `SchedError` to end it; the checks of ``PYGGML_CHECK`` are such an observer. Other methods
    must not raise. An object with a method ``record`` (`Recorder`) is an observer that receives every record.

    Notes
    -----
    After trio's `Instrument`.
    """

    def on_copy(self, record: CopyRecord) -> None:
        """Run after bytes were copied."""

    def on_experts(self, record: UsedExpertsRecord) -> None:
        """Run before the used experts of a weight are copied."""

    def on_read(self, record: ReadRecord) -> None:
        """Run after the host read a tensor."""

    def on_launch(self, record: ComputeRecord) -> None:
        """Run after nodes were submitted to a backend."""

    def on_wait(self, record: WaitRecord) -> None:
        """Run after the host or a backend waited."""

    def on_event(self, record: EventRecord) -> None:
        """Run after an event was recorded."""

    def on_callback(self, record: CallbackRecord) -> None:
        """Run after a call of the eval callback."""

    def on_assign(self, record: AssignRecord) -> None:
        """Run for each node that will be computed, with its backend, when the graph is split."""

    def on_split(self, record: SplitRecord) -> None:
        """Run for each split of a graph that was cut."""

    def on_alloc(self, record: AllocRecord) -> None:
        """Run after memory was allocated or freed."""

    def on_micro_batch(self, record: MicroBatchRecord) -> None:
        """Run when a session starts a micro-batch."""

    def on_begin(self, run: SplitRun) -> None:
        """Run when a compute starts."""

    def on_sent(self, transfer: Transfer, offset: int, size: int) -> None:
        """Run after bytes of a transfer's source were sent to its input copy."""

    def before_launch(self, run: SplitRun, i_split: int) -> None:
        """Run before a split is launched, after all its copies were sent."""

    def after_launch(self, run: SplitRun, i_split: int) -> None:
        """Run after a split was launched."""


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
    """Several observers; only overridden methods are called.

    Parameters
    ----------
    observers : iterable of Observer or Recorder

    Raises
    ------
    TypeError
        An object overrides none of the methods.
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
        """Return whether an observer takes records of a kind."""
        return bool(self._takers[kind])

    def record(self, record: Record) -> None:
        """Pass a record to all observers that take its kind."""
        for take in self._takers[type(record)]:
            take(record)

    def record_all(self, records: Iterable[Record]) -> None:
        """Pass several records to all observers that take their kinds."""
        for record in records:
            self.record(record)


class Recording:
    """A recorder that keeps every record in a list.

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
        """Remove all records."""
        self.records.clear()

    def _kinds(self) -> Counter[str]:
        return Counter(type(r).__name__.removesuffix("Record") for r in self.records)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self._kinds().items())
        return f"<Recording of {len(self.records)} records{f': {kinds}' if kinds else ''}>"

    def _repr_html_(self) -> str:
        """Return a table of the number of records of each kind, for notebooks."""
        rows = [(kind, f"{n:,}") for kind, n in self._kinds().items()]
        title = f"Recording of {len(self.records):,} records"
        return html_table(title, ("kind", "records"), rows, n_rows=len(rows), right=("records",))


class Statistics:
    """Counts of copies, launches and waits, which the scheduler always keeps.

    Attributes
    ----------
    n_copies, bytes_copied : int
        Copies to split backends, and their bytes.
    bytes_full : int
        Bytes if the same inputs had been copied whole.
    bytes_by_reason : dict
        Bytes copied, by `CopyReason`.
    bytes_in_device : int
        Bytes that a policy copied within a device; not part of the other counts.
    n_launches, n_waits : int
        Launches; waits of host and backends.
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
        """Set all counts to zero."""
        self.n_copies = self.bytes_copied = self.bytes_full = self.bytes_in_device = 0
        self.n_launches = self.n_waits = 0
        self.bytes_by_reason = {"input": 0, "activation": 0, "weight": 0, "experts": 0}

    def count_copy(self, size_bytes: int, tensor_bytes: int, reason: CopyReason, *, n_copies: int = 1) -> None:
        """Count one copy, or several together; `count_experts` counts the full copy of an expert weight."""
        self.n_copies += n_copies
        self.bytes_copied += size_bytes
        self.bytes_by_reason[reason] += size_bytes
        if reason != "experts":
            self.bytes_full += tensor_bytes

    def count_in_device(self, size_bytes: int, tensor_bytes: int, reason: CopyReason) -> None:
        """Count one copy within a device, instead of one to it."""
        self.bytes_in_device += size_bytes
        if reason != "experts":
            self.bytes_full += tensor_bytes

    def count_experts(self, tensor_bytes: int) -> None:
        """Count the bytes of a full copy of an expert weight."""
        self.bytes_full += tensor_bytes

    def __repr__(self) -> str:
        return (
            f"<Statistics: {self.bytes_copied:,} bytes in {self.n_copies} copies, {self.bytes_full:,} if whole, "
            f"{self.n_launches} launches>"
        )

    def _repr_html_(self) -> str:
        """Return a table of the counts, for notebooks; shares are relative to full copies."""
        whole = self.bytes_full
        counts = [*self.bytes_by_reason.items(), ("all", self.bytes_copied), ("if whole", whole)]
        rows = [(what, f"{n:,}", Bar(n / whole) if whole else "") for what, n in counts]
        title = f"{self.n_copies} copies, {self.n_launches} launches, {self.n_waits} waits"
        return html_table(title, ("copied", "bytes", "share"), rows, n_rows=len(rows), right=("bytes",))
