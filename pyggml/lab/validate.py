"""Checks for known mistakes in routing traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import FormatError
from .trace import Finding, Phase, Trace

__all__ = ["CHECKS", "refuse", "validated", "with_finding"]

#: Events of several rows after which rows that never share an expert cannot be chance.
_MIN_EVENTS = 8


def _strided(trace: Trace) -> Iterator[Finding]:
    """Find ids of several tokens that were read without the strides of their view.

    ``ffn_moe_topk`` is a view of all experts, sorted; its rows are ``n_expert`` apart. Read without its strides, an
    event's ids are permutations of all experts, so that none repeats before all have occurred.
    """
    n_rows = np.diff(trace.first_row)
    if trace.is_merged:
        return
    several = np.flatnonzero(n_rows > 1)
    saturated = whole = 0
    for event in several:
        flat = trace.rows(int(event)).ravel()
        flat = flat[flat >= 0]
        blocks = [flat[i : i + trace.n_expert] for i in range(0, len(flat), trace.n_expert)]
        if any(len(np.unique(block)) != len(block) for block in blocks):
            continue
        saturated += 1
        whole += len(flat) >= trace.n_expert and int(n_rows[event]) * trace.n_used >= trace.n_expert
    if (
        len(several)
        and saturated == len(several)
        and (whole or saturated >= _MIN_EVENTS)
        and trace.n_used < trace.n_expert
    ):
        phases = tuple(sorted({Phase(int(p)) for p in trace.phase[several]}))
        yield Finding(
            "strided-ids",
            f"in all {saturated} events of several tokens no expert comes twice before all have come: the ids were read flat from a strided view "
            "(rows of ffn_moe_topk are n_expert apart), so only those of single tokens are the model's",
            phases,
        )


def _cut(trace: Trace) -> Iterator[Finding]:
    """Find fewer experts per token than the model was trained with."""
    if trace.n_used_model is not None and trace.n_used < trace.n_used_model:
        yield Finding(
            "experts-cut",
            f"{trace.n_used} experts a token, the model was trained with {trace.n_used_model}: it repeats itself otherwise",
        )
    n = (trace.ids >= 0).sum(axis=1)
    if not trace.is_merged and len(n) and (n != trace.n_used).any():
        other = n[n != trace.n_used]
        yield Finding(
            "experts-vary",
            f"{len(other):,} of {len(n):,} rows have {other.min()} to {other.max()} experts, not {trace.n_used}",
        )


def _last_layer(trace: Trace) -> Iterator[Finding]:
    """Find a last layer with fewer rows than those before it."""
    layers = trace.layers
    if len(layers) < 2:
        return
    n_rows = np.diff(trace.first_row)
    last, before = trace.layer == layers[-1], trace.layer == layers[-2]
    rows_last, rows_before = int(n_rows[last].sum()), int(n_rows[before].sum())
    if rows_last < rows_before:
        yield Finding(
            "last-layer-rows",
            f"layer {layers[-1]} has {rows_last:,} rows, layer {layers[-2]} {rows_before:,}: only tokens whose output was asked for reach the last layer",
        )


def _duplicates(trace: Trace) -> Iterator[Finding]:
    """Find repeated experts in a row, and repeated events."""
    ordered = np.sort(trace.ids, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        event = int(np.searchsorted(trace.first_row, row, side="right")) - 1
        yield Finding(
            "duplicate-ids",
            f"{int(twice.sum()):,} rows choose an expert twice, the first in step {trace.step[event]}, layer {trace.layer[event]}: {trace.ids[row].tolist()}",
            tuple(sorted({Phase(int(p)) for p in np.repeat(trace.phase, np.diff(trace.first_row))[twice]})),
        )
    keys = np.stack((trace.request, trace.phase, trace.step, trace.layer), axis=1)
    n_twice = len(keys) - len(np.unique(keys, axis=0))
    if n_twice:
        yield Finding("duplicate-events", f"{n_twice:,} events have the request, step and layer of another")


def _order(trace: Trace) -> Iterator[Finding]:
    """Find steps that decrease, and layers out of order or missing."""
    same = np.diff(trace.request) == 0
    steps, layers = np.diff(trace.step), np.diff(trace.layer)
    back = same & (steps < 0)
    down = same & (steps == 0) & (np.diff(trace.phase) == 0) & (layers < 0)
    if back.any() or down.any():
        at = int(np.flatnonzero(back | down)[0]) + 1
        yield Finding(
            "order",
            f"{int(back.sum()):,} steps go back and {int(down.sum()):,} layers are out of order, the first at event {at} (step {trace.step[at]}, layer {trace.layer[at]}): "
            "events are replayed in the order of the file",
        )
    n_layer = len(trace.layers)
    keys = np.stack((trace.request, trace.phase, trace.step), axis=1)
    _, counts = np.unique(keys, axis=0, return_counts=True)
    short = int((counts < n_layer).sum())
    if short:
        yield Finding("layers-missing", f"{short:,} of {len(counts):,} steps lack some of the {n_layer} layers")


#: Each finds one kind of mistake.
CHECKS: tuple[Callable[[Trace], Iterator[Finding]], ...] = (_strided, _cut, _last_layer, _duplicates, _order)


def validated(trace: Trace) -> Trace:
    """Return the trace with the findings of all checks."""
    return replace(trace, findings=(*trace.findings, *(found for check in CHECKS for found in check(trace))))


def with_finding(trace: Trace, name: str, text: str) -> Trace:
    """Return the trace with one more finding."""
    return replace(trace, findings=(*trace.findings, Finding(name, text)))


def refuse(trace: Trace, phases: npt.NDArray[np.int64]) -> None:
    """Raise `FormatError` if a finding forbids replaying these phases."""
    for finding in trace.findings:
        hit = [phase for phase in finding.phases if (phases == phase).any()]
        if hit:
            raise FormatError(
                trace.source,
                f"{finding.name}: {finding.text}",
                hint="record again, or replay the phase that is sound: --phase decode",
            )
