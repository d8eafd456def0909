"""The CPU: host memory, and Numba kernels that run a split as one plan.

A mapped file is used in place (`CPUDevice.buffer_from_host`). The alignment is that of upstream's buffer type, 32, and
kernels assume no more, else no tensor of a mapped GGUF could be used where it lies.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ..backend import Backend, Device
from ..buffer import Buffer, BufferType
from ..errors import AllocError, DeviceUnavailableError
from ..graph import GraphView
from ..tensor import Tensor
from ..types import DeviceType
from . import _host_ops
from ._machine import HostBlock, available_cores, physical_memory

if TYPE_CHECKING:
    from ..kernels.cpu.pool import Pool

__all__ = ["CPU", "CPUBackend", "CPUBuffer", "CPUBufferType", "CPUDevice", "devices", "open_device", "why_missing"]

#: Mirrors `TENSOR_ALIGNMENT`.
TENSOR_ALIGNMENT = 32


class CPUBufferType(BufferType):
    """Plain host memory."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("CPU", alignment=TENSOR_ALIGNMENT, is_host=True)

    def _alloc(self, size: int) -> CPUBuffer:
        block = HostBlock(size, owner=self.name, purpose="a buffer")
        return CPUBuffer(self, block.address, size, block)


class CPUBuffer(Buffer):
    """Host memory: its own, or somebody else's that ``owner`` keeps alive.

    Parameters
    ----------
    is_writable : bool
        Whether the pages may be written; a mapped file's may not.
    """

    __slots__ = ("is_writable", "owner")

    def __init__(self, buft: BufferType, address: int, size: int, owner: object, *, is_writable: bool = True) -> None:
        super().__init__(buft, size, address)
        self.owner = owner
        self.is_writable = is_writable

    def _check_writable(self, tensor: Tensor) -> None:
        if not self.is_writable:
            raise AllocError(
                f"'{tensor.name}' lies in a read-only mapping and cannot be written",
                hint="copy it to a tensor in a buffer of its own",
            )

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into the tensor."""
        self._check_writable(tensor)
        assert tensor.data is not None
        ctypes.memmove(tensor.data + offset, address, size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        assert tensor.data is not None
        ctypes.memmove(address, tensor.data + offset, size)

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor."""
        self._check_writable(tensor)
        assert tensor.data is not None
        ctypes.memset(tensor.data + offset, value, size)

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from host memory; anything else goes the caller's way."""
        storage = src.storage
        if storage is None or not storage.is_host or src.data is None:
            return False
        self.set_tensor(dst, src.data, 0, src.nbytes)
        return True

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if not self.is_writable:
            raise AllocError("a read-only mapping cannot be cleared")
        ctypes.memset(self.base, value, self.size)

    def close(self) -> None:
        """Give own pages back; a mapping stays with its owner."""
        owner, self.owner = self.owner, None
        if isinstance(owner, HostBlock):
            owner.close()


class CPUDevice(Device):
    """The machine's processors and memory."""

    def __init__(self) -> None:
        self.name = "CPU"
        self.description = _processor_name()
        self.type = DeviceType.CPU
        self._buft = CPUBufferType()
        self._buft.device = self

    @property
    def buffer_type(self) -> CPUBufferType:
        """Plain host memory."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Bytes available and in all."""
        return physical_memory()

    def supports_op(self, op: Tensor) -> bool:
        """Whether there is a kernel."""
        return _host_ops.supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether the memory is host memory."""
        return buft.is_host

    def buffer_from_host(self, address: int, size: int, owner: object) -> CPUBuffer:
        """Return a read-only buffer over existing memory, which ``owner`` keeps alive."""
        return CPUBuffer(self._buft, address, size, owner, is_writable=False)

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
        """The threads, started at the first use."""
        if self._pool is None:
            from ..kernels.cpu.pool import Pool

            self._pool = Pool(self.threads)
        return self._pool

    def graph_compute(self, graph: GraphView) -> None:
        """Run the nodes' plan, which is made at the first time."""
        plan = graph.plan
        if not isinstance(plan, _host_ops.HostPlan):
            plan = graph.plan = _host_ops.HostPlan(graph.nodes, _address)
        plan.run(self.pool)

    def close(self) -> None:
        """Stop the threads; they start again when needed."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _address(tensor: Tensor) -> int:
    """Return where kernels find a tensor's bytes: host addresses are what they are."""
    assert tensor.data is not None
    return tensor.data


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


def open_device(spec: str, *, index: int = 0, data: bool = True) -> CPUDevice:
    """Return the CPU of the name ``cpu``.

    Raises
    ------
    DeviceUnavailableError
        Something follows the name.
    """
    if spec:
        raise DeviceUnavailableError("cpu", f"there is no 'cpu:{spec}'", hint="the name is `cpu`")
    return devices()[0]


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
