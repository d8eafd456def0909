"""Finds what macOS tells of a Mac: its chip, cores and memory, and how much of the memory its GPU may use."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .cards import Card, find_card
from .hosts import Host, find_cpu

__all__ = ["FoundMac", "found_mac", "usable_bytes"]

#: Up to so much memory macOS gives the GPU two thirds of it, above three quarters, unless ``iogpu.wired_limit_mb`` is set.
_SMALL_BYTES = 36 << 30


@dataclass(frozen=True, slots=True)
class FoundMac:
    """A Mac as macOS describes it.

    Attributes
    ----------
    name : str
        Of its processor: ``Apple M2 Max``, or Intel's name.
    n_cores : int
        Performance cores; of an Intel Mac all physical cores.
    memory_bytes : int
        Of memory; on Apple's chips the GPU shares it.
    gpu_bytes : int
        What the GPU may use; 0 on Intel's.
    card : Card or None
        The GPU's data sheet, if the chip is in the table.
    notes : tuple of str
        Each fact with the name by which macOS tells it, and what is assumed.
    """

    name: str
    n_cores: int
    memory_bytes: int
    gpu_bytes: int
    card: Card | None
    notes: tuple[str, ...]

    @property
    def profile(self) -> str:
        """The GPU as a value of ``--device``; empty if its chip is not in the table."""
        return "" if self.card is None else f"{self.card.name}-{self.gpu_bytes / 2**30:g}GiB"

    @property
    def host(self) -> Host:
        """The host, without a memory rate."""
        isa = "dotprod" if self.name.startswith("Apple") else find_cpu(self.name)[1] or "avx2"
        return Host(0.0, self.n_cores, isa, self.memory_bytes, self.name)


def found_mac(ask: Callable[..., str] | None = None, platform: str = sys.platform) -> FoundMac | None:
    """Return what macOS tells of this machine; None elsewhere, or if it tells nothing.

    Parameters
    ----------
    ask : callable
        Runs a program with arguments, and returns what it prints; empty if it fails.
    """
    if platform != "darwin":
        return None
    ask = ask or _printed

    def number(name: str) -> int:
        text = ask("sysctl", "-n", name).strip()
        return int(text) if text.isdecimal() else 0

    name, memory = ask("sysctl", "-n", "machdep.cpu.brand_string").strip(), number("hw.memsize")
    if not name or not memory:
        return None
    gib = memory / 2**30
    fast = number("hw.perflevel0.physicalcpu")
    n_cores = fast or number("hw.physicalcpu") or 1
    cores = f"{n_cores} performance cores (hw.perflevel0.physicalcpu)" if fast else f"{n_cores} cores (hw.physicalcpu)"
    said = f"found {name} (machdep.cpu.brand_string) with {cores}"
    if not name.startswith("Apple"):
        size = f"{said} and {gib:g} GiB of memory (hw.memsize)"
        return FoundMac(name, n_cores, memory, 0, None, (size, "the graphics of Intel Macs are not planned"))
    found = re.search(r'"gpu-core-count" = (\d+)', ask("ioreg", "-rd1", "-c", "AGXAccelerator"))
    whole = find_card(name)
    card = (find_card(name + found[1]) if found else None) or whole
    limit = number("iogpu.wired_limit_mb") << 20
    share = "two thirds" if memory <= _SMALL_BYTES else "three quarters"
    usable = limit or usable_bytes(memory)
    notes = [
        f"{said}" + (f" and {found[1]} GPU cores (ioreg)" if found else ""),
        f"{gib:g} GiB of unified memory (hw.memsize), of which the GPU may use {usable / 2**30:g} GiB: "
        + ("iogpu.wired_limit_mb" if limit else f"macOS gives it {share} unless iogpu.wired_limit_mb is set"),
    ]
    if card is None:
        notes.append(f"{name} is not in the table of cards: the CPU alone is planned")
    else:
        notes.append(f"planned as {card.name}, by its data sheet" + ("" if found else "; its GPU cores were not told"))
    return FoundMac(name, n_cores, memory, usable, card, tuple(notes))


def usable_bytes(memory_bytes: int) -> int:
    """Return how much of a Mac's memory macOS gives its GPU unless ``iogpu.wired_limit_mb`` is set."""
    return memory_bytes * 2 // 3 if memory_bytes <= _SMALL_BYTES else memory_bytes * 3 // 4


def _printed(program: str, *arguments: str) -> str:
    path = {"sysctl": "/usr/sbin/sysctl", "ioreg": "/usr/sbin/ioreg"}[program]
    try:
        return subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=10, check=True, errors="replace"
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
