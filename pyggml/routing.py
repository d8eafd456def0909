"""Which experts a batch uses when no batch was computed: a recording, or a stated assumption.

Real routers are skewed: 512 tokens of code used 72 to 95 of 128 experts in eight layers of gpt-oss-120b, which takes 4
for each token (llama.cpp, pull request 15346); a uniform router would use all. Its router has a bias; published speeds of models without one agree
with a much more even use. `routing_of` says what is assumed of a model; docs/accuracy.md what that is held to. Reports name it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import FormatError, GraphError
from .files import check_regular, read_json
from .hardware.rates import RATES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "BIASED_ROUTING",
    "DEFAULT_ROUTING",
    "LogNormal",
    "RecordedRouting",
    "Routing",
    "UsedCounts",
    "Zipf",
    "parse_routing",
    "routing_of",
]


class Routing(Protocol):
    """Which experts tokens choose. ``str(routing)`` names the assumption in reports."""

    def __hash__(self) -> int:
        """Return a hash: what is counted of a routing is kept by it."""

    @property
    def n_tokens(self) -> int | None:
        """Tokens that it knows of; None: any number."""

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the expected number of distinct experts that a batch uses in a layer."""

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts of one layer that the tokens at these positions choose."""

    def rows(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> list[list[int]]:
        """Return what each token chooses, in slot order; together they are `experts`."""


#: Tokens are drawn in blocks, the first ones together: of a token far behind only its own block is drawn.
_FIRST, _BLOCK = 4096, 1024


def _block(token: int) -> int:
    return 0 if token < _FIRST else 1 + (token - _FIRST) // _BLOCK


def _start(block: int) -> int:
    return 0 if block == 0 else _FIRST + (block - 1) * _BLOCK


class _Popularity(ABC):
    """Tokens that choose independently of each other, in proportion to the popularity of a layer's experts."""

    __slots__ = ()

    seed: int
    _drawn: dict[tuple[int, ...], _Race]  #: by layer, numbers of experts, and block

    @property
    def n_tokens(self) -> None:
        """Any number."""
        return

    @abstractmethod
    def _typical(self, n_expert: int) -> tuple[float, ...]:
        """Return the popularity of the experts of a typical layer, in any order."""

    @abstractmethod
    def _of_layer(self, rng: np.random.Generator, n_expert: int) -> npt.NDArray[np.float64]:
        """Draw the popularity of the experts of one layer."""

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the expected number of distinct experts that a batch uses.

        Parameters
        ----------
        n_expert, n_used : int
            The number of experts, and how many distinct ones each token uses.
        n_token : int
            The number of tokens in the batch.
        """
        if n_token == 0 or n_used == 0:
            return 0.0
        if n_used >= n_expert:
            return float(n_expert)
        if n_token == 1:
            return float(n_used)  # the formula below would differ in the last bit
        return _expected(self._typical(n_expert), n_used, n_token)

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts that tokens choose, the same in every call."""
        return {expert for row in self.rows(layer, tokens, n_expert, n_used) for expert in row}

    def rows(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> list[list[int]]:
        """Return what each token chooses, the same in every call."""
        if not len(tokens) or n_used == 0:
            return [[] for _ in tokens]
        if n_used >= n_expert:
            return [list(range(n_expert)) for _ in tokens]
        found: list[list[int]] = []
        for block, own in groupby(tokens, _block):
            at = [token - _start(block) for token in own]
            key = (layer, n_expert, n_used, block)
            race = self._drawn.get(key)
            if race is None:
                race = self._drawn[key] = self._race(layer, block, n_expert, n_used)
            ahead = _BLOCK if block else min(len(race.chosen) * 17 // 16, _FIRST)  # not each token by itself
            found += race.run(max(max(at) + 1, ahead))[at].tolist()
        return found

    def _race(self, layer: int, block: int, n_expert: int, n_used: int) -> _Race:
        import numpy as np

        rng = np.random.default_rng([self.seed, layer])
        popularity = self._of_layer(rng, n_expert)
        rng = np.random.default_rng([self.seed, layer, block]) if block else rng
        return _Race(popularity, rng, np.empty((0, n_used), np.int64))


@dataclass(eq=False, slots=True)
class _Race:
    """The choices of a block's first tokens in a layer: the experts race, and the first to arrive are chosen."""

    popularity: npt.NDArray[np.float64]
    rng: np.random.Generator
    chosen: npt.NDArray[np.int64]

    def run(self, n_token: int) -> npt.NDArray[np.int64]:
        """Return the choices of at least so many tokens."""
        import numpy as np

        n_more, n_used = n_token - len(self.chosen), self.chosen.shape[1]
        if n_more > 0:
            arrivals = self.rng.standard_exponential((n_more, len(self.popularity))) / self.popularity
            more = np.argpartition(arrivals, n_used - 1, axis=1)[:, :n_used].astype(np.int64)
            self.chosen = np.concatenate([self.chosen, more])
        return self.chosen


@dataclass(frozen=True, slots=True)
class LogNormal(_Popularity):
    """A text prefers some experts of a layer: the logarithm of the preference is normally distributed and constant for the text.

    The text adds a normally distributed number to the router's logits, drawn once for each layer and expert. Each token
    adds its own Gumbel noise and chooses the largest values. So some experts are hardly ever chosen, as in real texts, and
    layers differ in how many experts they use.

    Parameters
    ----------
    spread : float
        The standard deviation of the logarithm; 0 is uniform.
    seed : int
        The seed of `experts`: another seed is another text.

    Examples
    --------
    >>> text = LogNormal(2.4)
    >>> [round(text.used(128, 4, n)) for n in (1, 32, 512, 4096)]
    [4, 33, 83, 112]
    >>> [len(text.experts(layer, range(512), 128, 4)) for layer in range(8)]
    [92, 76, 82, 71, 85, 70, 92, 91]
    """

    spread: float
    seed: int = 0
    _drawn: dict[tuple[int, ...], _Race] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return _named(f"lognormal:{self.spread:g}", self.seed)

    def _typical(self, n_expert: int) -> tuple[float, ...]:
        return _lognormal_law(self.spread, n_expert)

    def _of_layer(self, rng: np.random.Generator, n_expert: int) -> npt.NDArray[np.float64]:
        import numpy as np

        return np.exp(self.spread * rng.standard_normal(n_expert))


@dataclass(frozen=True, slots=True)
class Zipf(_Popularity):
    """Experts are chosen in proportion to ``1 / rank ** skew``; 0 is uniform.

    Parameters
    ----------
    skew : float
        How strongly the first experts are preferred.
    seed : int
        The seed of `experts`. Each layer ranks its experts in another order.

    Examples
    --------
    >>> round(Zipf(1.9).used(128, 4, 512)), round(Zipf(0).used(128, 4, 512))
    (84, 128)
    >>> len(Zipf(1.9).experts(0, range(1), 128, 4)), len(Zipf(1.9).experts(3, range(512), 128, 4))
    (4, 79)
    """

    skew: float
    seed: int = 0
    _drawn: dict[tuple[int, ...], _Race] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return _named("uniform" if self.skew == 0 else f"zipf:{self.skew:g}", self.seed)

    def _typical(self, n_expert: int) -> tuple[float, ...]:
        return _zipf_law(self.skew, n_expert)

    def _of_layer(self, rng: np.random.Generator, n_expert: int) -> npt.NDArray[np.float64]:
        popularity: npt.NDArray[np.float64] = (1.0 / (rng.permutation(n_expert) + 1.0) ** self.skew).astype(
            "f8", copy=False
        )
        return popularity


def _named(law: str, seed: int) -> str:
    return f"{law} (seed {seed})" if seed else law


class RecordedRouting:
    """Choices recorded by ``pyggml run --record-routing``.

    Parameters
    ----------
    ids : int32, (n_layer, n_token, n_used)
        The experts that each token chose in each layer.
    name : str
        The name in reports.
    """

    def __init__(self, ids: npt.NDArray[np.int32], name: str) -> None:
        self.ids = ids
        self.name = name

    @classmethod
    def open(cls, path: Path) -> RecordedRouting:
        """Open a recording.

        Raises
        ------
        FormatError
            The file does not exist or is not a recording.
        """
        import zipfile

        import numpy as np

        try:
            check_regular(path)
            with np.load(path) as file:
                ids = file["topk"]
        except FileNotFoundError:
            raise FormatError(str(path), "no such file", hint="make one by `run --record-routing`") from None
        except (OSError, ValueError, KeyError, MemoryError, zipfile.BadZipFile) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                str(path), "this is not a recorded routing", hint="make one by `run --record-routing`"
            ) from error
        if ids.ndim != 3 or ids.dtype.kind != "i" or not ids.size:
            raise FormatError(
                str(path), f"not a recorded routing: ids have shape {ids.shape}", hint="does the model have experts?"
            )
        return cls(ids, f"recorded ({path.name}, {ids.shape[1]} tokens)")

    def __str__(self) -> str:
        return self.name

    @property
    def n_tokens(self) -> int:
        """Tokens of the recording."""
        return int(self.ids.shape[1])

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the mean over layers of the number of distinct experts that the first tokens use."""
        n_layer = self.ids.shape[0]
        return float(sum(len(self.experts(i, range(n_token), n_expert, n_used)) for i in range(n_layer)) / n_layer)

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts that tokens chose; see `rows`."""
        return {expert for row in self.rows(layer, tokens, n_expert, n_used) for expert in row}

    def rows(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> list[list[int]]:
        """Return what each token chose.

        Raises
        ------
        GraphError
            The recording lacks the layer, token or expert: it is of another model, or too short.
        """
        if not len(tokens):
            return []
        n_layer, n_token, n_slot = self.ids.shape
        if layer >= n_layer or n_slot != n_used:
            raise GraphError(
                f"{self} has {n_layer} layers with {n_slot} used experts, but the model uses {n_used} in layer {layer}",
                hint="record the routing of this model",
            )
        if max(tokens) >= n_token:
            raise GraphError(
                f"{self} has no token {max(tokens)}", hint="record a longer prompt, or plan smaller batches"
            )
        rows = self.ids[layer, list(tokens)]
        if rows.min() < 0 or rows.max() >= n_expert:
            raise GraphError(
                f"{self} has ids from {rows.min()} to {rows.max()} in layer {layer}, but the model has {n_expert} experts",
                hint="-1 means that the layer did not compute the token: record with all outputs",
            )
        chosen: list[list[int]] = rows.tolist()
        return chosen


@dataclass(frozen=True, slots=True)
class UsedCounts:
    """A stated number of experts per layer, the same for every micro-batch; which experts is drawn once.

    Parameters
    ----------
    counts : sequence of int
        The number of distinct experts used, by layer; a single number holds for all layers. A micro-batch that is too small
        for the number uses as many experts as it can.
    name : str
        For reports.

    Examples
    --------
    >>> counts = UsedCounts((72, 95), "counts:72,95")
    >>> len(counts.experts(1, range(512), 128, 4)), len(counts.experts(1, range(2), 128, 4))
    (95, 8)
    """

    counts: tuple[int, ...]
    name: str

    @property
    def n_tokens(self) -> None:
        """Any number."""
        return

    @classmethod
    def parse(cls, text: str) -> UsedCounts:
        """Return the counts in a text, or in a JSON file with a list.

        Raises
        ------
        FormatError
            The file does not exist or is not a list of counts.
        ValueError
            The text is not a list of counts.
        """
        if not text.endswith(".json"):
            return cls(_positive(int(n) for n in text.split(",")), f"counts:{text}")
        path = Path(text)
        try:
            found = read_json(path)
            if not isinstance(found, list) or any(type(n) is not int for n in found):
                raise ValueError("not a list of whole numbers")
            counts = _positive(found)
        except ValueError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise FormatError(
                text, f"no counts of used experts: {reason}", hint="a list with one count for each layer"
            ) from None
        return cls(counts, f"counts ({path.name}, {len(counts)} layers)")

    def __str__(self) -> str:
        return self.name

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the mean over layers of the number of distinct experts that a micro-batch uses."""
        return sum(self._n(i, n_expert, n_used, n_token) for i in range(len(self.counts))) / len(self.counts)

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the stated number of experts of a layer, the same experts in every call.

        Raises
        ------
        GraphError
            There is no count for the layer, or the model cannot use this number.
        """
        import numpy as np

        order = np.random.default_rng([len(self.counts), layer]).permutation(n_expert)
        return set(order[: self._n(layer, n_expert, n_used, len(tokens))].tolist())

    def rows(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> list[list[int]]:
        """Return experts for each token, which go round through those of the layer."""
        if not len(tokens) or n_used == 0:
            return [[] for _ in tokens]
        pool = sorted(self.experts(layer, tokens, n_expert, n_used))
        return [[pool[(i * n_used + j) % len(pool)] for j in range(n_used)] for i in range(len(tokens))]

    def _n(self, layer: int, n_expert: int, n_used: int, n_token: int) -> int:
        if 1 < len(self.counts) <= layer:
            raise GraphError(f"{self} has no layer {layer}", hint="state one count for each layer, or one for all")
        count = self.counts[layer if len(self.counts) > 1 else 0]
        if not n_used <= count <= n_expert:
            raise GraphError(f"{self} has {count} experts in layer {layer}, but the model uses {n_used} to {n_expert}")
        return min(count, n_token * n_used)


def _positive(counts: Iterable[int]) -> tuple[int, ...]:
    kept = tuple(counts)
    if not kept or min(kept) < 1:
        raise ValueError("counts start at 1")
    return kept


# -- laws of popularity, and expected counts -----------------------------------


@lru_cache
def _zipf_law(skew: float, n: int) -> tuple[float, ...]:
    return tuple(1 / i**skew for i in range(1, n + 1))


@lru_cache
def _lognormal_law(spread: float, n: int) -> tuple[float, ...]:
    """Return the middle quantiles of a log-normal law; expected counts are within 3 % of the mean over layers (8 experts: 12 %)."""
    from statistics import NormalDist  # imported late: most runs do not use it

    return tuple(math.exp(spread * NormalDist().inv_cdf((i + 0.5) / n)) for i in range(n))


@lru_cache
def _expected(popularity: tuple[float, ...], k: int, n_token: int) -> float:
    """Return the expected number of distinct items in ``n_token`` choices of ``k`` each."""
    return sum(1 - (1 - p) ** n_token for p in _inclusion(popularity, k))


@lru_cache
def _inclusion(popularity: tuple[float, ...], k: int) -> tuple[float, ...]:
    """Return each item's probability to be among k distinct ones that are drawn in proportion to their popularity.

    Items race: each arrives at an exponential time with its popularity as rate, and the first k are chosen. The result is
    the probability to arrive before the time at which k arrivals are expected.
    """

    def arrived(t: float) -> float:
        return sum(-math.expm1(-w * t) for w in popularity)

    low, high = 0.0, 1.0
    while arrived(high) < k:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if arrived(middle) < k else (low, middle)
    return tuple(-math.expm1(-w * high) for w in popularity)


#: What published speeds of models with experts in host memory agree with (`Rates.spread`).
DEFAULT_ROUTING = LogNormal(RATES.spread)
#: Of routers with a bias, which prefers some experts whatever the token is: one number fitted to one, the mean of the counts of
#: eight layers of gpt-oss-120b that llama.cpp's pull request 15346 tells, 83.1 of 128.
BIASED_ROUTING = LogNormal(2.4)


def routing_of(tensors: Iterable[str]) -> LogNormal:
    """Return how tokens of a model are assumed to choose experts, by the names of its tensors."""
    return BIASED_ROUTING if any(name.endswith("ffn_gate_inp.bias") for name in tensors) else DEFAULT_ROUTING


def parse_routing(text: str) -> Routing:
    """Return the routing that a text describes.

    Parameters
    ----------
    text : str
        ``lognormal:SPREAD``, ``uniform``, ``zipf:SKEW``, ``trace:FILE.npz``, ``counts:N,N,...`` or ``counts:FILE.json``.

    Raises
    ------
    GraphError
        The text has none of these forms.
    FormatError
        The file is not a recording or a list of counts.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "trace" and rest:
            return RecordedRouting.open(Path(rest))
        if kind == "counts" and rest:
            return UsedCounts.parse(rest)
        if kind == "uniform" and not rest:
            return Zipf(0.0)
        if kind == "zipf" and 0 <= float(rest) <= 8:
            return Zipf(float(rest))
        if kind == "lognormal" and 0 <= float(rest) <= 8:
            return LogNormal(float(rest))
    except FormatError:
        raise
    except ValueError:
        pass
    raise GraphError(
        f"there is no routing '{text}'",
        hint="lognormal:SPREAD or zipf:SKEW of 0 to 8, uniform, trace:FILE.npz, counts:72,95,... or counts:FILE.json",
    )
