"""Finds the graphics cards of this machine on Linux: name, PCIe generation and width, memory.

Reads ``/sys/bus/pci/devices`` (``vendor``, ``device``, ``class``, link speeds and widths). Names are from
``/proc/driver/nvidia``, from the ``pci.ids`` that distributions install, or from a table of identifiers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from .cards import CARDS, Card, find_card

__all__ = ["FoundCard", "found_cards"]

_VENDORS = {0x10DE: "NVIDIA", 0x1002: "AMD", 0x8086: "Intel"}
#: PCIe generation by GT/s per lane.
_SPEEDS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_PCI_IDS = (Path("/usr/share/hwdata/pci.ids"), Path("/usr/share/misc/pci.ids"))
#: Cards by device identifier, as in drivers and ``pci.ids``; with a revision if several cards share one.
_KNOWN = {
    0x10DE: """
        1b06 gtx1080ti 1b80 gtx1080 1b81 gtx1070 1c03 gtx1060 1b38 p40 15f8 p100 1db4 v100 1db5 v100 1db6 v100 1e04 rtx2080ti
        1e07 rtx2080ti 1e82 rtx2080 1e87 rtx2080 1e81 rtx2080super 1f02 rtx2070 1f07 rtx2070 1e84 rtx2070super 1f08 rtx2060
        1eb8 t4 2184 gtx1660 2182 gtx1660ti 2204 rtx3090 2203 rtx3090ti 2206 rtx3080 2216 rtx3080 2208 rtx3080ti 2484 rtx3070
        2488 rtx3070 2482 rtx3070ti 2486 rtx3060ti 2489 rtx3060ti 2503 rtx3060 2504 rtx3060 2507 rtx3050 2230 rtxa6000 2231
        rtxa5000 24b0 rtxa4000 2235 a40 2236 a10 20b0 a100sxm 20b2 a100sxm 20b5 a100 20f1 a100 20b7 a30 2684 rtx4090 2685
        rtx4090d 2702 rtx4080super 2704 rtx4080 2705 rtx4070tisuper 2782 rtx4070ti 2783 rtx4070super 2786 rtx4070 2803 rtx4060ti
        2805 rtx4060ti 2882 rtx4060 26b1 rtx6000ada 26b5 l40 26b9 l40s 27b8 l4 2331 h100 2330 h100sxm 2335 h200 2b85 rtx5090
        2c02 rtx5080 2c05 rtx5070ti 2f04 rtx5070 2d04 rtx5060ti 2d05 rtx5060 2bb1 rtxpro6000 2bb4 rtxpro6000maxq 2bb5 rtxpro6000""",
    0x1002: """
        66a1 mi60 66a0 mi50 66af radeonvii 738c mi100 740f mi210 74a1 mi300x 731f rx5700xt 73bf:c0 rx6900xt 73bf:c1 rx6800xt
        73bf:c3 rx6800 73df rx6700xt 73ff rx6600 744c:c8 rx7900xtx 744c:cc rx7900xt 744c:ce rx7900gre 744c rx7900xtx 747e:c8
        rx7800xt 747e:ff rx7700xt 747e rx7800xt 7480 rx7600 7550:c0 rx9070xt 7550:c3 rx9070 7550 rx9070xt 7551 r9700 7590
        rx9060xt 1586 8060s 150e 890m 15bf 780m""",
    0x8086: "56a0 a770 56a1 a750 56a2 a580 56a5 a380 56a6 a310 e20b b580 e20c b570 e211 b60 e212 b50 e223 b70",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FoundCard:
    """A card in a slot of this machine.

    Attributes
    ----------
    address : str
        Such as ``0000:01:00.0``.
    title : str
        The system's name for it, or its identifiers.
    card : Card or None
        Its data sheet, with the memory that the driver reports; None for an unknown card.
    pcie, lanes : int
        Highest generation and width of its link, limited by card and slot; 0: unknown. ``current_link_speed`` alone
        would be too low for an idle card.
    """

    address: str
    title: str
    card: Card | None
    pcie: int = 0
    lanes: int = 0

    @property
    def profile(self) -> str:
        """The card with its link as a value of ``-dev`` and ``plan --device``; empty for an unknown card."""
        if self.card is None:
            return ""
        if self.card.is_unified or not self.pcie:
            return self.card.name
        width = f"x{self.lanes}" if self.lanes and self.lanes != self.card.lanes else ""
        return f"{self.card.name}-pcie{self.pcie}{width}"


def found_cards(
    root: Path = Path("/sys/bus/pci/devices"), proc: Path = Path("/proc/driver/nvidia/gpus")
) -> list[FoundCard]:
    """Return the graphics cards of this machine in the order of their addresses; empty if the system lists none.

    Parameters
    ----------
    root, proc : Path
        Folders in which the kernel and NVIDIA's driver describe devices.
    """
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        kind, vendor = _number(folder / "class") >> 16, _number(folder / "vendor")
        if kind in (0x03, 0x12) and vendor in _VENDORS:  # a display controller, or an accelerator
            one = _found(folder, vendor, proc)
            if one.card is not None or vendor != 0x8086:  # llama.cpp does not use graphics within Intel's processors
                found.append(one)
    return found


def _found(folder: Path, vendor: int, proc: Path) -> FoundCard:
    device, revision = _number(folder / "device"), _number(folder / "revision")
    said = _nvidia_name(proc / folder.name) or _text(folder / "product_name") or _listed_name(vendor, device)
    card = _by_number(vendor, device, revision) or (find_card(said) if said else None)
    memory = _number(folder / "mem_info_vram_total")  # of amdgpu
    if card is not None and memory and not card.is_unified:
        card = replace(card, memory_bytes=memory)
    speed = min(
        filter(None, (_speed(folder, "max_link_speed"), _speed(folder.resolve().parent, "max_link_speed"))), default=0
    )
    speed = max(speed, _speed(folder, "current_link_speed"))
    title = said or f"{_VENDORS[vendor]} device {device:04x}"
    return FoundCard(folder.name, title, card, speed, _number(folder / "current_link_width", 10))


def _by_number(vendor: int, device: int, revision: int) -> Card | None:
    words = _KNOWN[vendor].split()
    names = dict(zip(words[::2], words[1::2], strict=True))
    name = names.get(f"{device:04x}:{revision:02x}") or names.get(f"{device:04x}")
    return None if name is None else CARDS[name]


def _nvidia_name(folder: Path) -> str:
    found = re.search(r"^Model:\s*(.+)$", _text(folder / "information"), re.MULTILINE)
    return found[1].strip() if found else ""


def _listed_name(vendor: int, device: int) -> str:
    """Return the name in brackets of an installed ``pci.ids``: ``GA102 [GeForce RTX 3090]``."""
    for path in _PCI_IDS:
        text = _text(path)
        start = re.search(rf"^{vendor:04x}  .*$", text, re.MULTILINE)
        if start is None:
            continue
        for line in text[start.end() + 1 :].splitlines():
            if line and line[0] not in "\t#":
                break
            if line.startswith(f"\t{device:04x}  "):
                name = line.split("  ", 1)[1]
                found = re.search(r"\[([^/\]]+)", name)
                return found[1].strip() if found else name
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path, base: int = 16) -> int:
    text = _text(path)
    try:
        return int(text, 10 if path.name.startswith("mem_info") else base)
    except ValueError:
        return 0


def _speed(folder: Path, name: str) -> int:
    found = re.match(r"([\d.]+) GT/s", _text(folder / name))
    return _SPEEDS.get(float(found[1]), 0) if found else 0
