"""Prefetchers: how often they are right, over all experts and over those that are not resident.

A prefetcher predicts each event's experts before it receives the event. Those that learn are fitted on other requests.
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
from .pools import Capacity, Pools, RequestKeys, request_keys
from .replay import Setting
from .trace import Trace

__all__ = [
    "FITTED",
    "PREFETCHERS",
    "Average",
    "Both",
    "Online",
    "Oracle",
    "Popularity",
    "Prefetcher",
    "Previous",
    "PreviousLayer",
    "Score",
    "best_of",
    "events_of",
    "predict",
]

Floats = npt.NDArray[np.float64]
_DEFAULT = Setting()
Events = Sequence[tuple[int, Sequence[int]]]  # index of the layer, experts


class Prefetcher(Protocol):
    """Ranks the experts of the next event. An instance serves one model's layers."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return counts of a request, which are summed over requests."""

    def fit(self, learned: Floats) -> None:
        """Receive the summed counts of other requests."""

    def start(self, request: Events) -> None:
        """Begin a request: forget the previous one. Only `Oracle` reads its events."""

    def scores(self, layer: int) -> Floats:
        """Return a score for each expert in the next event, of ``layer``: float64, (n_expert,)."""

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Receive an event."""


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
        """Do nothing."""

    def scores(self, layer: int) -> Floats:
        """Return the counts."""
        return np.asarray(self.counts[layer])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Do nothing."""


class Average(Popularity):
    """An exponential average of the experts of the layer's last tokens; ties are broken by popularity."""

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
        """Decay the average, and add the event."""
        self.average[layer] *= self.keep
        self.average[layer, experts] += 1


class Previous(Average):
    """The experts that the layer used for the previous token."""

    keep = 0.0


class PreviousLayer:
    """A table of which experts follow those of the previous layer; layer 0 follows the previous token's last layer."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return how often an expert followed one of the previous layer: float64, (n_layer, n_expert, n_expert)."""
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
        """Forget the previous layer."""
        self.before: list[int] = []

    def scores(self, layer: int) -> Floats:
        """Return the sum of the table's rows for the previous layer's experts."""
        return np.asarray(self.table[layer, self.before].sum(axis=0))

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Keep the event for the next layer."""
        self.before = list(experts)


class Online(PreviousLayer):
    """The same table, learned from what the request itself told before; it needs no other requests."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return the shape of the table alone."""
        return np.zeros((n_layer, n_expert, n_expert))

    def fit(self, learned: Floats) -> None:
        """Keep the shape."""
        self.shape = learned.shape

    def start(self, request: Events) -> None:
        """Forget what was learned."""
        super().start(request)
        self.table = np.zeros(self.shape)

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Count what follows the layer before."""
        if self.before:
            self.table[layer, np.asarray(self.before)[:, None], np.asarray(experts)] += 1
        super().saw(layer, experts)


class Both(PreviousLayer):
    """`PreviousLayer` combined with `Average`."""

    def start(self, request: Events) -> None:
        """Begin again."""
        super().start(request)
        self.average = np.zeros(self.table.shape[:2])

    def scores(self, layer: int) -> Floats:
        """Return the sum of both; the average has a fifth of the other's weight."""
        return np.asarray(super().scores(layer) + 0.2 * self.average[layer])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Tell both."""
        super().saw(layer, experts)
        self.average[layer] *= Average.keep
        self.average[layer, experts] += 1


class Oracle:
    """The next event itself: the limit of all prefetchers."""

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return only the number of experts."""
        return np.zeros(n_expert)

    def fit(self, learned: Floats) -> None:
        """Keep the number of experts."""
        self.n_expert = len(learned)

    def start(self, request: Events) -> None:
        """Keep the events to come."""
        self.request, self.at = request, 0

    def scores(self, layer: int) -> Floats:
        """Return 1 for each expert of the next event."""
        scores = np.zeros(self.n_expert)
        scores[list(self.request[self.at][1])] = 1
        return scores

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Advance to the next event."""
        self.at += 1


#: Prefetchers by name.
PREFETCHERS: dict[str, type[Prefetcher]] = {
    "popularity": Popularity,
    "previous": Previous,
    "average": Average,
    "previous-layer": PreviousLayer,
    "both": Both,
    "online": Online,
    "oracle": Oracle,
}


#: Those that know nothing without other requests.
FITTED = frozenset(("popularity", "previous-layer", "both"))


@dataclass(frozen=True, slots=True)
class Score:
    """The accuracy of a prefetcher, beside a cache.

    Attributes
    ----------
    recall : float
        Share of the used experts that were guessed, resident or not.
    precision_missing : float or None
        Share of the guesses of experts that were not resident which were then used.
    covered : float
        Share of the misses that were guessed.
    wasted_bytes : float or None
        Bytes per token of guesses that were neither resident nor used.
    late : float or None
        Share of the right guesses whose copies are not done when the experts are needed, on a machine, if the guess is
        made when the previous layer's experts are known.
    break_even : float or None
        The precision above which a guess saves time on this machine.
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
    """Return the accuracy of prefetchers beside a policy's cache, which they do not change.

    Prefetchers that learn are fitted on other requests.

    Raises
    ------
    GraphError
        A prefetcher is unknown, or must learn and the trace has only one request.
    """
    unknown = [name for name in names if name not in PREFETCHERS]
    if unknown:
        raise GraphError(f"there is no prefetcher '{unknown[0]}'", hint=f"one of {', '.join(PREFETCHERS)}")
    pools = Pools.of(trace, "layer")
    runs = list(request_keys(trace, pools, phase=setting.phase))
    requests = [events_of(run) for run in runs]
    if len(runs) < 2 and FITTED & set(names):
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


def events_of(run: RequestKeys) -> Events:
    """Return the events of a request: the place of the layer among the trace's, and its experts."""
    keys, offsets = run.keys.tolist(), run.offsets.tolist()
    return [(p, keys[offsets[i] : offsets[i + 1]]) for i, p in enumerate(run.pool.tolist())]


def best_of(scores: Floats, n: int) -> list[int]:
    """Return the experts that most speaks for, at most ``n``; none for which nothing does."""
    best = np.argsort(-scores, kind="stable")[:n]
    found: list[int] = best[scores[best] > 0].tolist()
    return found


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
            mine.append(best_of(prefetcher.scores(layer), n))
            prefetcher.saw(layer, experts)
        made.append(mine)
    return made


def _resident(run: RequestKeys, pools: Pools, policy: Policy, slots: list[int]) -> list[set[int]]:
    """Return the resident keys before each event."""
    caches = [
        Cache(slots[p], policy.eviction(slots[p], pools.n_key), policy.new_admission()) for p in range(pools.n_pool)
    ]
    there = []
    for (p, keys), step, layer in zip(events_of(run), run.step.tolist(), run.layer.tolist(), strict=True):
        there.append(set(caches[p].slot_of))
        caches[p].event(step, layer, keys)
    return there


def _score(
    name: str,
    n: int,
    capacity: Capacity,
    trace: Trace,
    pools: Pools,
    runs: list[RequestKeys],
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
    """Return the share of right guesses whose copy is late; copies of one event's guesses follow one another."""
    right = late = 0
    for request, guessed, there in zip(requests, guesses, resident, strict=True):
        for (_, experts), guess, held in zip(request, guessed, there, strict=True):
            absent = [e for e in guess if e not in held]
            for i, e in enumerate(absent):
                if e in experts:
                    right += 1
                    late += (i + 1) * copy_s > window_s
    return late / right if right else None
