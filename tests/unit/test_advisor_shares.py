"""`pyggml plan` with several cards and experts on the host: each card is filled with whole layers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyggml.advisor import plan
from pyggml.advisor.advice import MARGIN_BYTES, open_machine, order_of_cards
from pyggml.advisor.memory import MemoryModel
from pyggml.advisor.search import Goal, Search
from pyggml.advisor.settings import is_experts_only, last_experts, numbers_pattern
from pyggml.advisor.shares import filling
from pyggml.catalog import header_path
from pyggml.foresight import ModelShape, Setting
from pyggml.gguf import GGUFFile

HOST = "ddr5-6000x2,cores=8,64GiB"


@pytest.mark.parametrize("cards", ["rtx3060-6GiB,rtx2060", "rtx3060-4GiB,rtx3060-4GiB,rtx2060"])
def test_no_card_has_room_for_another_layer(cards: str) -> None:
    """Of each card less than a whole layer is free beside the margin, whichever end of the model has experts on the host."""
    backends, machine = open_machine(cards, HOST)
    with GGUFFile.open(header_path("gpt-oss-20b")) as file:
        shape = ModelShape.from_header(file.metadata, file.tensors, "gpt-oss-20b")
        memory = MemoryModel(file, backends, 4096, host=machine.host, margin_bytes=MARGIN_BYTES)
        search = Search(shape, machine, Goal(2048, 256, 4096), memory)
        whole = max(layer.expert_bytes + layer.other_bytes for layer in shape.layers)
        found = list(filling(search, Setting(n_cpu_moe=12, is_pinned=True, n_ubatch=512)))
        assert {bool(s.overrides) for s in found} == {False, True}
        for setting in found:
            *on_cards, host = memory.exact(setting) or []
            assert host.fits
            spare = [
                d.of_bytes - d.margin_bytes - d.bytes for d, n in zip(on_cards, setting.tensor_split, strict=True) if n
            ]
            assert all(0 <= n < 1.1 * whole for n in spare), setting
        memory.close()


def test_another_card_makes_no_plan_slower() -> None:
    """Beside two small cards the best plan is faster than on the first alone."""
    one, three = (
        plan("gpt-oss-20b", devices=cards, host=HOST, context=4096, n_plans=1).plans[0].seconds
        for cards in ("rtx3060-6GiB", "rtx3060-6GiB,rtx3060-3GiB,rtx3060-3GiB")
    )
    assert one > 1.1 * three


@pytest.mark.parametrize("cards", ["rtx3060,rtx4090", "rtx4090,rtx3060,rtx3060"])
def test_a_slow_card_that_is_not_needed_is_left_out(cards: str) -> None:
    """A model that fits on the fast card is as fast as on that card alone: another would compute its layers more slowly."""
    alone, beside = (plan("qwen3-8b", devices=d, host=HOST, n_plans=1).plans[0] for d in ("rtx4090", cards))
    assert [share > 0 for share in beside.setting.tensor_split] == [name == "rtx4090" for name in cards.split(",")]
    assert beside.seconds == pytest.approx(alone.seconds, rel=0.01)


@pytest.mark.parametrize("cards", ["rtx3060-4GiB", "rtx3060-4GiB,rtx2060-3GiB"])
def test_with_a_long_prompt_attention_stays_on_the_cards(cards: str) -> None:
    """Feed-forward weights on the host beat whole layers there, whose attention the CPU would compute over a full cache."""
    made = plan("llama-3-8b", devices=cards, host="ddr4-3200x2,cores=8", prompt=12000, context=12288, kv_types=["f16"])
    best, whole = made.plans[0], next(p for p in made.plans if not p.setting.overrides)
    assert "ffn" in best.setting.overrides[0]
    assert best.fits
    assert best.seconds * 1.03 < whole.seconds


@given(st.sets(st.integers(0, 130), min_size=1))
def test_a_short_pattern_matches_the_same_layers(layers: set[int]) -> None:
    """Alternatives with ranges of digits match these layers and no other; a long list of numbers is no command to read."""
    pattern = re.compile(rf"blk\.({numbers_pattern(layers)})\.ffn")
    assert {i for i in range(1400) if pattern.search(f"blk.{i}.ffn")} == layers


def test_experts_of_the_last_layers_are_named_in_few_letters() -> None:
    """The override of 77 layers has a line of its own, and is known again as one of experts only."""
    text = last_experts(77, 94)
    assert text == r"blk\.(1[7-9]|[2-8][0-9]|9[0-3])\.ffn_(up|down|gate|gate_up)_exps=CPU"
    assert is_experts_only(Setting(overrides=(text,)))
    assert not is_experts_only(Setting(overrides=(text.replace("_exps", ""),)))


def test_an_expert_cache_is_tried_beside_a_full_card() -> None:
    """The second card has whole layers, and what is left of the first is a cache: faster than the first alone, and it fits."""
    one, two = (
        plan("gpt-oss-20b", devices=cards, host=HOST, context=4096, n_plans=2).plans
        for cards in ("rtx4090-6GiB", "rtx4090-6GiB,rtx3060-3GiB")
    )
    best = two[0]
    assert best.setting.moe_cache_mib
    assert best.setting.tensor_split
    assert best.fits
    assert best.seconds < min(one[0].seconds, 0.97 * two[1].seconds)


def test_the_order_of_cards_is_named_where_another_is_faster() -> None:
    """With weights on the host the first device computes a prompt's copies: a plan says so if a faster card is not the first."""
    for cards, setting, is_said in (
        ("rtx2060,rtx4090", Setting(n_cpu_moe=3), True), ("rtx4090,rtx2060", Setting(n_cpu_moe=3), False),
        ("rtx2060,rtx4090", Setting(), False), ("rtx2060,rtx4090", Setting(n_cpu_moe=3, op_offload=False), False),
    ):  # fmt: skip
        said = order_of_cards(open_machine(cards, HOST)[1], setting)
        assert ["--device CUDA1,CUDA0: plan with --device rtx4090,rtx2060" in line for line in said] == [True] * is_said


@pytest.mark.parametrize("at_end", [False, True])
def test_a_cache_is_only_on_cards_with_host_experts(at_end: bool) -> None:
    """The estimate of a cache's memory is what the scheduler plans: the card with whole layers has no part of it."""
    backends, machine = open_machine("rtx3060-6GiB,rtx3060-6GiB", HOST)
    with GGUFFile.open(header_path("gpt-oss-20b")) as file:
        memory = MemoryModel(file, backends, 4096, host=machine.host, margin_bytes=MARGIN_BYTES)
        shares = (5.0, 20.0) if at_end else (19.0, 6.0)
        plain = Setting(tensor_split=shares, n_cpu_moe=0 if at_end else 15, overrides=(last_experts(15, 24),) * at_end)
        memory.exact(plain)
        cached = replace(plain, moe_cache_mib=1500)
        told = memory.estimate(cached)
        for a, b, without in zip(told or [], memory.exact(cached) or [], memory.exact(plain) or [], strict=True):
            assert a.bytes == pytest.approx(b.bytes, abs=48 << 20)
            assert (b.bytes > without.bytes + (1400 << 20)) == (a.device == f"SIM{int(at_end)}")
        memory.close()
