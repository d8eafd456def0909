"""The devices of an installed ggml library."""

from .device import (
    LibraryBackend,
    LibraryBuffer,
    LibraryBufferType,
    LibraryDevice,
    LibraryEvent,
    devices,
    open_device,
    why_missing,
)

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
