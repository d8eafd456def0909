"""Eviction as llama.cpp's two versions have it."""

from __future__ import annotations

import random
from collections import deque

import pytest

from pyggml.errors import SchedError
from pyggml.moe_cache import EVICTIONS, LRU, SLRU, EvictionPolicy, Upload, slots_without_hits


def test_lru_evicts_what_was_used_longest_ago() -> None:
    """Hits are taken note of before anything is evicted; misses take the oldest slots, by id."""
    cache = LRU(4, 8)
    first = cache.lookup(0, [5, 2, 5])
    assert (first.hits, first.misses, first.uploads) == ((), (2, 5), (Upload(2, 0), Upload(5, 1)))
    assert first.slots == {5: 1, 2: 0}
    assert cache.lookup(1, [7, 3]).uploads == (Upload(3, 2), Upload(7, 3))
    again = cache.lookup(0, [2, 6])
    assert (again.hits, again.uploads, again.evicted) == ((2,), (Upload(6, 1),), ((0, 5),))
    assert cache.slot_map(0) == [-1, -1, 0, -1, -1, -1, 1, -1]
    assert (cache.slot_of(1, 7), cache.slot_of(0, 5)) == (3, None)


def test_slru_protects_what_was_used_twice() -> None:
    """An expert that was hit outlives any number that come once; LRU would have let it go."""
    survivors = {}
    for policy in (LRU, SLRU):
        cache = policy(4, 16)
        cache.lookup(0, [0])
        cache.lookup(0, [0])
        for expert in range(1, 16):
            cache.lookup(0, [expert])
        survivors[policy.name] = cache.slot_of(0, 0) is not None
    assert survivors == {"lru": False, "slru": True}


def test_slru_protects_half_of_the_slots() -> None:
    """With more than half protected, the one that was hit longest ago is on probation again."""
    cache = SLRU(4, 8)
    cache.lookup(0, [0, 1, 2, 3])
    for expert in (0, 1, 2):
        cache.lookup(0, [expert])
    assert cache.lookup(0, [4]).evicted == ((0, 3),)  # never hit
    assert cache.lookup(0, [5]).evicted == ((0, 0),)  # pushed out by 2
    assert cache.slot_of(0, 1) is not None


def test_slru_evicts_nothing_that_is_chosen_now() -> None:
    """The oldest on probation stays if the layer chooses it at this very moment."""
    cache = SLRU(3, 8)
    cache.lookup(0, [0, 1, 2])
    cache.lookup(0, [1])
    cache.lookup(0, [2])  # protected is 2; 1 went back, behind 0
    found = cache.lookup(0, [0, 5])
    assert found.hits == (0,)
    assert (0, 0) not in found.evicted


class _Plain:
    """Both rules once more, by lists and nothing else."""

    def __init__(self, n_slots: int, *, is_segmented: bool) -> None:
        self.probation: deque[int] = deque(range(n_slots))
        self.protected: deque[int] = deque()
        self.limit = n_slots // 2 if is_segmented else 0
        self.is_segmented = is_segmented
        self.held: dict[int, tuple[int, int]] = {}

    def lookup(self, layer: int, ids: list[int]) -> list[tuple[int, int]]:
        chosen = list(dict.fromkeys(ids))
        where = {key: slot for slot, key in self.held.items()}
        for e in chosen:
            slot = where.get((layer, e))
            if slot is None:
                continue
            (self.protected if slot in self.protected else self.probation).remove(slot)
            (self.protected if self.is_segmented else self.probation).append(slot)
            if self.is_segmented and len(self.protected) > self.limit:
                self.probation.append(self.protected.popleft())
        filled = []
        for e in sorted(set(chosen)):
            if (layer, e) in where:
                continue
            now = {(layer, c) for c in chosen}
            slot = next(s for s in [*self.probation, *self.protected] if self.held.get(s) not in now)
            (self.protected if slot in self.protected else self.probation).remove(slot)
            self.probation.append(slot)
            self.held[slot] = (layer, e)
            filled.append((e, slot))
        return filled


@pytest.mark.parametrize("name", EVICTIONS)
def test_long_runs_equal_a_plain_restatement(name: str) -> None:
    """Random routing of many shapes: the same uploads to the same slots; slot maps and policy agree."""
    rng = random.Random(5)
    for _ in range(40):
        n_layer, n_expert, n_used = rng.randint(1, 5), rng.randint(4, 24), rng.randint(1, 4)
        n_slots = rng.randint(n_used, n_layer * n_expert)
        cache, plain = EVICTIONS[name](n_slots, n_expert), _Plain(n_slots, is_segmented=name == "slru")
        for _ in range(60):
            layer = rng.randrange(n_layer)
            ids = [min(int(rng.expovariate(3 / n_expert)), n_expert - 1) for _ in range(n_used)]
            found = cache.lookup(layer, ids)
            assert [tuple(u) for u in found.uploads] == plain.lookup(layer, ids)
            assert all(cache.slot_map(layer)[e] == slot for e, slot in found.slots.items())
        held = [e for layer in range(n_layer) for e in cache.slot_map(layer) if e >= 0]
        assert len(held) == len(set(held)) <= n_slots


@pytest.mark.parametrize("name", EVICTIONS)
@pytest.mark.parametrize(("n_layer", "n_distinct"), [(4, 4), (6, 8), (3, 1)])
def test_too_few_slots_never_hit(name: str, n_layer: int, n_distinct: int) -> None:
    """Up to the bound each lookup misses whatever is chosen; with one slot more a router that repeats itself hits."""
    rng = random.Random(7)
    bound = slots_without_hits(n_layer, n_distinct)

    def hits(n_slots: int, *, same: bool) -> int:
        cache = EVICTIONS[name](n_slots, 16)
        chosen = range(n_distinct)
        return sum(
            len(cache.lookup(layer, chosen if same else rng.sample(range(16), n_distinct)).hits)
            for _ in range(50)
            for layer in range(n_layer)
        )

    for n_slots in range(n_distinct, bound + 1):
        assert hits(n_slots, same=True) == hits(n_slots, same=False) == 0
    assert hits(max(bound + 1, n_distinct), same=True) > 0


@pytest.mark.parametrize("ids", [[0, 8], [-1]])
def test_ids_that_are_no_expert_are_refused(ids: list[int]) -> None:
    """The layer and the id are named, and the cache is as it was."""
    cache = LRU(4, 8)
    with pytest.raises(SchedError, match="of layer 2: the layer has experts 0 to 7"):
        cache.lookup(2, ids)
    assert cache.slot_map(2) == [-1] * 8


def test_more_experts_than_slots_are_refused() -> None:
    """Upstream aborts; here an error says how many there are."""
    with pytest.raises(SchedError, match="chooses 3 experts, and the cache has 2 slots"):
        SLRU(2, 8).lookup(0, [1, 2, 3])


def test_a_rule_of_ones_own() -> None:
    """Two methods make a policy."""

    class Random(EvictionPolicy):
        def _hit(self, slot: int) -> None:
            pass

        def _victim(self, needed: set[tuple[int, int]]) -> int:
            return next(s for s in range(self.n_slots) if self._held[s] not in needed)

    assert Random(2, 4).lookup(0, [3, 1]).slots == {3: 1, 1: 0}
