"""BigMoeOnEdge's ``--route-trace`` (CSV, ``# route_trace v1``): a row for each expert of each token.

Prefill has one event per layer with the rows of all its tokens; decode has one per step and layer.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from ...errors import FormatError
from ..trace import MAX_LAYERS, Phase, Trace, TraceBuilder
from ._text import open_lines

__all__ = ["read", "sniff"]

_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
_FIELD = re.compile(r"(\w+)=(\S+)")
#: Experts of a token as models of an architecture were trained; the engine can cut them.
_TRAINED = {"qwen3moe": 8, "gpt-oss": 4, "gemma4": 8, "olmoe": 8, "granitemoe": 8, "mixtral": 2}


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    return start.startswith((b"# route_trace", _COLUMNS.encode()))


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    facts: dict[str, str] = {}
    n_bytes: dict[int, int] = {}
    # by (turn, phase, step of decode, layer): the slots of the rows, in order of steps
    events: dict[tuple[int, int, int, int], dict[int, list[tuple[int, int, float]]]] = defaultdict(dict)
    n_dropped = 0
    for number, line in open_lines(path):
        if line.startswith("#"):
            found = dict(_FIELD.findall(line))
            if "layer" in found:
                layer, size = _int(path, number, found["layer"]), _int(path, number, found.get("expert_bytes", "0"))
                if layer >= MAX_LAYERS:
                    raise FormatError(str(path), f"line {number}: layer {layer}")
                n_bytes[layer] = size
            else:
                facts.update(found)
            continue
        cells = line.rstrip("\r\n").split(",")
        if cells[0] == "turn" or cells == [""]:
            continue
        if len(cells) < 9:
            raise FormatError(str(path), f"line {number}: {len(cells)} columns, not {_COLUMNS}")
        turn, phase, step, layer, slot, expert = (_int(path, number, cell) for cell in cells[:6])
        if phase > 1:
            raise FormatError(str(path), f"line {number}: phase {phase}, not 0 (prefill) or 1 (decode)")
        if len(cells) > 9 and cells[9] == "1":
            n_dropped += 1
        key = (turn, phase, step if phase else -1, layer)
        events[key].setdefault(step, []).append((slot, expert, _float(path, number, cells[6])))
    builder = TraceBuilder(str(path))
    turns = {turn: i for i, turn in enumerate(sorted({key[0] for key in events}))}
    for key in sorted(events):  # prefill before decode, step by step, layer by layer
        turn, phase, step, layer = key
        rows = [sorted(events[key][at]) for at in sorted(events[key])]
        builder.add(
            turns[turn], step + 1, Phase(phase), layer, ([e for _, e, _ in row] for row in rows),
            weights=([w for _, _, w in row] for row in rows),
        )  # fmt: skip
    told = {name: _int(path, 0, facts[name]) for name in ("n_layer", "n_expert", "n_expert_used") if name in facts}
    n_layer = told.get("n_layer")
    sizes = None
    if n_bytes:
        n_layer = max(n_layer or 0, *(layer + 1 for layer in n_bytes))
        sizes = np.zeros((n_layer, 1), np.int64)
        for layer, size in n_bytes.items():
            sizes[layer] = size
    return builder.finish(
        n_layer=n_layer, n_expert=told.get("n_expert"), n_used=told.get("n_expert_used"), expert_bytes=sizes,
        model=facts.get("model", "").replace("\\", "/").rpartition("/")[2], format="bigmoeonedge",
        requests=tuple(f"turn {turn}" for turn in turns), n_used_model=_TRAINED.get(facts.get("arch", "")),
    )  # fmt: skip


def _int(path: Path, number: int, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise FormatError(str(path), f"line {number}: '{text[:40]}' is not a whole number")
    return int(text)


def _float(path: Path, number: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        if text == "":
            return math.nan
        raise FormatError(str(path), f"line {number}: weight '{text[:40]}' is not a number") from None
