"""Which experts a batch uses, when no batch was run: a recording, or a stated assumption.

Real routers are skewed: 512 tokens of text used 72 to 95 of 128 experts of gpt-oss-120b (llama.cpp, pull request 15346),
where a uniform router would use all. `Zipf(1.9)` gives 84 there and is the default; reports name what was assumed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import FormatError, GraphError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DEFAULT_ROUTING", "RecordedRouting", "Routing", "UsedCounts", "Zipf", "parse_routing"]


class Routing(Protocol):
    """Says which experts tokens choose. ``str`` of it names the assumption in reports."""

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the expected number of distinct experts of a batch in a layer."""

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts of one layer that tokens choose, which are given by their positions."""


@dataclass(frozen=True, slots=True)
class Zipf:
    """Experts are chosen in proportion to ``1 / rank ** skew``; 0 is uniform.

    Parameters
    ----------
    skew : float
        How much the first experts are preferred.
    seed : int
        Of what `experts` draws. Each layer ranks its experts in another order.
    """

    skew: float
    seed: int = 0
    _drawn: dict[tuple[int, int, int], npt.NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        name = "uniform" if self.skew == 0 else f"zipf:{self.skew:g}"
        return f"{name} (seed {self.seed})" if self.seed else name

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the expected number of distinct experts of a batch.

        Parameters
        ----------
        n_expert, n_used : int
            Experts, and how many of them a token takes; they are distinct.
        n_token : int
            Tokens, which choose independently.

        Examples
        --------
        >>> round(Zipf(1.9).used(128, 4, 512)), round(Zipf(0).used(128, 4, 512))
        (84, 128)
        """
        if n_token == 0 or n_used == 0:
            return 0.0
        if n_used >= n_expert:
            return float(n_expert)
        return sum(1 - (1 - p) ** n_token for p in _inclusion(self.skew, n_expert, n_used))

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts that tokens choose, the same at every call.

        Examples
        --------
        >>> len(Zipf(1.9).experts(0, range(1), 128, 4)), len(Zipf(1.9).experts(3, range(512), 128, 4))
        (4, 79)
        """
        if not len(tokens) or n_used == 0:
            return set()
        if n_used >= n_expert:
            return set(range(n_expert))
        key = (layer, n_expert, n_used)
        chosen = self._drawn.get(key)
        if chosen is None or len(chosen) <= max(tokens):
            chosen = self._drawn[key] = self._draw(layer, max(tokens) + 1, n_expert, n_used)
        return set(chosen[list(tokens)].ravel().tolist())

    def _draw(self, layer: int, n_token: int, n_expert: int, n_used: int) -> npt.NDArray[np.int64]:
        """Return the choices of the first tokens: experts race, and the first to arrive are taken."""
        import numpy as np

        rng = np.random.default_rng([self.seed, layer])
        weights = 1.0 / (rng.permutation(n_expert) + 1.0) ** self.skew
        arrivals = rng.standard_exponential((n_token, n_expert)) / weights
        return np.argpartition(arrivals, n_used - 1, axis=1)[:, :n_used].astype(np.int64)


class RecordedRouting:
    """Choices that a run recorded: ``pyggml run --record-routing``.

    Parameters
    ----------
    ids : int32, (n_layer, n_token, n_used)
        The experts that each token chose in each layer.
    name : str
        For reports.
    """

    def __init__(self, ids: npt.NDArray[np.int32], name: str) -> None:
        self.ids = ids
        self.name = name

    @classmethod
    def open(cls, path: Path) -> RecordedRouting:
        """Return the recording of a file.

        Raises
        ------
        FormatError
            The file is not there, or no recording.
        """
        import zipfile

        import numpy as np

        try:
            with np.load(path) as file:
                ids = file["topk"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise FormatError(
                str(path), f"no recorded routing ({error})", hint="make one by `run --record-routing`"
            ) from None
        if ids.ndim != 3 or ids.dtype.kind != "i" or not ids.size:
            raise FormatError(str(path), f"no recorded routing: ids of shape {ids.shape}", hint="is the model a MoE?")
        return cls(ids, f"recorded ({path.name}, {ids.shape[1]} tokens)")

    def __str__(self) -> str:
        return self.name

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the number of distinct experts of the first tokens, the mean over layers."""
        n_layer = self.ids.shape[0]
        return float(sum(len(self.experts(i, range(n_token), n_expert, n_used)) for i in range(n_layer)) / n_layer)

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts that tokens chose.

        Raises
        ------
        GraphError
            The recording has no such layer, token or expert: it is another model's, or too short.
        """
        if not len(tokens):
            return set()
        n_layer, n_token, n_slot = self.ids.shape
        if layer >= n_layer or n_slot != n_used:
            raise GraphError(
                f"{self} has {n_layer} layers of {n_slot} experts used, the model uses {n_used} in layer {layer}",
                hint="record the routing of this model",
            )
        if max(tokens) >= n_token:
            raise GraphError(
                f"{self} has no token {max(tokens)}", hint="record a longer prompt, or plan smaller batches"
            )
        rows = self.ids[layer, list(tokens)]
        if rows.min() < 0 or rows.max() >= n_expert:
            raise GraphError(
                f"{self} has ids from {rows.min()} to {rows.max()} in layer {layer}, the model has {n_expert} experts",
                hint="-1 is a token that the layer did not compute: record with all outputs",
            )
        return set(rows.ravel().tolist())


@dataclass(frozen=True, slots=True)
class UsedCounts:
    """So many experts of each layer are used by any micro-batch; which ones is drawn once.

    Parameters
    ----------
    counts : sequence of int
        Distinct experts used, by layer; a single one holds for all layers. A micro-batch too small to use so many uses
        as many as it can.
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

    @classmethod
    def parse(cls, text: str) -> UsedCounts:
        """Return the counts that a text lists, or a JSON file that holds a list.

        Raises
        ------
        FormatError
            The file is not there, or no list of counts.
        ValueError
            The text is no list of counts.
        """
        if not text.endswith(".json"):
            return cls(_positive(int(n) for n in text.split(",")), f"counts:{text}")
        path = Path(text)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, list) or any(type(n) is not int for n in found):
                raise ValueError("not a list of whole numbers")
            counts = _positive(found)
        except (OSError, ValueError) as error:
            raise FormatError(text, f"no counts of used experts ({error})", hint="a list, one for each layer") from None
        return cls(counts, f"counts ({path.name}, {len(counts)} layers)")

    def __str__(self) -> str:
        return self.name

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the number of distinct experts of a micro-batch, the mean over layers."""
        return sum(self._n(i, n_expert, n_used, n_token) for i in range(len(self.counts))) / len(self.counts)

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return experts of a layer, as many as stated: the same at every call.

        Raises
        ------
        GraphError
            There is no count for the layer, or the model cannot use so few or so many.
        """
        import numpy as np

        order = np.random.default_rng([len(self.counts), layer]).permutation(n_expert)
        return set(order[: self._n(layer, n_expert, n_used, len(tokens))].tolist())

    def _n(self, layer: int, n_expert: int, n_used: int, n_token: int) -> int:
        if 1 < len(self.counts) <= layer:
            raise GraphError(f"{self} has no layer {layer}", hint="state one count for each layer, or one for all")
        count = self.counts[layer if len(self.counts) > 1 else 0]
        if not n_used <= count <= n_expert:
            raise GraphError(f"{self} has {count} experts in layer {layer}, the model uses {n_used} to {n_expert}")
        return min(count, n_token * n_used)


def _positive(counts: Iterable[int]) -> tuple[int, ...]:
    kept = tuple(counts)
    if not kept or min(kept) < 1:
        raise ValueError("counts start at 1")
    return kept


@lru_cache
def _inclusion(skew: float, n: int, k: int) -> tuple[float, ...]:
    """Return each item's chance to be among k distinct ones of n, drawn in proportion to ``1 / i ** skew``.

    Items race: each arrives at an exponential time with its weight as rate, and the first k are taken; the chance is
    that of arriving before the time at which k are expected.
    """
    weights = [1 / i**skew for i in range(1, n + 1)]

    def arrived(t: float) -> float:
        return sum(-math.expm1(-w * t) for w in weights)

    low, high = 0.0, 1.0
    while arrived(high) < k:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if arrived(middle) < k else (low, middle)
    return tuple(-math.expm1(-w * high) for w in weights)


DEFAULT_ROUTING = Zipf(1.9)


def parse_routing(text: str) -> Routing:
    """Return the routing of ``uniform``, ``zipf:SKEW``, ``trace:FILE.npz``, ``counts:N,N,...`` or ``counts:FILE.json``.

    Raises
    ------
    GraphError
        It is none of these.
    FormatError
        The file is no recording, or no list of counts.
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
    except FormatError:
        raise
    except ValueError:
        pass
    raise GraphError(
        f"there is no routing '{text}'",
        hint="uniform, zipf:SKEW with a skew of 0 to 8, trace:FILE.npz, counts:72,95,... or counts:FILE.json",
    )
