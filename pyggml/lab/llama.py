"""llama.cpp's two policies from `pyggml.moe_cache`, with the interface of `Cache`."""

from __future__ import annotations

from collections.abc import Sequence

from ..moe_cache import EvictionPolicy
from .cache import Decision, Load

__all__ = ["LlamaCache"]


class LlamaCache:
    """A pool of llama.cpp's expert cache: hits become most recent in order of appearance, then misses enter by id.

    Parameters
    ----------
    rule : type of EvictionPolicy
        LRU of b11549, or SLRU of b11739.
    n_slot, n_expert : int
        Slots of the pool; experts of a layer. A key is the layer's index in the pool times ``n_expert``, plus expert.

    Notes
    -----
    llama.cpp decides events of 1 to 32 tokens. Larger ones only read resident experts, which is not replayed.
    """

    def __init__(self, rule: type[EvictionPolicy], n_slot: int, n_expert: int) -> None:
        self._n_expert = n_expert
        self._rule = rule(n_slot, n_expert)

    def __contains__(self, key: int) -> bool:
        return self._rule.slot_of(key // self._n_expert, key % self._n_expert) is not None

    def event(self, step: int, layer: int, keys: Sequence[int]) -> Decision:
        """Decide an event of one layer; see `Cache.event`. Keys are in order of first appearance.

        Raises
        ------
        SchedError
            There are more keys than slots.
        """
        n = self._n_expert
        place = keys[0] // n if keys else 0
        found = self._rule.lookup(place, [key % n for key in keys])
        return Decision(
            tuple(place * n + e for e in found.hits),
            tuple(Load(place * n + upload.expert, upload.slot) for upload in found.uploads),
            (),
            tuple(where * n + e for where, e in found.evicted),
        )
