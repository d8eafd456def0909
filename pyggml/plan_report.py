"""The contents of a plan as data: splits, the bytes that each copies, memory, causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .notebook import Bar, html_table
from .routing import Routing
from .sched.debug import assignments_text
from .sched.describe import split_records
from .sched.state import Cause
from .simulation import SimulatedBatch, can_simulate, simulate_prompt
from .types import DeviceType

if TYPE_CHECKING:
    from .backend import Backend
    from .memory_rows import Memory
    from .planning import PlannedGraph, Planner
    from .record import SplitInput, SplitRecord

__all__ = [
    "BatchPlan",
    "BatchPlans",
    "GraphPlan",
    "MemoryFit",
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
    more_bytes: int = 0  #: of the host: pinned memory, less what of a mapped file is only read for devices

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be in the device's memory at once."""
        return self.memory.total + self.more_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that the device lacks; 0 if everything fits or the size is unknown."""
        return 0 if self.total_bytes is None else max(self.needed_bytes - self.total_bytes, 0)

    @property
    def fits(self) -> bool | None:
        """Whether the device is large enough; None if its size is unknown."""
        return None if self.total_bytes is None else not self.missing_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON; ``device_bytes`` and ``fits`` are null if the size is unknown."""
        m = self.memory
        return {
            **asdict(m), "total": m.total, "backend": self.backend, "needed": self.needed_bytes, "device_bytes": self.total_bytes,
            "fits": self.fits, "missing_bytes": self.missing_bytes,
        }  # fmt: skip


def memory_fits(
    memory: Sequence[Memory], backends: Sequence[Backend], *, host_bytes: int | None = None, gap_bytes: int = 0
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
    gap_bytes : int
        `Placement.gap_bytes`: what of a mapped file the host need not keep.

    Notes
    -----
    All that is not a device's is in the host's memory, pinned or not: one row has the host's name, its size, and the sum.
    """
    host = backends[-1]
    sizes = {
        b.device.buffer_type.name: (b.name, b.device.memory()[1] or None)
        for b in reversed(backends)
        if b.device.type is not DeviceType.CPU
    }
    on_host = sorted((m for m in memory if m.buft not in sizes), key=lambda m: m.buft != host.device.buffer_type.name)
    found = []
    for m in memory:
        (name, total), more = sizes.get(m.buft, ("", None)), 0
        if m in on_host[:1]:
            name, total, more = host.name, host_bytes or None, sum(other.total for other in on_host[1:]) - gap_bytes
        found.append(MemoryFit(name, m, total, more))
    return found


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """One micro-batch."""

    n_tokens: int
    n_nodes: int
    splits: tuple[SplitRecord, ...]
    compute_bytes: dict[str, int]  #: by backend
    routing: Routing  #: assumed where ids are not known

    @property
    def bytes_max(self) -> int:
        """Bytes that its splits copy if all inputs are copied whole."""
        return sum(i.size_bytes for s in self.splits for i in s.inputs)

    @property
    def bytes_expected(self) -> int:
        """Bytes that its splits copy with the assumed routing."""
        return sum(self.expected_bytes(i) for s in self.splits for i in s.inputs)

    def expected_experts(self, i: SplitInput) -> float | None:
        """Return how many experts of an input are used with the assumed routing; None unless its kind is "experts"."""
        return self.routing.used(i.ne[2], *i.ids_ne[:2]) if i.ids_ne else None

    def expected_bytes(self, i: SplitInput) -> int:
        """Return the bytes of an input that are copied with the assumed routing."""
        used = self.expected_experts(i)
        return i.size_bytes if used is None else round(i.size_bytes * used / i.ne[2])

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return {
            "n_tokens": self.n_tokens, "n_nodes": self.n_nodes, "splits": [self._split_dict(s) for s in self.splits],
            "compute_bytes": self.compute_bytes, "n_splits": len(self.splits), "bytes_max": self.bytes_max,
            "bytes_expected": self.bytes_expected,
        }  # fmt: skip

    def _split_dict(self, split: SplitRecord) -> dict[str, Any]:
        return {
            "index": split.split, "backend": split.backend, "i_start": split.i_start, "i_end": split.i_end,
            "first_node": split.first, "first_op": split.op, "cause": Cause(split.cause).text if split.cause else "",
            "note": split.cause, "causes": dict(split.causes), "inputs": [self._input_dict(i) for i in split.inputs],
        }  # fmt: skip

    def _input_dict(self, i: SplitInput) -> dict[str, Any]:
        used = self.expected_experts(i)
        return {
            "name": i.tensor, "kind": i.kind, "bytes_max": i.size_bytes, "bytes_expected": self.expected_bytes(i),
            "experts_expected": used, "n_expert": None if used is None else i.ne[2],
        }  # fmt: skip


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
            "graphs": [g.as_dict() for g in self.graphs],
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
    planner: Planner,
    sizes: Sequence[int],
    *,
    outputs: Literal["last", "all"] = "last",
    routing: Routing,
    depth: int = 0,
) -> BatchPlans:
    """Return the plan of a decode of each size, with ``depth`` tokens in the cache before.

    Raises
    ------
    CacheFullError
        A size is larger than the context.
    """
    plans = BatchPlans()
    for n in sizes:
        graphs = [
            _graph_plan(planner, planned, routing) for planned in planner.plan_batch(n, outputs=outputs, depth=depth)
        ]
        simulated = None
        if can_simulate(planner):
            simulated = simulate_prompt(planner, n, outputs=outputs, routing=routing, depth=depth)
        plans.append(BatchPlan(n, graphs, simulated))
    return plans


def _graph_plan(planner: Planner, planned: PlannedGraph, routing: Routing) -> GraphPlan:
    compute = {b.name: n for b, n in zip(planner.backends, planned.compute_bytes, strict=True)}
    splits = tuple(split_records(planned.plan))
    return GraphPlan(planned.part.n_tokens, len(planned.graph.graph.nodes), splits, compute, routing)


def _range(simulated: SimulatedBatch) -> dict[str, float | None]:
    speed = simulated.speed
    return {"low": None if speed is None else speed.low, "high": None if speed is None else speed.high}


def ggml_text(planner: Planner, planned: PlannedGraph) -> str:
    """Return the text that upstream prints for a planned graph with ``GGML_SCHED_DEBUG=2``."""
    return assignments_text(planned.plan, level=2)
