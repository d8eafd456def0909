"""The byte ranges of used experts: what they cover, and what they leave alone."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyggml.sched.experts import expert_copy_ranges, find_bad_id, used_experts

ALWAYS = settings(max_examples=200, derandomize=True, database=None, deadline=None)

#: Below, at and above the padding of 512 bytes, and of no alignment.
EXPERT_BYTES = st.sampled_from([1, 17, 170, 511, 512, 513, 558, 4096, 5_242_880]) | st.integers(1, 3000)


@st.composite
def routed(draw: st.DrawFn) -> tuple[set[int], int, int]:
    """Used experts, their number, and the bytes of one."""
    n_expert = draw(st.integers(1, 160))
    some = st.sets(st.integers(0, n_expert - 1))
    used = draw(
        st.just(set())
        | st.just({n_expert - 1})
        | st.just(set(range(n_expert)))
        | st.integers(0, n_expert - 1).map(lambda i: {i})
        | some
    )
    return used, n_expert, draw(EXPERT_BYTES)


NONE_USED = (set(), 8, 1000)
ALL_USED = (set(range(8)), 8, 1000)
LAST_ONLY = ({7}, 8, 100)


@ALWAYS
@given(routed())
@example(NONE_USED)
@example(ALL_USED)
@example(LAST_ONLY)
def test_used_experts_are_covered(case: tuple[set[int], int, int]) -> None:
    """Every byte of every used expert lies in one range."""
    used, n_expert, size = case
    ranges = expert_copy_ranges(used, n_expert, size)
    for i in used:
        assert sum(r.offset_bytes <= i * size and (i + 1) * size <= r.end_bytes for r in ranges) == 1


@ALWAYS
@given(routed())
@example(NONE_USED)
@example(ALL_USED)
def test_ranges_are_disjoint_ascending_and_inside(case: tuple[set[int], int, int]) -> None:
    """Ranges ascend without touching a byte twice, and none reaches past the tensor."""
    used, n_expert, size = case
    ranges = expert_copy_ranges(used, n_expert, size)
    end = 0
    for r in ranges:
        assert end <= r.offset_bytes < r.end_bytes
        end = r.end_bytes
    assert end <= n_expert * size


@ALWAYS
@given(routed())
def test_runs_are_maximal(case: tuple[set[int], int, int]) -> None:
    """There are as many ranges as used experts whose left neighbour is unused: each starts at such a one."""
    used, n_expert, size = case
    starts = sorted(i for i in used if i - 1 not in used)
    assert [r.offset_bytes for r in expert_copy_ranges(used, n_expert, size)] == [i * size for i in starts]


@ALWAYS
@given(routed())
@example(LAST_ONLY)
def test_padding_follows_every_run_but_the_last_experts(case: tuple[set[int], int, int]) -> None:
    """A run is followed by the smaller of an expert and 512 bytes, unless it ends with the last expert."""
    used, n_expert, size = case
    lasts = sorted(i for i in used if i + 1 not in used)
    got = [r.end_bytes for r in expert_copy_ranges(used, n_expert, size)]
    assert got == [(i + 1) * size + (min(size, 512) if i != n_expert - 1 else 0) for i in lasts]


@ALWAYS
@given(routed(), st.data())
def test_ranges_end_with_a_strided_weight(case: tuple[set[int], int, int], data: st.DataObject) -> None:
    """A weight that is a strided view ends before its last stride does, and so do the ranges; experts stay covered."""
    used, n_expert, stride = case
    expert = data.draw(st.integers(1, stride))
    tensor_bytes = (n_expert - 1) * stride + expert
    ranges = expert_copy_ranges(used, n_expert, stride, tensor_bytes=tensor_bytes)
    assert all(r.size_bytes > 0 and r.end_bytes <= tensor_bytes for r in ranges)
    for i in used:
        assert any(r.offset_bytes <= i * stride and i * stride + expert <= r.end_bytes for r in ranges)


@ALWAYS
@given(routed(), st.integers(0, 2000))
def test_padding_can_be_chosen(case: tuple[set[int], int, int], pad: int) -> None:
    """No padding is longer than asked for, and none is longer than an expert."""
    used, n_expert, size = case
    total = sum(r.size_bytes for r in expert_copy_ranges(used, n_expert, size, pad_bytes=pad))
    n_padded = len([i for i in used if i + 1 not in used and i != n_expert - 1])
    assert total == len(used) * size + n_padded * min(pad, size)


@st.composite
def id_words(draw: st.DrawFn) -> tuple[list[int], int, int, tuple[int, int], list[list[int]]]:
    """The words of an ids tensor with gaps, its numbers and strides, and the ids by token."""
    n_used, n_token = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    s0 = draw(st.integers(1, 3))
    s1 = draw(st.integers(max(1, n_used * s0), n_used * s0 + 4))
    if draw(st.booleans()):  # transposed: slots far apart
        s0, s1 = max(1, n_token) + draw(st.integers(0, 2)), 1
    ids = draw(
        st.lists(st.lists(st.integers(0, 63), min_size=n_used, max_size=n_used), min_size=n_token, max_size=n_token)
    )
    words = [-1] * (max(0, n_token - 1) * s1 + max(0, n_used - 1) * s0 + 1 if n_token and n_used else 0)
    for token, row in enumerate(ids):
        for slot, id in enumerate(row):
            words[token * s1 + slot * s0] = id
    return words, n_used, n_token, (s0, s1), ids


@ALWAYS
@given(id_words())
def test_ids_are_read_by_strides(case: tuple[list[int], int, int, tuple[int, int], list[list[int]]]) -> None:
    """Ids are found in strided and transposed tensors, and what lies in the gaps is not taken for one."""
    words, n_used, n_token, strides, ids = case
    assert used_experts(words, n_used=n_used, n_token=n_token, strides=strides) == {i for row in ids for i in row}
    assert find_bad_id(words, n_used=n_used, n_token=n_token, strides=strides, n_expert=64) is None


@ALWAYS
@given(id_words().filter(lambda c: c[1] and c[2]), st.data())
def test_bad_ids_are_located(
    case: tuple[list[int], int, int, tuple[int, int], list[list[int]]], data: st.DataObject
) -> None:
    """The first id outside 0..n_expert-1 is reported with its token and slot."""
    words, n_used, n_token, strides, _ = case
    token, slot = data.draw(st.integers(0, n_token - 1)), data.draw(st.integers(0, n_used - 1))
    bad = data.draw(st.sampled_from([-1, 64, 2**31 - 1, -(2**31)]))
    words[token * strides[1] + slot * strides[0]] = bad
    got = find_bad_id(words, n_used=n_used, n_token=n_token, strides=strides, n_expert=64)
    assert got == (token, slot, bad)


@pytest.mark.parametrize("kind", ["list", "memoryview", "numpy"])
def test_ids_may_be_any_sequence(kind: str) -> None:
    """Ids are read from a list, from raw bytes and from an array alike."""
    ids = [3, 1, 0, 3]
    words = ids if kind == "list" else memoryview(struct.pack("<4i", *ids)).cast("i")
    if kind == "numpy":
        words = np.array(ids, np.int32)
    assert used_experts(words, n_used=2, n_token=2, strides=(1, 2)) == {0, 1, 3}
