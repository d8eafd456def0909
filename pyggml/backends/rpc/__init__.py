"""Devices of other machines, through ggml's RPC protocol."""

from .device import RPCBackend, RPCBuffer, RPCBufferType, RPCDevice, RPCEvent, devices, open_device, why_missing

__all__ = ["RPCBackend", "RPCBuffer", "RPCBufferType", "RPCDevice", "RPCEvent", "devices", "open_device", "why_missing"]
