"""Profiles of devices and links, and the one cost model: what a thing costs, and where the numbers are from."""

from __future__ import annotations

import pytest

from pyggml.cost import CPU_PROFILE, PROFILES, LinkProfile, link_of, parse_profile
from pyggml.errors import DeviceUnavailableError
from pyggml.hardware.cards import CARDS, Card
from pyggml.hardware.formulas import Kind, Work, card_s, host_read, host_s, pageable_rate
from pyggml.hardware.hosts import DEFAULT_HOST, Host
from pyggml.hardware.rates import FEW_COLUMNS, RATES
from pyggml.types import Type


@pytest.mark.parametrize("profile", [*PROFILES.values(), CPU_PROFILE], ids=lambda p: p.name)
def test_every_profile_has_a_source(profile):
    """Each profile has rates above 0 and names where they are from."""
    assert profile.source
    assert min(profile.memory_bytes, profile.memory_bytes_per_s, profile.link.bytes_per_s) > 0
    assert profile.launch_s > 0 or isinstance(profile.sheet, Host)
    assert profile.copy_engines >= 1


def test_a_pass_over_memory_takes_its_launch_and_its_bytes():
    """Reading goes at the share of the data sheet that was fitted, small ops move more than is counted."""
    p = PROFILES["rtx4090-pcie4"]
    memory = 1008e9 * RATES.cuda.memory
    assert p.seconds(Work(read_bytes=8e8)) == pytest.approx(RATES.cuda.launch_s + 8e8 / memory)
    assert p.seconds(Work(moved_bytes=8e8, n_kernels=2)) == pytest.approx(
        2 * RATES.cuda.launch_s + RATES.passes * 8e8 / memory
    )
    assert p.seconds(Work(n_kernels=0)) == 0


def test_a_product_takes_the_longer_of_reading_and_multiplying():
    """Few columns add up both; many columns fill tiles, of which each matrix pays for some in vain."""
    card = CARDS["rtx3090"]
    work = Work(Kind.PRODUCT, 2.0 * 4096 * 4096, 1e7, n_kernels=0, type=Type.Q4_K)
    few = card_s(work, card, RATES)
    assert few > 1e7 / (card.bytes_per_s * RATES.cuda.memory)
    many = work._replace(flops=512 * work.flops, columns=512.0, n_tokens=512)
    one, eight = card_s(many, card, RATES), card_s(many._replace(matrices=8.0), card, RATES)
    assert eight / one == pytest.approx((512 + 8 * RATES.cuda.pad) / (512 + RATES.cuda.pad))
    assert card_s(many._replace(flops=0.0), card, RATES) == pytest.approx(1e7 / (card.bytes_per_s * RATES.cuda.memory))
    edge = [card_s(work._replace(columns=n, n_tokens=n), card, RATES) for n in (FEW_COLUMNS, FEW_COLUMNS + 1)]
    assert edge[0] != edge[1]


def test_products_run_at_the_rate_of_their_type():
    """Of 32 bits slower than of 16, of 16 slower than of quantised weights on cards with matrix units for them."""
    for p in PROFILES.values():
        works = [Work(Kind.PRODUCT, 1e13, type=t, columns=512.0, n_tokens=512) for t in (Type.F32, Type.F16, Type.Q8_0)]
        f32, f16, q8 = (p.seconds(w) for w in works)
        assert f32 > f16
        assert f32 > q8


def test_generations_have_kernels_of_their_own():
    """Cards without matrix units take the 8-bit instruction's rate; Vulkan on a card is another family."""
    work = Work(Kind.PRODUCT, 1e12, type=Type.Q4_0, columns=512.0, n_tokens=512, n_kernels=0)
    old = CARDS["p40"]
    padded = 1e12 * (1 + RATES.cuda.pad / 512)
    assert card_s(work, old, RATES) == pytest.approx(padded / (old.int8_per_s * RATES.dp4a), rel=0.3)
    new = CARDS["rx7900xtx"]
    assert card_s(work, new, RATES, backend="Vulkan") != card_s(work, new, RATES)
    assert card_s(Work(), new, RATES, slow_host=True) > 3 * card_s(Work(), new, RATES)


def test_the_host_reads_and_multiplies():
    """One token waits for memory, many for arithmetic; types without an order of their own are slower."""
    read = host_read(DEFAULT_HOST, RATES)
    assert 0.5 * DEFAULT_HOST.read_bytes_per_s < read < DEFAULT_HOST.read_bytes_per_s
    assert CPU_PROFILE.seconds(Work(read_bytes=read)) == pytest.approx(1.0)
    many = Work(Kind.PRODUCT, 1e12, 1e6, type=Type.Q4_K, columns=512.0, n_tokens=512)
    assert host_s(many, DEFAULT_HOST, RATES) < host_s(many._replace(type=Type.IQ3_XXS), DEFAULT_HOST, RATES)


def test_a_link_takes_latency_for_each_copy_and_is_no_faster_than_pageable_memory():
    """Copies from pageable memory go at what the host's memory and the driver give, or at the link's rate if that is less."""
    link = LinkProfile(25e9, 10e-6)
    assert link.seconds(25_000_000) == pytest.approx(1e-3 + 10e-6)
    assert link.seconds(25_000_000, n_copies=3) == pytest.approx(1e-3 + 30e-6)
    assert link.seconds(25_000_000, at_most=12.5e9) == pytest.approx(2e-3 + 10e-6)
    assert link.seconds(25_000_000, at_most=50e9) == link.seconds(25_000_000)
    slow, fast = Host(30e9), Host(300e9)
    assert pageable_rate(slow, RATES) == pytest.approx(RATES.pageable * 30e9)
    assert pageable_rate(fast, RATES) == 20e9


def test_links_are_as_wide_as_card_and_slot():
    """What was measured holds; a narrower slot halves a link."""
    card = CARDS["rtx4060ti"]
    assert link_of(card, "4.0 x16") == link_of(card, "4.0 x8")
    assert link_of(card, "3.0 x8").bytes_per_s == pytest.approx(link_of(card, "4.0 x8").bytes_per_s / 2)
    assert link_of(card, "5.0 x4", 14.5).bytes_per_s == 14.5e9
    assert PROFILES["rtx3090-pcie4"].link == link_of(CARDS["rtx3090"], "4.0 x16")


def test_custom_profile_holds_what_was_given():
    """Memory, its bandwidth, the link's and pinned memory are read from the name."""
    p = parse_profile("custom:8GiB,448GB/s,12GB/s,pinned")
    assert isinstance(p.sheet, Card)
    assert (p.memory_bytes, p.sheet.bytes_per_s, p.link.bytes_per_s, p.is_pinned) == (8 << 30, 448e9, 12e9, True)


@pytest.mark.parametrize("text", ["rtx9999", "custom:8GiB", "custom:0GiB,1GB/s,1GB/s", "custom:8GiB,0GB/s,1GB/s"])
def test_a_profile_that_cannot_be_is_refused(text):
    """The error says what there is."""
    with pytest.raises(DeviceUnavailableError):
        parse_profile(text)


def test_copy_engines_are_as_the_driver_tells():
    """One engine of the RTX 4060 Ti, two of the RTX 4090; two are assumed where nothing is known."""
    engines = {name: PROFILES[name].copy_engines for name in ("rtx4060ti-pcie4", "rtx4090-pcie4")}
    assert list(engines.values()) == [1, 2]
    assert parse_profile("custom:8GiB,448GB/s,12GB/s").copy_engines == 2


def test_a_link_may_be_slower_from_the_device_than_to_it():
    """A custom profile states both ways, the latency and the copy engines; without, both ways are the same."""
    p = parse_profile("custom:8GiB,448GB/s,12/6GB/s,latency=25us,engines=1,pinned")
    assert (p.link, p.from_device) == (LinkProfile(12e9, 25e-6), LinkProfile(6e9, 25e-6))
    assert (p.copy_engines, p.is_pinned) == (1, True)
    assert PROFILES["rtx4090-pcie4"].from_device == PROFILES["rtx4090-pcie4"].link


def test_blocks_of_attention_read_k_and_v_again_on_rocm():
    """A prompt of full multi-head attention waits for memory there; CUDA's heads read a quantised cache each for itself."""
    card = CARDS["rx7900xtx"]
    one = Work(Kind.ATTENTION, 1e9, 1e9, n_kernels=0, n_tokens=1)
    many = one._replace(n_tokens=512)
    assert card_s(many, card, RATES) == pytest.approx(16 * card_s(one, card, RATES))
    nvidia = CARDS["rtx3090"]
    assert card_s(many, nvidia, RATES) == card_s(one, nvidia, RATES)
    heads = one._replace(heads_bytes=16e9)
    assert card_s(heads, nvidia, RATES) == pytest.approx(16e9 / nvidia.bytes_per_s)
    assert card_s(heads, card, RATES) == card_s(one, card, RATES)
