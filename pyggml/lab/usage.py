"""Which experts are used: by layer, and by the number of tokens of an event, consecutive or independent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .pools import Pools, request_keys
from .trace import Phase, Trace

__all__ = ["Union", "Usage", "usage"]

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MAX_DRAWS = 400


@dataclass(frozen=True, slots=True)
class Union:
    """Mean number of distinct experts of a layer for a number of tokens; None if the trace is too short."""

    n_token: int
    consecutive: float | None  #: tokens of one sequence, one after another
    independent: float | None  #: the same step of different requests
    uniform: float  #: a router that chooses all experts with equal probability

    def json(self) -> dict[str, float | int | None]:
        """Return the numbers."""
        return {
            "tokens": self.n_token,
            "consecutive": self.consecutive,
            "independent": self.independent,
            "uniform": self.uniform,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """The result of `usage`.

    Attributes
    ----------
    layers : list of int
    counts : int64, (n_layer_with_experts, n_expert)
        Events in which each expert was used.
    events : int64, (n_layer_with_experts,)
    unions : list of Union
    coverage : list of (float, float)
        Share of experts, most used first, and their share of all uses.
    repeat : float
        Share of a token's experts that the previous token used, too; NaN if there are no consecutive tokens.
    """

    layers: list[int]
    counts: npt.NDArray[np.int64]
    events: npt.NDArray[np.int64]
    unions: list[Union]
    coverage: list[tuple[float, float]]
    repeat: float

    def sentences(self, trace: Trace) -> list[str]:
        """Return sentences that summarise the usage."""
        said = ["Most used experts: " + ", ".join(f"{s:.0%} carry {c:.0%}" for s, c in self.coverage) + " of all uses."]
        if not math.isnan(self.repeat):
            by_chance = trace.n_used / trace.n_expert
            said.append(
                f"A token uses {self.repeat:.0%} of the experts of the token before; independent choices would give {by_chance:.0%}."
            )
        return said


def usage(trace: Trace, *, phase: str = "decode") -> Usage:
    """Count the experts that a trace uses."""
    pools = Pools.of(trace, "layer")
    runs = list(request_keys(trace, pools, phase=phase))
    counts = np.zeros((pools.n_pool, pools.n_key), np.int64)
    events = np.zeros(pools.n_pool, np.int64)
    for run in runs:
        np.add.at(counts, (run.touch_pool, run.keys), 1)
        events += np.bincount(run.pool, minlength=pools.n_pool)
    used = _rows(trace, phase)
    most = max((len(rows) for rows in used), default=0)
    sizes = [n for n in _SIZES if n == 1 or n <= max(most, len(used))]
    k = trace.n_used
    unions = [
        Union(n, _consecutive(used, n), _independent(used, n), trace.n_expert * (1 - (1 - k / trace.n_expert) ** n))
        for n in sizes
    ]
    ordered = np.sort(counts.ravel())[::-1]
    total = max(1, int(ordered.sum()))
    coverage = [
        (share, float(ordered[: round(share * ordered.size)].sum()) / total) for share in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]
    both = [float((a & b).sum() / max(1, b.sum())) for rows in used for a, b in pairwise(rows)]
    return Usage(trace.layers, counts, events, unions, coverage, float(np.mean(both)) if both else float("nan"))


def _rows(trace: Trace, phase: str) -> list[npt.NDArray[np.bool_]]:
    """Return each sequence's tokens: bool, (n_token, n_layer, n_expert), without tokens that lack layers."""
    if trace.is_merged:
        return []
    wanted = np.ones(trace.n_event, bool) if phase == "all" else trace.phase == Phase[phase.upper()]
    part = trace.select(wanted)
    n_rows = np.diff(part.first_row)
    event = np.repeat(np.arange(part.n_event), n_rows)
    within = np.arange(len(event)) - part.first_row[event]
    place = {layer: i for i, layer in enumerate(part.layers)}
    layer = np.array([place[int(i)] for i in part.layer], np.int64)
    key = np.stack((part.request[event], part.sequence, part.phase[event], part.step[event], within), axis=1)
    tokens, index = np.unique(key, axis=0, return_inverse=True)
    n = np.bincount(index, minlength=len(tokens))
    whole = n == len(place)
    made = np.zeros((len(tokens), len(place), part.n_expert), bool)
    rows, slots = np.nonzero(part.ids >= 0)
    made[index[rows], layer[event[rows]], part.ids[rows, slots]] = True
    sequences = np.unique(tokens[:, :2], axis=0)
    return [made[whole & (tokens[:, :2] == s).all(axis=1)] for s in sequences]


def _consecutive(used: list[npt.NDArray[np.bool_]], n: int) -> float | None:
    sizes = []
    for rows in used:
        starts = range(0, len(rows) - n + 1, max(1, (len(rows) - n + 1) * len(used) // _MAX_DRAWS))
        sizes += [rows[i : i + n].any(axis=0).sum(axis=1).mean() for i in starts]
    return float(np.mean(sizes)) if sizes else None


def _independent(used: list[npt.NDArray[np.bool_]], n: int) -> float | None:
    """Return the mean union of the same step of ``n`` adjacent sequences of the file."""
    if n > len(used):
        return None
    length = min(len(rows) for rows in used)
    sizes = []
    for step in range(0, length, max(1, length * len(used) // _MAX_DRAWS)):
        for first in range(len(used)):
            together = [used[(first + i) % len(used)][step] for i in range(n)]
            sizes.append(np.any(together, axis=0).sum(axis=1).mean())
    return float(np.mean(sizes)) if sizes else None
