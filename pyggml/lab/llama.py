"""llama.cpp's own two policies, as `pyggml.moe_cache` has them, decided event by event like any other."""

from __future__ import annotations

from collections.abc import Sequence

from ..moe_cache import EvictionPolicy
from .cache import Decision, Load

__all__ = ["LlamaCache"]


class LlamaCache:
    """A pool of llama.cpp's cache: hits go to the recent end in order of appearance, then misses take slots by ascending id.

    Parameters
    ----------
    rule : type of EvictionPolicy
        LRU of b11549, or SLRU of b11739.
    n_slot, n_expert : int
        Slots of the pool; experts of a layer. A key is a layer's place in the pool times ``n_expert``, and the expert.

    Notes
    -----
    llama.cpp decides events of 1 to 32 tokens; larger ones only read what is there, which is not replayed here.
    """

    def __init__(self, rule: type[EvictionPolicy], n_slot: int, n_expert: int) -> None:
        self._n_expert = n_expert
        self._rule = rule(n_slot, n_expert)

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
