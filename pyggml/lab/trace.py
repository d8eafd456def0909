"""`Trace`: which experts a model chose, as columns. Every format is read into it.

An *event* is one layer of one step: the ids of all rows that were routed together. A row is one token of one sequence.
Caches decide once per event.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import FormatError

__all__ = ["Finding", "Phase", "Trace", "TraceBuilder"]

Ints = npt.NDArray[np.int64]
_T = TypeVar("_T", bound=np.generic)

#: Largest numbers that a file may claim: far above any model, and small enough for memory.
MAX_LAYERS, MAX_EXPERTS, MAX_SLOTS, MAX_IDS = 4096, 65536, 4096, 1 << 28


class Phase(IntEnum):
    """Whether a step was prefill or decode."""

    PREFILL = 0
    DECODE = 1


class Finding(NamedTuple):
    """Something in a trace that makes results misleading.

    Attributes
    ----------
    name : str
        The kind, such as ``strided-ids``.
    text : str
        What was found, and where.
    phases : tuple of Phase
        Phases that must not be replayed because of it; empty for a warning.
    """

    name: str
    text: str
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The experts that tokens chose, event by event.

    Attributes
    ----------
    n_layer, n_expert, n_used : int
        Layers of the model (including dense ones), experts of a layer, experts of a token.
    request, step, phase, layer : int64, (n_event,)
        Of each event: its request (requests do not share a cache), its step (one compute of the model, counted by
        request), `Phase` and layer.
    first_row : int64, (n_event + 1,)
        Rows of event ``i`` are ``first_row[i]:first_row[i + 1]``.
    sequence : int64, (n_row,)
        The sequence of each row.
    ids : int32, (n_row, n_slot)
        Experts of each row in slot order (the router's first choice first); -1: none.
    weights : float32, (n_row, n_slot), or None
        The router's weight of each; NaN if unknown.
    expert_bytes : int64, (n_layer, n_projection), or None
        Bytes of one expert of a layer, by projection; None if unknown.
    projections : tuple of str
        Names of the projections; ``("all",)`` if only the sum is known.
    n_used_model : int or None
        Experts of a token in training, if known.
    is_merged : bool
        Whether rows are unions over tokens whose own experts are unknown.
    requests : tuple of str
        Names of the requests.
    """

    n_layer: int
    n_expert: int
    n_used: int
    request: Ints
    step: Ints
    phase: Ints
    layer: Ints
    first_row: Ints
    sequence: Ints
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None
    expert_bytes: Ints | None = None
    projections: tuple[str, ...] = ("all",)
    model: str = ""
    source: str = ""
    format: str = ""
    n_used_model: int | None = None
    is_merged: bool = False
    requests: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def n_event(self) -> int:
        """Number of events."""
        return len(self.layer)

    @property
    def layers(self) -> list[int]:
        """The layers with experts, ascending."""
        return [int(i) for i in np.unique(self.layer)]

    @property
    def bytes_of_layer(self) -> Ints:
        """Bytes of one expert by layer, over all projections: int64, (n_layer,); 0 if unknown."""
        if self.expert_bytes is None:
            return np.zeros(self.n_layer, np.int64)
        total: Ints = self.expert_bytes.sum(axis=1)
        return total

    def rows(self, event: int) -> npt.NDArray[np.int32]:
        """Return the ids of an event: int32, (n_row, n_slot)."""
        return self.ids[self.first_row[event] : self.first_row[event + 1]]

    def select(self, events: npt.NDArray[np.bool_]) -> Trace:
        """Return the trace of the events for which ``events``, bool, (n_event,), is True."""
        n_rows = np.diff(self.first_row)
        rows = np.repeat(events, n_rows)
        first = np.concatenate(([0], np.cumsum(n_rows[events]))).astype(np.int64)
        return replace(
            self, request=self.request[events], step=self.step[events], phase=self.phase[events],
            layer=self.layer[events], first_row=first, sequence=self.sequence[rows], ids=self.ids[rows],
            weights=None if self.weights is None else self.weights[rows],
        )  # fmt: skip

    def with_expert_bytes(self, n_bytes: int) -> Trace:
        """Return the trace with experts of ``n_bytes`` bytes in every layer."""
        return replace(self, expert_bytes=np.full((self.n_layer, 1), n_bytes, np.int64), projections=("all",))

    def __str__(self) -> str:
        name = self.model or self.source or "trace"
        return f"{name}: {len(self.layers)} layers, {self.n_used} of {self.n_expert} experts, {self.n_event:,} events"

    @staticmethod
    def joined(traces: Sequence[Trace]) -> Trace:
        """Return several traces of one model as one, with their requests one after another.

        Raises
        ------
        FormatError
            The models differ.
        """
        first = traces[0]
        if len(traces) == 1:
            return first
        for other in traces[1:]:
            shape = (other.n_layer, other.n_expert, other.n_used)
            same_bytes = np.array_equal(other.bytes_of_layer, first.bytes_of_layer)
            if shape != (first.n_layer, first.n_expert, first.n_used) or not same_bytes:
                raise FormatError(other.source, f"of another model than {first.source}", hint="compare them apart")
        width = max(t.ids.shape[1] for t in traces)
        starts = np.cumsum([0, *(int(t.request.max(initial=-1)) + 1 for t in traces)])
        row_starts = np.cumsum([0, *(len(t.ids) for t in traces)])
        weights = None
        if all(t.weights is not None for t in traces):
            weights = np.concatenate([_padded(t.weights, width, np.nan) for t in traces if t.weights is not None])
        return replace(
            first,
            request=np.concatenate([t.request + at for t, at in zip(traces, starts, strict=False)]),
            step=np.concatenate([t.step for t in traces]),
            phase=np.concatenate([t.phase for t in traces]),
            layer=np.concatenate([t.layer for t in traces]),
            first_row=np.concatenate(
                [t.first_row[:-1] + at for t, at in zip(traces, row_starts, strict=False)] + [row_starts[-1:]]
            ),
            sequence=np.concatenate([t.sequence for t in traces]),
            ids=np.concatenate([_padded(t.ids, width, -1) for t in traces]),
            weights=weights,
            source=f"{first.source} and {len(traces) - 1} more",
            is_merged=any(t.is_merged for t in traces),
            requests=tuple(name for t in traces for name in t.requests),
            findings=tuple(dict.fromkeys(f for t in traces for f in t.findings)),
        )


def _padded(rows: npt.NDArray[_T], width: int, value: float) -> npt.NDArray[_T]:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=value)


class TraceBuilder:
    """Collects events in chronological order, and makes a `Trace`.

    Parameters
    ----------
    path : str
        The file that is read, for errors.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._events = array("q")  # request, step, phase, layer, n_row
        self._sequences = array("q")
        self._widths = array("q")
        self._ids = array("q")
        self._weights = array("f")
        self._has_weights = False

    def add(
        self,
        request: int,
        step: int,
        phase: int,
        layer: int,
        rows: Iterable[Sequence[int]],
        *,
        sequences: Sequence[int] | None = None,
        weights: Iterable[Sequence[float]] | None = None,
    ) -> None:
        """Add an event.

        Raises
        ------
        FormatError
            The trace is too large, or the numbers of rows and sequences differ.
        """
        n_row = 0
        for row in rows:
            self._widths.append(len(row))
            self._ids.extend(row)
            n_row += 1
        self._events.extend((request, step, phase, layer, n_row))
        self._sequences.extend(sequences if sequences is not None else [0] * n_row)
        if len(self._sequences) != len(self._widths):
            raise FormatError(self.path, f"step {step}, layer {layer}: {n_row} rows, but not as many sequences")
        if weights is not None:
            self._has_weights = True
            for given in weights:
                self._weights.extend(given)
        short = len(self._ids) - len(self._weights)
        if self._has_weights and short:
            self._weights.extend([float("nan")] * short)
        if len(self._ids) > MAX_IDS:
            raise FormatError(self.path, f"more than {MAX_IDS:,} ids", hint="cut the trace")

    def finish(
        self,
        *,
        n_layer: int | None = None,
        n_expert: int | None = None,
        n_used: int | None = None,
        expert_bytes: npt.NDArray[np.int64] | None = None,
        projections: tuple[str, ...] = ("all",),
        model: str = "",
        format: str = "",
        requests: tuple[str, ...] = (),
        n_used_model: int | None = None,
    ) -> Trace:
        """Return the trace. Numbers that the file lacks are derived from the ids, and named in a finding.

        Raises
        ------
        FormatError
            There are no events, or ids and layers contradict the file's numbers.
        """
        if not self._events:
            raise FormatError(self.path, "no routing in it")
        events = np.frombuffer(self._events, np.int64).reshape(-1, 5)
        widths = np.frombuffer(self._widths, np.int64)
        flat = np.frombuffer(self._ids, np.int64)
        findings: list[Finding] = []
        if n_expert is None:
            n_expert = int(flat.max(initial=0)) + 1
            findings.append(
                Finding("experts-not-told", f"the file does not say how many experts a layer has: {n_expert} seen")
            )
        if n_layer is None:
            n_layer = int(events[:, 3].max()) + 1
        width = int(widths.max(initial=0))
        if n_used is None:
            n_used = width
        check_shape(self.path, n_layer, n_expert, n_used)
        check_ids(self.path, flat, n_expert)
        if events[:, 3].min() < 0 or events[:, 3].max() >= n_layer:
            raise FormatError(
                self.path, f"layers from {events[:, 3].min()} to {events[:, 3].max()}, the model has {n_layer}"
            )
        if width > MAX_SLOTS:
            raise FormatError(self.path, f"a row of {width:,} ids; {MAX_SLOTS:,} are the most")
        n_row = len(widths)
        if n_row * max(width, 1) > MAX_IDS:
            raise FormatError(self.path, "rows of very different width", hint="split the trace")
        ids = np.full((n_row, max(width, 1)), -1, np.int32)
        filled = np.arange(max(width, 1)) < widths[:, None]
        ids[filled] = flat
        weights = None
        if self._has_weights:
            weights = np.full(ids.shape, np.nan, np.float32)
            weights[filled] = np.frombuffer(self._weights, np.float32)
        first_row = np.concatenate(([0], np.cumsum(events[:, 4]))).astype(np.int64)
        n_request = int(events[:, 0].max()) + 1
        return Trace(
            n_layer, n_expert, n_used, events[:, 0].copy(), events[:, 1].copy(), events[:, 2].copy(),
            events[:, 3].copy(), first_row, np.frombuffer(self._sequences, np.int64).copy(), ids, weights,
            expert_bytes, projections, model, self.path, format, n_used_model, False,
            requests or tuple(str(i) for i in range(n_request)) if n_request <= MAX_IDS >> 8 else (), tuple(findings),
        )  # fmt: skip


def check_shape(path: str, n_layer: int, n_expert: int, n_used: int) -> None:
    """Raise `FormatError` unless the numbers are possible for a model."""
    for what, n, most in (("layers", n_layer, MAX_LAYERS), ("experts", n_expert, MAX_EXPERTS)):
        if not 1 <= n <= most:
            raise FormatError(path, f"{n:,} {what}; 1 to {most:,} are possible")
    if not 1 <= n_used <= n_expert:
        raise FormatError(path, f"{n_used} experts a token of {n_expert}")


def check_ids(path: str, ids: npt.NDArray[np.integer], n_expert: int) -> None:
    """Raise `FormatError` unless all ids are experts, or -1."""
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= n_expert:
        wrong = int(np.flatnonzero((ids < -1) | (ids >= n_expert))[0])
        raise FormatError(
            path, f"id {int(ids[wrong])} is not in 0..{n_expert - 1} (the {wrong + 1:,}th id of the file)",
            hint="ids beyond the experts mean a wrong element type or stride, or another model",
        )  # fmt: skip
