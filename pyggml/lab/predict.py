"""Prefetchers: how often they are right, and how often where it matters, on experts that are not there.

A prefetcher is told of every event in order and asked for the next event's experts before it is told. Those that learn are fitted on other requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import GraphError
from .cache import Cache
from .machine import Machine, Workload, break_even
from .policies import Policy
from .pools import Capacity, Pools, Run, runs_of
from .replay import Setting
from .trace import Trace

__all__ = [
    "PREFETCHERS",
    "Average",
    "Both",
    "Oracle",
    "Popularity",
    "Prefetcher",
    "Previous",
    "PreviousLayer",
    "Score",
    "predict",
]

Floats = npt.NDArray[np.float64]
_DEFAULT = Setting()
Events = Sequence[tuple[int, Sequence[int]]]  # place of the layer, experts


class Prefetcher(Protocol):
    """Ranks the experts of the next event. An instance serves one model's layers."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return what a request teaches, as numbers that are added up over requests."""

    def fit(self, learned: Floats) -> None:
        """Take what other requests taught, in sum."""

    def start(self, request: Events) -> None:
        """Forget what a request told; another begins (only an oracle looks at it)."""

    def scores(self, layer: int) -> Floats:
        """Return what speaks for each expert of a layer, the next event: float64, (n_expert,)."""

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Take note of an event."""


class Popularity:
    """The experts that other requests used most."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return how often each expert was used: float64, (n_layer, n_expert)."""
        counts = np.zeros((n_layer, n_expert))
        for layer, experts in request:
            for e in experts:
                counts[layer, e] += 1
        return counts

    def fit(self, learned: Floats) -> None:
        """Keep the counts."""
        self.counts = learned

    def start(self, request: Events) -> None:
        """Nothing is kept."""

    def scores(self, layer: int) -> Floats:
        """Return the counts."""
        return np.asarray(self.counts[layer])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing is learned on the way."""


class Average(Popularity):
    """An exponential average of what the layer's last tokens used; popularity among equals."""

    keep = 0.8

    def fit(self, learned: Floats) -> None:
        """Keep the counts, to break ties."""
        self.ties = 1e-6 * learned / max(1.0, float(learned.max()))

    def start(self, request: Events) -> None:
        """Forget."""
        self.average = np.zeros_like(self.ties)

    def scores(self, layer: int) -> Floats:
        """Return the average."""
        return np.asarray(self.average[layer] + self.ties[layer])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Let the past fade, and add."""
        self.average[layer] *= self.keep
        self.average[layer, experts] += 1


class Previous(Average):
    """What the layer used for the token before."""

    keep = 0.0


class PreviousLayer:
    """A table of which experts follow those of the layer before; the first layer follows the last one of the token before."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return how often an expert followed one of the layer before: float64, (n_layer, n_expert, n_expert)."""
        table = np.zeros((n_layer, n_expert, n_expert))
        before: Sequence[int] = ()
        for layer, experts in request:
            for e in before:
                row = table[layer, e]
                for after in experts:
                    row[after] += 1
            before = experts
        return table

    def fit(self, learned: Floats) -> None:
        """Turn counts into shares."""
        table = learned + 0.01
        self.table = table / table.sum(axis=2, keepdims=True)

    def start(self, request: Events) -> None:
        """Forget the layer before."""
        self.before: list[int] = []

    def scores(self, layer: int) -> Floats:
        """Return the sum of what follows each expert of the layer before."""
        return np.asarray(self.table[layer, self.before].sum(axis=0))

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Keep an event for the next."""
        self.before = list(experts)


class Both(PreviousLayer):
    """The layer before, and the average of the layer's last tokens."""

    def start(self, request: Events) -> None:
        """Begin again."""
        super().start(request)
        self.average = np.zeros(self.table.shape[:2])

    def scores(self, layer: int) -> Floats:
        """Return a sum in which the average has a fifth of the layer before's weight."""
        return np.asarray(super().scores(layer) + 0.2 * self.average[layer])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Tell both."""
        super().saw(layer, experts)
        self.average[layer] *= Average.keep
        self.average[layer, experts] += 1


class Oracle:
    """The next event itself: the limit of all prefetchers."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return the number of experts alone."""
        return np.zeros(n_expert)

    def fit(self, learned: Floats) -> None:
        """Keep the number of experts."""
        self.n_expert = len(learned)

    def start(self, request: Events) -> None:
        """Look at what will come."""
        self.request, self.at = request, 0

    def scores(self, layer: int) -> Floats:
        """Return 1 for what comes."""
        scores = np.zeros(self.n_expert)
        scores[list(self.request[self.at][1])] = 1
        return scores

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Go on."""
        self.at += 1


#: By name.
PREFETCHERS: dict[str, type[Prefetcher]] = {
    "popularity": Popularity,
    "previous": Previous,
    "average": Average,
    "previous-layer": PreviousLayer,
    "both": Both,
    "oracle": Oracle,
}


@dataclass(frozen=True, slots=True)
class Score:
    """How a prefetcher does beside a cache.

    Attributes
    ----------
    recall : float
        Share of the used experts that were among the guesses, there or not.
    precision_missing : float or None
        Share of the guesses that were not there and then used: what copies are worth.
    covered : float
        Share of the misses that were guessed.
    wasted_bytes : int or None
        Of guesses that were not there and were not used, a token.
    late : float or None
        Share of the right guesses' copies that are not done when the experts are needed, on a machine: the guess is made when the layer before is known.
    break_even : float or None
        The precision from which on a guess pays on this machine.
    """

    prefetcher: str
    n_guess: int
    capacity: Capacity
    recall: float
    precision_missing: float | None
    covered: float
    wasted_bytes: float | None
    late: float | None
    break_even: float | None

    def json(self) -> dict[str, object]:
        """Return the numbers."""
        made: dict[str, object] = {name: getattr(self, name) for name in self.__slots__ if name != "capacity"}
        return {**made, "capacity": self.capacity.json()}


def predict(
    trace: Trace,
    names: Sequence[str],
    capacities: Sequence[Capacity],
    policy: Policy,
    *,
    n_guess: int | None = None,
    setting: Setting = _DEFAULT,
    machine: Machine | None = None,
) -> list[Score]:
    """Return how prefetchers do beside a policy's cache, which they do not change: each request is guessed by what others taught.

    Raises
    ------
    GraphError
        There is no such prefetcher, or only one request to learn from and be tested on.
    """
    unknown = [name for name in names if name not in PREFETCHERS]
    if unknown:
        raise GraphError(f"there is no prefetcher '{unknown[0]}'", hint=f"one of {', '.join(PREFETCHERS)}")
    pools = Pools.of(trace, "layer")
    runs = list(runs_of(trace, pools, phase=setting.phase))
    requests = [_events(run) for run in runs]
    if len(runs) < 2 and set(names) & {"popularity", "previous-layer", "both"}:
        raise GraphError(
            "prefetchers that learn need other requests: the trace has one",
            hint="give several traces, or --prefetchers previous,average",
        )
    n = trace.n_used if n_guess is None else n_guess
    resident = {}
    for capacity in capacities:
        slots = pools.slots(capacity)
        assert slots is not None
        resident[capacity] = [_resident(run, pools, policy, slots.tolist()) for run in runs]
    scores = []
    for name in names:
        guesses = _guesses(PREFETCHERS[name](), requests, pools, n)
        for capacity in capacities:
            scores.append(
                _score(name, n, capacity, trace, pools, runs, requests, guesses, resident[capacity], setting, machine)
            )
    return scores


def _events(run: Run) -> Events:
    keys, offsets = run.keys.tolist(), run.offsets.tolist()
    return [(p, keys[offsets[i] : offsets[i + 1]]) for i, p in enumerate(run.pool.tolist())]


def _guesses(prefetcher: Prefetcher, requests: Sequence[Events], pools: Pools, n: int) -> list[list[list[int]]]:
    """Return the guesses of each event of each request, the best first."""
    made = []
    learned = [prefetcher.learn(request, pools.n_pool, pools.n_expert) for request in requests]
    total = np.sum(learned, axis=0)
    for i, request in enumerate(requests):
        prefetcher.fit(total - learned[i])
        prefetcher.start(request)
        mine = []
        for layer, experts in request:
            scores = prefetcher.scores(layer)
            best = np.argsort(-scores, kind="stable")[:n]
            mine.append(best[scores[best] > 0].tolist())
            prefetcher.saw(layer, experts)
        made.append(mine)
    return made


def _resident(run: Run, pools: Pools, policy: Policy, slots: list[int]) -> list[set[int]]:
    """Return what is there before each event."""
    caches = [
        Cache(slots[p], policy.eviction(slots[p], pools.n_key), policy.new_admission()) for p in range(pools.n_pool)
    ]
    there = []
    for (p, keys), step, layer in zip(_events(run), run.step.tolist(), run.layer.tolist(), strict=True):
        there.append(set(caches[p].slot_of))
        caches[p].event(step, layer, keys)
    return there


def _score(
    name: str,
    n: int,
    capacity: Capacity,
    trace: Trace,
    pools: Pools,
    runs: list[Run],
    requests: Sequence[Events],
    guesses: list[list[list[int]]],
    resident: list[list[set[int]]],
    setting: Setting,
    machine: Machine | None,
) -> Score:
    used = right = missing = right_missing = misses = 0
    wasted = 0
    for request, guessed, there in zip(requests, guesses, resident, strict=True):
        for (layer, experts), guess, held in zip(request, guessed, there, strict=True):
            needed = set(experts)
            absent = [e for e in guess if e not in held]
            good = sum(e in needed for e in absent)
            used += len(needed)
            right += sum(e in needed for e in guess)
            misses += len(needed - held)
            missing += len(absent)
            right_missing += good
            wasted += (len(absent) - good) * int(pools.sizes[layer, 0])
    n_token = max(1, sum(run.n_token for run in runs))
    late = even = None
    if machine is not None and pools.is_sized:
        work = Workload.of(trace, setting)
        per_layer_s = work.seconds(machine, 0, 0).total_s * n_token / max(1, work.n_layer_step)
        mean = float(pools.sizes[:, 0].mean())
        even = break_even(machine, mean, work.n_projection, per_layer_s)
        late = _late(
            guesses,
            resident,
            requests,
            machine.device.link.seconds(round(mean), n_copies=work.n_projection),
            per_layer_s,
        )
    return Score(
        name, n, capacity, right / max(1, used), right_missing / missing if missing else None, right_missing / misses if misses else 0.0,
        wasted / n_token if pools.is_sized else None, late, even,
    )  # fmt: skip


def _late(
    guesses: list[list[list[int]]],
    resident: list[list[set[int]]],
    requests: Sequence[Events],
    copy_s: float,
    window_s: float,
) -> float | None:
    """Return the share of right guesses whose copy ends after the layer before does; copies of one guess go one after another."""
    right = late = 0
    for request, guessed, there in zip(requests, guesses, resident, strict=True):
        for (_, experts), guess, held in zip(request, guessed, there, strict=True):
            absent = [e for e in guess if e not in held]
            for i, e in enumerate(absent):
                if e in experts:
                    right += 1
                    late += (i + 1) * copy_s > window_s
    return late / right if right else None
