"""NVIDIA cards."""

from .device import CudaBackend, CudaBuffer, CudaBufferType, CudaDevice, CudaEvent, devices, open_device, why_missing

__all__ = [
    "CudaBackend",
    "CudaBuffer",
    "CudaBufferType",
    "CudaDevice",
    "CudaEvent",
    "devices",
    "open_device",
    "why_missing",
]
