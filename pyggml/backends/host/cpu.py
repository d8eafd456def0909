"""The CPU: host memory, and Numba kernels that run a split as one plan.

A mapped file is used in place (`CPUDevice.buffer_from_host`). The alignment is that of upstream's buffer type, 32, and
kernels assume no more, else no tensor of a mapped GGUF could be used where it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...backend import Backend, Device, answers_by_kind
from ...buffer import BufferType
from ...errors import BackendError, DeviceUnavailableError
from ...graph import GraphView
from ...tensor import Tensor
from ...types import DeviceType
from .dataless import DatalessCPU
from .machine import (
    TENSOR_ALIGNMENT,
    HostBuffer,
    HostBufferType,
    available_cores,
    in_use,
    is_writable,
    physical_memory,
    plan_of,
    shared_pool,
)
from .plan import supports_op
from .race_watch import HOST, accesses_of

if TYPE_CHECKING:
    from ...kernels.cpu.pool import Pool


class CPUDevice(Device):
    """The machine's processors and memory."""

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
        """Bytes available and in all."""
        return physical_memory()

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Whether there is a kernel."""
        return supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether the memory is host memory."""
        return buft.is_host

    def buffer_from_host(self, address: int, size: int, owner: object) -> HostBuffer | None:
        """Return a buffer over existing memory, which ``owner`` keeps alive; None if its address is not aligned.

        Parameters
        ----------
        owner : object
            If it has Python's buffer interface and is read-only, so is the buffer.

        Notes
        -----
        Mirrors `ggml_backend_cpu_buffer_from_ptr`. Differs: read-only memory stays so; an address that is not aligned
        gives None, upstream aborts.
        """
        if address % TENSOR_ALIGNMENT:
            return None
        return HostBuffer(self._mapped_buft, address, size, owner, is_writable=is_writable(owner))

    def backend(self, *, threads: int | None = None) -> CPUBackend:
        """Return a new stream of work."""
        return CPUBackend(self, threads=threads)


class CPUBackend(Backend):
    """Runs splits with Numba kernels.

    Parameters
    ----------
    threads : int, optional
        Of the kernels' own pool; one for each core that the process may use if not given. Results do not depend on it.
    """

    def __init__(self, device: CPUDevice, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise DeviceUnavailableError(device.name, f"{threads} threads cannot compute", hint="give 1 or more")
        self.device = device
        self.name = device.name
        self.threads = available_cores() if threads is None else threads
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The threads, started at the first use and shared with all backends that have as many."""
        if self._pool is None:
            self._pool = shared_pool(self.threads)
        return self._pool

    def graph_compute(self, graph: GraphView) -> None:
        """Run the nodes' plan, which is made at the first time.

        Raises
        ------
        ComputeError
            A row index is out of bounds, or the computation was stopped.
        ExpertIdError
            An id that is no expert.
        BackendError
            A tensor lies in another device's memory, or in a buffer that was closed.
        """
        plan = plan_of(graph, self.device, self.name, self._address)
        if HOST.is_busy:
            HOST.by_host(accesses_of(graph))
        with in_use(plan.buffers, self.name):
            plan.run(self.pool)

    def _address(self, tensor: Tensor) -> int:
        """Return where kernels find a tensor's bytes: host addresses are what they are."""
        storage = tensor.storage
        if storage is None or not storage.is_host or tensor.data is None:
            where = "in no memory" if storage is None else f"in {storage.buft.name}"
            raise BackendError(self.name, f"'{tensor.name}' is {where}, not in host memory")
        storage.check_open(tensor)
        return tensor.data

    def close(self) -> None:
        """Let the threads go; they start again when needed."""
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
    """Return the one CPU; schedulers share it, so that their buffers have one type."""
    global _device
    if _device is None:
        _device = CPUDevice()
    return [_device]


def open_device(spec: str, *, index: int = 0, data: bool = True) -> Device:
    """Return the CPU of the name ``cpu``; without data, one that only plans.

    Raises
    ------
    DeviceUnavailableError
        Something follows the name.
    """
    if spec:
        raise DeviceUnavailableError("cpu", f"there is no 'cpu:{spec}'", hint="the name is `cpu`")
    return devices()[0] if data else DatalessCPU()


def why_missing() -> str:
    """Return nothing: there is always a CPU."""
    return ""


def CPU(threads: int | None = None) -> CPUBackend:
    """Return a backend that computes on the machine's processors.

    Examples
    --------
    >>> CPU(threads=2).threads
    2
    """
    return devices()[0].backend(threads=threads)
