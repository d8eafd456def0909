"""How far a predicted speed may be off: factors of which 80 % of held-out runs stay within."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cards import Card
from .formulas import backend_family

__all__ = ["Speed", "spread_of"]

#: Factors by family of kernels, of prompts and of generation: what 80 % of runs stayed within when their series was not fitted
#: (``docs/accuracy.md``). ROCm and Vulkan differ most from one driver to the next.
_PROMPT = {"cuda": 1.28, "rocm": 1.45, "vulkan": 1.55, "metal": 1.3, "cpu": 1.45}
_GENERATION = {"cuda": 1.2, "rocm": 1.3, "vulkan": 1.8, "metal": 1.25, "cpu": 1.3}
#: More, where weights are in host memory: the link and the threads are less certain than kernels.
_HOST = 1.05


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second: what is expected, and between what the truth is in four cases of five."""

    low: float
    mid: float
    high: float

    @classmethod
    def around(cls, mid: float, factor: float) -> Speed:
        """Return a speed whose range goes down and up by a factor."""
        return cls(mid / factor, mid, mid * factor)


def spread_of(cards: Iterable[Card], *, is_prompt: bool, has_host_weights: bool, backend: str = "") -> float:
    """Return the factor that a prediction is multiplied and divided with.

    Parameters
    ----------
    cards : iterable of Card
        None of them: the CPU alone.
    has_host_weights : bool
        Whether weights of layers are in host memory.
    backend : str
        ``"vulkan"`` for kernels other than the cards' usual ones.
    """
    factors = _PROMPT if is_prompt else _GENERATION
    kinds = {backend_family(card, backend).partition("-")[0] for card in cards}
    factor = max(factors[kind] for kind in kinds or {"cpu"})
    return factor * (_HOST if kinds and has_host_weights else 1.0)
