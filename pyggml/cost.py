"""Profiles of devices and links: a data sheet with its link, and how long work takes.

The formulas are those of `pyggml.hardware.formulas`, for simulated devices and for predictions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import DeviceUnavailableError
from .hardware.cards import GENERATIONS, Card, find_card
from .hardware.files import read_profile
from .hardware.formulas import Work, backend_family, card_s, family_of, host_read, host_s
from .hardware.hosts import DEFAULT_HOST, Host
from .hardware.rates import RATES, Rates

__all__ = ["CPU_PROFILE", "PROFILES", "DeviceProfile", "LinkProfile", "host_profile", "link_of", "parse_profile"]

_GIB = 1024**3
_GB = 1e9
_T = 1e12
_LATENCY_S = 10e-6  # of a copy, as CUDA programs see it
#: What large pinned copies carry of 0.985 GB/s a lane of PCIe 3.0 (25.6 GB/s of PCIe 4.0 x16, 56 of 5.0 x16, 13.3 of 3.0 x16).
_PINNED_SHARE = 0.83
_LANE = 0.985 * _GB


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One direction of a link between host and device."""

    bytes_per_s: float  #: of large copies from or to pinned memory
    latency_s: float = _LATENCY_S  #: from the call to the first byte

    def seconds(self, n_bytes: int, *, n_copies: int = 1, at_most: float = math.inf) -> float:
        """Return the time of ``n_copies`` copies, one after another, with ``n_bytes`` in total.

        Parameters
        ----------
        at_most : float
            Bytes per second from host memory that is not pinned (`pageable_rate`).
        """
        return n_copies * self.latency_s + n_bytes / min(self.bytes_per_s, at_most)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """The data sheet of a device, with its link."""

    name: str
    description: str
    sheet: Card | Host
    link: LinkProfile  #: from the host to the device
    source: str  #: where the numbers are from
    is_pinned: bool = False  #: whether it offers pinned host memory, as CUDA does; what is placed on the CPU goes there
    copy_engines: int = 2  #: copies at a time; with one both ways share it, more than two serve nothing here
    link_back: LinkProfile | None = None  #: from the device to the host, if it differs
    peer: LinkProfile | None = (
        None  #: to and from other devices that have one, beside the link to the host, such as NVLink
    )
    rates: Rates = RATES  #: what kernels reach of the sheet

    @property
    def from_device(self) -> LinkProfile:
        """The direction of the link from the device to the host."""
        return self.link if self.link_back is None else self.link_back

    @property
    def memory_bytes(self) -> int:
        """The size of its memory; 64 GiB for a host of unknown size."""
        return self.sheet.memory_bytes or 64 * _GIB

    @property
    def memory_bytes_per_s(self) -> float:
        """The rate at which weights are read."""
        if isinstance(self.sheet, Host):
            return host_read(self.sheet, self.rates)
        return self.sheet.bytes_per_s * family_of(self.rates, backend_family(self.sheet)).memory

    @property
    def launch_s(self) -> float:
        """The time from the end of one kernel to the start of the next."""
        if isinstance(self.sheet, Host):
            return 0.0
        return family_of(self.rates, backend_family(self.sheet)).launch_s

    def seconds(self, work: Work, *, slow_host: bool = False) -> float:
        """Return the time of work; a slow host delays the launches of a card."""
        if isinstance(self.sheet, Host):
            return host_s(work, self.sheet, self.rates)
        return card_s(work, self.sheet, self.rates, slow_host=slow_host)


def link_of(card: Card, pcie: str = "", measured_gbs: float | None = None) -> LinkProfile:
    """Return the link between host and card.

    Parameters
    ----------
    pcie : str
        For example ``"4.0 x16"``; empty: the card's own, at most PCIe 4.0.
    measured_gbs : float, optional
        The measured rate of pinned copies.
    """
    if card.is_unified:
        return LinkProfile(card.bytes_per_s / 2)  # it reads and writes
    found = re.search(r"(\d)\.0 ?x ?(\d+)", pcie)
    generation = int(found[1]) if found else min(card.pcie, 4)
    lanes = int(found[2]) if found else card.lanes
    pinned = _PINNED_SHARE * _LANE * 2 ** (min(generation, card.pcie) - 3) * min(lanes, card.lanes)
    return LinkProfile(measured_gbs * _GB if measured_gbs else pinned)


def host_profile(host: Host) -> DeviceProfile:
    """Return the profile of a host."""
    # a copy in memory reads and writes
    return DeviceProfile("host", host.description, host, LinkProfile(0.5 * host.read_bytes_per_s, 1e-6), "given")


#: The host that simulated devices are plugged into: eight cores with AVX2 and VNNI, two channels DDR5-5600.
CPU_PROFILE = host_profile(DEFAULT_HOST)


#: Of custom devices, whose arithmetic no one states: between those of cards with matrix units (142 to 330 and 35 to 90).
_FLOPS_PER_BYTE, _F32_PER_BYTE = 200.0, 50.0
#: Cards with a single copy engine, as NVIDIA's ``deviceQuery`` prints ``asyncEngineCount``; 2 of RTX 3060 Ti, 3090, 4090 and 5090,
#: 3 of the A100. CUDA's programming guide has copies both ways at once where it is 2 or more, which is assumed of the others.
_SINGLE_ENGINE = {"rtx4060ti"}
#: GB/s each way of an NVLink bridge between two cards, half of what NVIDIA's data sheets state for both ways.
_NVLINK = {"rtx3090": 56.25, "a100": 300.0, "h100": 300.0}
_CUSTOM = re.compile(
    r"(?P<memory>[\d.]+)(?P<unit>[MG])i?B,(?P<bandwidth>[\d.]+)GB/s,(?P<link>[\d.]+)(?:/(?P<back>[\d.]+))?GB/s"
    r"(?:,latency=(?P<latency>[\d.]+)us)?(?:,engines=(?P<engines>[1-9]))?(?P<pinned>,pinned)?"
    r"(?:,peer=(?P<peer>[\d.]+)GB/s)?(?:,gen=(?P<generation>[\w.-]+))?(?:,f32=(?P<f32>[\d.]+)T)?(?:,f16=(?P<f16>[\d.]+)T)?(?:,int8=(?P<int8>[\d.]+)T)?",
    re.IGNORECASE,
)


def parse_profile(text: str) -> DeviceProfile:
    """Return the profile of a name, or of ``custom:MEMORY,BANDWIDTH,LINK[,latency=US][,engines=N][,pinned][,peer=RATE][,gen=NAME][,f32=NT][,f16=NT][,int8=NT]``.

    A name is a card of `pyggml.hardware.cards` with its own link (``rtx3060``) or another (``rtx3060-pcie3``, ``rtx3060-pcie4x8``),
    with a bridge to another card (``rtx3090-pcie4-nvlink``), or a file of `pyggml devices --measure`, `pyggml calibrate` or `pyggml selftest`. For a custom device, ``gen`` is the generation
    whose kernels it runs (ada by default), and ``f32``, ``f16`` and ``int8`` are its TFLOP/s and TOP/s; missing values are in
    proportion to memory. A link of ``25/20GB/s`` is slower from the device than to it. ``peer=50GB/s`` is the rate, each way, of a
    link to other devices that have one.

    Raises
    ------
    DeviceUnavailableError
        The profile does not exist, or the numbers cannot be read.

    Examples
    --------
    >>> parse_profile("custom:8GiB,448GB/s,12GB/s").memory_bytes
    8589934592
    """
    if text.endswith(".json"):
        return _of_file(text)
    plain = text.removesuffix("-nvlink")
    named, _, pcie = plain.partition("-pcie")
    card = find_card(named) if ":" not in text else None
    slot = re.fullmatch(r"([1-6])(?:x(\d+))?", pcie) if pcie else None
    if card is not None and (not pcie or slot) and (plain == text or card.name in _NVLINK):
        made = _of_card(text, card, int(slot[1]) if slot else card.pcie, int(slot[2] or 0) if slot else 0)
        return made if plain == text else replace(made, peer=LinkProfile(_NVLINK[card.name] * _GB))
    kind, _, numbers = text.partition(":")
    found = _CUSTOM.fullmatch(numbers) if kind == "custom" else None
    if found is None:
        raise DeviceUnavailableError(
            f"sim:{text}",
            "no such profile",
            hint=f"there are {', '.join(PROFILES)}, any other card of the table such as rtx3060 or r9700, and custom:24GiB,1000GB/s,25GB/s (memory, its bandwidth, the link's; "
            "25/20GB/s for a slower way back; then, if wanted, latency=10us, engines=2, pinned, peer=50GB/s); -nvlink works with "
            f"{', '.join(_NVLINK)}",
        )
    memory = float(found["memory"]) * (_GIB if found["unit"].upper() == "G" else 1024**2)
    latency_s = _LATENCY_S if found["latency"] is None else float(found["latency"]) / 1e6
    link, back = (float(found[way] or found["link"]) * _GB for way in ("link", "back"))
    bandwidth = float(found["bandwidth"]) * _GB
    if memory < 1 or min(link, back, bandwidth) <= 0:
        raise DeviceUnavailableError(f"sim:{text}", "sizes and rates must be above 0")
    generation = found["generation"] or ""
    if generation and generation not in GENERATIONS:
        raise DeviceUnavailableError(
            f"sim:{text}", f"no generation is called {generation!r}", hint=f"there are {', '.join(GENERATIONS)}"
        )
    f32, f16, int8 = (float(found[name] or 0) * _T for name in ("f32", "f16", "int8"))
    f16 = f16 or _FLOPS_PER_BYTE * bandwidth
    card = Card(
        text, generation or "ada", int(memory), bandwidth, f32 or _F32_PER_BYTE * bandwidth, f16,
        int8 or 2 * f16, 4, 16,
    )  # fmt: skip
    return DeviceProfile(
        text,
        f"custom device ({numbers})",
        card,
        LinkProfile(link, latency_s),
        "given; arithmetic in proportion to memory",
        is_pinned=found["pinned"] is not None,
        copy_engines=int(found["engines"] or 2),
        link_back=None if found["back"] is None else LinkProfile(back, latency_s),
        peer=None if found["peer"] is None else LinkProfile(float(found["peer"]) * _GB, latency_s),
    )


def _of_card(text: str, card: Card, pcie: int, lanes: int = 0) -> DeviceProfile:
    """Return the profile of a card of the table, in a slot of its own width or another."""
    pcie, lanes = min(pcie, card.pcie), min(lanes or card.lanes, card.lanes)
    where = f"PCIe {pcie}.0 x{lanes}" if lanes else "shared memory"
    return DeviceProfile(
        text, f"{card.name}, {card.generation}, {where}", card, link_of(card, f"{pcie}.0 x{lanes}"),
        "the maker's data sheet", is_pinned=card.lanes > 0, copy_engines=1 if card.name in _SINGLE_ENGINE else 2,
    )  # fmt: skip


def _of_file(text: str) -> DeviceProfile:
    """Return the profile that a file has of a device."""
    found = read_profile(Path(text))
    if found.simulated:
        return parse_profile(found.simulated)
    if found.card is None:
        raise DeviceUnavailableError(f"sim:{text}", "is of a host, not of a device", hint=f"use it as --host {text}")
    card, link = found.card, link_of(found.card)
    there = LinkProfile(found.link_bytes_per_s or link.bytes_per_s)
    back = LinkProfile(found.link_back_bytes_per_s) if found.link_back_bytes_per_s else None
    return DeviceProfile(
        text, f"{card.name}, {card.generation}, as measured", card, there, f"measured, {text}",
        is_pinned=card.lanes > 0, copy_engines=1 if card.name in _SINGLE_ENGINE else 2, link_back=back,
    )  # fmt: skip


#: Profiles that `pyggml devices` lists by name; any card of the table is one, too.
PROFILES: dict[str, DeviceProfile] = {
    name: parse_profile(name)
    for name in (
        "rtx3060-pcie4", "rtx3090-pcie4", "rtx3090-pcie3", "rtx4060ti-pcie4", "rtx4090-pcie4", "rtx5090-pcie5",
        "rtxpro6000-pcie5", "a100-pcie4", "h100-pcie5", "l4-pcie4",
    )
}  # fmt: skip
