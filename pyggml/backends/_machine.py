"""What the process can have of the machine: pages of memory, and cores."""

from __future__ import annotations

import ctypes
import mmap
import os

from ..errors import OutOfMemoryError

__all__ = ["HostBlock", "available_cores", "physical_memory"]


def physical_memory() -> tuple[int, int]:
    """Return the machine's memory, available and in all, in bytes; zeros where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, 0
    return total, total


def available_cores() -> int:
    """Return how many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class HostBlock:
    """Pages of the process, zeroed and touched only when used.

    Attributes
    ----------
    address : int
        Of the first byte, a multiple of the page size.
    size : int
        Bytes.

    Raises
    ------
    OutOfMemoryError
        The machine has not so much memory.
    """

    __slots__ = ("_map", "address", "size")

    def __init__(self, size: int, *, owner: str, purpose: str) -> None:
        available, total = physical_memory()
        if total and size > total:
            raise OutOfMemoryError(owner, size, available, purpose, hint="the machine has not so much memory")
        try:
            self._map: mmap.mmap | None = mmap.mmap(-1, size)
        except (OSError, ValueError, OverflowError) as error:
            raise OutOfMemoryError(owner, size, available or None, purpose) from error
        if hasattr(mmap, "MADV_HUGEPAGE") and size >= 1 << 21:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.size = size

    def fill(self, value: int) -> None:
        """Set all bytes to a value."""
        ctypes.memset(self.address, value, self.size)

    def close(self) -> None:
        """Give the pages back now; every address in them becomes invalid."""
        if self._map is not None:
            block, self._map = self._map, None
            block.close()
