"""pyggml's own format, to which others can be mapped: JSON lines, the first of which describes the rest.

::

    {"format": "pyggml-routing", "version": 1, "model": "...", "n_layer": 24, "n_expert": 32, "n_used": 4,
     "projections": ["gate", "up", "down"], "expert_bytes": [[...], ...], "requests": ["a", "b"]}
    {"request": 0, "step": 0, "phase": "decode", "layer": 0, "sequence": [0], "ids": [[3, 17, 5, 1]], "weights":
    [[...]]}

A line is an event or some rows of one: adjacent lines with the same request, step and layer are joined. ``ids`` may be
one row. Only ``layer`` and ``ids`` are required. By default the request is 0, a step begins when the layer is not above
the previous one, and a step of one row is decode.

Files of other programs only need a first line that maps their names of fields:
``{"format": "pyggml-routing", "version": 1, "n_expert": 64, "fields": {"layer": "layer_idx", "step": "token_idx",
"ids": "selected_ids"}, "phases": {"prompt": "prefill"}}``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import FormatError
from ...files import aside, parse_json
from ..trace import MAX_LAYERS, Phase, Trace, TraceBuilder
from ._text import as_ids, as_int, open_lines

__all__ = ["read", "sniff", "write"]

NAME, VERSION = "pyggml-routing", 1
_FIELDS = ("request", "step", "phase", "layer", "sequence", "ids", "weights")


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    return NAME.encode() in start.partition(b"\n")[0]


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    lines = open_lines(path)
    _, first = next(lines, (1, ""))
    header = parse_json(path, first, where="line 1: ")
    if not isinstance(header, dict) or header.get("format") != NAME or header.get("version") != VERSION:
        raise FormatError(str(path), f"line 1 does not describe {NAME} of version {VERSION}")
    names = {field: field for field in _FIELDS}
    given = header.get("fields", {})
    if (
        not isinstance(given, dict)
        or not set(given) <= set(_FIELDS)
        or any(not isinstance(v, str) for v in given.values())
    ):
        raise FormatError(str(path), f"line 1: fields must name some of {', '.join(_FIELDS)}")
    names.update(given)
    reader = _Reader(path, names, _phases(path, header.get("phases", {})))
    for number, line in lines:
        if line.strip():
            reader.take(f"line {number}: ", parse_json(path, line, where=f"line {number}: "))
    reader.flush()
    sizes, n_layer = _sizes(path, header)
    requests = header.get("requests", reader.request_names())
    shape = {
        key: None if header.get(key) is None else as_int(path, f"line 1: {key}", header[key], 1)
        for key in ("n_expert", "n_used", "n_used_model")
    }
    return reader.builder.finish(
        n_layer=n_layer, n_expert=shape["n_expert"], n_used=shape["n_used"], expert_bytes=sizes,
        projections=_projections(header, sizes), model=str(header.get("model", "")), format="jsonl",
        requests=tuple(map(str, requests)) if isinstance(requests, list) else (), n_used_model=shape["n_used_model"],
    )  # fmt: skip


class _Reader:
    """Joins lines to events."""

    def __init__(self, path: Path, names: dict[str, str], phases: dict[str, Phase]) -> None:
        self.path, self.names, self.phases = path, names, phases
        self.builder = TraceBuilder(str(path))
        self._requests: dict[Any, int] = {}  # by what the file calls them
        self._last: tuple[int, int] = (-1, -1)  # request and layer of the line before
        self._step = -1
        self._key: tuple[int, int, int] | None = None
        self._phase: Phase | None = None
        self._rows: list[list[int]] = []
        self._sequences: list[int] = []
        self._weights: list[list[float]] | None = None

    def request_names(self) -> list[str]:
        return [str(name) for name in self._requests]

    def take(self, where: str, entry: Any) -> None:  # of JSON's values
        if not isinstance(entry, dict):
            raise FormatError(str(self.path), f"{where}no object")

        def of(field: str) -> Any:
            return entry.get(self.names[field])

        name = of("request")
        if name is not None and type(name) not in (int, str):
            raise FormatError(str(self.path), f"{where}the request is neither a number nor a text")
        request = self._requests.setdefault(name, len(self._requests))
        layer = as_int(self.path, f"{where}{self.names['layer']}", of("layer"))
        step = of("step")
        if step is None:
            self._step = 0 if request != self._last[0] else self._step + (layer <= self._last[1])
            step = self._step
        as_int(self.path, f"{where}{self.names['step']}", step)
        self._last = (request, layer)
        phase = of("phase")
        if phase is not None and str(phase) not in self.phases:
            raise FormatError(str(self.path), f"{where}phase {phase!r} is none of {', '.join(self.phases)}")
        if self._key != (request, step, layer):
            self.flush()
            self._key = (request, step, layer)
            self._phase = None if phase is None else self.phases[str(phase)]
        rows = _rows(self.path, f"{where}{self.names['ids']}", of("ids"))
        sequence = of("sequence")
        sequences = [sequence] * len(rows) if type(sequence) is int else sequence
        if sequence is not None and (not isinstance(sequences, list) or len(sequences) != len(rows)):
            raise FormatError(str(self.path), f"{where}{len(rows)} rows, but not as many sequences")
        self._sequences += (
            [0] * len(rows) if sequence is None else [as_int(self.path, f"{where}sequence", i) for i in sequences]
        )
        self._rows += rows
        weights = of("weights")
        if weights is not None:
            before = [[float("nan")] * len(row) for row in self._rows[: len(self._rows) - len(rows)]]
            self._weights = (self._weights or before) + _weights(self.path, where, weights, rows)
        elif self._weights is not None:
            self._weights += [[float("nan")] * len(row) for row in rows]

    def flush(self) -> None:
        if self._key is None:
            return
        request, step, layer = self._key
        phase = self._phase if self._phase is not None else Phase.DECODE if len(self._rows) == 1 else Phase.PREFILL
        self.builder.add(request, step, phase, layer, self._rows, sequences=self._sequences, weights=self._weights)
        self._key, self._rows, self._sequences, self._weights = None, [], [], None


def _rows(path: Path, where: str, value: Any) -> list[list[int]]:  # of JSON's values
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [as_ids(path, where, row) for row in value]
    return [as_ids(path, where, value)]


def _weights(path: Path, where: str, value: Any, rows: list[list[int]]) -> list[list[float]]:  # of JSON's values
    given = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    good = len(given) == len(rows) and all(
        isinstance(row, list) and len(row) == len(ids) and all(w is None or type(w) in (int, float) for w in row)
        for row, ids in zip(given, rows, strict=False)
    )
    if not good:
        raise FormatError(str(path), f"{where}weights do not fit the ids")
    return [[float("nan") if w is None else float(w) for w in row] for row in given]


def _phases(path: Path, given: Any) -> dict[str, Phase]:  # of JSON's values
    phases = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}
    if not isinstance(given, dict) or any(v not in ("prefill", "decode") for v in given.values()):
        raise FormatError(str(path), "line 1: phases must say which names mean prefill and decode")
    return phases | {str(name): phases[meant] for name, meant in given.items()}


def _sizes(path: Path, header: dict[str, Any]) -> tuple[npt.NDArray[np.int64] | None, int | None]:
    """Return the bytes of experts, and the number of layers if the header has it."""
    told = header.get("n_layer")
    n_layer = None if told is None else as_int(path, "line 1: n_layer", told, 1, MAX_LAYERS)
    given = header.get("expert_bytes")
    if given is None:
        return None, n_layer
    if type(given) is int and n_layer is not None:
        given = [[given]] * n_layer
    if not isinstance(given, list) or not given or len(given) > MAX_LAYERS:
        raise FormatError(str(path), "line 1: expert_bytes is neither a number nor a list by layer")
    rows = [row if isinstance(row, list) else [row] for row in given]
    width = len(rows[0])
    for i, row in enumerate(rows):
        if len(row) != width or not 1 <= width <= 64:
            raise FormatError(str(path), f"line 1: expert_bytes[{i}] has {len(row)} projections")
        for n in row:
            as_int(path, f"line 1: expert_bytes[{i}]", n, 0, 1 << 44)
    if n_layer is not None and len(rows) != n_layer:
        raise FormatError(str(path), f"line 1: expert_bytes of {len(rows)} layers, the model has {n_layer}")
    return np.array(rows, np.int64), len(rows)


def _projections(header: dict[str, Any], sizes: npt.NDArray[np.int64] | None) -> tuple[str, ...]:
    names = header.get("projections")
    n = 1 if sizes is None else sizes.shape[1]
    if isinstance(names, list) and len(names) == n:
        return tuple(map(str, names))
    return ("all",) if n == 1 else tuple(f"tensor {i}" for i in range(n))


def write(trace: Trace, path: Path) -> None:
    """Write a trace, which `read` can read."""
    with aside(path) as part, part.open("w", encoding="utf-8") as file:
        for line in lines_of(trace):
            file.write(line + "\n")


def header_of(trace: Trace) -> str:
    """Return the line that describes a trace."""
    header: dict[str, Any] = {
        "format": NAME, "version": VERSION, "model": trace.model, "n_layer": trace.n_layer, "n_expert": trace.n_expert,
        "n_used": trace.n_used, "requests": list(trace.requests),
    }  # fmt: skip
    if trace.n_used_model is not None:
        header["n_used_model"] = trace.n_used_model
    if trace.expert_bytes is not None:
        header |= {"projections": list(trace.projections), "expert_bytes": trace.expert_bytes.tolist()}
    return json.dumps(header)


def lines_of(trace: Trace) -> list[str]:
    """Return the lines of a trace."""
    made = [header_of(trace)]
    for event in range(trace.n_event):
        rows = slice(int(trace.first_row[event]), int(trace.first_row[event + 1]))
        entry: dict[str, Any] = {
            "request": int(trace.request[event]), "step": int(trace.step[event]),
            "phase": Phase(trace.phase[event]).name.lower(), "layer": int(trace.layer[event]),
            "sequence": trace.sequence[rows].tolist(), "ids": [[i for i in row if i >= 0] for row in trace.ids[rows].tolist()],
        }  # fmt: skip
        if trace.weights is not None:
            entry["weights"] = [
                [None if math.isnan(w) else round(w, 6) for w, i in zip(row, ids, strict=True) if i >= 0]
                for row, ids in zip(trace.weights[rows].tolist(), trace.ids[rows].tolist(), strict=True)
            ]
        made.append(json.dumps(entry))
    return made
