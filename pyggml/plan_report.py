"""The contents of a plan as data: splits, the bytes that each copies, memory, causes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .notebook import Bar, html_table
from .routing import Routing
from .sched.debug import assignments_text
from .simulation import SimulatedBatch, can_simulate, simulate_batch
from .types import DeviceType

if TYPE_CHECKING:
    from .backend import Backend
    from .memory_rows import Memory
    from .planning import PlannedGraph, Planner
    from .record import CopyReason
    from .sched.plan import Plan
    from .sched.transfer import Transfer

__all__ = [
    "BatchPlan",
    "BatchPlans",
    "GraphPlan",
    "InputPlan",
    "MemoryFit",
    "SplitPlan",
    "ggml_text",
    "memory_fits",
    "plan_batches",
]


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """The memory that a model needs of one buffer type, and the size of its device."""

    backend: str  #: the backend to which the memory belongs; empty for other buffer types
    memory: Memory
    total_bytes: int | None  #: size of the device; None if unknown

    @property
    def missing_bytes(self) -> int:
        """Bytes that the device lacks; 0 if everything fits or the size is unknown."""
        return 0 if self.total_bytes is None else max(self.memory.total - self.total_bytes, 0)

    @property
    def fits(self) -> bool | None:
        """Whether the device is large enough; None if its size is unknown."""
        return None if self.total_bytes is None else not self.missing_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON; ``device_bytes`` and ``fits`` are null if the size is unknown."""
        m = self.memory
        return {
            **asdict(m), "total": m.total, "backend": self.backend, "device_bytes": self.total_bytes,
            "fits": self.fits, "missing_bytes": self.missing_bytes,
        }  # fmt: skip


def memory_fits(
    memory: Sequence[Memory], backends: Sequence[Backend], *, host_bytes: int | None = None
) -> list[MemoryFit]:
    """Return for each buffer type whether the memory of a session or plan fits in its device.

    Parameters
    ----------
    memory : sequence of Memory
        From `Planner.memory` or `Session.memory`.
    backends : sequence of Backend
        The backends of the devices, then that of the CPU.
    host_bytes : int, optional
        The size of the planned host's memory, if stated. The size of this machine's memory is not used.
    """
    sizes: dict[str, tuple[str, int | None]] = {}
    for backend in backends:
        device = backend.device
        size = host_bytes if device.type is DeviceType.CPU else device.memory()[1]
        sizes.setdefault(device.buffer_type.name, (backend.name, size or None))
    found = []
    for m in memory:
        name, total = sizes.get(m.buft, ("", None))
        found.append(MemoryFit(name, m, total))
    return found


@dataclass(frozen=True, slots=True)
class InputPlan:
    """One tensor that a split copies to its backend."""

    name: str
    kind: CopyReason
    bytes_max: int  #: if copied whole
    bytes_expected: int  #: with the assumed routing
    experts_expected: float | None  #: number of used experts, for kind "experts"
    n_expert: int | None


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One split."""

    index: int
    backend: str
    i_start: int
    i_end: int
    first_node: str  #: name of the first computed node
    first_op: str
    cause: str  #: why that node is on this backend, as a phrase
    note: str  #: the same as upstream's note
    causes: dict[str, int]  #: number of computed nodes by upstream's note
    inputs: list[InputPlan]


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """One micro-batch."""

    n_tokens: int
    n_nodes: int
    splits: list[SplitPlan]
    compute_bytes: dict[str, int]  #: by backend

    @property
    def bytes_max(self) -> int:
        """Bytes that its splits copy if all inputs are copied whole."""
        return sum(i.bytes_max for s in self.splits for i in s.inputs)

    @property
    def bytes_expected(self) -> int:
        """Bytes that its splits copy with the assumed routing."""
        return sum(i.bytes_expected for s in self.splits for i in s.inputs)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One batch size, from an empty cache."""

    n_tokens: int
    graphs: list[GraphPlan]
    simulated: SimulatedBatch | None = None  #: the batch computed without data; only for a planner without data

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return {
            "n_tokens": self.n_tokens,
            "bytes_max": sum(g.bytes_max for g in self.graphs),
            "bytes_expected": sum(g.bytes_expected for g in self.graphs),
            "graphs": [
                {**asdict(g), "n_splits": len(g.splits), "bytes_max": g.bytes_max, "bytes_expected": g.bytes_expected}
                for g in self.graphs
            ],
            "virtual": None
            if self.simulated is None
            else {**asdict(self.simulated), "tokens_per_s": self.simulated.tokens_per_s, **_range(self.simulated)},
        }


class BatchPlans(list[BatchPlan]):
    """Plans of several batch sizes; notebooks show a table."""

    def _repr_html_(self) -> str:
        """Return a table with a row for each micro-batch, for notebooks."""
        columns = (
            "batch",
            "micro-batch",
            "nodes",
            "splits",
            "bytes copied",
            "bytes if whole",
            "",
            "tokens/s of the batch",
        )
        rows = [
            (
                plan.n_tokens, graph.n_tokens, graph.n_nodes, len(graph.splits), f"{graph.bytes_expected:,}",
                f"{graph.bytes_max:,}", Bar(graph.bytes_expected / graph.bytes_max if graph.bytes_max else 0.0),
                "" if plan.simulated is None or not plan.simulated.seconds else f"{plan.simulated.tokens_per_s:,.1f}",
            )
            for plan in self
            for graph in plan.graphs
        ]  # fmt: skip
        return html_table("Plans", columns, rows, n_rows=len(rows), right=(*columns[:6], columns[-1]))


def plan_batches(
    planner: Planner, sizes: Sequence[int], *, outputs: Literal["last", "all"] = "last", routing: Routing
) -> BatchPlans:
    """Return the plan of a decode of each size, from an empty cache.

    Raises
    ------
    CacheFullError
        A size is larger than the context.
    """
    plans = BatchPlans()
    for n in sizes:
        graphs = [_graph_plan(planner, planned, routing) for planned in planner.plan_batch(n, outputs=outputs)]
        simulated = simulate_batch(planner, n, outputs=outputs, routing=routing) if can_simulate(planner) else None
        plans.append(BatchPlan(n, graphs, simulated))
    return plans


def _graph_plan(planner: Planner, planned: PlannedGraph, routing: Routing) -> GraphPlan:
    splits = [_split_plan(planned.plan, i, routing) for i in range(len(planned.plan.splits))]
    compute = {b.name: n for b, n in zip(planner.backends, planned.compute_bytes, strict=True)}
    return GraphPlan(planned.part.n_tokens, len(planned.graph.graph.nodes), splits, compute)


def _split_plan(plan: Plan, i: int, routing: Routing) -> SplitPlan:
    split, transfers = plan.splits[i], {t.source: t for t in plan.transfers[i]}
    nodes = [n for n in split.graph.nodes if not n.op.is_view]
    causes = Counter(c.value for n in nodes if (c := plan.assignment.cause(n)) is not None)
    cause = plan.assignment.cause(nodes[0]) if nodes else None
    return SplitPlan(
        index=i,
        backend=plan.backends[split.backend_id].name,
        i_start=split.i_start,
        i_end=split.i_end,
        first_node=nodes[0].name if nodes else "",
        first_op=nodes[0].op_desc if nodes else "",
        cause="" if cause is None else cause.text,
        note="" if cause is None else cause.value,
        causes=dict(causes),
        inputs=[_input_plan(transfers[tensor], routing) for tensor in split.inputs],
    )


def _input_plan(transfer: Transfer, routing: Routing) -> InputPlan:
    tensor, ids = transfer.source, transfer.ids_tensor
    size, n_expert = tensor.nbytes, tensor.ne[2]
    if transfer.kind != "experts" or ids is None:
        return InputPlan(tensor.name, transfer.kind, size, size, None, None)
    used = routing.used(n_expert, ids.ne[0], ids.ne[1])
    return InputPlan(tensor.name, "experts", size, round(size * used / n_expert), used, n_expert)


def _range(simulated: SimulatedBatch) -> dict[str, float | None]:
    speed = simulated.speed
    return {"low": None if speed is None else speed.low, "high": None if speed is None else speed.high}


def ggml_text(planner: Planner, planned: PlannedGraph) -> str:
    """Return the text that upstream prints for a planned graph with ``GGML_SCHED_DEBUG=2``."""
    return assignments_text(planned.plan, level=2)
