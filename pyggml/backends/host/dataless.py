"""Host memory with sizes and addresses but no bytes, and a CPU that computes nothing: for plans of any size.

Addresses are numbers that no process uses. The scheduler allocates, copies and launches as with data. Reading a value
raises an error.
"""

from __future__ import annotations

import itertools

from ...backend import Backend, Device, answers_by_kind
from ...buffer import Buffer, BufferType
from ...errors import BackendError
from ...graph import GraphView
from ...opset import plans_op
from ...tensor import Tensor
from ...types import DeviceType
from .machine import TENSOR_ALIGNMENT, physical_memory

__all__ = ["FIRST_ADDRESS", "DatalessCPU", "DatalessHostBufferType"]

#: First address; no process has memory at or above it.
FIRST_ADDRESS = 1 << 56
_FIRST_HOST_ADDRESS = 1 << 61
_addresses = itertools.count(_FIRST_HOST_ADDRESS, 1 << 44)


class DatalessHostBuffer(Buffer):
    """Host memory without bytes."""

    __slots__ = ()

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Do nothing."""

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Do nothing if the target has no bytes either; otherwise raise `BackendError`."""
        if address < FIRST_ADDRESS:
            raise BackendError(
                self.buft.name,
                f"'{tensor.name}' has no data: the host only plans",
                hint="open the session with data to read results",
            )

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Do nothing."""

    def clear(self, value: int) -> None:
        """Do nothing."""


class DatalessHostBufferType(BufferType):
    """Host memory without bytes, with the sizes of `HostBufferType`."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name, alignment=TENSOR_ALIGNMENT, is_host=True)

    def _alloc(self, size: int) -> DatalessHostBuffer:
        return DatalessHostBuffer(self, size, next(_addresses))

    def _alloc_empty(self) -> DatalessHostBuffer:
        return DatalessHostBuffer(self, 0, 0)


class DatalessCPU(Device):
    """The CPU for plans: it answers like `CPUDevice`, but has no memory and computes nothing."""

    def __init__(self) -> None:
        self.name = "CPU"
        self.description = "host of a plan, without data"
        self.type = DeviceType.CPU
        self.has_data = False
        self._buft = DatalessHostBufferType("CPU")
        self._buft.device = self

    @property
    def only_counts(self) -> bool:
        """Always: there are no data."""
        return True

    @property
    def buffer_type(self) -> DatalessHostBufferType:
        """Host memory."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Available and total bytes of this machine."""
        return physical_memory()

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Return whether the CPU's kernels can run a node; ops without any kernel in pyggml count as supported."""
        return plans_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Return whether a buffer type is host memory."""
        return buft.is_host

    def backend(self) -> DatalessCPUBackend:
        """Return a new backend."""
        return DatalessCPUBackend(self)


class DatalessCPUBackend(Backend):
    """Computes nothing, but checks that the nodes could be computed."""

    def __init__(self, device: DatalessCPU) -> None:
        self.device = device
        self.name = device.name

    def graph_compute(self, graph: GraphView) -> None:
        """Check that the tensors of the nodes are in host memory.

        Raises
        ------
        BackendError
            A tensor of a node is in another device's memory: an input of the split was not copied.
        """
        for node in graph.nodes:
            if node.op.is_empty or node.is_empty:
                continue
            for tensor in (node, *node.src):
                if tensor is None:
                    continue
                storage = tensor.storage
                if (storage is None or not storage.is_host or tensor.data is None) and not tensor.is_empty:
                    where = "in no memory" if storage is None else f"in {storage.buft.name}"
                    raise BackendError(self.name, f"'{tensor.name}' is {where}, not in host memory")
