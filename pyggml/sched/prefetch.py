"""`PrefetchedExperts`: the experts of the next layer are guessed and sent while a layer computes.

`ExpertPrefetch` asks an `ExpertPredictor` for guesses and counts how right they were. `PrefetchedExperts` uses it for weights that
are copied to their layer's device, `pyggml.moe_cache.MoeCachePolicy` for a cache's misses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..dialect import Repairs
from ..tensor import Tensor
from .experts import expert_copy_ranges, layer_of
from .overlap import OverlappedExperts
from .resources import CopyQueue

if TYPE_CHECKING:
    from .plan import Plan
    from .transfer import Feed, Transfer

__all__ = ["ExpertPredictor", "ExpertPrefetch", "Guess", "PrefetchCounters", "PrefetchedExperts"]


class ExpertPredictor(Protocol):
    """Ranks the experts of the next layer. `pyggml.lab.running.RunningPredictor` makes one of the lab's prefetchers."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def begin(self, layers: Sequence[int], n_expert: int) -> None:
        """Receive the layers that will be asked for; called with each plan."""

    def restart(self) -> None:
        """Forget what the run told; another begins."""

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Receive the experts that a layer chose."""

    def best(self, layer: int, n: int) -> list[int]:
        """Return at most ``n`` experts of the layer that chooses next, the most likely first."""


@dataclass(slots=True)
class PrefetchCounters:
    """How right the guesses of a run were, in the terms of `pyggml.lab.predict.Score`.

    Attributes
    ----------
    used, right : int
        Experts that guessed layers used, and those of them that were guessed.
    misses : int
        Used experts that were not on the device.
    sent, right_sent : int
        Guesses that were not on the device and so were sent; those of them that were used.
    wasted_bytes : int
        Bytes of guesses that were sent and not used.
    n_late : int or None
        Guesses that were sent, used, and not there yet when the layer's ids were known; None without virtual time.
    """

    used: int = 0
    right: int = 0
    misses: int = 0
    sent: int = 0
    right_sent: int = 0
    wasted_bytes: int = 0
    n_late: int | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        """Return shares and bytes for JSON."""
        return {
            "used": self.used, "misses": self.misses, "sent": self.sent,
            "recall": self.right / self.used if self.used else None,
            "precision_missing": self.right_sent / self.sent if self.sent else None,
            "covered": self.right_sent / self.misses if self.misses else None,
            "wasted_bytes": self.wasted_bytes,
            "late": None if self.n_late is None or not self.right_sent else self.n_late / self.right_sent,
        }  # fmt: skip

    def line(self) -> str:
        """Return one line for reports."""
        told = self.as_dict()

        def share(name: str) -> str:
            value = told[name]
            return "-" if value is None else f"{value:.1%}"

        late = "" if self.n_late is None else f", {share('late')} of them late"
        return (
            f"Prefetch: recall {share('recall')}; {self.sent:,} experts sent ahead, {share('precision_missing')} right{late}; "
            f"{share('covered')} of misses covered; {self.wasted_bytes / 2**20:,.1f} MiB wasted"
        )


@dataclass(slots=True)
class Guess:
    """Experts that a layer is expected to use.

    Attributes
    ----------
    experts : list of int
        The most likely first.
    sent : dict of int to float
        Those that were sent, and the virtual time in seconds when they arrive.
    """

    experts: list[int]
    sent: dict[int, float] = field(default_factory=dict)


class ExpertPrefetch:
    """Guesses the experts of the next layer, and counts how right that was.

    Parameters
    ----------
    predictor : ExpertPredictor
    n_guess : int, optional
        Experts per guess; by default as many as the layer before used, in a cache as many as a token uses.

    Attributes
    ----------
    counters : PrefetchCounters
    """

    def __init__(self, predictor: ExpertPredictor, *, n_guess: int | None = None) -> None:
        self.predictor, self.n_guess = predictor, n_guess
        self.counters = PrefetchCounters()
        self.n_clears = 0

    def clear(self) -> None:
        """Start again: counters, what the predictor learned in the run, and guesses that wait for their layer."""
        self.counters = PrefetchCounters()
        self.predictor.restart()
        self.n_clears += 1

    def judge(
        self, guess: Guess, used: Collection[int], resident: Callable[[int], bool], n_bytes: int, now_s: float | None
    ) -> None:
        """Count a guess once the layer's ids are known.

        Parameters
        ----------
        resident : callable
            Whether an expert was on the device without the guess.
        n_bytes : int
            Bytes of one expert, over the layer's weights.
        now_s : float or None
            The host's virtual time.
        """
        c, needed = self.counters, set(used)
        good = needed.intersection(guess.sent)
        c.used += len(needed)
        c.right += len(needed.intersection(guess.experts))
        c.misses += sum(not resident(e) for e in needed)
        c.sent += len(guess.sent)
        c.right_sent += len(good)
        c.wasted_bytes += (len(guess.sent) - len(good)) * n_bytes
        if now_s is not None:
            c.n_late = (c.n_late or 0) + sum(guess.sent[e] > now_s for e in good)

    def as_dict(self) -> dict[str, int | float | str | None]:
        """Return predictor and counts for JSON."""
        return {"predictor": self.predictor.name, "n_guess": self.n_guess, **self.counters.as_dict()}


class PrefetchedExperts(OverlappedExperts):
    """Copies used experts as `OverlappedExperts` does, and sends those that the next layer is expected to use ahead of its ids.

    While a layer computes, a queue brings the guessed experts of the next layer into memory of the policy. Once that layer's
    ids are known, those that were guessed are copied within the device, and the rest is sent as usual.

    Parameters
    ----------
    prefetch : ExpertPrefetch
    repairs : Repairs, optional
        See `CopyPolicy`.

    Notes
    -----
    The policy needs device memory for two layers' expert weights: while one is read, the other is filled.
    """

    def __init__(self, prefetch: ExpertPrefetch, repairs: Repairs | None = None) -> None:
        super().__init__(repairs)
        self.prefetch = prefetch
        self._groups: list[_Layer] = []
        self._at: dict[Transfer, tuple[int, int]] = {}  # layer in order, and weight in it
        self._guess: Guess | None = None

    def reserve(self, plan: Plan) -> None:
        """Find the layers, and ask for memory of two of them and for a queue."""
        self._groups, self._at, self._guess = [], {}, None
        for transfer in plan.expert_transfers():
            last = self._groups[-1] if self._groups else None
            if last is None or not last.has(transfer):
                name = layer_of(transfer.source.name)
                last = _Layer(len(self._groups) if name is None else name)
                self._groups.append(last)
            self._at[transfer] = len(self._groups) - 1, len(last.weights)
            last.weights.append(transfer)
        sizes: dict[tuple[int, int, int], int] = {}
        for i, group in enumerate(self._groups):
            for j, transfer in enumerate(group.weights):
                key = transfer.backend_id, i % 2, j
                sizes[key] = max(sizes.get(key, 0), transfer.source.nbytes)
        for i, group in enumerate(self._groups):
            group.queue = plan.queue(group.weights[0].backend)
            group.memory = [
                plan.memory(t.backend, sizes[t.backend_id, i % 2, j], f"prefetched experts {i % 2}.{j}")
                for j, t in enumerate(group.weights)
            ]
        if self._groups:
            n_expert = self._groups[0].weights[0].n_expert
            self.prefetch.predictor.begin([group.number for group in self._groups], n_expert)

    def copy(self, transfer: Transfer) -> bool:
        """Take what was sent ahead, send the rest; after a layer's first weight, send the others and the next layer's guess."""
        if transfer.kind != "experts":
            return False
        at = self._at.get(transfer)
        if transfer.is_further or at is None:
            transfer.send_experts(transfer.ids())
            return True
        i, j = at
        group, used = self._groups[i], transfer.ids()
        if j == 0:
            self._start(transfer, i, used)
        ahead = used & group.there[j]
        for offset, size in _ranges(transfer, ahead):
            transfer.send_from(group.memory[j], offset, offset, size)
        if used - ahead:
            transfer.send_experts(used - ahead)
        if j == 0:
            for other, memory, there in zip(group.weights[1:], group.memory[1:], group.there[1:], strict=True):
                for offset, size in _ranges(other, used - there):
                    other.send(offset, size, into=memory, at=offset, queue=group.queue)
                there.update(used)
            self._guess_next(i + 1, used)
        return True

    def _start(self, transfer: Transfer, i: int, used: set[int]) -> None:
        """Judge the guess of a layer whose ids are known."""
        group, guess, self._guess = self._groups[i], self._guess, None
        guess = Guess([]) if guess is None else guess
        self.prefetch.predictor.saw(group.number, sorted(used))
        group.there = [set(guess.sent) for _ in group.weights]
        n_bytes = sum(t.expert_bytes for t in group.weights)
        self.prefetch.judge(guess, used, lambda _: False, n_bytes, transfer.virtual_s())

    def _guess_next(self, i: int, used: set[int]) -> None:
        """Send what the next layer is expected to use."""
        if i >= len(self._groups):
            return
        group, n = self._groups[i], self.prefetch.n_guess or len(used)
        guess = self._guess = Guess(self.prefetch.predictor.best(group.number, n))
        for transfer, memory in zip(group.weights, group.memory, strict=True):
            for offset, size in _ranges(transfer, guess.experts):
                transfer.send(offset, size, into=memory, at=offset, queue=group.queue)
                first = offset // transfer.expert_bytes
                arrives_s = transfer.arrives_s(memory)
                for e in guess.experts:
                    if first <= e < first + -(-size // transfer.expert_bytes):
                        guess.sent[e] = arrives_s

    def before_split(self, i_split: int) -> None:
        """Forget what a compute that failed has sent."""
        if i_split == 0:
            self._guess = None


@dataclass(slots=True)
class _Layer:
    """The expert weights of one layer, in the order of copying."""

    number: int
    weights: list[Transfer] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    there: list[set[int]] = field(default_factory=list)  #: by weight, what was sent to its memory
    queue: CopyQueue | None = None

    def has(self, transfer: Transfer) -> bool:
        """Return whether a weight is chosen from by the ids of this layer, on its device."""
        first = self.weights[0]
        return transfer.ids_tensor is first.ids_tensor and transfer.backend is first.backend


def _ranges(weight: Feed, experts: Collection[int]) -> list[tuple[int, int]]:
    found = expert_copy_ranges(experts, weight.n_expert, weight.expert_bytes, tensor_bytes=weight.source.nbytes)
    return [(r.offset_bytes, r.size_bytes) for r in found]
