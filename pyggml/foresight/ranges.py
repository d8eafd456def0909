"""How far a predicted speed may be off: factors of which 80 % of held-out runs stay within."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .estimate import Machine, Placed, Setting

__all__ = ["spread_of"]

#: Factors by family of kernels, of prompts and of generation: what 80 % of runs stayed within when their series was not fitted
#: (``docs/accuracy.md``). ROCm and Vulkan differ most from one driver to the next.
_PROMPT = {"cuda": 1.28, "rocm": 1.75, "vulkan": 1.55, "metal": 1.3, "cpu": 1.4}
_GENERATION = {"cuda": 1.2, "rocm": 1.3, "vulkan": 1.5, "metal": 1.25, "cpu": 1.3}
#: More, where weights are in host memory: the link and the threads are less certain than kernels.
_HOST = 1.05


def spread_of(machine: Machine, setting: Setting, placed: list[Placed], *, is_prompt: bool) -> float:
    """Return the factor that a prediction is multiplied and divided with."""
    from .engine import backend_family

    factors = _PROMPT if is_prompt else _GENERATION
    kinds = {backend_family(card, setting.backend).partition("-")[0] for card in machine.cards} or {"cpu"}
    factor = max(factors[kind] for kind in kinds)
    return factor * (_HOST if machine.cards and any(p.experts_on_host or p.device < 0 for p in placed) else 1.0)
