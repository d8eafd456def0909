"""Devices that compute nothing and record every call."""

from .abilities import (
    BackendAbilities,
    BufferTypeAbilities,
    Capabilities,
    FailCompute,
    Note,
    OffloadWish,
    OpSupport,
    Optimize,
    ignore,
    short_name,
)
from .device import MockBackend, MockDevice, MockEvent, devices, open_device, why_missing
from .memory import MockBuffer, MockBufferType, MockMemory

__all__ = [
    "BackendAbilities",
    "BufferTypeAbilities",
    "Capabilities",
    "FailCompute",
    "MockBackend",
    "MockBuffer",
    "MockBufferType",
    "MockDevice",
    "MockEvent",
    "MockMemory",
    "Note",
    "OffloadWish",
    "OpSupport",
    "Optimize",
    "devices",
    "ignore",
    "open_device",
    "short_name",
    "why_missing",
]
