"""Policies for what leaves a cache; each is an `Eviction`. A user's own policy is a subclass, too."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

from .cache import Eviction

__all__ = ["ARC", "CLOCK", "FIFO", "LFRU", "LFU", "LRU", "SLRU", "HalfPinned", "LFUDecay", "LeastStale", "Static"]


class LRU(Eviction):
    """The key that was used longest ago leaves."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._order: OrderedDict[int, None] = OrderedDict()  # resident keys, oldest first

    def used(self, key: int, is_hit: bool) -> None:
        """Move a key to the recent end."""
        self._order[key] = None
        self._order.move_to_end(key)

    def entered(self, key: int) -> None:
        """Prefetched keys enter at the recent end; those in use are there."""
        self._order.setdefault(key)

    def left(self, key: int) -> None:
        """Forget a key."""
        self._order.pop(key, None)

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the oldest."""
        return next((key for key in self._order if key in resident and key not in protected), None)


class LeastStale(LRU):
    """Keys that the current step has not used leave first, least recently used first (SpecMD, arXiv 2602.03921).

    Without prefetch the order is that of LRU. A prefetched key counts as used in the current step.
    """

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._step = -1
        self._last: dict[int, int] = {}

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Note the step."""
        self._step = step

    def used(self, key: int, is_hit: bool) -> None:
        """Move a key to the recent end of this step."""
        super().used(key, is_hit)
        self._last[key] = self._step

    def entered(self, key: int) -> None:
        """Count a prefetched key as of this step."""
        super().entered(key)
        self._last[key] = self._step

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the oldest of an earlier step, else the oldest."""
        stale = (k for k in self._order if k in resident and k not in protected and self._last[k] < self._step)
        return next(stale, super().victim(resident, protected))


class FIFO(Eviction):
    """The key that entered first leaves."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._order: OrderedDict[int, None] = OrderedDict()

    def used(self, key: int, is_hit: bool) -> None:
        """Use changes nothing."""

    def entered(self, key: int) -> None:
        """Put a key at the end."""
        self._order[key] = None

    def left(self, key: int) -> None:
        """Forget a key."""
        self._order.pop(key, None)

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the first."""
        return next((key for key in self._order if key not in protected), None)


class _Scored(Eviction):
    """The key with the lowest score leaves; among equals, the least recently used."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._t = -1  #: events of this pool
        self._clock = 0
        self._stamp: dict[int, int] = {}

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Count the event."""
        self._t += 1

    def used(self, key: int, is_hit: bool) -> None:
        """Note the order of use."""
        self._clock += 1
        self._stamp[key] = self._clock

    def entered(self, key: int) -> None:
        """Give a prefetched key its place in the order."""
        if key not in self._stamp:
            self._clock += 1
            self._stamp[key] = self._clock

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the key of the lowest score."""
        return min(
            (key for key in resident if key not in protected),
            key=lambda k: (self.worth(k), self._stamp[k]),
            default=None,
        )


class LFU(_Scored):
    """The key with the fewest uses leaves; uses are counted from the start, also while a key is not resident."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._count: dict[int, int] = {}

    def used(self, key: int, is_hit: bool) -> None:
        """Count a use."""
        super().used(key, is_hit)
        self._count[key] = self._count.get(key, 0) + 1

    def worth(self, key: int) -> float:
        """Return how often a key was used."""
        return self._count.get(key, 0)


class LFRU(LFU):
    """The key with the lowest ``count / (t - last + 1)`` leaves; ``t`` counts events (vLLM, pull request 37190)."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._last: dict[int, int] = {}

    def used(self, key: int, is_hit: bool) -> None:
        """Count a use, and when it was."""
        super().used(key, is_hit)
        self._last[key] = self._t

    def worth(self, key: int) -> float:
        """Return frequency over age."""
        return self._count.get(key, 0) / (self._t - self._last.get(key, 0) + 1)


class LFUDecay(_Scored):
    """LFU whose counts halve every ``half_life`` events of the pool."""

    def __init__(self, n_slot: int, n_key: int, *, half_life: float = 64.0) -> None:
        super().__init__(n_slot, n_key)
        self.half_life = half_life
        self._rank: dict[int, float] = {}

    def used(self, key: int, is_hit: bool) -> None:
        """Decay a key's count, and add one."""
        super().used(key, is_hit)
        age = self._rank.get(key, -math.inf) - self._t / self.half_life
        self._rank[key] = math.log2(2.0**age + 1.0) + self._t / self.half_life

    def worth(self, key: int) -> float:
        """Return the logarithm of the decayed count, relative to a fixed time."""
        return self._rank.get(key, -math.inf)


class SLRU(Eviction):
    """Two LRU lists: keys enter on probation; a second use protects them, in at most ``share`` of the slots.

    Victims come from probation, and from the protected list only if probation is empty.
    """

    def __init__(self, n_slot: int, n_key: int, *, share: float = 0.5) -> None:
        super().__init__(n_slot, n_key)
        self.n_protected = int(n_slot * share)
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()

    def used(self, key: int, is_hit: bool) -> None:
        """Protect a hit; if too many are protected, the oldest returns to probation."""
        if not is_hit:
            return
        self._probation.pop(key, None)
        self._protected[key] = None
        self._protected.move_to_end(key)
        while len(self._protected) > self.n_protected:
            oldest, _ = self._protected.popitem(last=False)
            self._probation[oldest] = None

    def entered(self, key: int) -> None:
        """Put a key on probation."""
        self._probation[key] = None

    def left(self, key: int) -> None:
        """Forget a key."""
        self._probation.pop(key, None)
        self._protected.pop(key, None)

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the oldest on probation, else the oldest protected."""
        for keys in (self._probation, self._protected):
            for key in keys:
                if key not in protected:
                    return key
        return None


class CLOCK(Eviction):
    """LRU with one bit per key: a hand goes round, clears bits of used keys, and evicts the first key without one."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self._ring: OrderedDict[int, bool] = OrderedDict()  # in the order in which the hand meets them

    def used(self, key: int, is_hit: bool) -> None:
        """Set the bit of a resident key."""
        if key in self._ring:
            self._ring[key] = True

    def entered(self, key: int) -> None:
        """Put a key behind the hand."""
        self._ring[key] = False

    def left(self, key: int) -> None:
        """Forget a key."""
        self._ring.pop(key, None)

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Move the hand to a key that may leave."""
        for _ in range(2 * len(self._ring)):
            key, is_used = next(iter(self._ring.items()))
            if not is_used and key not in protected:
                return key
            self._ring[key] = False if key not in protected else is_used
            self._ring.move_to_end(key)
        return None


class ARC(Eviction):
    """Balances recency and frequency by hits on recently evicted keys (Megiddo and Modha, 2003)."""

    def __init__(self, n_slot: int, n_key: int) -> None:
        super().__init__(n_slot, n_key)
        self.target = 0.0  #: slots of keys that were used once
        self._once: OrderedDict[int, None] = OrderedDict()
        self._often: OrderedDict[int, None] = OrderedDict()
        self._ghosts_once: OrderedDict[int, None] = OrderedDict()
        self._ghosts_often: OrderedDict[int, None] = OrderedDict()
        self._is_often: set[int] = set()  #: missing keys that were known

    def used(self, key: int, is_hit: bool) -> None:
        """Learn from a use."""
        if key in self._once or key in self._often:
            self._once.pop(key, None)
            self._often[key] = None
            self._often.move_to_end(key)
        elif key in self._ghosts_once:
            step = max(1.0, len(self._ghosts_often) / len(self._ghosts_once))
            self.target = min(float(self.n_slot), self.target + step)
            del self._ghosts_once[key]
            self._is_often.add(key)
        elif key in self._ghosts_often:
            step = max(1.0, len(self._ghosts_once) / len(self._ghosts_often))
            self.target = max(0.0, self.target - step)
            del self._ghosts_often[key]
            self._is_often.add(key)

    def entered(self, key: int) -> None:
        """Put a key among those used once, or often if it left lately."""
        (self._often if key in self._is_often else self._once)[key] = None
        self._is_often.discard(key)

    def left(self, key: int) -> None:
        """Remember a key for a while."""
        ghosts = self._ghosts_once if key in self._once else self._ghosts_often
        self._once.pop(key, None)
        self._often.pop(key, None)
        ghosts[key] = None
        while len(ghosts) > self.n_slot:
            ghosts.popitem(last=False)

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the oldest of the list that is above its share."""
        lists = [self._once, self._often]
        if len(self._once) <= max(1.0, self.target) and self._often:
            lists.reverse()
        for keys in lists:
            for key in keys:
                if key not in protected:
                    return key
        return None


class Static(Eviction):
    """The keys that other requests used most; nothing enters or leaves.

    Parameters
    ----------
    counts : mapping of int to int
        Uses of each key in other requests.
    """

    must_admit = False

    def __init__(self, n_slot: int, n_key: int, *, counts: Mapping[int, int]) -> None:
        super().__init__(n_slot, n_key)
        self.preload = sorted(counts, key=lambda k: (-counts[k], k))[:n_slot]

    def used(self, key: int, is_hit: bool) -> None:
        """Use changes nothing."""

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return None: nothing leaves."""
        return None


class HalfPinned(LRU):
    """Half of the slots are static, the others LRU."""

    def __init__(self, n_slot: int, n_key: int, *, counts: Mapping[int, int], share: float = 0.5) -> None:
        super().__init__(n_slot, n_key)
        self.preload = sorted(counts, key=lambda k: (-counts[k], k))[: int(n_slot * share)]
        self._pinned = set(self.preload)

    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the oldest that is not pinned."""
        return next((k for k in self._order if k in resident and k not in protected and k not in self._pinned), None)
