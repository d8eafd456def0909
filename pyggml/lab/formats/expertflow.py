"""Expertflow's JSONL 1.0.0: a line for each token and layer. Lines of one ``forward_id`` are one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...files import parse_json
from ..trace import Phase, Trace, TraceBuilder
from ._text import as_ids, as_int, open_lines

__all__ = ["read", "sniff"]

_PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    first = start.lstrip().partition(b"\n")[0]
    return first[:1] == b"{" and b'"schema_version"' in first and b'"selected_expert_ids"' in first


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    requests: dict[str, int] = {}
    # (request, forward, layer): phase, place in the file, rows by token
    events: dict[tuple[int, int, int], tuple[Phase, dict[int, tuple[list[int], list[float] | None]]]] = {}
    order: dict[tuple[int, int], int] = {}
    for number, line in open_lines(path):
        if not line.strip():
            continue
        entry = parse_json(path, line, where=f"line {number}: ")
        if not isinstance(entry, dict):
            raise FormatError(str(path), f"line {number} is no object")
        where = f"line {number}: "
        request = requests.setdefault(str(entry.get("request_id", "")), len(requests))
        phase = _PHASES.get(str(entry.get("phase")))
        if phase is None:
            raise FormatError(str(path), f"{where}phase is {entry.get('phase')!r}, not prefill or decode")
        forward, token, layer = (
            as_int(path, where + key, entry.get(key)) for key in ("forward_id", "token_index", "layer_id")
        )
        ids = as_ids(path, f"{where}selected_expert_ids", entry.get("selected_expert_ids"))
        order.setdefault((request, forward), len(order))
        _, rows = events.setdefault((request, forward, layer), (phase, {}))
        if token in rows:
            raise FormatError(str(path), f"{where}token {token} of layer {layer} is told twice in forward {forward}")
        rows[token] = (ids, _weights(path, where, entry.get("selected_expert_weights"), len(ids)))
    builder = TraceBuilder(str(path))
    for request, forward, layer in sorted(events, key=lambda k: (k[0], order[k[:2]], k[2])):
        phase, rows = events[request, forward, layer]
        chosen = [rows[token] for token in sorted(rows)]
        weights = [w if w is not None else [float("nan")] * len(ids) for ids, w in chosen]
        builder.add(request, forward, phase, layer, (ids for ids, _ in chosen), weights=weights)
    return builder.finish(format="expertflow", requests=tuple(requests))


def _weights(path: Path, where: str, value: Any, n: int) -> list[float] | None:  # of JSON's values
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != n or any(type(w) not in (int, float) for w in value):
        raise FormatError(str(path), f"{where}selected_expert_weights is no list of {n} numbers")
    return [float(w) for w in value]
