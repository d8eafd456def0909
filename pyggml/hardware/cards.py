"""Data sheets of graphics cards and chips, by name.

One line per card: name; generation; memory in GiB and its GB/s; TFLOP/s in 32 bits without matrix units, and in 16 bits
with them and 16-bit sums; TOP/s in 8 bits; PCIe generation and lanes (0: the memory is the host's). Peaks are without
sparsity. Sources: NVIDIA's architecture white papers (Turing to Blackwell) and data sheets, AMD's and Intel's product
pages, Apple's specifications; computed from cores and clock if a maker states only these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CARDS", "GENERATIONS", "LLAMA_NAMES", "Card", "find_card", "llama_names"]

#: The family of kernels that llama.cpp runs on each generation.
GENERATIONS: dict[str, str] = {
    "pascal": "cuda-dp4a", "volta": "cuda-dp4a", "turing-dp4a": "cuda-dp4a", "turing": "cuda", "ampere": "cuda",
    "ada": "cuda", "hopper": "cuda", "blackwell": "cuda", "gcn": "rocm-dp4a", "cdna": "rocm", "rdna1": "rocm-dp4a",
    "rdna2": "rocm-dp4a", "rdna3": "rocm", "rdna3.5": "rocm", "rdna4": "rocm", "xe": "vulkan", "xe2": "vulkan",
    "apple": "metal", "m5": "metal",
}  # fmt: skip
#: How llama.cpp names the devices of a family, before their number.
LLAMA_NAMES = {"cuda": "CUDA", "rocm": "ROCm", "vulkan": "Vulkan", "metal": "MTL"}


@dataclass(frozen=True, slots=True)
class Card:
    """A card's data sheet; rates are in bytes/s and operations/s."""

    name: str
    generation: str
    memory_bytes: int
    bytes_per_s: float
    f32_per_s: float
    f16_per_s: float
    int8_per_s: float
    pcie: int
    lanes: int

    @property
    def is_unified(self) -> bool:
        """Whether its memory is the host's."""
        return self.lanes == 0

    @property
    def family(self) -> str:
        """The family of kernels that it runs by default."""
        return GENERATIONS[self.generation]


_TABLE = """
gtx1060 pascal 6 192 4.4 4.4 17.5 3 16
gtx1070 pascal 8 256 6.5 6.5 25.8 3 16
gtx1080 pascal 8 320 8.9 8.9 35.5 3 16
gtx1080ti pascal 11 484 11.3 11.3 45.4 3 16
p40 pascal 24 347 11.8 11.8 47 3 16
p100 pascal 16 732 10.6 21.2 10.6 3 16
v100 volta 32 900 14.1 112 56 3 16
titanv volta 12 653 14.9 110 60 3 16
gtx1650 turing-dp4a 4 128 3.0 6.0 11.9 3 16
gtx1650super turing-dp4a 4 192 4.4 8.8 17.7 3 16
gtx1660 turing-dp4a 6 192 5.0 10 20 3 16
gtx1660super turing-dp4a 6 336 5.0 10 20 3 16
gtx1660ti turing-dp4a 6 288 5.4 10.9 21.7 3 16
rtx2060 turing 6 336 6.5 52 103 3 16
rtx2060super turing 8 448 7.2 57 115 3 16
rtx2070 turing 8 448 7.5 60 119 3 16
rtx2070super turing 8 448 9.1 73 145 3 16
rtx2080 turing 8 448 10.1 81 161 3 16
rtx2080super turing 8 496 11.2 89 178 3 16
rtx2080ti turing 11 616 13.4 108 215 3 16
titanrtx turing 24 672 16.3 130 261 3 16
quadrortx4000 turing 8 416 7.1 57 114 3 16
quadrortx5000 turing 16 448 11.2 89 178 3 16
quadrortx6000 turing 24 672 16.3 130 261 3 16
quadrortx8000 turing 48 672 16.3 130 261 3 16
t4 turing 16 320 8.1 65 130 3 16
rtx3050 ampere 8 224 9.1 36.4 73 4 8
rtx3060 ampere 12 360 12.7 51 102 4 16
rtx3060ti ampere 8 448 16.2 65 130 4 16
rtx3070 ampere 8 448 20.3 81 163 4 16
rtx3070ti ampere 8 608 21.7 87 174 4 16
rtx3080 ampere 10 760 29.8 119 238 4 16
rtx3080ti ampere 12 912 34.1 136 273 4 16
rtx3090 ampere 24 936 35.6 142 284 4 16
rtx3090ti ampere 24 1008 40 160 320 4 16
rtxa2000 ampere 12 288 8 32 64 4 16
rtxa4000 ampere 16 448 19.2 77 153 4 16
rtxa4500 ampere 20 640 23.7 95 189 4 16
rtxa5000 ampere 24 768 27.8 111 222 4 16
rtxa5500 ampere 24 768 34.1 136 273 4 16
rtxa6000 ampere 48 768 38.7 155 310 4 16
a2 ampere 16 200 4.5 18 36 4 8
a10 ampere 24 600 31.2 125 250 4 16
a16 ampere 16 200 4.5 18 36 4 16
a30 ampere 24 933 10.3 165 330 4 16
a40 ampere 48 696 37.4 150 299 4 16
a100 ampere 80 1935 19.5 312 624 4 16
a100sxm ampere 80 2039 19.5 312 624 4 16
rtx4050laptop ada 6 192 9 36 72 4 8
rtx4060laptop ada 8 256 11.6 46 93 4 8
rtx4070laptop ada 8 256 15.6 62 125 4 8
rtx4080laptop ada 12 432 24.7 99 198 4 16
rtx4090laptop ada 16 576 33 132 264 4 16
rtx4060 ada 8 272 15.1 60 121 4 8
rtx4060ti ada 16 288 22.1 88 177 4 8
rtx4070 ada 12 504 29.1 117 233 4 16
rtx4070super ada 12 504 35.5 142 284 4 16
rtx4070ti ada 12 504 40 160 321 4 16
rtx4070tisuper ada 16 672 44 176 353 4 16
rtx4080 ada 16 717 48.7 195 390 4 16
rtx4080super ada 16 736 52 209 418 4 16
rtx4090 ada 24 1008 82.6 330 661 4 16
rtx4090d ada 24 1008 73.5 294 588 4 16
rtx2000ada ada 16 224 12 48 96 4 8
rtx4000sffada ada 20 280 19.2 77 153 4 16
rtx4000ada ada 20 360 26.7 107 214 4 16
rtx4500ada ada 24 432 39.6 158 317 4 16
rtx5000ada ada 32 576 65.3 261 522 4 16
rtx6000ada ada 48 960 91.1 364 728 4 16
l4 ada 24 300 30.3 121 242 4 16
l40 ada 48 864 90.5 362 724 4 16
l40s ada 48 864 91.6 366 733 4 16
h100 hopper 80 2000 51 756 1513 5 16
h100sxm hopper 80 3350 67 989 1979 5 16
h100nvl hopper 94 3900 60 835 1671 5 16
h200 hopper 141 4800 67 989 1979 5 16
gh200 hopper 96 4000 67 989 1979 5 16
rtx5050 blackwell 8 320 13.2 53 105 5 8
rtx5060 blackwell 8 448 19.2 77 154 5 8
rtx5060ti blackwell 16 448 23.7 95 190 5 8
rtx5070 blackwell 12 672 30.9 123 247 5 16
rtx5070ti blackwell 16 896 43.9 176 352 5 16
rtx5080 blackwell 16 960 56.3 225 450 5 16
rtx5090 blackwell 32 1792 104.8 419 838 5 16
rtx5090laptop blackwell 24 896 31.8 127 254 5 8
rtx5080laptop blackwell 16 896 23 92 184 5 8
rtx5070laptop blackwell 8 384 14 56 112 5 8
rtxpro2000 blackwell 16 288 17 68 136 5 8
rtxpro4000 blackwell 24 672 46.9 188 375 5 16
rtxpro4500 blackwell 32 896 54.9 220 439 5 16
rtxpro5000 blackwell 48 1344 73.7 295 590 5 16
rtxpro6000 blackwell 96 1792 125 504 1007 5 16
rtxpro6000maxq blackwell 96 1792 110 438 876 5 16
b200 blackwell 180 8000 80 2250 4500 5 16
gb10 blackwell 128 273 29.7 119 238 0 0
mi25 gcn 16 484 12.3 24.6 24.6 3 16
mi50 gcn 32 1024 13.4 26.8 53.6 3 16
mi60 gcn 32 1024 14.7 29.5 59 3 16
radeonvii gcn 16 1024 13.4 26.9 53.8 3 16
mi100 cdna 32 1229 23.1 184 184 4 16
mi210 cdna 64 1638 22.6 181 181 4 16
mi250 cdna 128 3277 45.3 362 362 4 16
mi300x cdna 192 5300 163 1307 2615 5 16
rx5700xt rdna1 8 448 9.8 19.5 19.5 4 16
rx6600 rdna2 8 224 8.9 17.9 35.7 4 8
rx6600xt rdna2 8 256 10.6 21.2 42.4 4 8
rx6650xt rdna2 8 280 10.8 21.6 43 4 8
rx6700xt rdna2 12 384 13.2 26.4 52.8 4 16
rx6750xt rdna2 12 432 13.3 26.6 53.2 4 16
rx6800 rdna2 16 512 16.2 32.3 64.7 4 16
rx6800xt rdna2 16 512 20.7 41.5 83 4 16
rx6900xt rdna2 16 512 23 46 92 4 16
rx6950xt rdna2 16 576 23.7 47.3 94.6 4 16
rx6500xt rdna2 4 144 5.8 11.5 23 4 4
w6800 rdna2 32 512 17.8 35.7 71.3 4 16
rx7600 rdna3 8 288 21.8 43.5 43.5 4 8
rx7600xt rdna3 16 288 22.6 45.1 45.1 4 8
rx7700xt rdna3 12 432 35.2 70.3 70.3 4 16
rx7800xt rdna3 16 624 37.3 74.7 74.7 4 16
rx7900gre rdna3 16 576 46 92 92 4 16
rx7900xt rdna3 20 800 51.6 103 103 4 16
rx7900xtx rdna3 24 960 61.4 123 123 4 16
w7500 rdna3 8 172 12.2 24.4 24.4 4 8
w7600 rdna3 8 288 20 40 40 4 8
w7700 rdna3 16 576 28.3 56.5 56.5 4 16
w7800 rdna3 32 576 45.2 90.5 90.5 4 16
w7900 rdna3 48 864 61.3 123 123 4 16
780m rdna3 32 90 8.3 16.6 16.6 0 0
890m rdna3.5 64 120 11.9 23.8 23.8 0 0
8050s rdna3.5 64 256 23.8 47.5 47.5 0 0
8060s rdna3.5 128 256 29.7 59.4 59.4 0 0
rx9060xt rdna4 16 320 25.6 103 205 5 16
rx9070gre rdna4 12 432 34.3 137 274 5 16
rx9070 rdna4 16 640 36.1 145 289 5 16
rx9070xt rdna4 16 640 48.7 195 389 5 16
r9600d rdna4 32 640 36.1 145 289 5 16
r9700 rdna4 32 640 47.8 191 383 5 16
a310 xe 4 124 3.1 24.6 49 4 8
a380 xe 6 186 4.2 33 66 4 8
a580 xe 8 512 12.3 98 197 4 16
a750 xe 8 512 17.2 138 275 4 16
a770 xe 16 560 19.7 157 315 4 16
b570 xe2 10 380 11.5 101 203 4 8
b580 xe2 12 456 13.7 117 233 4 8
b50 xe2 16 224 10.7 85 170 5 8
b60 xe2 24 456 12.3 98 197 5 8
b70 xe2 32 608 22.9 184 367 5 16
m1 apple 16 68 2.6 2.6 2.6 0 0
m1pro apple 32 200 5.3 5.3 5.3 0 0
m1max apple 64 400 10.6 10.6 10.6 0 0
m1max24 apple 64 400 7.8 7.8 7.8 0 0
m1ultra apple 128 800 21.2 21.2 21.2 0 0
m1ultra48 apple 128 800 15.9 15.9 15.9 0 0
m2 apple 24 100 3.6 3.6 3.6 0 0
m2pro apple 32 200 6.8 6.8 6.8 0 0
m2max apple 96 400 13.5 13.5 13.5 0 0
m2max30 apple 96 400 10.7 10.7 10.7 0 0
m2ultra apple 192 800 27.2 27.2 27.2 0 0
m2ultra60 apple 192 800 21.5 21.5 21.5 0 0
m3 apple 24 100 3.6 3.6 3.6 0 0
m3pro apple 36 150 6.4 6.4 6.4 0 0
m3max apple 128 400 14.2 14.2 14.2 0 0
m3max30 apple 96 300 10.6 10.6 10.6 0 0
m3ultra apple 512 819 28.4 28.4 28.4 0 0
m3ultra60 apple 256 819 21.3 21.3 21.3 0 0
m4 apple 32 120 4.3 4.3 4.3 0 0
m4pro apple 64 273 8.6 8.6 8.6 0 0
m4pro16 apple 64 273 6.9 6.9 6.9 0 0
m4max apple 128 546 17.2 17.2 17.2 0 0
m4max32 apple 64 410 13.8 13.8 13.8 0 0
m5 m5 32 153 4.2 16.6 16.6 0 0
m5pro m5 64 307 8.3 33 33 0 0
m5max m5 128 614 16.6 66 66 0 0
"""


def _read() -> dict[str, Card]:
    cards = {}
    for line in _TABLE.split("\n"):
        if line:
            name, generation, *numbers = line.split()
            gib, gbs, f32, f16, int8, pcie, lanes = (float(n) for n in numbers)
            cards[name] = Card(
                name,
                generation,
                int(gib * 2**30),
                gbs * 1e9,
                f32 * 1e12,
                f16 * 1e12,
                int8 * 1e12,
                int(pcie),
                int(lanes),
            )
    return cards


#: Cards by name.
CARDS: dict[str, Card] = _read()
#: Machines that people name instead of their card.
_MACHINES = {"strixhalo": "8060s", "ryzenaimax395": "8060s", "ryzenaimax385": "8050s", "dgxspark": "gb10"}
#: Words in names of cards that do not identify a card.
_NOISE = re.compile(
    r"nvidia|geforce|amd|radeon(?!vii)|intel|apple|arc|tesla|instinct|graphics|gpu|workstation|blackwell|generation|edition|server"
    r"|aipro|pcie|\d+gb|\d+gib|core|series|mobile(?=$)|promax|(?<=b[5-7]0)pro"
)


def llama_names(cards: Sequence[Card]) -> list[str]:
    """Return the names that llama.cpp gives cards: each of its backends counts its own from 0.

    Examples
    --------
    >>> llama_names([CARDS["rtx3090"], CARDS["mi50"], CARDS["rtx3060"]])
    ['CUDA0', 'ROCm0', 'CUDA1']
    """
    kinds = [LLAMA_NAMES[card.family.partition("-")[0]] for card in cards]
    return [f"{kind}{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def find_card(text: str, memory_gib: float | None = None) -> Card | None:
    """Return the card with a name as people write it, of its size in the table or another (``m2max-48GiB``); None if it is unknown.

    Examples
    --------
    >>> find_card("NVIDIA GeForce RTX 3090").name, find_card("Radeon 8060S (Strix Halo iGPU, gfx1151)").name
    ('rtx3090', '8060s')
    >>> find_card("strix-halo").name, find_card("DGX Spark").name
    ('8060s', 'gb10')
    """
    sized = re.search(r"-([\d.]+)GiB$", text)
    if sized is not None:
        text, memory_gib = text[: sized.start()], memory_gib or float(sized[1])
    for part in re.split(r"[/(]", text):
        name = re.sub(r"[^a-z0-9]", "", re.sub(r"\b\d+ ?gi?b\b", "", part.lower()))
        name = re.sub(r"(aipro|arcpro)", "", name)
        short = _NOISE.sub("", name)
        apple = re.fullmatch(r"(m\d(?:pro|max|ultra)?)(\d*)", short)
        for guess in (
            *((short, apple[1]) if apple else ()),
            _MACHINES.get(name, name),
            short,
            re.sub(r"^(rtx|rx|pro)", "", short),
            f"rtx{short}",
            f"rx{short}",
            f"gtx{short}",
        ):
            if guess in CARDS:
                return _of_memory(CARDS[guess], memory_gib)
        for known in sorted(CARDS, key=len, reverse=True):  # "m2ultra76", "a100sxm480gb"
            if short.startswith(known) and len(known) > 2 and not re.match(r"[a-z]", short[len(known) :]):
                return _of_memory(CARDS[known], memory_gib)
    return None


def _of_memory(card: Card, memory_gib: float | None) -> Card:
    """Return the card with ``memory_gib`` of memory, if given."""
    if memory_gib is None or abs(memory_gib * 2**30 - card.memory_bytes) < 2**29:
        return card
    from dataclasses import replace

    return replace(card, memory_bytes=int(memory_gib * 2**30))
