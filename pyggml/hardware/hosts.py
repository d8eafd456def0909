"""`Host`: memory, cores and instructions of a host, from a specification such as ``ddr4-3200x2,cores=8,64GiB``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DeviceUnavailableError
from .cards import Card
from .rates import RATES

__all__ = [
    "DEFAULT_HOST",
    "Host",
    "assumed_host",
    "find_cpu",
    "host_beside",
    "host_spec",
    "is_possible",
    "parse_host",
]

#: Relative rate of a core's 8-bit products, by instruction set.
_ISA = {"amx": 2.0, "avx512": 1.6, "vnni": 1.3, "avx2": 1.0, "dotprod": 1.2, "neon": 0.8}


@dataclass(frozen=True, slots=True)
class Host:
    """A host's memory and CPU.

    Attributes
    ----------
    read_bytes_per_s : float
        Bytes/s that all cores together read of memory: measured, or 0.88 of the modules' rate.
    n_cores : int
        Number of physical cores.
    isa : str
        The best instruction set that ggml uses: ``avx2``, ``vnni``, ``avx512``, ``amx``, ``dotprod`` (large ARM cores, not
        measured) or ``neon`` (small ones).
    memory_bytes : int
        Size of memory; 0: unknown.
    product_per_s : float
        Measured operations/s of quantised products of many tokens; 0: computed from cores and instructions.
    is_memory_assumed : bool
        Whether the type of memory was not given, so that the default host's was taken.
    """

    read_bytes_per_s: float
    n_cores: int = 8
    isa: str = "avx2"
    memory_bytes: int = 0
    description: str = ""
    product_per_s: float = 0.0
    is_memory_assumed: bool = False

    @property
    def int8_per_s(self) -> float:
        """8-bit operations/s of all cores."""
        if self.product_per_s:
            return self.product_per_s / RATES.cpu_product
        return self.n_cores * 4e9 * 64 * _ISA[self.isa]

    def with_threads(self, n: int) -> Host:
        """Return the host with only ``n`` of its cores working; itself if ``n`` is 0 or not fewer."""
        if not 0 < n < self.n_cores:
            return self
        share = n / self.n_cores
        read = min(self.read_bytes_per_s, max(n * _THREAD_BYTES_PER_S, share * self.read_bytes_per_s))
        return replace(self, n_cores=n, read_bytes_per_s=read, product_per_s=share * self.product_per_s)


#: Bytes/s that one thread reads: four threads of a Ryzen 5700X read 42.4 GB/s, all that its memory provides.
_THREAD_BYTES_PER_S = 10.6e9
#: The same of one of Apple's performance cores, of which eight do not read all that the memory of a Max provides.
_APPLE_BYTES_PER_S = 28e9
#: The default host: a desktop with eight cores and two channels of DDR5-5600.
DEFAULT_HOST = Host(0.88 * 89.6e9, 8, "vnni", 64 * 2**30, "8 cores, 2 channels of DDR5-5600")
#: Measured share of the modules' rate: 0.92 and 0.88 (Ryzen 5700X, stream), 0.86 (9950X), 0.62 to 0.98 (servers).
READ_SHARE = 0.88
_SPEC = re.compile(r"(?P<kind>l?p?ddr[345]x?)-(?P<rate>\d+)(?:x(?P<channels>\d+))?", re.IGNORECASE)

#: Cores and instructions of processors, by a part of their name.
_CPUS = [
    (r"7980xe", 18, "avx512"), (r"10900x", 10, "avx512"), (r"i[79]-1[234]900", 8, "vnni"), (r"i7-1[234]700", 8, "vnni"),
    (r"i5-1[234][456]00", 6, "vnni"), (r"i7-[6789]700", 4, "avx2"), (r"i7-10700", 8, "avx2"), (r"i9-9900", 8, "avx2"),
    (r"265k|ultra 7", 8, "vnni"), (r"285k|ultra 9", 8, "vnni"), (r"9950x|7950x", 16, "avx512"),
    (r"9900x|7900x|9900", 12, "avx512"), (r"9800x|7800x|9700x|7700", 8, "avx512"), (r"9600x|7600", 6, "avx512"),
    (r"5950x|3950x", 16, "avx2"), (r"5900x|3900x", 12, "avx2"), (r"5[78]00|3[78]00", 8, "avx2"), (r"5600|3600", 6, "avx2"),
    (r"ai max\+? ?395", 16, "avx512"), (r"7965wx", 24, "avx512"), (r"7975wx", 32, "avx512"), (r"7995wx", 96, "avx512"),
    (r"9355", 32, "avx512"), (r"9[67]55|9654", 96, "avx512"), (r"7343", 16, "avx2"), (r"7[37]02|7[37]02p", 32, "avx2"),
    (r"8480", 56, "amx"), (r"6980p", 128, "amx"), (r"cm5|pi 5|raspberry", 4, "neon"), (r"e5-26", 12, "avx2"),
]  # fmt: skip


def find_cpu(text: str) -> tuple[int | None, str | None]:
    """Return cores and instruction set of a processor named as people write it; None if unknown."""
    low = text.lower()
    isa = n_cores = None
    for pattern, n, what in _CPUS:
        if re.search(pattern, low):
            n_cores, isa = n, what
            break
    said = re.search(r"(\d+) ?(?:c\b|c/|p-cores|cores)", low)
    return (int(said[1]) if said else n_cores), isa


def parse_host(text: str) -> Host:
    """Parse the specification of a host.

    Parameters
    ----------
    text : str
        Parts separated by commas, in any order: RAM and channels (``ddr5-6000x2``) or read rate (``read=60GB/s``),
        ``cores=16``, ``isa=avx512``, size of memory (``64GiB``), or a processor's name. Or a file of `write_profile`.

    Raises
    ------
    DeviceUnavailableError
        A part is not understood, or the file cannot be read.

    Examples
    --------
    >>> host = parse_host("ddr4-3200x2,cores=8,64GiB")
    >>> host.n_cores, host.memory_bytes // 2**30, round(host.read_bytes_per_s / 1e9, 1)
    (8, 64, 45.1)
    """
    if text.endswith(".json"):
        from .files import read_profile  # that module imports this one

        found = read_profile(Path(text)).host
        if found is None:
            raise DeviceUnavailableError(
                f"host:{text}", "is of a device, not of a host", hint=f"use it as --device {text}"
            )
        return found
    rate, n_cores, isa, size = None, None, None, 0
    for part in filter(None, (p.strip() for p in text.split(","))):
        low = part.lower()
        if ram := _SPEC.fullmatch(low):
            rate = READ_SHARE * int(ram["rate"]) * 1e6 * 8 * int(ram["channels"] or 2)
        elif said := re.fullmatch(r"read=([\d.]+)gb/s", low):
            rate = float(said[1]) * 1e9
        elif said := re.fullmatch(r"cores=(\d+)", low):
            n_cores = int(said[1])
        elif (said := re.fullmatch(r"isa=(\w+)", low)) and said[1] in _ISA:
            isa = said[1]
        elif said := re.fullmatch(r"([\d.]+) ?gi?b", low):
            size = int(float(said[1]) * 2**30)
        else:
            n, what = find_cpu(part)
            if what is None:
                hint = f"say for instance ddr5-6000x2,cores=16,isa=avx512,96GiB; instructions are {', '.join(_ISA)}"
                raise DeviceUnavailableError(f"host:{text}", f"{part!r} is not understood", hint=hint)
            n_cores, isa = n_cores or n, isa or what
    if (rate is not None and not rate > 0) or n_cores == 0:
        raise DeviceUnavailableError(f"host:{text}", "rates and cores must be above 0")
    about = text if rate else f"{text}, memory assumed as ddr5-5600x2"
    return Host(
        rate or DEFAULT_HOST.read_bytes_per_s, n_cores or DEFAULT_HOST.n_cores, isa or "avx2", size, about,
        is_memory_assumed=not rate,
    )  # fmt: skip


#: Performance cores beside GPUs with unified memory, and instructions.
_BESIDE = {
    "m1": 4, "m1pro": 8, "m1max": 8, "m1ultra": 16, "m2": 4, "m2pro": 8, "m2max": 8, "m2ultra": 16, "m3": 4, "m3pro": 6,
    "m3max": 12, "m3ultra": 24, "m4": 4, "m4pro": 10, "m4max": 12, "gb10": 20, "780m": 8, "890m": 12, "8050s": 8, "8060s": 16,
}  # fmt: skip


def host_beside(card: Card) -> Host:
    """Return the host whose memory a card with unified memory shares, as assumed: its cores read what they can of it."""
    is_apple, is_arm = card.name.startswith("m"), card.name.startswith(("m", "gb"))
    known = re.match(r"m\d(?:pro|max|ultra)?", card.name)
    n = _BESIDE.get(known[0] if known and is_apple else card.name, DEFAULT_HOST.n_cores)
    read = min(READ_SHARE * card.bytes_per_s, n * (_APPLE_BYTES_PER_S if is_apple else _THREAD_BYTES_PER_S))
    about = f"the CPU beside {card.name}, {n} cores that share its memory"
    return Host(read, n, "dotprod" if is_arm else "avx512", card.memory_bytes, about)


def assumed_host(sheets: Iterable[object]) -> Host:
    """Return the host of some devices if none is described: the one beside a card with unified memory, else the default.

    Parameters
    ----------
    sheets : iterable
        Data sheets of the devices, as far as they have one (`DeviceProfile.sheet`).
    """
    shared = next((card for card in sheets if isinstance(card, Card) and card.is_unified), None)
    return DEFAULT_HOST if shared is None else host_beside(shared)


def host_spec(host: Host) -> str:
    """Return a host as `parse_host` takes it.

    Examples
    --------
    >>> host_spec(parse_host("ddr4-3200x2,cores=8,64GiB"))
    'read=45.06GB/s,cores=8,isa=avx2,64GiB'
    """
    size = f",{host.memory_bytes / 2**30:.4g}GiB" if host.memory_bytes else ""
    return f"read={host.read_bytes_per_s / 1e9:.4g}GB/s,cores={host.n_cores},isa={host.isa}{size}"


def is_possible(host: Host) -> bool:
    """Return whether a host's rates, cores and instruction set are possible."""
    return host.read_bytes_per_s > 0 and host.n_cores > 0 and host.isa in _ISA and host.product_per_s >= 0
