"""The uncertainty of predicted speeds: factors within which 80 % of held-out runs stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cards import Card
from .formulas import backend_family

__all__ = ["Speed", "spread_of"]

#: Factors for prompts and for generation, by family of kernels: 80 % of the runs of series that were not fitted stayed
#: within them (``docs/accuracy.md``). ROCm and Vulkan differ most between drivers.
_PROMPT = {"cuda": 1.28, "rocm": 1.45, "vulkan": 1.55, "metal": 1.3, "cpu": 1.45}
_GENERATION = {"cuda": 1.2, "rocm": 1.3, "vulkan": 1.8, "metal": 1.25, "cpu": 1.3}
#: Additional factor with host weights: link and threads are less certain than kernels.
_HOST = 1.05


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s: the expected value, and the range that contains the truth in four of five cases."""

    low: float
    mid: float
    high: float

    @classmethod
    def around(cls, mid: float, factor: float) -> Speed:
        """Return a speed with the range from ``mid / factor`` to ``mid * factor``."""
        return cls(mid / factor, mid, mid * factor)


def spread_of(cards: Iterable[Card], *, is_prompt: bool, has_host_weights: bool, backend: str = "") -> float:
    """Return the factor by which a prediction is multiplied and divided to give its range.

    Parameters
    ----------
    cards : iterable of Card
        Cards of the machine; empty: the CPU alone.
    has_host_weights : bool
        Whether layers have host weights.
    backend : str
        ``"vulkan"``, or empty for the cards' default kernels.
    """
    factors = _PROMPT if is_prompt else _GENERATION
    kinds = {backend_family(card, backend).partition("-")[0] for card in cards}
    factor = max(factors[kind] for kind in kinds or {"cpu"})
    return factor * (_HOST if kinds and has_host_weights else 1.0)
