"""Profiles of devices and links, and the one cost formula: how many seconds bytes and operations take.

Peak numbers are the makers' data sheets. What programs reach of them is stated once, below: `EFFICIENCY` of arithmetic,
of memory, and of a link. A profile is for plans and comparisons, not for predicting a benchmark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import DeviceUnavailableError
from .hardware.cards import GENERATIONS, Card, find_card
from .hardware.hosts import Host

__all__ = [
    "CPU_PROFILE",
    "EFFICIENCY",
    "PROFILES",
    "DeviceProfile",
    "LinkProfile",
    "Work",
    "host_profile",
    "parse_profile",
]

_GIB = 1024**3
_GB = 1e9
_T = 1e12
_LATENCY_S = 10e-6  # of a copy, as CUDA programs see it


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What programs reach of a data sheet's peak."""

    arithmetic: float = 0.45  #: of ggml's matrix kernels, of the type's peak
    memory: float = 0.8
    link: float = 0.8  #: of large copies from pinned memory, of what the bus can carry
    pageable: float = 0.5  #: of a copy from pinned memory (llama.cpp, pull request 20978: 298 against 544 tokens/s)


#: The assumptions that every profile shares.
EFFICIENCY = Efficiency()


@dataclass(frozen=True, slots=True)
class Work:
    """What computing a node takes, whatever the device.

    Attributes
    ----------
    flops : float
        Operations; a multiplication with addition is two.
    n_bytes : float
        Bytes of memory read and written.
    is_int8, is_f32 : bool
        Whether the operations are products of quantised weights, or of 32-bit ones; else they are of 16 bits.
    n_kernels : int
        Launches.
    """

    flops: float = 0.0
    n_bytes: float = 0.0
    is_int8: bool = False
    n_kernels: int = 1
    is_f32: bool = False


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One way of a link between host and device."""

    bytes_per_s: float  #: of large copies from or to pinned memory
    latency_s: float = _LATENCY_S  #: from the call to the first byte

    def seconds(self, n_bytes: int, *, n_copies: int = 1, is_pinned: bool = True) -> float:
        """Return the time that ``n_copies`` copies of ``n_bytes`` in all take, one after the other."""
        rate = self.bytes_per_s * (1.0 if is_pinned else EFFICIENCY.pageable)
        return n_copies * self.latency_s + n_bytes / rate


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device that need not be there; rates are peaks."""

    name: str
    description: str
    memory_bytes: int
    memory_bytes_per_s: float
    f32_per_s: float  #: operations in 32 bits, without matrix units, as ggml multiplies F32 weights
    flops_per_s: float  #: 16-bit products summed in 32 bits, matrix units included
    int8_per_s: float  #: 8-bit products, matrix units included
    link: LinkProfile  #: from the host to the device
    source: str  #: where the numbers are from
    launch_s: float = 3e-6  #: from the end of one kernel to the start of the next
    is_pinned: bool = False  #: whether it offers pinned host memory, as CUDA does; what is placed on the CPU goes there
    copy_engines: int = 2  #: copies at a time; with one both ways share it, more than two serve nothing here
    link_back: LinkProfile | None = None  #: from the device to the host, if it differs
    generation: str = ""  #: of `GENERATIONS`; empty: not stated

    @property
    def from_device(self) -> LinkProfile:
        """The link's way from the device to the host."""
        return self.link if self.link_back is None else self.link_back

    def seconds(self, work: Work) -> float:
        """Return the time that a node takes: its launch, and the longer of arithmetic and memory."""
        peak = self.int8_per_s if work.is_int8 else self.f32_per_s if work.is_f32 else self.flops_per_s
        arithmetic_s = work.flops / (peak * EFFICIENCY.arithmetic)
        memory_s = work.n_bytes / (self.memory_bytes_per_s * EFFICIENCY.memory)
        return work.n_kernels * self.launch_s + max(arithmetic_s, memory_s)


def _pcie(generation: int) -> LinkProfile:
    """Return a link of 16 lanes, either way: 15.75, 31.5 and 63 GB/s for generations 3, 4 and 5."""
    return LinkProfile(EFFICIENCY.link * 15.75 * _GB * 2 ** (generation - 3))


def _gpu(
    name: str,
    title: str,
    memory_gib: int,
    memory_gb_per_s: float,
    f32_tflops: float,
    tflops: float,
    int8_tops: float,
    pcie: int,
    source: str,
    copy_engines: int = 2,
) -> DeviceProfile:
    """Return the profile of an NVIDIA card.

    Data sheets are silent on copy engines. CUDA's programming guide has copies both ways at once where
    ``asyncEngineCount`` is 2 or more, and NVIDIA's ``deviceQuery`` prints that: 1 of the RTX 4060 Ti; 2 of RTX 3060 Ti,
    3090, 4090 and 5090; 3 of the A100. The others are assumed to have 2.
    """
    description = f"NVIDIA {title}, PCIe {pcie}.0 x16"
    return DeviceProfile(
        name, description, memory_gib * _GIB, memory_gb_per_s * _GB, f32_tflops * _T, tflops * _T, int8_tops * _T,
        _pcie(pcie), source, copy_engines=copy_engines,
    )  # fmt: skip


#: Profiles by name.
PROFILES: dict[str, DeviceProfile] = {
    p.name: p
    for p in (
        _gpu("rtx3060-pcie4", "GeForce RTX 3060", 12, 360, 12.7, 25.5, 102, 4, "NVIDIA GA102/GA106 white paper"),
        _gpu("rtx3090-pcie4", "GeForce RTX 3090", 24, 936, 35.6, 71, 284, 4, "NVIDIA GA102 white paper, appendix A"),
        _gpu("rtx3090-pcie3", "GeForce RTX 3090", 24, 936, 35.6, 71, 284, 3, "NVIDIA GA102 white paper, appendix A"),
        _gpu("rtx4060ti-pcie4", "GeForce RTX 4060 Ti 16 GB", 16, 288, 22.1, 44, 177, 4, "NVIDIA Ada white paper", 1),
        _gpu(
            "rtx4090-pcie4", "GeForce RTX 4090", 24, 1008, 82.6, 165.2, 660.6, 4, "NVIDIA Ada white paper, appendix A"
        ),
        _gpu("rtx5090-pcie5", "GeForce RTX 5090", 32, 1792, 104.8, 209.5, 838, 5, "NVIDIA RTX Blackwell white paper"),
        _gpu(
            "rtxpro6000-pcie5", "RTX PRO 6000 Blackwell", 96, 1792, 125, 252, 1007, 5, "NVIDIA RTX PRO 6000 data sheet"
        ),
        _gpu("a100-pcie4", "A100 80 GB PCIe", 80, 1935, 19.5, 312, 624, 4, "NVIDIA A100 data sheet", 3),
        _gpu("h100-pcie5", "H100 PCIe", 80, 2000, 51, 756, 1513, 5, "NVIDIA H100 data sheet, without sparsity"),
        _gpu("l4-pcie4", "L4", 24, 300, 30.3, 121, 242, 4, "NVIDIA L4 data sheet, without sparsity"),
    )
}

#: The host that simulated devices are plugged into: eight cores at 5 GHz with AVX2 and VNNI, two channels DDR5-5600.
CPU_PROFILE = DeviceProfile(
    "desktop-ddr5",
    "8 cores, 2 channels DDR5-5600",
    64 * _GIB,
    89.6 * _GB,
    1.28 * _T,  # 8 cores x 5 GHz x 32 operations of AVX2
    1.28 * _T,  # of 16 bits as many: they are widened first
    5.12 * _T,  # four times as many with VNNI
    LinkProfile(0.5 * 89.6 * _GB, 1e-6),  # a copy in memory reads and writes
    "JEDEC DDR5-5600; arithmetic counted from instructions",
    launch_s=1e-6,
)


def host_profile(host: Host) -> DeviceProfile:
    """Return the profile of a host that somebody states.

    Notes
    -----
    Its memory's rate is what programs read, so that it is scaled to be a peak, as that of other profiles is.
    """
    peak = host.read_bytes_per_s / EFFICIENCY.memory
    return DeviceProfile(
        "host", host.description, host.memory_bytes or 64 * _GIB, peak, host.int8_per_s / 4, host.int8_per_s / 4,
        host.int8_per_s, LinkProfile(0.5 * host.read_bytes_per_s, 1e-6), "given", launch_s=1e-6,
    )  # fmt: skip


#: Of custom devices, whose arithmetic nobody states: between those of the cards above (71 to 164 and 35 to 82 without the
#: servers').
_FLOPS_PER_BYTE, _F32_PER_BYTE = 100.0, 50.0
_CUSTOM = re.compile(
    r"(?P<memory>[\d.]+)(?P<unit>[MG])i?B,(?P<bandwidth>[\d.]+)GB/s,(?P<link>[\d.]+)(?:/(?P<back>[\d.]+))?GB/s"
    r"(?:,latency=(?P<latency>[\d.]+)us)?(?:,engines=(?P<engines>[1-9]))?(?P<pinned>,pinned)?"
    r"(?:,gen=(?P<generation>[\w.-]+))?(?:,f32=(?P<f32>[\d.]+)T)?(?:,f16=(?P<f16>[\d.]+)T)?(?:,int8=(?P<int8>[\d.]+)T)?",
    re.IGNORECASE,
)


def parse_profile(text: str) -> DeviceProfile:
    """Return the profile of a name, or of ``custom:MEMORY,BANDWIDTH,LINK[,latency=US][,engines=N][,pinned][,gen=NAME][,f32=NT][,f16=NT][,int8=NT]``.

    A name is one of `PROFILES`, or a card of `pyggml.hardware.cards` at its own link (``rtx3060``) or another
    (``rtx3060-pcie3``). Of a custom device, ``gen`` is the generation whose kernels it runs, and ``f32``, ``f16`` and ``int8``
    are its TFLOP/s and TOP/s; what is not given is in proportion to memory. A link of ``25/20GB/s`` is slower from the device than to it.

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
    named, _, pcie = text.partition("-pcie")
    card = find_card(named) if ":" not in text else None
    if card is not None and (not pcie or pcie in "345"):
        return _of_card(text, card, int(pcie or card.pcie))
    kind, _, numbers = text.partition(":")
    found = _CUSTOM.fullmatch(numbers) if kind == "custom" else None
    if found is None:
        raise DeviceUnavailableError(
            f"sim:{text}",
            "no such profile",
            hint=f"there are {', '.join(PROFILES)}, any card of the table such as rtx3060 or r9700, and custom:24GiB,1000GB/s,25GB/s (memory, its bandwidth, the link's; "
            "25/20GB/s for a slower way back; then, if wanted, latency=10us, engines=2, pinned)",
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
    description = f"custom device ({numbers})"
    return DeviceProfile(
        text,
        description,
        int(memory),
        bandwidth,
        f32 or _F32_PER_BYTE * bandwidth,
        f16 or _FLOPS_PER_BYTE * bandwidth,
        int8 or 4 * _FLOPS_PER_BYTE * bandwidth,
        LinkProfile(link, latency_s),
        "given; arithmetic in proportion to memory",
        is_pinned=found["pinned"] is not None,
        copy_engines=int(found["engines"] or 2),
        link_back=None if found["back"] is None else LinkProfile(back, latency_s),
        generation=generation,
    )


def _of_card(text: str, card: Card, pcie: int) -> DeviceProfile:
    """Return the profile of a card of the table."""
    lanes = card.lanes or 16  # a chip that shares the host's memory copies as fast as that reads and writes
    rate = EFFICIENCY.link * 0.985 * _GB * 2 ** (pcie - 3) * lanes if card.lanes else card.bytes_per_s / 2
    where = f"PCIe {pcie}.0 x{lanes}" if card.lanes else "shared memory"
    return DeviceProfile(
        text, f"{card.name}, {card.generation}, {where}", card.memory_bytes, card.bytes_per_s, card.f32_per_s,
        card.f16_per_s / 2 if card.f16_per_s > 2.5 * card.f32_per_s else card.f16_per_s, card.int8_per_s,
        LinkProfile(rate), "the maker's data sheet", generation=card.generation,
    )  # fmt: skip
