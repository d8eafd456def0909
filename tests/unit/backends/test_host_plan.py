"""Where stages of a host plan begin: found by one look-up for each range, as an obvious comparison of all pairs finds it."""

from __future__ import annotations

import random

import pytest

from pyggml.backends.host import plan
from pyggml.backends.host.plan import _Touched


@pytest.mark.parametrize("few", [0, 4, 48])
def test_conflicts_are_those_of_all_pairs(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random reads and writes, by one thread or by all, a conflict is found where two ranges of the stage meet."""
    monkeypatch.setattr(plan, "_FEW", few)  # however many are kept one by one
    rng = random.Random(1)
    for _ in range(300):
        touched, pairs = _Touched(), []
        for _ in range(rng.randrange(1, 30)):
            serial = rng.random() < 0.5
            ranges = []
            for _ in range(rng.randrange(1, 4)):
                first = rng.randrange(60)
                ranges.append((first, first + rng.randrange(1, 8), rng.random() < 0.5))
            want = any(
                first < end2 and first2 < end and (is_write or is_write2) and not (serial and serial2)
                for first, end, is_write in ranges
                for first2, end2, is_write2, serial2 in pairs
            )
            assert touched.conflicts(ranges, serial) == want
            if want:
                touched, pairs = _Touched(), []
            touched.add(ranges, serial)
            pairs += [(*r, serial) for r in ranges]


def test_a_long_chain_is_a_few_ranges() -> None:
    """However many nodes of a chain lie side by side, what is kept of them does not grow, so that the next look is as short."""
    touched = _Touched()
    for i in range(10_000):
        ranges = [(64 * i, 64 * i + 64, True), (64 * i - 64, 64 * i, False)]
        assert not touched.conflicts(ranges, True)
        touched.add(ranges, True)
    assert touched.many is not None
    assert [len(kept.starts) for kept in touched.many] == [1, 1]
