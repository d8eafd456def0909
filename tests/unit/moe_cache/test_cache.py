"""Budgets, copies and counts of the expert cache."""

from __future__ import annotations

import pytest

from pyggml.errors import SchedError
from pyggml.moe_cache import (
    LRU,
    CacheGroup,
    ExpertCache,
    ExpertTensor,
    HostLayer,
    PartialCopy,
    Transfer,
    plan_cache,
    slots_that_fit,
)


def _layer(index: int, device: int = 0, *, n_bytes: int = 1000, layout: str = "q8_0") -> HostLayer:
    names = ("gate", "up", "down")
    tensors = tuple(ExpertTensor(f"blk.{index}.ffn_{n}_exps.weight", (layout,), 16, n_bytes) for n in names)
    return HostLayer(index, device, tensors)


def test_slots_have_a_spare_and_alignment() -> None:
    """Each tensor's bank has one slot more than counts, and ends at the alignment."""
    group = CacheGroup(0, _layer(0).experts, layers=[0, 1])
    assert group.bank_bytes(9, 1024) == 3 * 10240
    assert slots_that_fit(group, 3 * 10240, 1024) == 9
    assert slots_that_fit(group, 3 * 10240 - 1, 1024) == 8
    assert slots_that_fit(group, 10**9, 1024) == 32
    assert slots_that_fit(group, 100, 1024) == 0


def test_groups_share_the_budget_by_their_bytes() -> None:
    """Layers of another layout are a group of their own; both keep the same part of their experts."""
    layers = [_layer(0), _layer(1), _layer(2, n_bytes=2000, layout="f16"), _layer(3)]
    groups = plan_cache(layers, 120_000, n_used=2, alignments=[32], weights=[1.0])
    assert [g.layers for g in groups] == [[0, 1, 3], [2]]
    assert [g.host_bytes for g in groups] == [144_000, 96_000]
    assert [g.n_slots for g in groups] == [23, 7]
    assert str(groups[0]) == "3 layers with 23 slots (47.9 %)"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0, 1.0], [15, 15]), ([3.0, 1.0], [23, 7]), ([0.0, 0.0], [15, 15]), ([5.0, 0.0], [31, 0])],
)
def test_devices_share_the_budget_by_weight(weights: list[float], expected: list[int]) -> None:
    """By the user's shares or free memory; alike if neither is known."""
    layers = [_layer(i, device=i // 2) for i in range(4)]
    groups = plan_cache(layers, 96_000, n_used=2, alignments=[32, 32], weights=weights)
    assert [g.n_slots for g in groups] == expected


def test_a_device_without_host_experts_gets_nothing() -> None:
    """The whole budget goes to the device that has a use for it."""
    (group,) = plan_cache([_layer(0, 1)], 48_000, n_used=2, alignments=[32, 32], weights=[1.0, 1.0])
    assert group.n_slots == 15


def test_a_group_that_is_too_small_is_left_out() -> None:
    """Fewer slots than a token needs: those layers are not cached; if none is left, that is an error."""
    layers = [_layer(0), _layer(1), _layer(2), _layer(3, layout="f16")]
    groups = plan_cache(layers, 72_000, n_used=6, alignments=[8], weights=[1.0])
    assert [g.n_slots for g in groups] == [17, 0]
    with pytest.raises(SchedError, match="too small to hold the experts of one token"):
        plan_cache(layers, 10_000, n_used=2, alignments=[32], weights=[1.0])


def _cache(n_slots: int = 8, n_expert: int = 16) -> ExpertCache:
    return ExpertCache(LRU(n_slots, n_expert), (1000, 1000, 600), n_used=2)


def test_which_micro_batches_it_serves() -> None:
    """Up to 32 tokens, and only if the experts that they may choose fit."""
    cache = _cache()
    assert [n for n in range(40) if cache.serves(n, 2)] == [1, 2, 3, 4]
    large = _cache(n_slots=16)
    assert [n for n in (0, 1, 32, 33) if large.serves(n, 2)] == [1, 32]


def test_neighbours_are_uploaded_together() -> None:
    """Experts that follow each other into slots that follow each other are one copy."""
    cache = _cache()
    _, transfers = cache.update(0, [5, 3, 4, 9])
    assert transfers == [Transfer(3, 0, 3), Transfer(9, 3, 1)]


def test_counts_are_told_as_llama_cpp_tells_them() -> None:
    """Three lines: small micro-batches, large ones, and what went past the cache; none for what did not happen."""
    cache = _cache(n_slots=16)
    assert cache.counters.lines() == []
    cache.update(0, [1, 2])
    cache.update(0, [2, 3])
    cache.update(1, [0, 1] * 9)
    assert cache.counters.lines() == [
        "llama_moe_cache: ubatch <= 8: hits = 1, misses = 3, hit rate = 25.00%, uploaded = 0.01 MiB",
        "llama_moe_cache: ubatch  > 8: hits = 0, misses = 2, hit rate = 0.00%, uploaded = 0.00 MiB",
    ]
    cache.partial_copies(0, [1, 2, 9], 0)
    assert cache.counters.lines()[2:] == ["llama_moe_cache: large batches: 2 experts copied from the cache, 0.00 MiB"]
    assert (cache.counters.hits, cache.counters.misses, cache.counters.uploaded_bytes) == (1, 5, 5 * 2600)


def test_large_batches_take_what_is_there() -> None:
    """Runs are cut at what the cache has; the gap before it is sent after it, and the end brings padding."""
    cache = _cache()
    cache.update(0, [3, 4])
    cache.update(0, [8])
    assert cache.partial_copies(0, [1, 2, 3, 4, 5, 8, 15], 0) == [
        PartialCopy(3, 2, 0),
        PartialCopy(1, 2, None),
        PartialCopy(5, 1, None, 512),
        PartialCopy(8, 1, 2),
        PartialCopy(9, 0, None, 512),
        PartialCopy(15, 1, None),
    ]
    assert cache.counters.copied == 3
    assert cache.policy.slot_map(0)[3] == 0, "nothing is evicted"
