"""Profiles of devices and links: what a thing costs, and where the numbers are from."""

from __future__ import annotations

import pytest

from pyggml.cost import CPU_PROFILE, EFFICIENCY, PROFILES, LinkProfile, Work, parse_profile
from pyggml.errors import DeviceUnavailableError


@pytest.mark.parametrize("profile", [*PROFILES.values(), CPU_PROFILE], ids=lambda p: p.name)
def test_every_profile_has_a_source(profile):
    """Each profile has rates above 0 and names where they are from."""
    assert profile.source
    assert min(profile.memory_bytes, profile.memory_bytes_per_s) > 0
    assert min(profile.f32_per_s, profile.flops_per_s, profile.int8_per_s, profile.launch_s) > 0
    assert profile.link.bytes_per_s > 0
    assert profile.copy_engines >= 1


def test_a_node_takes_its_launch_and_the_longer_of_arithmetic_and_memory():
    """The one formula, for work bound by memory and for work bound by arithmetic."""
    p = PROFILES["rtx4090-pcie4"]
    by_memory = p.seconds(Work(flops=1, n_bytes=8e8))
    assert by_memory == pytest.approx(p.launch_s + 8e8 / (p.memory_bytes_per_s * EFFICIENCY.memory))
    by_flops = p.seconds(Work(flops=1e13, n_bytes=1, n_kernels=2))
    assert by_flops == pytest.approx(2 * p.launch_s + 1e13 / (p.flops_per_s * EFFICIENCY.arithmetic))


def test_quantised_products_run_at_the_rate_of_8_bits():
    """The same operations take less time where they are products of quantised weights."""
    p = PROFILES["rtx4090-pcie4"]
    assert p.seconds(Work(flops=1e13, is_int8=True)) < p.seconds(Work(flops=1e13))


def test_no_kernel_takes_no_time():
    """Views cost nothing."""
    assert PROFILES["l4-pcie4"].seconds(Work(n_kernels=0)) == 0


def test_a_link_takes_latency_for_each_copy_and_longer_for_pageable_memory():
    """Copies from pageable memory go at the stated part of the pinned rate."""
    link = LinkProfile(25e9, 10e-6)
    assert link.seconds(25_000_000) == pytest.approx(1e-3 + 10e-6)
    assert link.seconds(25_000_000, n_copies=3) == pytest.approx(1e-3 + 30e-6)
    assert link.seconds(25_000_000, is_pinned=False) == pytest.approx(1e-3 / EFFICIENCY.pageable + 10e-6)


def test_custom_profile_holds_what_was_given():
    """Memory, its bandwidth, the link's and pinned memory are read from the name."""
    p = parse_profile("custom:8GiB,448GB/s,12GB/s,pinned")
    assert (p.memory_bytes, p.memory_bytes_per_s, p.link.bytes_per_s, p.is_pinned) == (8 << 30, 448e9, 12e9, True)


@pytest.mark.parametrize("text", ["rtx9999", "custom:8GiB", "custom:0GiB,1GB/s,1GB/s", "custom:8GiB,0GB/s,1GB/s"])
def test_a_profile_that_cannot_be_is_refused(text):
    """The error says what there is."""
    with pytest.raises(DeviceUnavailableError):
        parse_profile(text)


def test_copy_engines_are_as_the_driver_tells():
    """One engine of the RTX 4060 Ti, two of the RTX 4090, three of the A100; two are assumed where nothing is known."""
    engines = {name: PROFILES[name].copy_engines for name in ("rtx4060ti-pcie4", "rtx4090-pcie4", "a100-pcie4")}
    assert list(engines.values()) == [1, 2, 3]
    assert parse_profile("custom:8GiB,448GB/s,12GB/s").copy_engines == 2


def test_a_link_may_be_slower_from_the_device_than_to_it():
    """A custom profile states both ways, the latency and the copy engines; without, both ways are the same."""
    p = parse_profile("custom:8GiB,448GB/s,12/6GB/s,latency=25us,engines=1,pinned")
    assert (p.link, p.from_device) == (LinkProfile(12e9, 25e-6), LinkProfile(6e9, 25e-6))
    assert (p.copy_engines, p.is_pinned) == (1, True)
    assert PROFILES["rtx4090-pcie4"].from_device == PROFILES["rtx4090-pcie4"].link


def test_products_run_at_the_rate_of_their_type():
    """Of 32 bits slower than of 16, of 16 slower than of 8; a card's data sheet states each."""
    for p in PROFILES.values():
        rates = [1 / p.seconds(Work(flops=1e13, is_f32=f32, is_int8=int8)) for f32, int8 in ((1, 0), (0, 0), (0, 1))]
        assert rates == sorted(rates)
        assert rates[0] < rates[2]
