"""How many experts a batch uses, when no batch was run: a stated assumption instead of a measurement.

Real routers are skewed: 512 tokens of text used 72 to 95 of 128 experts of gpt-oss-120b (llama.cpp, pull request 15346),
where a uniform router would use all. `Zipf(1.9)` gives 84 there and is the default; reports name what was assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import GraphError

__all__ = ["DEFAULT_ROUTING", "Zipf", "parse_routing"]


@dataclass(frozen=True, slots=True)
class Zipf:
    """Expert number i is chosen in proportion to ``1 / i ** skew``; 0 is uniform."""

    skew: float

    def __str__(self) -> str:
        return "uniform" if self.skew == 0 else f"zipf:{self.skew:g}"

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
        weights = [1 / i**self.skew for i in range(1, n_expert + 1)]
        return sum(1 - (1 - p) ** n_token for p in _inclusion(weights, n_used))


def _inclusion(weights: list[float], k: int) -> list[float]:
    """Return each item's chance to be among k distinct ones drawn in proportion to the weights.

    Items race: each arrives at an exponential time with its weight as rate, and the first k are taken; the chance is
    that of arriving before the time at which k are expected.
    """

    def arrived(t: float) -> float:
        return sum(-math.expm1(-w * t) for w in weights)

    low, high = 0.0, 1.0
    while arrived(high) < k:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if arrived(middle) < k else (low, middle)
    return [-math.expm1(-w * high) for w in weights]


DEFAULT_ROUTING = Zipf(1.9)


def parse_routing(text: str) -> Zipf:
    """Return the routing of ``uniform`` or ``zipf:SKEW``.

    Raises
    ------
    GraphError
        It is neither.
    """
    kind, _, skew = text.partition(":")
    try:
        if kind == "uniform" and not skew:
            return Zipf(0.0)
        if kind == "zipf" and 0 <= float(skew) <= 8:
            return Zipf(float(skew))
    except ValueError:
        pass
    raise GraphError(f"there is no routing '{text}'", hint="uniform, or zipf:SKEW with a skew of 0 to 8")
