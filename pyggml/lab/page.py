"""Pages of the expert lab: comparison, used experts and prefetchers; each plot has a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import aside
from ..viz.page import fill
from .comparison import Comparison
from .machine import Machine, TokenTime
from .predict import Score
from .trace import Trace
from .usage import Usage, usage

__all__ = ["write_comparison", "write_prediction", "write_usage"]


def write_comparison(path: Path, made: Comparison) -> None:
    """Write the page of a comparison: hit rate and bytes by capacity, used experts, and the terms of a token's time."""
    report = made.json()
    told, machine = report["report"], report["machine"]
    about = (
        f"{told['phase']}, contract {told['contract']}, scope {told['scope']}; {_requests(told['requests'])}, {told['steps']} steps; "
        f"{machine['name']}, link {machine['link_gb_per_s']:.1f} GB/s; {told['retention']}."
    )
    used = _used(usage(made.trace, phase=made.setting.phase), made.trace)
    _write(path, "Expert caches", made.trace, {**report, "about": about, "usage": used, "bars": _bars(made)})


def _requests(n: int) -> str:
    return f"{n:,} request{'s' if n != 1 else ''}"


def write_usage(path: Path, trace: Trace, used: Usage, *, phase: str) -> None:
    """Write the page of used experts: by layer, and by the number of tokens of an event."""
    about = f"{phase}; {_requests(len(trace.requests) or 1)}"
    _write(path, "Used experts", trace, {"about": about, "warnings": _warnings(trace), "usage": _used(used, trace)})


def write_prediction(
    path: Path, trace: Trace, scores: Sequence[Score], *, phase: str, policy: str, machine: Machine
) -> None:
    """Write the page of prefetchers: recall, and precision on experts that are not resident, by capacity."""
    about = f"{phase}; {scores[0].n_guess} guesses a layer beside {policy}, which they do not change; {machine.json()['name']}"
    data = {"about": about, "warnings": _warnings(trace), "scores": [score.json() for score in scores]}
    _write(path, "Predicted experts", trace, data)


def _warnings(trace: Trace) -> list[str]:
    return [f"{finding.name}: {finding.text}" for finding in trace.findings]


def _write(path: Path, kind: str, trace: Trace, data: dict[str, Any]) -> None:
    """Write a page as one file that needs no network."""
    page = (files(__package__) / "static" / "lab.html").read_text(encoding="utf-8")
    text = fill(page, f"{kind}: {trace.model or trace.source}", {**data, "title": str(trace)})
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def _used(used: Usage, trace: Trace) -> dict[str, Any]:
    """Return the data of the plots of used experts."""
    shares = used.counts / used.events.clip(1)[:, None]
    return {
        "layers": used.layers,
        "shares": [[round(float(x), 4) for x in row] for row in shares],
        "unions": [u.json() for u in used.unions],
        "words": " ".join(used.sentences(trace)),
    }


def _bars(made: Comparison) -> list[dict[str, Any]]:
    """Return a token's time by term: without a cache, with each policy, and with each policy and perfect prefetch."""
    if made.trace.expert_bytes is None:
        return []
    bars = []
    touches = made.rows[0].result.touches
    for capacity in made.capacities:
        none = made.work.seconds(made.machine, made.work.expert_bytes, touches)
        bars.append(_bar(str(capacity), "no cache", none, 0.0))
        for row in made.rows:
            if row.result.capacity == capacity and row.time is not None:
                bars.append(_bar(str(capacity), row.result.policy.name, row.time, 0.0))
                # computing a layer can hide a copy of the next
                bars.append(
                    _bar(
                        str(capacity),
                        f"{row.result.policy.name}, perfect prefetch",
                        row.time,
                        min(row.time.copy_s, row.time.device_s),
                    )
                )
        for size, layers in made.resident:
            if size == capacity:
                bars.append(_bar(str(capacity), f"as {layers.n_resident} of {layers.n_layer} layers", layers.time, 0.0))
    return bars


def _bar(size: str, name: str, time: TokenTime, hidden_s: float) -> dict[str, Any]:
    ms = {
        "device": time.device_s - hidden_s,
        "device and copy": hidden_s,
        "copy": time.copy_s - hidden_s,
        "sync": time.sync_s,
        "CPU": time.cpu_s,
    }
    return {"size": size, "name": name, "ms": {term: round(1e3 * s, 5) for term, s in ms.items()}}
