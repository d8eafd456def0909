"""The CPU: host memory, and Numba kernels that compute a split as one plan.

A mapped file is used in place (`CPUDevice.buffer_from_host`). The alignment is that of upstream's buffer type, 32
bytes. Kernels assume no more, because tensors in a mapped GGUF have no larger alignment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...backend import Backend, Device, answers_by_kind
from ...buffer import BufferType
from ...errors import BackendError, DeviceUnavailableError
from ...graph import GraphView
from ...opset import supports_op
from ...tensor import Tensor
from ...types import DeviceType
from .dataless import DatalessCPU
from .machine import (
    TENSOR_ALIGNMENT,
    HostBuffer,
    HostBufferType,
    is_writable,
    physical_memory,
    plan_of,
    shared_pool,
    threads_of,
)
from .race_watch import HOST, accesses_of

if TYPE_CHECKING:
    from ...kernels.cpu.pool import Pool


class CPUDevice(Device):
    """The host's CPU and memory."""

    def __init__(self) -> None:
        self.name = "CPU"
        self.description = _processor_name()
        self.type = DeviceType.CPU
        self._buft = HostBufferType("CPU")
        self._mapped_buft = HostBufferType("CPU_Mapped")
        self._buft.device = self._mapped_buft.device = self

    @property
    def buffer_type(self) -> HostBufferType:
        """Plain host memory."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Available and total bytes."""
        return physical_memory()

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Return whether the kernels can run a node."""
        return supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Return whether a buffer type is host memory."""
        return buft.is_host

    def buffer_from_host(self, address: int, size: int, owner: object) -> HostBuffer | None:
        """Return a buffer over existing memory, which ``owner`` keeps alive; None if the address is not aligned.

        Parameters
        ----------
        owner : object
            If it has Python's buffer interface and is read-only, the buffer is read-only.

        Notes
        -----
        Mirrors `ggml_backend_cpu_buffer_from_ptr`. Differs: read-only memory stays read-only. An unaligned address
        gives None; upstream aborts.
        """
        if address % TENSOR_ALIGNMENT:
            return None
        return HostBuffer(self._mapped_buft, address, size, owner, is_writable=is_writable(owner))

    def backend(self, *, threads: int | None = None) -> CPUBackend:
        """Return a new backend."""
        return CPUBackend(self, threads=threads)


class CPUBackend(Backend):
    """Runs splits with Numba kernels.

    Parameters
    ----------
    threads : int, optional
        Threads of the kernels; by default one for each core that the process may use. Results do not depend on it.
    """

    def __init__(self, device: CPUDevice, *, threads: int | None = None) -> None:
        self.device = device
        self.name = device.name
        self.threads = threads_of(device.name, threads)
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The threads, started on first use and shared by all backends with the same number."""
        if self._pool is None:
            self._pool = shared_pool(self.threads)
        return self._pool

    def graph_compute(self, graph: GraphView) -> None:
        """Run the plan of the nodes, which is made on first use.

        Raises
        ------
        ComputeError
            A row index is out of range, or the compute was stopped.
        ExpertIdError
            An id is not an expert.
        BackendError
            A tensor is in another device's memory, or in a closed buffer.
        """
        plan = plan_of(graph, self.device, self.name, self._address)
        if HOST.is_busy:
            HOST.by_host(accesses_of(graph))
        with plan.in_use:
            plan.run(self.pool)

    def _address(self, tensor: Tensor) -> int:
        """Return the address of a tensor's bytes for kernels."""
        storage = tensor.storage
        if storage is None or not storage.is_host or tensor.data is None:
            where = "in no memory" if storage is None else f"in {storage.buft.name}"
            raise BackendError(self.name, f"'{tensor.name}' is {where}, not in host memory")
        storage.check_open(tensor)
        return tensor.data

    def close(self) -> None:
        """Release the threads; they start again when needed."""
        self._pool = None


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine() or "processor"


_device: CPUDevice | None = None


def devices() -> list[CPUDevice]:
    """Return the CPU; all schedulers share the object, so that their buffers have one type."""
    global _device
    if _device is None:
        _device = CPUDevice()
    return [_device]


def open_device(spec: str, *, index: int = 0, data: bool = True) -> Device:
    """Return the CPU for the name ``cpu``; with ``data=False`` one that only plans.

    Raises
    ------
    DeviceUnavailableError
        ``spec`` is not empty.
    """
    if spec:
        raise DeviceUnavailableError("cpu", f"there is no 'cpu:{spec}'", hint="the name is `cpu`")
    return devices()[0] if data else DatalessCPU()


def why_missing() -> str:
    """Return "": the CPU is never missing."""
    return ""


def CPU(threads: int | None = None) -> CPUBackend:
    """Return a backend that computes on the host's CPU.

    Examples
    --------
    >>> CPU(threads=2).threads
    2
    """
    return devices()[0].backend(threads=threads)
