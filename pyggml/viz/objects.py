"""Views of objects: a scheduler with or without a recording, and a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..record import AssignRecord, Record, Recording, SplitRecord
from ..sched.describe import split_records
from ..sched.state import is_computed
from ..types import TensorFlag
from .view import View, view_of_records

if TYPE_CHECKING:
    from ..graph import Graph
    from ..sched.scheduler import Scheduler

__all__ = ["view_of_graph", "view_of_scheduler"]


def view_of_scheduler(sched: Scheduler, *, name: str = "", about: Mapping[str, Any] | None = None) -> View:
    """Return the view of a scheduler: of its run if the recorder is a `Recording`, otherwise of its latest plan.

    Parameters
    ----------
    sched : Scheduler
        The scheduler.
    name : str
        Shown above it; by default the backends' names.
    about : mapping, optional
        See `view_of_records`.
    """
    title = name or " + ".join(b.name for b in sched.backends)
    told = {"devices": [{"name": b.name, "description": b.device.description} for b in sched.backends], **(about or {})}
    if isinstance(sched.recorder, Recording) and sched.recorder.records:
        records = sched.recorder.records
        if not any(isinstance(r, SplitRecord) for r in records):  # the graph was cut before the recording began
            records = [*_plan(sched), *records]
        return view_of_records(records, name=title, about=told)
    return view_of_records(_plan(sched), name=title, about=told)


def _plan(sched: Scheduler) -> list[Record]:
    if not sched.n_splits:
        return []
    plan, of = sched.plan, sched.planned
    asg, backends = plan.assignment, plan.backends
    records: list[Record] = []
    for split in plan.splits:
        for node in split.graph.nodes:
            if is_computed(node):
                cause = asg.cause(node)
                text = "" if cause is None else cause.value
                records.append(AssignRecord(node.name, node.op_desc, backends[asg.ids[node]].name, text, **of))
    return [*records, *split_records(plan, of)]


def view_of_graph(graph: Graph, *, name: str = "") -> View:
    """Return the view of a graph: nodes and leafs with ops, types, shapes and sources.

    Parameters
    ----------
    graph : Graph
        The graph; it need not be assigned.
    name : str
        Shown above it.
    """
    tensors = list(
        dict.fromkeys([*graph.leafs, *graph.nodes, *(s for n in graph.nodes for s in n.src if s is not None)])
    )
    numbers = {t: i for i, t in enumerate(tensors)}  # a scheduler's input copies come last
    model = dict(view_of_records([], name=name).model)
    model["graph"] = {
        "n_leafs": len(graph.leafs),
        "tensors": [
            {
                "name": t.name, "op": t.op_desc, "type": t.type.ggml_name, "ne": list(t.ne), "bytes": t.nbytes,
                "src": [numbers[s] for s in t.src if s is not None and s in numbers],
                "view_of": None if t.view_src is None else t.view_src.name,
                "flags": [flag.name.lower() for flag in TensorFlag if flag & t.flags],
            }
            for t in tensors
        ],
    }  # fmt: skip
    return View(name or repr(graph), model)
