"""How often an expert cache lacks an expert, without carrying anything out: from how many experts tokens use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..routing import Routing
from .counts import used_experts
from .shape import ModelShape

__all__ = ["misses_of_groups", "misses_per_token"]


def misses_of_groups(
    model: ModelShape,
    layers: Sequence[tuple[int, int, int, int]],
    cache_bytes: int,
    shares: Sequence[float],
    routing: Routing,
    n_tokens: int,
) -> list[float]:
    """Return the mean misses of a layer per generated token, for each group; below 0: the group is not cached.

    Parameters
    ----------
    layers : sequence of tuple
        Groups of equal layers with host experts: card, layers, bytes of the experts of a layer, number of experts.
    cache_bytes : int
        Size of the cache, over all cards.
    shares : sequence of float
        Relative shares of the cards.
    routing : Routing
        How tokens choose experts.
    n_tokens : int
        Tokens that are generated, from an empty cache on.

    Notes
    -----
    The budget is divided as by `plan_cache`. The number of slots is not rounded to the alignment of a device.
    """
    host: dict[int, int] = {}
    for device, count, n_bytes, _ in layers:
        host[device] = host.get(device, 0) + count * n_bytes
    total = sum(shares[d] for d in host) or 1.0
    found = []
    for device, count, n_bytes, n_expert in layers:
        budget = cache_bytes * shares[device] / total * count * n_bytes / host[device]
        slots = min(int(budget * n_expert / n_bytes) - 1, count * n_expert)
        if slots < model.n_used:
            found.append(-1.0)
        elif slots <= (count - 1) * model.n_used:
            found.append(float(model.n_used))
        else:
            found.append(misses_per_token(routing, n_expert, model.n_used, slots / count, n_tokens))
    return found


@lru_cache(maxsize=4096)
def misses_per_token(routing: Routing, n_expert: int, n_used: int, slots: float, n_tokens: int) -> float:
    """Return the mean misses per token of a layer that has ``slots`` slots on average, from an empty cache on.

    Notes
    -----
    The least recently used experts leave, so that a layer's slots hold those of its last t tokens, where t tokens use as
    many experts as there are slots (Che's approximation). Until then every first use is a miss; from then on as many
    miss as one more token adds.
    """

    def used(t: int) -> float:
        return used_experts(routing, n_expert, n_used, t)

    if used(n_tokens) <= slots:
        return used(n_tokens) / n_tokens
    low, high = 1, n_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if used(middle) <= slots else (low, middle)
    return (slots + (n_tokens - low) * (used(low + 1) - used(low))) / n_tokens
