"""The data of the page: one `View` is one timeline, in columns, with each string once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..record import Record
from ..sched.state import Cause
from .columns import Columns, Interval
from .lanes import KINDS
from .runs import RecordedGraph
from .waits import Activity, device_times, merge

__all__ = ["View", "view_of_records"]

Clock = Literal["virtual", "wall", "order"]


@dataclass(frozen=True, slots=True)
class View:
    """The data that the page shows for one timeline, plan or graph.

    Attributes
    ----------
    name : str
        Shown above it.
    model : dict
        JSON values; see `view_of_records`.
    """

    name: str
    model: dict[str, Any]  # of JSON's values


def view_of_records(records: Iterable[Record], *, name: str = "", about: Mapping[str, Any] | None = None) -> View:
    """Return the view of records.

    Parameters
    ----------
    records : iterable of Record
        In chronological order, from a `Recording` or from `read_timeline`. If no record has a time, the view is that of
        a plan, with one step for each input and each split.
    name : str
        Shown above it.
    about : mapping, optional
        Facts that are not in the records, as JSON values: ``model``, ``devices`` with ``memory_bytes``, ``options``;
        ``is_plan``: nothing was computed, so wall times are not shown; ``assumed``: the assumptions of virtual times;
        ``too_large``: a sentence for each device with too little memory.

    Returns
    -------
    View
        Its model has ``strings``; ``kinds``, ``lanes``; ``events``, the columns of `Columns`; ``times``, by clock the
        columns ``start`` and ``length`` in ns, -1: none; ``runs``, ``graphs`` with ``splits`` and ``nodes``;
        ``experts`` and ``used_sets``; ``memory``; ``phases`` with what each device waited for; ``causes``.
    """
    columns = Columns()
    for record in records:
        columns.take(record)
    runs = columns.runs
    runs.settle()
    is_plan = not columns.wall
    if is_plan:
        columns.add_plan()
    for graph in runs.graphs:
        for split in graph.splits:
            columns.backends(split.backend)
    has_wall = not (about or {}).get("is_plan")  # wall times of a plan are those of planning
    times = _times(columns, has_wall=has_wall)
    graphs = [_graph(g, columns) for g in runs.graphs]  # before strings are complete
    model: dict[str, Any] = {
        "name": name,
        "about": dict(about or {}),
        "is_plan": is_plan,
        "kinds": KINDS,
        "backends": list(columns.backends.numbers),
        "lanes": [{"kind": kind, "name": n, "backend": backend} for kind, n, backend in columns.lanes.numbers],
        "strings": list(columns.strings.numbers),
        "events": columns.events,
        "times": {clock: {"start": t.start, "length": t.length} for clock, t in times.items()},
        "runs": [
            {
                "n_tokens": None if r.batch is None else r.batch.n_tokens,
                "n_past": None if r.batch is None else r.batch.n_past,
                "graph": -1 if r.graph is None else r.graph,
            }
            for r in runs.runs
        ],
        "graphs": graphs,
        "experts": columns.experts,
        "used_sets": list(columns.used_sets.numbers),
        "cause_sets": list(columns.cause_sets.numbers),
        "engine_sets": list(columns.engine_sets.numbers),
        "causes": {c.value: c.text for c in Cause},
        "memory": [_step(step, times) for step in columns.memory],
        "phases": [] if is_plan else _phases(columns, times),
        "graph": None,
    }
    return View(name, model)


class _Times(NamedTuple):
    zero_s: float
    start: list[int]
    length: list[int]


def _times(columns: Columns, *, has_wall: bool) -> dict[Clock, _Times]:
    """Return the columns of each clock, virtual time first; for a plan, one step for each event."""
    made: dict[Clock, _Times] = {}
    both: tuple[tuple[Clock, Sequence[Interval | None]], ...] = (("virtual", columns.virtual), ("wall", columns.wall))
    for clock, spans in both:
        known = [s for s in spans if s is not None]
        if not known or (clock == "wall" and not has_wall):
            continue
        zero_s = min(start for start, _ in known) if clock == "wall" else 0.0
        start = [-1 if s is None else round((s[0] - zero_s) * 1e9) for s in spans]
        end = [-1 if s is None else round((s[1] - zero_s) * 1e9) for s in spans]
        made[clock] = _Times(zero_s, start, [-1 if a < 0 else b - a for a, b in zip(start, end, strict=True)])
    if not made:
        n = len(columns.wall)
        made["order"] = _Times(0.0, list(range(n)), [1] * n)
    return made


def _graph(graph: RecordedGraph, columns: Columns) -> dict[str, Any]:
    """Return splits with their inputs, and the nodes in columns."""
    ops, causes = sorted({n.op for n in graph.nodes}), sorted({n.cause for n in graph.nodes})
    return {
        "splits": [
            {
                "split": s.split, "backend": s.backend, "i_start": s.i_start, "i_end": s.i_end, "n_nodes": s.n_nodes,
                "first": columns.strings(s.first), "op": s.op, "cause": s.cause,
                "inputs": [
                    {
                        "tensor": columns.strings(i.tensor), "kind": i.kind, "src": i.src, "cause": i.cause,
                        "buft": i.buft, "type": i.type, "ne": i.ne, "bytes": i.size_bytes,
                        "user": columns.strings(i.user), "user_op": i.user_op, "user_cause": i.user_cause,
                        "n_users": i.n_users,
                    }
                    for i in s.inputs
                ],
            }
            for s in graph.splits
        ],
        "ops": ops,
        "causes": causes,
        "nodes": {
            "name": [columns.strings(n.tensor) for n in graph.nodes],
            "op": [ops.index(n.op) for n in graph.nodes],
            "backend": [columns.backends(n.backend) for n in graph.nodes],
            "cause": [causes.index(n.cause) for n in graph.nodes],
        },
    }  # fmt: skip


def _step(step: dict[str, Any], times: Mapping[Clock, _Times]) -> dict[str, Any]:
    """Return a step of memory with its times in ns from the first event; earlier ones are at 0."""
    found = dict(step)
    for clock in ("virtual", "wall"):
        t = times.get(clock)
        when_s = step[clock]
        found[clock] = None if t is None or when_s is None else max(round((when_s - t.zero_s) * 1e9), 0)
    return found


def _phases(columns: Columns, times: Mapping[Clock, _Times]) -> list[dict[str, Any]]:
    """Return how the backends spent their time, by clock: in all runs, in those of several tokens, in those of one."""
    n_tokens = [None if r.batch is None else r.batch.n_tokens for r in columns.runs.runs]
    kinds = {"prompt": [n is not None and n > 1 for n in n_tokens], "generate": [n == 1 for n in n_tokens]}
    chosen = {"all": [True] * len(n_tokens)} | {k: v for k, v in kinds.items() if any(v)}
    found = []
    for clock, t in times.items():
        ends = [a + n for a, n in zip(t.start, t.length, strict=True)]
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for run, a, b in zip(columns.events["run"], t.start, ends, strict=True):
            if run >= 0 and a >= 0:
                first[run] = min(first.get(run, a), a)
                last[run] = max(last.get(run, b), b)
        activities = [
            Activity(what, src, dst, t.start[i], ends[i]) for i, what, src, dst in columns.activities if t.start[i] >= 0
        ]
        for name, is_in in chosen.items():
            runs = [run for run in first if is_in[run]]
            spent = device_times(activities, columns.backends.numbers, merge((first[r], last[r]) for r in runs))
            found.append(
                {
                    "clock": clock,
                    "phase": name,
                    "n_runs": len(runs),
                    "n_tokens": sum(n_tokens[r] or 0 for r in runs) or None,
                    "length": spent[0].total if spent else 0,
                    "backends": [s._asdict() for s in spent],
                }
            )
    return found
