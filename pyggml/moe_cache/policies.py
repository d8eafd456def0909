"""Which experts stay in the slots of a cache: llama.cpp's two rules, and the size below which neither has any hit.

A policy serves a group of layers that share slots. For each layer of each micro-batch, `lookup` receives the ids that
the router chose and returns the slot of each expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import SchedError

__all__ = ["EVICTIONS", "LRU", "SLRU", "EvictionPolicy", "Lookup", "SlotTable", "Upload", "slots_without_hits"]


class Upload(NamedTuple):
    """An expert of the layer that must be copied into a slot."""

    expert: int
    slot: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """The slots of the experts that one layer chose, and what changed.

    Attributes
    ----------
    slots : dict of int to int
        Slot of each distinct expert, in the order in which they were chosen.
    hits : tuple of int
        Experts that were in the cache, in the order in which they were chosen.
    misses : tuple of int
        Experts that were not in the cache, ascending.
    uploads : tuple of Upload
        Copies to make before the layer is computed, in order.
    evicted : tuple of (int, int)
        Layer and expert of each expert that lost its slot.
    """

    slots: dict[int, int]
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    uploads: tuple[Upload, ...]
    evicted: tuple[tuple[int, int], ...]


class SlotTable(ABC):
    """Which expert is in which slot, for a group of layers that share a bank.

    Attributes
    ----------
    n_slots : int
        Slots that keep experts.
    n_expert : int
        Experts of each layer.
    n_transit : int
        Slots after these for experts that are not kept: each layer overwrites those of the previous layer.
    """

    n_slots: int
    n_expert: int
    n_transit: int = 0

    @property
    def most(self) -> int:
        """Most distinct experts of a lookup."""
        return self.n_slots

    @abstractmethod
    def lookup(self, layer: int, ids: Iterable[int]) -> Lookup:
        """Give every chosen expert of a layer a slot, at least until the next layer's lookup."""

    @abstractmethod
    def slot_of(self, layer: int, expert: int) -> int | None:
        """Return the slot of an expert; None if it is not kept."""

    def begin(self) -> None:
        """Begin a compute."""
        return


class EvictionPolicy(SlotTable):
    """Slots for the experts of a group of layers.

    Parameters
    ----------
    n_slots : int
        Slots that the layers share.
    n_expert : int
        Experts of each layer.

    Notes
    -----
    A subclass defines `_hit`, called for each use, and `_victim`, which returns the slot to fill next.
    """

    #: Name of the rule for users.
    name = ""

    def __init__(self, n_slots: int, n_expert: int) -> None:
        self.n_slots = n_slots
        self.n_expert = n_expert
        self._held: list[tuple[int, int] | None] = [None] * n_slots  # layer and expert in each slot
        self._slots: dict[int, dict[int, int]] = {}  # by layer: expert -> slot

    def lookup(self, layer: int, ids: Iterable[int]) -> Lookup:
        """Give every chosen expert of a layer a slot.

        Parameters
        ----------
        layer : int
            Any number that names the layer.
        ids : iterable of int
            All ids of the micro-batch, in the router's order, with repeats.

        Raises
        ------
        SchedError
            An id is not an expert, or there are more distinct ids than slots. Upstream aborts.

        Notes
        -----
        Mirrors `moe_cache_lru::plan`: hits first, then misses by id, so that adjacent experts tend to get adjacent
        slots and need one copy.
        """
        chosen = list(dict.fromkeys(ids))
        if chosen and not (min(chosen) >= 0 and max(chosen) < self.n_expert):
            bad = next(e for e in chosen if not 0 <= e < self.n_expert)
            raise SchedError(f"expert {bad} of layer {layer}: the layer has experts 0 to {self.n_expert - 1}")
        if len(chosen) > self.n_slots:
            raise SchedError(
                f"layer {layer} chooses {len(chosen)} experts, and the cache has {self.n_slots} slots",
                hint="a larger cache, or smaller micro-batches",
            )
        slots = self._slots.setdefault(layer, {})
        hits = tuple(e for e in chosen if e in slots)
        misses = tuple(sorted(e for e in chosen if e not in slots))
        for expert in hits:
            self._hit(slots[expert])
        uploads, evicted = [], []
        needed = {(layer, e) for e in chosen}
        for expert in misses:
            slot = self._victim(needed)
            before = self._held[slot]
            if before is not None:
                del self._slots[before[0]][before[1]]
                evicted.append(before)
            self._held[slot] = (layer, expert)
            slots[expert] = slot
            uploads.append(Upload(expert, slot))
        return Lookup({e: slots[e] for e in chosen}, hits, misses, tuple(uploads), tuple(evicted))

    def slot_of(self, layer: int, expert: int) -> int | None:
        """Return the slot of an expert; None if it is not in the cache."""
        return self._slots.get(layer, {}).get(expert)

    def slot_map(self, layer: int) -> list[int]:
        """Return the slot of each expert of a layer, or -1: the table that the device reads."""
        slots = self._slots.get(layer, {})
        return [slots.get(e, -1) for e in range(self.n_expert)]

    @abstractmethod
    def _hit(self, slot: int) -> None:
        """Receive the slot of an expert that is used."""

    @abstractmethod
    def _victim(self, needed: set[tuple[int, int]]) -> int:
        """Return the slot to fill next and count it as just used; its expert must not be in ``needed``."""


class LRU(EvictionPolicy):
    """Evicts the least recently used expert.

    Notes
    -----
    Mirrors `moe_cache_lru` of llama.cpp b11549 and release 0.7.0.

    Examples
    --------
    >>> cache = LRU(n_slots=2, n_expert=4)
    >>> cache.lookup(0, [3, 1]).uploads
    (Upload(expert=1, slot=0), Upload(expert=3, slot=1))
    >>> cache.lookup(1, [2]).evicted
    ((0, 1),)
    """

    name = "lru"

    def __init__(self, n_slots: int, n_expert: int) -> None:
        super().__init__(n_slots, n_expert)
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_slots))  # the least recently used first

    def _hit(self, slot: int) -> None:
        self._order.move_to_end(slot)

    def _victim(self, needed: set[tuple[int, int]]) -> int:
        slot = next(iter(self._order))  # hits moved to the end, and lookup checked that the slots are enough
        self._order.move_to_end(slot)
        return slot


class SLRU(EvictionPolicy):
    """Evicts experts that were used once before those that were used again.

    Notes
    -----
    The rule of llama.cpp b11739, decoded from its machine code and tested against recordings. There are two lists,
    probation and protected; the latter has at most half of the slots. A hit moves to the recent end of the protected
    list, whose oldest entry may return to the recent end of probation. A miss takes the oldest slot on probation, else
    the oldest protected, that the layer does not need now, and is on probation.
    """

    name = "slru"

    def __init__(self, n_slots: int, n_expert: int) -> None:
        super().__init__(n_slots, n_expert)
        self._probation: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_slots))
        self._protected: OrderedDict[int, None] = OrderedDict()

    def _hit(self, slot: int) -> None:
        if slot in self._protected:
            self._protected.move_to_end(slot)
            return
        del self._probation[slot]
        self._protected[slot] = None
        if len(self._protected) > self.n_slots // 2:
            oldest, _ = self._protected.popitem(last=False)
            self._probation[oldest] = None

    def _victim(self, needed: set[tuple[int, int]]) -> int:
        for kept in (self._probation, self._protected):
            for slot in kept:
                if self._held[slot] not in needed:
                    del kept[slot]
                    self._probation[slot] = None
                    return slot
        raise AssertionError("fewer slots than experts that are needed")  # lookup has checked this


#: The rules by name, oldest first.
EVICTIONS: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (LRU, SLRU)}


def slots_without_hits(n_layer: int, n_distinct: int) -> int:
    """Return the largest number of shared slots with which there is no hit.

    Between two lookups of a layer, the other layers choose ``(n_layer - 1) * n_distinct`` other experts. With at most
    that many slots, each expert is evicted before its layer's next lookup, whatever the router chooses. This holds for
    `LRU` and for `SLRU`, which protects nothing without a hit.

    Parameters
    ----------
    n_layer : int
        Layers of the group.
    n_distinct : int
        Distinct experts that each layer chooses in a step; with one token, all that the token uses.

    Notes
    -----
    Upstream has no such check.
    """
    return (n_layer - 1) * n_distinct
