"""The devices of an installed ggml library."""

from .device import LibraryBackend, LibraryDevice, LibraryEvent, devices, open_device, why_missing
from .memory import LibraryBuffer, LibraryBufferType

__all__ = [
    "LibraryBackend",
    "LibraryBuffer",
    "LibraryBufferType",
    "LibraryDevice",
    "LibraryEvent",
    "devices",
    "open_device",
    "why_missing",
]
