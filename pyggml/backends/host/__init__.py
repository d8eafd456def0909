"""The CPU, and what backends that run its kernels share: plans of kernel calls, host memory, the race watch."""

from .cpu import CPU, CPUBackend, CPUDevice, devices, open_device, why_missing

__all__ = ["CPU", "CPUBackend", "CPUDevice", "devices", "open_device", "why_missing"]
