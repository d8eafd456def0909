"""Policies by capacity: the values that `pyggml experts compare` reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from .machine import Machine, ResidentLayers, TokenTime, Workload, resident_layers
from .pools import Capacity, Pools, request_keys
from .replay import Refusal, Result, Setting, lru_begins, replay
from .trace import Trace

__all__ = ["Comparison", "Row", "compare"]

_EVENTS = {
    "event": "all ids of one layer of one step; hits judged before, the event's experts protected",
    "bigmoeonedge": "prefill one event a layer with all tokens, decode one a step and layer; the event's entries protected beyond the budget",
    "sequential": "each id by itself: overstates misses, some policies more than others",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one capacity."""

    result: Result
    time: TokenTime | None
    gap: float | None  #: points of hit rate below the Belady of its own admission

    def json(self) -> dict[str, Any]:
        """Return the row as `--json` prints it."""
        r = self.result
        rates = [q.hit_rate for q in r.requests]
        ms = None if self.time is None else round(1e3 * self.time.total_s, 6)
        return {
            "policy": r.policy.name,
            "scope": r.setting.scope,
            "capacity": r.capacity.json(),
            "touches": r.touches,
            "hits": r.hits,
            "bytes_read": r.bytes_read,
            "ms_per_token": ms,
            "tokens_per_s": None if not ms else round(1e3 / ms, 4),
            "ms": None if self.time is None else self.time.json(),
            "bytes_per_token": None if r.bytes_read is None else round(r.bytes_read / max(1, r.n_token), 1),
            "preload_bytes": r.preload_bytes,
            "slots": r.slots,
            "capacity_bytes": r.capacity_bytes or None,
            "hit_rate": r.hits / r.touches if r.touches else 0.0,
            "hit_rate_of_requests": {
                "mean": float(np.mean(rates)), "min": min(rates), "max": max(rates), "std": float(np.std(rates)),
            },
            "first_touches": sum(q.first_touches for q in r.requests),
            "points_below_belady": None if self.gap is None else round(100 * self.gap, 4),
            "must_admit": r.policy.must_admit,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`."""

    trace: Trace
    setting: Setting
    machine: Machine
    work: Workload
    rows: list[Row]
    refused: list[Refusal]
    resident: list[tuple[Capacity, ResidentLayers]]
    lru_begins: dict[str, int | None]
    n_step: int
    sweep: int  #: most distinct experts of a step, over all layers
    seconds: float = 0.0  #: that the replays took on this machine
    asked: Sequence[Capacity] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def capacities(self) -> list[Capacity]:
        """Capacities with a result, in the order in which they were given."""
        found = {row.result.capacity for row in self.rows}
        return [capacity for capacity in self.asked if capacity in found]

    @property
    def n_replayed(self) -> int:
        """Touches of all replays."""
        return sum(row.result.touches for row in self.rows)

    def json(self) -> dict[str, Any]:
        """Return everything, as `--json` prints it."""
        trace, setting = self.trace, self.setting
        fits = {row.result.policy.fit for row in self.rows} - {""}
        requests = len(np.unique(trace.request))
        split = "none: every policy starts each request knowing nothing"
        if fits:
            split = "; ".join(
                {"others": "leave one request out", "same": "fitted on the request it is tested on: misleads"}[f]
                for f in sorted(fits)
            )
        admissions = sorted(
            {row.result.policy.name for row in self.rows if row.result.policy.name.startswith(("belady", "oracle"))}
        )
        return {
            "report": {
                "event_unit": _EVENTS[setting.contract],
                "contract": setting.contract,
                "phase": setting.phase,
                "scope": setting.scope,
                "order": "slot order, the last slot newest; events in the order of the trace",
                "retention": "one cache for all requests" if setting.contract == "bigmoeonedge" else "each request starts with an empty cache",
                "split": split,
                "preload": "read before the first event, in bytes_read" if fits else "none",
                "oracle": {
                    name: "must admit, its event protected" if name != "belady-bypass" else "may decline" for name in admissions
                } or "none",
                "steps": self.n_step,
                "requests": requests,
                "tokens": self.work.n_token,
                "most_experts_of_a_step": self.sweep,
            },
            "trace": {
                "source": trace.source, "format": trace.format, "model": trace.model, "layers": len(trace.layers), "experts": trace.n_expert,
                "used": trace.n_used, "expert_bytes": sorted({int(n) for n in trace.bytes_of_layer[trace.layers]}) if trace.expert_bytes is not None else None,
                "findings": [{"name": f.name, "text": f.text} for f in trace.findings],
            },
            "machine": self.machine.json(),
            "lru_hits_begin": self.lru_begins,
            "rows": [row.json() for row in self.rows],
            "resident_layers": [
                {
                    "capacity": capacity.json(), "capacity_bytes": r.capacity_bytes, "layers": r.n_resident, "of_layers": r.n_layer,
                    "ms_per_token": round(1e3 * r.time.total_s, 6), "ms": r.time.json(),
                }
                for capacity, r in self.resident
            ],
            "refused": [{"policy": r.policy, "capacity": r.capacity.json(), "reason": r.reason} for r in self.refused],
            "warnings": self.warnings,
        }  # fmt: skip


def compare(
    trace: Trace,
    policies: Sequence[str],
    capacities: Sequence[Capacity],
    setting: Setting,
    machine: Machine,
    *,
    dense_bytes: int = 0,
) -> Comparison:
    """Replay policies at several capacities, and compute what the same bytes give as resident layers."""
    work = Workload.of(trace, setting, dense_bytes=dense_bytes)
    start_s = perf_counter()
    results = list(replay(trace, policies, capacities, setting))
    seconds = perf_counter() - start_s
    rows, refused = [], []
    best = {(r.policy.name, r.capacity): r.hit_rate for r in results if isinstance(r, Result)}
    if any(isinstance(r, Result) for r in results):
        missing = [name for name in ("belady", "belady-bypass") if name not in policies]
        best |= {
            (r.policy.name, r.capacity): r.hit_rate
            for r in replay(trace, missing, capacities, setting)
            if isinstance(r, Result)
        }
    for r in results:
        if isinstance(r, Refusal):
            refused.append(r)
            continue
        top = best.get(("belady" if r.policy.must_admit else "belady-bypass", r.capacity))
        gap = None if top is None or r.policy.fit else top - r.hit_rate
        rows.append(Row(r, work.of_result(machine, r), gap))
    resident = []
    if trace.expert_bytes is not None:
        for capacity in capacities:
            held = next((row.result.capacity_bytes for row in rows if row.result.capacity == capacity), 0)
            if held:
                resident.append((capacity, resident_layers(trace, work, machine, held)))
    begins = lru_begins(trace, setting)
    made = Comparison(
        trace, setting, machine, work, rows, refused, resident, begins, *_steps(trace, setting), seconds, capacities
    )
    made.warnings.extend(_warnings(made))
    return made


def _steps(trace: Trace, setting: Setting) -> tuple[int, int]:
    """Return the number of steps, and the most distinct experts that one uses over all layers."""
    n = most = 0
    for run in request_keys(trace, Pools.of(trace, "global"), phase=setting.phase, contract="event"):
        _, steps = np.unique(run.step, return_inverse=True)
        used = np.bincount(steps, weights=np.diff(run.offsets))
        n += len(used)
        most = max(most, int(used.max()))
    return n, most


def _warnings(made: Comparison) -> list[str]:
    """Return sentences about what may mislead in the numbers."""
    said = [f"{f.name}: {f.text}" for f in made.trace.findings]
    if made.setting.contract == "sequential":
        said.append(
            "contract sequential takes ids one by one, which no engine does: an event's experts push each other out, and misses are overstated "
            "by up to a third for LRU and LFRU, less for others, so that the order of policies can turn round"
        )
    if any(row.result.policy.fit == "same" for row in made.rows):
        said.append("static-same-trace is fitted on what it is tested on: no run can do that")
    begins = made.lru_begins["slots"]
    if made.setting.scope != "layer" and begins is not None:
        for row in made.rows:
            slots = row.result.slots
            if row.result.policy.name == "lru" and row.result.hits == 0 and slots is not None:
                n = made.lru_begins["bytes"]
                least = f"{begins:,} slots" + (f" ({n / (1 << 20):,.0f} MiB)" if n else "")
                said.append(
                    f"lru at {row.result.capacity} hits nothing: a token's sweep over the layers pushes out what the next needs; hits begin at {least}"
                )
    if made.trace.expert_bytes is None:
        said.append("bytes of experts are not in the trace: hit rates only; --expert-bytes 12.6MiB states them")
    first = [
        row
        for row in made.rows
        if row.result.touches and sum(q.first_touches for q in row.result.requests) > 0.2 * row.result.touches
    ]
    if first:
        share = sum(q.first_touches for q in first[0].result.requests) / first[0].result.touches
        said.append(f"{share:.0%} of all touches are first touches, which no cache avoids: the trace is short")
    return said
