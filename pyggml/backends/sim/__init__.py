"""Simulated devices: memory of their own that host code cannot reach, computed by the CPU's kernels."""

from .device import (
    Hazard,
    Sim,
    SimBackend,
    SimBuffer,
    SimBufferType,
    SimDevice,
    SimEvent,
    Traffic,
    counted,
    devices,
    open_device,
    why_missing,
)

__all__ = [
    "Hazard",
    "Sim",
    "SimBackend",
    "SimBuffer",
    "SimBufferType",
    "SimDevice",
    "SimEvent",
    "Traffic",
    "counted",
    "devices",
    "open_device",
    "why_missing",
]
