"""Profiles of devices and links, and what they make of bytes: seconds.

The profile of a simulated device tells how much memory it has and how fast its link is. Numbers are the makers' data
sheets; links are given at 80 per cent of what the bus can carry, as large copies from pinned memory reach about that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import DeviceUnavailableError

__all__ = ["PROFILES", "DeviceProfile", "LinkProfile", "parse_profile"]

_GIB = 1024**3
_GB = 1e9


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A link between host and device."""

    bytes_per_s: float  #: of large copies, either way
    latency_s: float = 10e-6  #: from the call to the first byte

    def seconds(self, n_bytes: int, *, n_copies: int = 1) -> float:
        """Return the time that ``n_copies`` copies of ``n_bytes`` in all take, one after the other."""
        return n_copies * self.latency_s + n_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device that need not be there."""

    name: str
    description: str
    memory_bytes: int
    memory_bytes_per_s: float
    link: LinkProfile
    source: str  #: where the numbers are from
    is_pinned: bool = False  #: whether it offers pinned host memory, as CUDA does; what is placed on the CPU goes there


def _pcie(generation: int) -> LinkProfile:
    """Return 80 per cent of 16 lanes: 15.75, 31.5 and 63 GB/s for generations 3, 4 and 5."""
    return LinkProfile(0.8 * 15.75 * _GB * 2 ** (generation - 3))


#: Profiles by name.
PROFILES: dict[str, DeviceProfile] = {
    p.name: p
    for p in (
        DeviceProfile(
            "rtx3060-pcie4", "NVIDIA GeForce RTX 3060, PCIe 4.0", 12 * _GIB, 360 * _GB, _pcie(4),
            "NVIDIA GA106 data sheet: 12 GB, 360 GB/s",
        ),
        DeviceProfile(
            "rtx3090-pcie4", "NVIDIA GeForce RTX 3090, PCIe 4.0", 24 * _GIB, 936 * _GB, _pcie(4),
            "NVIDIA GA102 white paper: 24 GB, 936 GB/s",
        ),
        DeviceProfile(
            "rtx4090-pcie4", "NVIDIA GeForce RTX 4090, PCIe 4.0", 24 * _GIB, 1008 * _GB, _pcie(4),
            "NVIDIA Ada white paper: 24 GB, 1008 GB/s",
        ),
        DeviceProfile(
            "rtx5090-pcie5", "NVIDIA GeForce RTX 5090, PCIe 5.0", 32 * _GIB, 1792 * _GB, _pcie(5),
            "NVIDIA Blackwell white paper: 32 GB, 1792 GB/s",
        ),
        DeviceProfile(
            "a100-pcie4", "NVIDIA A100 80 GB, PCIe 4.0", 80 * _GIB, 1935 * _GB, _pcie(4),
            "NVIDIA A100 data sheet: 80 GB, 1935 GB/s",
        ),
        DeviceProfile(
            "h100-pcie5", "NVIDIA H100 PCIe, PCIe 5.0", 80 * _GIB, 2000 * _GB, _pcie(5),
            "NVIDIA H100 data sheet: 80 GB, 2 TB/s",
        ),
    )
}  # fmt: skip

_CUSTOM = re.compile(
    r"(?P<memory>[\d.]+)(?P<unit>[MG])i?B,(?P<bandwidth>[\d.]+)GB/s,(?P<link>[\d.]+)GB/s(?P<pinned>,pinned)?",
    re.IGNORECASE,
)


def parse_profile(text: str) -> DeviceProfile:
    """Return the profile of a name, or of ``custom:MEMORY,BANDWIDTH,LINK[,pinned]``.

    Raises
    ------
    DeviceUnavailableError
        There is no such profile, or the numbers cannot be read.

    Examples
    --------
    >>> parse_profile("custom:8GiB,448GB/s,12GB/s").memory_bytes
    8589934592
    """
    if text in PROFILES:
        return PROFILES[text]
    kind, _, numbers = text.partition(":")
    found = _CUSTOM.fullmatch(numbers) if kind == "custom" else None
    if found is None:
        raise DeviceUnavailableError(
            f"sim:{text}",
            "no such profile",
            hint=f"there are {', '.join(PROFILES)}, and custom:24GiB,1000GB/s,25GB/s (memory, its bandwidth, the link's)",
        )
    memory = float(found["memory"]) * (_GIB if found["unit"].upper() == "G" else 1024**2)
    link = float(found["link"]) * _GB
    bandwidth = float(found["bandwidth"]) * _GB
    if memory < 1 or link <= 0 or bandwidth <= 0:
        raise DeviceUnavailableError(f"sim:{text}", "sizes and rates must be above 0")
    description = f"custom device ({numbers})"
    pinned = found["pinned"] is not None
    return DeviceProfile(text, description, int(memory), bandwidth, LinkProfile(link), "given", pinned)
