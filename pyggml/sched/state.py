"""The data that the passes read and return: machine, assignment with causes, splits, and the scheduler's own graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ..backend import Backend
from ..buffer import BufferType
from ..dialect import Dialect, Repairs
from ..errors import SchedError
from ..graph import GraphView
from ..notebook import html_table
from ..tensor import Tensor
from ..types import DeviceType, TensorFlag

__all__ = [
    "CAUSES_OF_WEIGHTS",
    "Assignment",
    "BufferUsers",
    "Cause",
    "Copies",
    "Machine",
    "OpCheck",
    "SchedGraph",
    "Split",
    "check_backends",
    "check_bufts",
    "is_computed",
]


class Cause(Enum):
    """Why a tensor is on its backend. The value is upstream's note (`SET_CAUSE`); its first digit is the pass."""

    __hash__ = object.__hash__  # members are single objects; an enum's own hash is a call in Python

    USER = "usr"
    DST = "1.dst"
    VIEW_SRC = "1.vsrc"
    INPUT = "1.inp"
    OFFLOADED = "1.off"
    WEIGHT0 = "1.wgt0"
    WEIGHT1 = "1.wgt1"
    WEIGHT2 = "1.wgt2"
    WEIGHT3 = "1.wgt3"
    WEIGHT4 = "1.wgt4"
    WEIGHT5 = "1.wgt5"
    WEIGHT6 = "1.wgt6"
    WEIGHT7 = "1.wgt7"
    WEIGHT8 = "1.wgt8"
    WEIGHT9 = "1.wgt9"
    EXPANDED = "2.sup"
    BEST = "3.best"
    UPGRADED = "3.upg"
    VIEWED = "4.vsrc"
    USED = "4.cur"
    COPIED = "4.cpy"
    GRAPH_INPUT = "6.cpy"

    @staticmethod
    def weight(i_src: int) -> Cause:
        """Return the cause "source i is a weight"."""
        return CAUSES_OF_WEIGHTS[i_src]

    @property
    def text(self) -> str:
        """A phrase that completes "it is there because"."""
        if self.value.startswith("1.wgt"):
            return f"its source {self.value[5:]} is a weight there"
        return _TEXTS[self.value]


CAUSES_OF_WEIGHTS = [c for c in Cause if c.value.startswith("1.wgt")]
_TEXTS = {
    "usr": "the user pinned it there",
    "1.dst": "its own buffer is there",
    "1.vsrc": "it is a view of a tensor there",
    "1.inp": "it is an input, and inputs start on the CPU",
    "1.off": "its weight is in host memory, and the device offered to take the op",
    "2.sup": "its neighbours are there, and the op is supported there",
    "3.best": "most of its sources can be used there",
    "3.upg": "a backend of higher priority shares the memory",
    "4.vsrc": "it is a view of a tensor there",
    "4.cur": "the node that uses it is there",
    "4.cpy": "it is a copy of a split's input",
    "6.cpy": "it is a pipeline copy of a graph's input",
}

#: Copies of a tensor: by tensor, then backend id, one for each pipeline copy.
Copies = dict[Tensor, dict[int, list[Tensor]]]


#: Whether a backend can run a node.
OpCheck = Callable[[Tensor], bool]


class Assignment:
    """The backend of each tensor, and why."""

    __slots__ = ("_causes", "_causes_before", "_counts", "_ids", "_ids_before", "has_pins")

    def __init__(self) -> None:
        self._ids: dict[Tensor, int] = {}
        self._ids_before: tuple[Sequence[Tensor], Sequence[int]] | None = None
        self._causes: dict[Tensor, Cause] = {}
        self._causes_before: tuple[Sequence[Tensor], Sequence[Cause], Sequence[Tensor]] | None = None
        self._counts: dict[tuple[int, int], tuple[tuple[str, int], ...]] = {}
        self.has_pins = False  #: whether the user pinned anything

    @property
    def ids(self) -> dict[Tensor, int]:
        """The index of each tensor's backend; missing tensors are not assigned."""
        if self._ids_before is not None:
            self._ids = dict(zip(*self._ids_before, strict=True))
            self._ids_before = None
        return self._ids

    @property
    def causes(self) -> dict[Tensor, Cause]:
        """The latest cause of each tensor."""
        if self._causes_before is not None:
            tensors, causes, copies = self._causes_before
            copied = dict.fromkeys(copies, Cause.COPIED)
            self._causes = {**dict(zip(tensors, causes, strict=True)), **copied, **self._causes}
            self._causes_before = None
        return self._causes

    def follow(
        self, tensors: Sequence[Tensor], backend_ids: Sequence[int], causes: Sequence[Cause], copies: Sequence[Tensor]
    ) -> None:
        """Assign tensors as earlier ones, and explain copies of inputs; nothing must be assigned yet. All is looked up on first use."""
        self._ids_before = tensors, backend_ids
        self._causes_before = tensors, causes, copies

    def explain(self, tensor: Tensor, cause: Cause) -> None:
        """Set the cause of a tensor without an assignment, such as an input copy."""
        self._causes[tensor] = cause

    def get(self, tensor: Tensor) -> int | None:
        """Return the backend id of a tensor."""
        return self.ids.get(tensor)

    def set(self, tensor: Tensor, backend_id: int, cause: Cause) -> None:
        """Assign a tensor."""
        self.ids[tensor] = backend_id
        self.causes[tensor] = cause
        if cause is Cause.USER:
            self.has_pins = True

    def cause(self, tensor: Tensor) -> Cause | None:
        """Return why a tensor is where it is."""
        return self.causes.get(tensor)

    def copy(self) -> Assignment:
        """Return an assignment of its own that begins like this one."""
        made = Assignment()
        made._ids, made._causes, made.has_pins = dict(self.ids), dict(self.causes), self.has_pins
        return made

    def forget_counts(self) -> None:
        """Discard the counts of causes: the graph was assigned again."""
        self._counts.clear()

    def cause_counts(self, graph: GraphView) -> tuple[tuple[str, int], ...]:
        """Return the causes of a range's computed nodes with their counts; counted once per range."""
        key = (graph.i_start, graph.i_end)
        counts = self._counts.get(key)
        if counts is None:
            found = Counter(self.causes[n].value for n in graph.nodes if n in self.causes and is_computed(n))
            counts = self._counts[key] = tuple(sorted(found.items()))
        return counts


def is_computed(node: Tensor) -> bool:
    """Return whether a backend computes anything for a node."""
    return bool(node.flags & TensorFlag.COMPUTE) and not node.op.is_empty


class BufferUsers(dict[BufferType, tuple[int, ...]]):
    """Indices of the backends that can use a buffer type, by type. Each backend is called once per type, because answers do not change."""

    __slots__ = ("_backends",)

    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__()
        self._backends = backends

    def __missing__(self, buft: BufferType) -> tuple[int, ...]:
        """Ask the backends."""
        users = self[buft] = tuple(b for b, backend in enumerate(self._backends) if backend.supports_buft(buft))
        return users


def check_backends(backends: Sequence[Backend]) -> None:
    """Refuse backends that no scheduler can have.

    Raises
    ------
    SchedError
        There is none, one is not a backend, or the last is not a CPU.
    """
    if not backends:
        raise SchedError("a scheduler needs at least one backend", hint="the last one must be a CPU")
    for backend in backends:
        if not isinstance(backend, Backend):
            raise SchedError(f"{backend!r} is no backend", hint="pyggml.CPU() and pyggml.Sim() make some")
    if backends[-1].device.type is not DeviceType.CPU:
        raise SchedError(
            f"the last backend must be a CPU, not {backends[-1].name}", hint="append pyggml.CPU() to the backends"
        )


def check_bufts(backends: Sequence[Backend], bufts: Sequence[BufferType]) -> None:
    """Refuse buffer types that their backends cannot use.

    Raises
    ------
    SchedError
        There are more or fewer than backends, or one cannot be used.
    """
    if len(bufts) != len(backends):
        raise SchedError(f"{len(backends)} backends need as many buffer types, not {len(bufts)}")
    for backend, buft in zip(backends, bufts, strict=True):
        if not backend.supports_buft(buft):
            raise SchedError(f"{backend.name} cannot use memory of type {buft.name}")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the passes know: the backends in order of priority, the last a CPU, and the rules."""

    backends: Sequence[Backend]
    bufts: Sequence[BufferType]  #: where each backend's results go
    dialect: Dialect
    repairs: Repairs
    listen: Callable[[int, OpCheck], OpCheck] | None = None  #: returns what `op_checks` has for a backend instead
    users: BufferUsers = field(init=False, compare=False, repr=False)  #: which backends can use a buffer type
    cpu: int = field(init=False)  #: index of the last backend, which is a CPU

    def __post_init__(self) -> None:
        object.__setattr__(self, "users", BufferUsers(self.backends))
        object.__setattr__(self, "cpu", len(self.backends) - 1)

    def index(self, backend: Backend) -> int:
        """Return the index of a backend.

        Raises
        ------
        SchedError
            It is not one of these.
        """
        for i, own in enumerate(self.backends):
            if own is backend:
                return i
        raise SchedError(f"{backend!r} is not a backend of this scheduler")

    @property
    def op_checks(self) -> list[OpCheck]:
        """The ``supports_op`` of each backend; that of its device if the backend only passes the call on."""
        passes_on = Backend.supports_op
        asked = [b.supports_op for b in self.backends]
        checks: list[OpCheck] = [
            b.device.supports_op if getattr(ask, "__func__", None) is passes_on else ask
            for b, ask in zip(self.backends, asked, strict=True)
        ]
        listen = self.listen
        return checks if listen is None else [listen(b, check) for b, check in enumerate(checks)]

    def buffer_supported(self, tensor: Tensor, backend_id: int, asg: Assignment) -> bool:
        """Return whether a backend can use a tensor where it is, or will be.

        Notes
        -----
        Mirrors `ggml_backend_sched_buffer_supported`.
        """
        root = tensor.view_src
        buffer = tensor.buffer if root is None else root.buffer
        if buffer is not None:
            return backend_id in self.users[buffer.buft]
        at = asg.ids.get(tensor)
        if at is None and root is not None:
            at = asg.ids.get(root)
        return at is not None and backend_id in self.users[self.bufts[at]]


class Split(NamedTuple):
    """A range of nodes that one backend computes in one call, after the split's inputs were copied there.

    Notes
    -----
    Mirrors `struct ggml_backend_sched_split`.
    """

    backend_id: int
    i_start: int
    i_end: int
    inputs: tuple[Tensor, ...]  #: sources of the copies, in upstream's order
    graph: GraphView  #: the nodes

    def __repr__(self) -> str:
        names = ", ".join(t.name for t in self.inputs)
        return f"<Split of nodes {self.i_start}..{self.i_end - 1} on backend {self.backend_id}, inputs [{names}]>"

    def _repr_html_(self) -> str:
        """Return the inputs as a table, for notebooks."""
        rows = [(t.name, t.type.ggml_name, t.dims, f"{t.nbytes:,}") for t in self.inputs]
        title = f"Split of nodes {self.i_start}..{self.i_end - 1} on backend {self.backend_id}"
        return html_table(title, ("input", "type", "ne", "bytes"), rows, n_rows=len(rows), right=("bytes",))


class SchedGraph:
    """The graph that the allocator sees: the nodes and, before each split, the sources and copies of its inputs.

    Parameters
    ----------
    make_nodes : callable
        Returns the nodes, when they are first asked for.

    Attributes
    ----------
    leafs : list of Tensor
    placeable : list of Tensor
        All that may get memory of its own: nodes, copies and leafs, but no views that keep a source alive.
    node_backend_ids, leaf_backend_ids : list of int
        Of nodes and leafs; -1: a leaf that nothing uses has no backend.

    Notes
    -----
    Mirrors the copy of the graph made at the end of `ggml_backend_sched_split_graph`.
    """

    __slots__ = ("_make_nodes", "_nodes", "leaf_backend_ids", "leafs", "node_backend_ids", "placeable")

    def __init__(self, make_nodes: Callable[[], list[Tensor]] = list) -> None:
        self._make_nodes: Callable[[], list[Tensor]] | None = make_nodes
        self._nodes: list[Tensor] = []
        self.leafs: list[Tensor] = []
        self.placeable: list[Tensor] = []
        self.node_backend_ids: list[int] = []
        self.leaf_backend_ids: list[int] = []

    @property
    def nodes(self) -> list[Tensor]:
        """Results and copies, in the order of computation; before a copy a view that keeps its source alive."""
        if self._make_nodes is not None:
            self._nodes, self._make_nodes = self._make_nodes(), None
        return self._nodes

    def leaf_buffer_ids(self, unused: int) -> list[int]:
        """Return the backend in whose memory each leaf goes; ``unused`` for a leaf that no node uses.

        Notes
        -----
        Differs: upstream aborts on a leaf without a backend, unless there is only one backend.
        """
        return [unused if b < 0 else b for b in self.leaf_backend_ids]
