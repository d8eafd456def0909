"""Devices of other machines, through ggml's RPC protocol."""

from .device import RPCBackend, RPCDevice, RPCEvent, devices, open_device, why_missing
from .memory import RPCBuffer, RPCBufferType

__all__ = ["RPCBackend", "RPCBuffer", "RPCBufferType", "RPCDevice", "RPCEvent", "devices", "open_device", "why_missing"]
