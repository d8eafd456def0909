"""Prefetchers: how often they are right, over all experts and over those that are not resident.

A prefetcher predicts each event's experts before it receives the event. Those that learn are fitted on other requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import GraphError
from ..kernels.lab import guesses as compiled
from ..kernels.lab import stack
from .machine import Machine, Workload, break_even
from .policies import Policy, own_class
from .pools import Capacity, Pools, RequestKeys
from .replay import Bools, Setting, replayer
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
    "find_prefetcher",
    "guesses",
    "predict",
]

Floats = npt.NDArray[np.float64]
Guesses = npt.NDArray[np.int32]
_DEFAULT = Setting()
Events = Sequence[tuple[int, Sequence[int]]]  # index of the layer, experts


class Prefetcher(ABC):
    """Ranks the experts of the next event. An instance serves one model's layers; ``module:Class`` names a user's own.

    The order of calls: `learn` with each of the other requests, `fit`, `start`; then, for each event, `scores` and `saw`.
    """

    def learn(self, request: Events, n_layer: int, n_expert: int) -> Floats:
        """Return counts of a request, which are summed over requests: by default zeros, (n_layer, n_expert)."""
        return np.zeros((n_layer, n_expert))

    def fit(self, learned: Floats) -> None:
        """Receive the summed counts of other requests: by default only their sizes are kept."""
        self.n_layer, self.n_expert = learned.shape

    def start(self, request: Events) -> None:
        """Begin a request: forget the previous one. Only `Oracle` reads its events."""
        return

    @abstractmethod
    def scores(self, layer: int) -> Floats:
        """Return a score for each expert in the next event, of ``layer``: float64, (n_expert,); an expert without one is not guessed."""

    @abstractmethod
    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Receive an event."""


class Popularity(Prefetcher):
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


class PreviousLayer(Prefetcher):
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

    weight = 0.2

    def start(self, request: Events) -> None:
        """Begin again."""
        super().start(request)
        self.average = np.zeros(self.table.shape[:2])

    def scores(self, layer: int) -> Floats:
        """Return the sum of both; the average has a fifth of the other's weight."""
        return np.asarray(super().scores(layer) + self.weight * self.average[layer])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Tell both."""
        super().saw(layer, experts)
        self.average[layer] *= Average.keep
        self.average[layer, experts] += 1


class Oracle(Prefetcher):
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


def find_prefetcher(name: str | type[Prefetcher]) -> type[Prefetcher]:
    """Return the prefetcher of a name, or of ``module:Class``; a class itself is one.

    Raises
    ------
    GraphError
        There is no such prefetcher; or see `own_class`.
    """
    if not isinstance(name, str):
        return name
    found: type[object] | None = PREFETCHERS.get(name)
    if found is None and ":" in name:
        found = own_class(name, "prefetcher", Prefetcher, n_args=0)
    if found is None or not issubclass(found, Prefetcher):
        raise GraphError(f"there is no prefetcher '{name}'", hint=f"{', '.join(PREFETCHERS)}; module:Class")
    return found


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
    names: Sequence[str | type[Prefetcher]],
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
        See `find_prefetcher`; or a prefetcher must learn and the trace has only one request.
    """
    found = {name: find_prefetcher(name) for name in names}
    ready = replayer(trace, Setting("layer", setting.phase), by_first=policy.llama is not None)
    pools, runs = ready.pools, ready.runs
    if len(runs) < 2 and FITTED & set(names):
        raise GraphError(
            "prefetchers that learn need other requests: the trace has one",
            hint="give several traces, or --prefetchers previous,average",
        )
    n = trace.n_used if n_guess is None else n_guess
    used = [_as_mask(run, pools.n_key) for run in runs]
    resident = {}
    for capacity in capacities:
        slots = pools.slots(capacity)
        assert slots is not None
        resident[capacity] = ready.resident(policy, slots)
    late = None if machine is None or not pools.is_sized else _Lateness.of(trace, pools, runs, setting, machine)
    scores = []
    for name in names:
        guessed = guesses(found[name](), runs, pools, n)
        for capacity in capacities:
            label = name if isinstance(name, str) else name.__name__
            scores.append(_score(label, n, capacity, pools, runs, guessed, used, resident[capacity], late))
    return scores


def events_of(run: RequestKeys) -> Events:
    """Return the events of a request: the place of the layer among the trace's, and its experts."""
    keys, offsets = run.keys.tolist(), run.offsets.tolist()
    return [(p, keys[offsets[i] : offsets[i + 1]]) for i, p in enumerate(run.pool.tolist())]


def best_of(prefetcher: Prefetcher, layer: int, n: int, n_expert: int) -> list[int]:
    """Return the experts with the highest scores, at most ``n``; none without a score.

    Raises
    ------
    GraphError
        The scores are not one number for each expert.
    """
    scores = np.asarray(prefetcher.scores(layer))
    if scores.shape != (n_expert,):
        raise GraphError(
            f"{type(prefetcher).__name__}.scores() returned an array of shape {scores.shape}; a layer has {n_expert} experts"
        )
    best = np.argsort(-scores, kind="stable")[:n]
    found: list[int] = best[scores[best] > 0].tolist()
    return found


def guesses(prefetcher: Prefetcher, runs: Sequence[RequestKeys], pools: Pools, n: int) -> list[Guesses]:
    """Return the guesses of each event of each request, the best first: int32, (n_event, n); -1 where there are fewer.

    Those of pyggml's own prefetchers are compiled; others are asked event by event.
    """
    size = pools.n_pool, pools.n_expert
    kind = _COMPILED.get(type(prefetcher))
    requests = [events_of(run) if kind is None else () for run in runs]
    learned = [
        prefetcher.learn(request, *size) if kind is None else _learn(run, kind, *size)
        for run, request in zip(runs, requests, strict=True)
    ]
    total = np.sum(learned, axis=0)
    made = []
    for run, request, own in zip(runs, requests, learned, strict=True):
        prefetcher.fit(total - own)
        if kind is None:
            made.append(_ask(prefetcher, request, n, pools.n_expert))
            continue
        counts, table, keep, weight = np.zeros(size), np.zeros((1, 1, 1)), 0.0, 1.0
        if isinstance(prefetcher, Average):
            counts, keep = prefetcher.ties, prefetcher.keep
        elif isinstance(prefetcher, Popularity):
            counts = prefetcher.counts
        elif isinstance(prefetcher, PreviousLayer):
            table = np.zeros((*size, size[1])) if isinstance(prefetcher, Online) else prefetcher.table
            keep, weight = Average.keep, Both.weight
        made.append(compiled.guesses(run.offsets, run.keys, run.pool, *size, kind, n, counts, table, keep, weight))
    return made


#: Number of the compiled form of each prefetcher.
_COMPILED: dict[type, int] = {
    Popularity: compiled.POPULARITY,
    Average: compiled.AVERAGE,
    Previous: compiled.AVERAGE,
    PreviousLayer: compiled.PREVIOUS_LAYER,
    Both: compiled.BOTH,
    Online: compiled.ONLINE,
    Oracle: compiled.ORACLE,
}


def _learn(run: RequestKeys, kind: int, n_layer: int, n_expert: int) -> Floats:
    """Return what a prefetcher's `learn` returns."""
    if kind in (compiled.POPULARITY, compiled.AVERAGE):
        return np.asarray(stack.count_uses(run.offsets, run.keys, run.pool, n_layer, n_expert), np.float64)
    if kind in (compiled.PREVIOUS_LAYER, compiled.BOTH):
        table: Floats = compiled.count_followers(run.offsets, run.keys, run.pool, n_layer, n_expert)
        return table
    return np.zeros(n_expert)


def _ask(prefetcher: Prefetcher, request: Events, n: int, n_expert: int) -> Guesses:
    """Return the guesses of a prefetcher for each event, asked one by one."""
    prefetcher.start(request)
    made: Guesses = np.full((len(request), n), -1, np.int32)
    for event, (layer, experts) in enumerate(request):
        best = best_of(prefetcher, layer, n, n_expert)
        made[event, : len(best)] = best
        prefetcher.saw(layer, experts)
    return made


def _as_mask(run: RequestKeys, n_key: int) -> Bools:
    """Return the keys of each event: bool, (n_event, n_key)."""
    mask = np.zeros((len(run.pool), n_key), np.bool_)
    mask[np.repeat(np.arange(len(run.pool)), np.diff(run.offsets)), run.keys] = True
    return mask


@dataclass(frozen=True, slots=True)
class _Lateness:
    """Seconds of one expert's copy and of the time before it is needed, on a machine; and the precision that pays."""

    copy_s: float
    window_s: float
    break_even: float | None

    @classmethod
    def of(
        cls, trace: Trace, pools: Pools, runs: Sequence[RequestKeys], setting: Setting, machine: Machine
    ) -> _Lateness:
        work = Workload.of(trace, setting)
        n_token = max(1, sum(run.n_token for run in runs))
        per_layer_s = work.seconds(machine, 0, 0).total_s * n_token / max(1, work.n_layer_step)
        mean = float(pools.sizes[:, 0].mean())
        copy_s = machine.device.link.seconds(round(mean), n_copies=work.n_projection)
        return cls(copy_s, per_layer_s, break_even(machine, mean, work.n_projection, per_layer_s))


def _score(
    name: str,
    n: int,
    capacity: Capacity,
    pools: Pools,
    runs: Sequence[RequestKeys],
    guessed: list[Guesses],
    used: list[Bools],
    resident: list[Bools],
    late: _Lateness | None,
) -> Score:
    n_used = right = missing = right_missing = misses = wasted = n_late = 0
    for run, guess, needed, held in zip(runs, guessed, used, resident, strict=True):
        event = np.arange(len(guess))[:, None]
        is_guess = guess >= 0
        is_used = is_guess & needed[event, guess]
        is_absent = is_guess & ~held[event, guess]
        good = is_absent & is_used
        n_used += len(run.keys)
        right += int(is_used.sum())
        misses += int((needed & ~held).sum())
        missing += int(is_absent.sum())
        right_missing += int(good.sum())
        wasted += int(((is_absent & ~is_used).sum(axis=1) * pools.sizes[run.pool, 0]).sum())
        if late is not None:  # copies of one event's guesses follow one another
            n_late += int((good & (np.cumsum(is_absent, axis=1) * late.copy_s > late.window_s)).sum())
    n_token = max(1, sum(run.n_token for run in runs))
    return Score(
        name, n, capacity, right / max(1, n_used), right_missing / missing if missing else None,
        right_missing / misses if misses else 0.0, wasted / n_token if pools.is_sized else None,
        n_late / right_missing if late is not None and right_missing else None, None if late is None else late.break_even,
    )  # fmt: skip
