"""Routing that is stated as used counts."""

from __future__ import annotations

import pytest

from pyggml.errors import FormatError, GraphError
from pyggml.routing import parse_routing


def test_counts_are_used_by_layer():
    """Each layer uses as many experts as stated, the same ones at every call, and reports name the counts."""
    routing = parse_routing("counts:72,95,80")
    assert str(routing) == "counts:72,95,80"
    used = [routing.experts(layer, range(512), 128, 4) for layer in range(3)]
    assert [len(u) for u in used] == [72, 95, 80]
    assert all(u <= set(range(128)) for u in used)
    assert used[0] == routing.experts(0, range(512, 1024), 128, 4)
    assert routing.used(128, 4, 512) == pytest.approx((72 + 95 + 80) / 3)


def test_few_tokens_use_no_more_than_they_can():
    """A micro-batch uses at most as many experts as its tokens choose."""
    routing = parse_routing("counts:72")
    assert len(routing.experts(5, range(1), 128, 4)) == 4
    assert routing.used(128, 4, 3) == 12
    assert routing.experts(5, [], 128, 4) == set()


def test_counts_are_read_from_a_file(tmp_path):
    """A JSON list states one count for each layer; reports name the file."""
    path = tmp_path / "used.json"
    path.write_text("[72, 95]", encoding="utf-8")
    routing = parse_routing(f"counts:{path}")
    assert len(routing.experts(1, range(512), 128, 4)) == 95
    assert str(routing) == "counts (used.json, 2 layers)"


@pytest.mark.parametrize("text", ["counts:", "counts:x", "counts:72,", "counts:0", "counts:-3,4"])
def test_counts_that_cannot_be_are_refused(text):
    """The error says what a routing may be."""
    with pytest.raises(GraphError, match="no routing"):
        parse_routing(text)


@pytest.mark.parametrize("text", ["{}", "[]", "[1.5]", "[true]", "72"])
def test_a_file_without_counts_is_refused(tmp_path, text):
    """Only a list of whole numbers above 0 is a file of counts."""
    path = tmp_path / "used.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError):
        parse_routing(f"counts:{path}")
    with pytest.raises(FormatError):
        parse_routing(f"counts:{tmp_path / 'none.json'}")


@pytest.mark.parametrize(("text", "layer"), [("counts:72,95", 2), ("counts:129", 0), ("counts:3", 0)])
def test_counts_of_another_model_are_refused(text, layer):
    """A layer without a count, more experts than there are, or fewer than one token takes."""
    with pytest.raises(GraphError):
        parse_routing(text).experts(layer, range(512), 128, 4)
