"""Samplers choose as asked."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml.errors import GraphError
from pyggml.sampling import SamplerFlags, greedy, make_sampler

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.04, 0.01], np.float32))


def drawn(n: int = 400, **flags: float) -> set[int]:
    """Return the tokens that n draws at temperature 1 give."""
    sampler = make_sampler(SamplerFlags(temperature=1.0, seed=7, **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | flags)))
    return {sampler(LOGITS) for _ in range(n)}


def test_greedy_takes_the_first_of_equals():
    """The most likely token, and of equals the one of the lowest id."""
    assert greedy(np.array([1.0, 3.0, 3.0], np.float32)) == 1


def test_temperature_zero_is_greedy():
    """The default sampler draws nothing."""
    assert make_sampler(SamplerFlags()) is greedy


def test_a_seed_repeats():
    """Two samplers of one seed draw the same tokens."""
    a, b = (make_sampler(SamplerFlags(temperature=2.0, seed=3)) for _ in range(2))
    assert [a(LOGITS) for _ in range(50)] == [b(LOGITS) for _ in range(50)]


def test_frequencies_follow_the_probabilities():
    """At temperature 1 without cuts tokens come as often as they are likely."""
    sampler = make_sampler(SamplerFlags(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    counts = np.bincount([sampler(LOGITS) for _ in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(counts, np.exp(LOGITS), atol=0.03)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"top_p": 0.0}, {0}),
    ],
)
def test_cuts_keep_the_likely(flags, expected):
    """Top-k, top-p and min-p leave only the likely tokens."""
    assert drawn(**flags) == expected


@pytest.mark.parametrize("flags", [{"temperature": -1.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}])
def test_numbers_out_of_bounds_are_refused(flags):
    """A flag out of bounds is an error before anything is drawn."""
    with pytest.raises(GraphError):
        make_sampler(SamplerFlags(**flags))
