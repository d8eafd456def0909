"""Simulated devices: separate memory that host code cannot reach, and the CPU's kernels."""

from ..host.race_watch import Hazard
from .device import Sim, SimBackend, SimDevice, SimEvent, counted, devices, open_device, why_missing
from .memory import SimBuffer, SimBufferType, Traffic

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
