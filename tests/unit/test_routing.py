"""Routing that is stated: by a law, or as used counts."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml.errors import FormatError, GraphError
from pyggml.hardware.rates import RATES
from pyggml.routing import DEFAULT_ROUTING, LogNormal, Zipf, parse_routing

#: Of 128 experts, 4 used, by 512 tokens of code in the first eight layers of gpt-oss-120b: llama.cpp, pull request 15346.
GPT_OSS_120B = (95, 91, 72, 74, 73, 78, 87, 95)


def test_the_default_is_the_spread_of_published_speeds():
    """It has a name that can be given, and is more even than one text."""
    assert parse_routing(str(DEFAULT_ROUTING)) == DEFAULT_ROUTING == LogNormal(RATES.spread)
    assert DEFAULT_ROUTING.used(128, 4, 512) > np.mean(GPT_OSS_120B)


def test_a_law_uses_as_many_experts_as_a_real_text():
    """A spread of 2.4 is fitted to the mean of what eight layers used; least and most of them, which are not, come out too."""
    assert LogNormal(2.4).used(128, 4, 512) == pytest.approx(np.mean(GPT_OSS_120B), abs=1)
    drawn = [
        [len(LogNormal(2.4, seed).experts(layer, range(512), 128, 4)) for layer in range(len(GPT_OSS_120B))]
        for seed in range(20)
    ]
    assert np.mean([min(n) for n in drawn]) == pytest.approx(min(GPT_OSS_120B), abs=4)
    assert np.mean([max(n) for n in drawn]) == pytest.approx(max(GPT_OSS_120B), abs=4)


def test_a_log_normal_law_adds_as_much_with_each_doubling_and_zipf_a_factor():
    """Where a power law soon has all experts in, the tail of a log-normal one stays out."""
    sizes = (128, 256, 512, 1024)
    steps = np.diff([LogNormal(3.2).used(32, 4, n) for n in sizes])
    assert steps.max() < 1.3 * steps.min()
    assert Zipf(3).used(32, 4, 2048) > 31.5
    assert LogNormal(3.2).used(32, 4, 2048) < 28


def test_a_spread_of_zero_is_uniform():
    """Without preferences both laws come to the same."""
    assert LogNormal(0).used(64, 6, 20) == pytest.approx(Zipf(0).used(64, 6, 20))


@pytest.mark.parametrize(
    "text", ["lognormal:", "lognormal", "lognormal:x", "lognormal:-1", "lognormal:9", "lognormal:nan"]
)
def test_laws_that_cannot_be_are_refused(text):
    """The error says what a routing may be."""
    with pytest.raises(GraphError, match="no routing"):
        parse_routing(text)


def test_reports_name_law_number_and_text():
    """The name is what `--routing` takes; another text is told."""
    assert [str(r) for r in (LogNormal(2.4), LogNormal(3, seed=7), Zipf(1.9), Zipf(0))] == [
        "lognormal:2.4",
        "lognormal:3 (seed 7)",
        "zipf:1.9",
        "uniform",
    ]


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
