"""`pyggml devices --measure`: what memory, link and kernels give here, as a profile for ``--host`` and ``--device``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..backend import REGISTRY, Backend, Device
from ..clock import VirtualClock
from ..cost import CPU_PROFILE
from ..errors import DeviceUnavailableError, PyggmlError
from ..hardware.cards import Card
from ..hardware.files import ProfileFile, card_of_rates, host_of_rates, links_of_rates, write_profile
from ..hardware.measure import measure_host
from ..selftest.report import Rate
from ..selftest.times import Sizes, copy_rates, kernel_rates
from ..types import DeviceType

__all__ = ["measure_here"]

#: Seconds of a device's measurement after which no work starts; two devices and the memory take less than a minute.
_SECONDS = 15.0
_LINK_BYTES = 64 << 20


def measure_here(path: Path, device: str, tell: Callable[[str], None]) -> tuple[ProfileFile, dict[str, Any]]:
    """Measure this machine and a device, write the profile, and return it with what it rests on.

    Parameters
    ----------
    device : str
        What to measure beside the CPU; empty: the first accelerator found, or none.
    tell : callable
        Called with the name of each step.

    Raises
    ------
    DeviceUnavailableError
        There is no such device, nothing could be measured of it, or the file cannot be written.
    """
    if path.suffix != ".json":
        raise DeviceUnavailableError(f"profile:{path}", "a profile's name ends in .json")
    other = REGISTRY.open(device) if device else _accelerator()
    tell("reading memory")
    host = measure_host()
    cpu = _cpu()
    tell(f"products on {cpu.description}")
    with_cpu = {r.what: r.per_s for r in _kernels(cpu.backend(), (512,))}
    host = host_of_rates(with_cpu, host)
    measured: dict[str, Any] = {"host": {"device": cpu.name, "memory B/s": host.read_bytes_per_s, **with_cpu}}
    profile = ProfileFile(host)
    if other is not None:
        tell(f"link and kernels of {other.description}")
        card, link, back, rates = _measured_device(other)
        measured["device"] = {"device": other.name, **rates}
        profile = ProfileFile(host, card, link, back)
    write_profile(path, profile, measured)
    return profile, measured


def _cpu() -> Device:
    """Return the CPU as llama.cpp computes on it, if a ggml library is here."""
    try:
        return REGISTRY.open("libggml:CPU")
    except (PyggmlError, ImportError, OSError):
        return REGISTRY.open("cpu")


def _accelerator() -> Device | None:
    for kind in REGISTRY.kinds():
        try:
            devices = REGISTRY.load(kind).devices()
        except (PyggmlError, ImportError, OSError):
            continue
        for device in devices:
            if device.type is not DeviceType.CPU and device.profile is None:
                return device
    return None


def _kernels(backend: Backend, tokens: tuple[int, ...]) -> Iterator[Rate]:
    begin = time.perf_counter()
    for rate in kernel_rates(backend, Sizes(tokens=tokens)):
        yield rate
        if time.perf_counter() - begin > _SECONDS:
            return


def _measured_device(device: Device) -> tuple[Card, float, float, dict[str, float]]:
    """Return a device's sheet and its link both ways; of a simulated one what its clock gives, as its kernels run on the CPU."""
    profile = device.profile
    if profile is not None:
        if not isinstance(profile.sheet, Card):
            raise DeviceUnavailableError(device.name, "is not a card")
        clock = VirtualClock([profile, CPU_PROFILE])
        spans = [clock.copy(*ends, _LINK_BYTES, is_async=False, is_pinned=True) for ends in ((1, 0), (0, 1))]
        there, back = (_LINK_BYTES / span.seconds for span in spans)
        return profile.sheet, there, back, {"copy to the device, 64 MiB": there, "copy from the device, 64 MiB": back}
    backend = device.backend()
    rates = {r.what: r.per_s for r in (*_kernels(backend, (1, 512)), *copy_rates(backend, Sizes()))}
    try:
        card = card_of_rates(rates, device.description, device.memory()[1])
    except ValueError as error:
        raise DeviceUnavailableError(device.name, f"could not be measured: {error}") from None
    return card, *links_of_rates(rates), rates
