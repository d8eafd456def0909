"""Tables that several commands show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..types import DeviceType
from ._console import Bar, n_bytes, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..backend import Backend
    from ..planning import Memory

__all__ = ["device_bytes", "memory_dicts", "memory_table", "too_large"]


def device_bytes(backends: Sequence[Backend]) -> dict[str, int]:
    """Return what devices beside the CPU have in all, by the name of their own buffer type; unknown sizes are left out."""
    devices = [b.device for b in backends if b.device.type is not DeviceType.CPU]
    return {device.buffer_type.name: total for device in devices if (total := device.memory()[1])}


def memory_table(memory: Sequence[Memory], capacity: Mapping[str, int]) -> Table:
    """Return what is held of each buffer type, and what part that is of the device's memory.

    Parameters
    ----------
    memory : sequence of Memory
        Of a session or a plan.
    capacity : mapping
        Bytes of devices, as `device_bytes` has them.
    """
    columns = ("buffer type", "weights", "KV cache", "compute", "total", "of device")
    made = table("Memory", *columns, *([""] if capacity else []), right=columns[1:])
    for m in memory:
        sizes = [n_bytes(n) if n else "-" for n in (m.weights, m.cache, m.compute, m.total)]
        total = capacity.get(m.buft)
        made.add_row(
            m.buft, *sizes, *(("-", "") if total is None else (f"{m.total / total:.1%}", Bar(m.total / total)))
        )
    return made


def memory_dicts(memory: Sequence[Memory], capacity: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return what is held of each buffer type, for JSON; ``device_bytes`` is null where it is not known."""
    return [{**asdict(m), "total": m.total, "device_bytes": capacity.get(m.buft)} for m in memory]


def too_large(memory: Sequence[Memory], capacity: Mapping[str, int]) -> list[str]:
    """Return a sentence for each device that has too little memory."""
    return [
        f"{m.buft} has {n_bytes(total)}: {n_bytes(m.total)} do not fit."
        for m in memory
        if (total := capacity.get(m.buft)) is not None and m.total > total
    ]
