"""Profile files: written by `pyggml devices --measure`, `calibrate`, `selftest`; read by ``--host`` and ``--device``.

The formulas take data sheets. A measured rate therefore becomes the data sheet from which the formulas give that rate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DeviceUnavailableError
from ..files import read_json
from .cards import GENERATIONS, Card, find_card
from .formulas import family_of
from .hosts import Host, is_possible
from .rates import RATES

__all__ = ["ProfileFile", "card_of_rates", "host_of_rates", "read_profile", "write_profile"]

#: Columns per expert in the self-test's products of 512 tokens (8 of 64 experts).
_COLUMNS = 64
_HINT = "`pyggml devices --measure FILE.json`, `pyggml calibrate` and `pyggml selftest` write such files"


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """The contents of a profile file: a host, a device, or both.

    Attributes
    ----------
    link_bytes_per_s, link_back_bytes_per_s : float
        Rate of copies from host to device, and back; 0: the card's link.
    simulated : str
        For a simulated device: its name as `parse_profile` reads it, which gives card and link.
    """

    host: Host | None = None
    card: Card | None = None
    link_bytes_per_s: float = 0.0
    link_back_bytes_per_s: float = 0.0
    simulated: str = ""


def write_profile(path: Path, profile: ProfileFile, measured: Mapping[str, Any]) -> None:
    """Write a profile; ``measured`` are the measurements behind it, for people to read.

    Raises
    ------
    DeviceUnavailableError
        The file cannot be written, or its name does not end in ``.json``.
    """
    if path.suffix != ".json":
        raise DeviceUnavailableError(f"profile:{path}", "a profile's name ends in .json")
    device = None
    if profile.card is not None:
        device = {
            "card": asdict(profile.card), "link_bytes_per_s": profile.link_bytes_per_s,
            "link_back_bytes_per_s": profile.link_back_bytes_per_s,
        }  # fmt: skip
    host = None if profile.host is None else asdict(profile.host)
    try:
        text = json.dumps({"pyggml_profile": 1, "host": host, "device": device, "measured": measured}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DeviceUnavailableError(f"profile:{path}", f"cannot be written: {error.strerror}") from None


def read_profile(path: Path) -> ProfileFile:
    """Read a profile file, or the report of a self-test.

    Raises
    ------
    DeviceUnavailableError
        The file cannot be read, or is neither.
    """
    try:
        data = read_json(path)
        if isinstance(data, dict) and "outcomes" in data and "rates" in data:
            return _of_selftest(data)
        if not isinstance(data, dict) or data.get("pyggml_profile") != 1:
            raise ValueError("it has no version that is known")
        host = None if data["host"] is None else Host(**data["host"])
        if host is not None and not is_possible(host):
            raise ValueError("a rate, the cores or the instructions cannot be")
        device = data["device"]
        if device is None:
            return ProfileFile(host)
        card = Card(**device["card"])
        link, back = float(device["link_bytes_per_s"]), float(device["link_back_bytes_per_s"])
        rates = (card.bytes_per_s, card.f32_per_s, card.f16_per_s, card.int8_per_s, card.memory_bytes)
        if card.generation not in GENERATIONS or min(rates) <= 0 or min(link, back) < 0:
            raise ValueError("a rate, the memory or the generation cannot be")
        return ProfileFile(host, card, link, back)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DeviceUnavailableError(f"profile:{path}", f"is no profile: {reason}", hint=_HINT) from None


def _of_selftest(data: dict[str, Any]) -> ProfileFile:
    """Return the profile in a self-test's report: for a CPU a host, for a simulated device its name, else a card."""
    from .measure import found_host

    device, rates = str(data["device"]), {str(r["what"]): float(r["per_s"]) for r in data["rates"]}
    kind, _, rest = device.partition(":")
    if kind == "sim":
        return ProfileFile(simulated=rest or "rtx4090-pcie4")
    if not rates:
        raise ValueError("the self test measured no times (stage 'times')")
    if kind == "cpu" or rest.upper() == "CPU":
        around = found_host() or Host(0.0)
        return ProfileFile(host_of_rates(rates, replace(around, description=str(data["description"]))))
    card = card_of_rates(rates, str(data["description"]), int(data.get("facts", {}).get("memory_bytes", 0)))
    return ProfileFile(None, card, *links_of_rates(rates))


def links_of_rates(rates: Mapping[str, float]) -> tuple[float, float]:
    """Return the rates of the largest copies to and from the device, preferring pinned memory; 0 if not measured."""

    def best(way: str) -> float:
        for kind in ("pinned", "pageable"):
            own = {
                _size(what): rate for what, rate in rates.items() if what.startswith(f"copy {way} the device, {kind}")
            }
            if own:
                return own[max(own)]
        return 0.0

    return best("to"), best("from")


def _size(what: str) -> int:
    found = re.search(r"(\d+) ([KM])iB", what)
    return int(found[1]) << (20 if found[2] == "M" else 10) if found else 0


def _products(rates: Mapping[str, float], *, quantized: bool) -> float:
    """Return the operations/s of products of 512 tokens, the median over types."""
    own = [
        r
        for what, r in rates.items()
        if what.endswith("512 tokens") and what.startswith("MUL_MAT") and (" f16" not in what) is quantized
    ]
    if not own:
        raise ValueError("no products of 512 tokens were measured")
    from statistics import median  # imported late: plans do not use it

    return median(own)


def host_of_rates(rates: Mapping[str, float], host: Host) -> Host:
    """Return a host with the measured rate of products, and the measured memory rate if ``host`` has none."""
    read = host.read_bytes_per_s or max((r for what, r in rates.items() if what.startswith("ADD")), default=0.0)
    if not read:
        raise ValueError("its memory was not measured")
    return replace(host, read_bytes_per_s=read, product_per_s=_products(rates, quantized=True))


def card_of_rates(rates: Mapping[str, float], description: str, memory_bytes: int = 0) -> Card:
    """Return the data sheet from which the formulas give the measured rates.

    Parameters
    ----------
    description : str
        The device's own name. If it is a known card, it gives the generation, and the memory if ``memory_bytes`` is 0.
    """
    known = find_card(description)
    if known is None and not memory_bytes:
        raise ValueError(f"{description!r} is no card of the table, and its memory is not told")
    generation = "ada" if known is None else known.generation
    f = family_of(RATES, GENERATIONS[generation])
    read = max((r for what, r in rates.items() if what.startswith("ADD")), default=0.0)
    if not read:
        raise ValueError("its memory was not measured")
    tiles = 1.0 + f.pad / _COLUMNS
    f16 = _products(rates, quantized=False) * tiles / RATES.half
    f32 = f16 / 4 if known is None else known.f32_per_s * f16 / known.f16_per_s
    quantized = _products(rates, quantized=True) * tiles
    kind = GENERATIONS[generation]
    if kind.endswith("dp4a"):
        int8 = quantized / RATES.dp4a
    elif kind == "cuda":
        int8 = 1.0 / max(1.0 / quantized - 1.0 / (f32 * RATES.scalar), 0.1 / quantized) / f.quantized
    else:
        int8 = 2 * f16
        if kind == "rocm":
            f32 = quantized / f.quantized
        else:
            f16 = quantized / f.quantized
    return Card(
        known.name if known else description, generation, memory_bytes or (known.memory_bytes if known else 0),
        read / f.memory, f32, f16, int8, known.pcie if known else 4, known.lanes if known else 16,
    )  # fmt: skip
