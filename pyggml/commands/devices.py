"""`pyggml devices`: list devices with their memory, what they can run, and why one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import cloup

from ..backend import REGISTRY, Device
from ..cost import PROFILES, DeviceProfile
from ..errors import PyggmlError
from ..hardware.cards import CARDS, GENERATIONS, LLAMA_NAMES, Card
from ..hardware.pci import found_cards
from ..types import DeviceType, Type
from ._options import file_option, json_option, option

__all__ = ["DeviceFacts", "command", "find_devices", "weight_types"]

#: Elements of a row that every type's blocks divide.
_ROW = 256


@dataclass(frozen=True, slots=True)
class BufferTypeFacts:
    """One kind of memory of a device."""

    name: str  #: as ``-ot`` calls it
    alignment_bytes: int
    max_size_bytes: int
    is_host: bool


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The facts about one device."""

    kind: str  #: what ``-dev`` calls it, up to the colon
    name: str
    type: str
    description: str
    memory_free_bytes: int
    memory_total_bytes: int
    buffer_types: tuple[BufferTypeFacts, ...]
    weight_types: tuple[str, ...]  #: that it can multiply with
    expert_weight_types: tuple[str, ...]  #: that it can multiply with, expert by expert
    has_events: bool


def weight_types(device: Device, *, experts: bool = False) -> tuple[str, ...]:
    """Return the weight types for which a device supports products.

    Parameters
    ----------
    experts : bool
        For MUL_MAT_ID instead of MUL_MAT.
    """
    from ..ops import mul_mat, mul_mat_id
    from ..tensor import Tensor

    found = []
    x = Tensor(Type.F32, (_ROW, 1))
    ids = Tensor(Type.I32, (1, 1))
    for type in Type:
        try:
            if experts:
                node = mul_mat_id(Tensor(type, (_ROW, _ROW, 2)), Tensor(Type.F32, (_ROW, 1, 1)), ids)
            else:
                node = mul_mat(Tensor(type, (_ROW, _ROW)), x)
        except PyggmlError:  # not a type of weights
            continue
        if device.supports_op(node):
            found.append(type.ggml_name)
    return tuple(found)


def _facts(kind: str, device: Device) -> DeviceFacts:
    free, total = device.memory()
    bufts = (device.buffer_type, device.host_buffer_type)
    return DeviceFacts(
        kind,
        device.name,
        device.type.value,
        device.description,
        free,
        total,
        tuple(BufferTypeFacts(b.name, b.alignment, b.max_size, b.is_host) for b in bufts if b is not None),
        weight_types(device),
        weight_types(device, experts=True),
        device.event_new() is not None,
    )


def find_devices() -> tuple[list[DeviceFacts], dict[str, str]]:
    """Return the facts about each device, and why a kind has no device."""
    found: list[DeviceFacts] = []
    missing: dict[str, str] = {}
    for kind in REGISTRY.kinds():
        try:
            module = REGISTRY.load(kind)
            devices = [_facts(kind, device) for device in module.devices()]
        except (PyggmlError, ImportError, OSError) as error:
            missing[kind] = " ".join(str(error).split())
            continue
        found += devices
        if not devices:
            missing[kind] = module.why_missing()
    return found, missing


@cloup.command("devices", short_help="Show devices, their memory, and what they can run.")
@json_option("Print the devices as JSON.")
@file_option("--measure", dir_okay=False,
     help="Measure memory, link and kernels here in under a minute, and write FILE, which --host and --device take.")  # fmt: skip
@option("-dev", "--device", default="", metavar="DEVICE",
     help="With --measure: what to measure beside the CPU. [default: the first accelerator found]")  # fmt: skip
def command(as_json: bool, measure: Path | None, device: str) -> None:
    """List the devices of this machine, their buffer types and memory, what they can run, and why others are missing.

    Also lists the cards that --device takes by name, which are simulated.
    """
    if measure is not None:
        _measure(measure, device, as_json=as_json)
        return
    if device:
        raise click.UsageError("--device goes with --measure FILE")
    found, missing = find_devices()
    from . import _console

    if as_json:
        _console.print_json(_as_json(found, missing))
    else:
        _print(found, missing)


def _measure(path: Path, device: str, *, as_json: bool) -> None:
    """Measure this machine and a device, and write the profile."""
    from . import _console
    from ._measure import measure_here

    profile, measured = measure_here(path, device, lambda what: click.echo(f"{what} ...", err=True))
    host, card = profile.host, profile.card
    assert host is not None
    if as_json:
        _console.print_json(
            {
                "host": asdict(host),
                "device": None if card is None else asdict(card),
                "measured": measured,
                "file": str(path),
            }
        )
        return
    console = _console.report()
    size = f", {host.memory_bytes / 2**30:.0f} GiB" if host.memory_bytes else ""
    console.print(
        f"{host.description}: {host.n_cores} cores ({host.isa}) read {host.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"quantised products {host.product_per_s / 1e9:,.0f} GFLOP/s{size}"
    )
    uses = f"--host {path}"
    if card is not None:
        console.print(
            f"{card.name}: link {profile.link_bytes_per_s / 1e9:.1f} GB/s there, {profile.link_back_bytes_per_s / 1e9:.1f} back"
        )
        uses += f" and --device {path}"
    console.print(f"Written to {path}: use it as {uses}")


def _as_json(found: list[DeviceFacts], missing: dict[str, str]) -> dict[str, Any]:  # of JSON's values
    return {
        "devices": [asdict(facts) for facts in found],
        "slots": [
            {
                "address": c.address,
                "title": c.title,
                "card": c.card.name if c.card else None,
                "pcie": c.pcie,
                "lanes": c.lanes,
                "device": c.profile or None,
            }
            for c in found_cards()
        ],
        "missing": [{"kind": kind, "why": why} for kind, why in missing.items()],
        "cards": [asdict(card) for card in CARDS.values()],
        "profiles": [
            {
                "device": f"sim:{p.name}",
                "description": p.description,
                "memory_bytes": p.memory_bytes,
                "memory_bytes_per_s": card.bytes_per_s,
                "f32_per_s": card.f32_per_s,
                "f16_per_s": card.f16_per_s,
                "int8_per_s": card.int8_per_s,
                "launch_s": p.launch_s,
                "link_bytes_per_s": p.link.bytes_per_s,
                "link_back_bytes_per_s": p.from_device.bytes_per_s,
                "link_latency_s": p.link.latency_s,
                "copy_engines": p.copy_engines,
                "source": p.source,
            }
            for p, card in _cards()
        ],
    }


def _print(found: list[DeviceFacts], missing: dict[str, str]) -> None:
    from . import _console

    console = _console.report()
    devices = _console.table("Devices", "name", "kind", "free", "memory", "buffer types", "", right=("free", "memory"),
                             free=("buffer types", ""))  # fmt: skip
    for d in found:
        bufts = ", ".join(f"{b.name}{' (host)' if b.is_host else ''}" for b in d.buffer_types)
        free, total = _console.n_bytes(d.memory_free_bytes), _console.n_bytes(d.memory_total_bytes)
        devices.add_row(d.name, d.kind, free, total, bufts, d.description)
    console.print(devices)
    for d in found:
        console.print(f"{d.name} multiplies with weights of {_words(d.weight_types)}")
        experts = "the same" if d.expert_weight_types == d.weight_types else _words(d.expert_weight_types)
        console.print(f"{' ' * len(d.name)} and, with experts, of {experts}")
    simulated = _console.table(
        "Simulated devices (use the name with --device)", "device", "memory", "bandwidth", "link", "",
        right=("memory", "bandwidth", "link"),
    )  # fmt: skip
    for p, card in _cards():
        simulated.add_row(
            f"sim:{p.name}",
            _console.n_bytes(p.memory_bytes),
            f"{card.bytes_per_s / 1e9:,.0f} GB/s",
            f"{p.link.bytes_per_s / 1e9:,.0f} GB/s",
            p.description,
        )
    console.print()
    console.print(simulated)
    console.print()
    named = _console.table("Cards by name (--device)", "generation", "", "names", free=("names",))
    for generation, alike in groupby(CARDS.values(), key=lambda card: card.generation):
        backend = LLAMA_NAMES[GENERATIONS[generation].partition("-")[0]]
        named.add_row(generation, backend, ", ".join(card.name for card in alike))
    console.print(named)
    console.print("With another memory or link: rtx4060ti-8GiB, rtx3090-pcie3x8")
    if cards := found_cards():
        console.print()
        slots = _console.table("Cards in this machine's slots", "address", "name", "link", "plan with", free=("name",))
        for c in cards:
            slots.add_row(
                c.address, c.title, f"PCIe {c.pcie}.0 x{c.lanes}" if c.pcie else "", c.profile or "not in the table"
            )
        console.print(slots)
    others = {kind: why for kind, why in missing.items() if kind != "sim"}
    if others:
        console.print()
        none = _console.table("Not found", "kind", "why", free=("why",))
        for kind, why in others.items():
            none.add_row(kind, why)
        console.print(none)
    if not any(d.type != DeviceType.CPU.value for d in found):
        console.print("\nNo accelerator was found. `pyggml run` computes on the CPU and on a simulated device.")


def _cards() -> Iterator[tuple[DeviceProfile, Card]]:
    """Yield the profiles that have a name, with their data sheets."""
    for profile in PROFILES.values():
        if isinstance(profile.sheet, Card):
            yield profile, profile.sheet


def _words(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "nothing"
