"""Garbage collections are rare inside a plan, and as before after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from pyggml.collector import rare_collections


@pytest.fixture(autouse=True)
def _threshold() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def _fail() -> None:
    with rare_collections:
        with rare_collections:
            assert gc.get_threshold()[0] > 100_000
        assert gc.get_threshold()[0] > 100_000
        raise ValueError("inside")


def test_the_threshold_comes_back() -> None:
    """The threshold is higher inside, also after an inner use ended, and the caller's own again after an error."""
    gc.set_threshold(500, 7, 9)
    with pytest.raises(ValueError, match="inside"):
        _fail()
    assert gc.get_threshold() == (500, 7, 9)


@pytest.mark.parametrize("threshold", [0, 1_000_000])
def test_rarer_collections_stay(threshold: int) -> None:
    """A collector that is off, or that runs even more seldom, is left alone."""
    gc.set_threshold(threshold, 10, 10)
    with rare_collections:
        assert gc.get_threshold() == (threshold, 10, 10)
    assert gc.get_threshold() == (threshold, 10, 10)
