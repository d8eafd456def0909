"""Host memory that has a size and addresses but no bytes, and a CPU that computes nothing: for plans of any size.

Addresses are numbers that no process can have. Whatever the scheduler does goes through as with data: allocation,
copies, launches. Reading a number fails with an error that says so.
"""

from __future__ import annotations

import itertools

from ...backend import Backend, Device, answers_by_kind
from ...buffer import Buffer, BufferType
from ...errors import BackendError
from ...graph import GraphView
from ...tensor import Tensor
from ...types import DeviceType
from .machine import TENSOR_ALIGNMENT, physical_memory
from .support import plans_op

__all__ = ["FIRST_ADDRESS", "DatalessCPU", "DatalessHostBufferType"]

#: No process has memory here or above, on any machine that Python runs on.
FIRST_ADDRESS = 1 << 56
_FIRST_HOST_ADDRESS = 1 << 61
_addresses = itertools.count(_FIRST_HOST_ADDRESS, 1 << 44)


class DatalessHostBuffer(Buffer):
    """Host memory without bytes."""

    __slots__ = ()

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Take no bytes."""

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Give no bytes to memory that has none; refuse any other."""
        if address < FIRST_ADDRESS:
            raise BackendError(
                self.buft.name,
                f"'{tensor.name}' has no data: the host only plans",
                hint="open the session with data to read results",
            )

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set no bytes."""

    def clear(self, value: int) -> None:
        """Set no bytes."""


class DatalessHostBufferType(BufferType):
    """Host memory without bytes, laid out as `HostBufferType`."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name, alignment=TENSOR_ALIGNMENT, is_host=True)

    def _alloc(self, size: int) -> DatalessHostBuffer:
        return DatalessHostBuffer(self, size, next(_addresses))


class DatalessCPU(Device):
    """The machine's processors, for plans: the same answers, no memory, no work."""

    def __init__(self) -> None:
        self.name = "CPU"
        self.description = "host of a plan, without data"
        self.type = DeviceType.CPU
        self.has_data = False
        self._buft = DatalessHostBufferType("CPU")
        self._buft.device = self

    @property
    def buffer_type(self) -> DatalessHostBufferType:
        """Host memory."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Bytes available and in all, of this machine."""
        return physical_memory()

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Return whether our CPU's kernels can run the node, as `run` would; ops without any kernel here count as ggml's."""
        return plans_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether the memory is host memory."""
        return buft.is_host

    def backend(self) -> DatalessCPUBackend:
        """Return a new stream of no work."""
        return DatalessCPUBackend(self)


class DatalessCPUBackend(Backend):
    """Computes nothing, and checks that it could."""

    def __init__(self, device: DatalessCPU) -> None:
        self.device = device
        self.name = device.name

    def graph_compute(self, graph: GraphView) -> None:
        """Check where the tensors of the nodes lie.

        Raises
        ------
        BackendError
            A tensor of a node is in another device's memory: a split input was not copied.
        """
        for node in graph.nodes:
            if node.op.is_empty or node.is_empty:
                continue
            for tensor in (node, *node.src):
                if tensor is None or tensor.is_empty:
                    continue
                storage = tensor.storage
                if storage is None or not storage.is_host or tensor.data is None:
                    where = "in no memory" if storage is None else f"in {storage.buft.name}"
                    raise BackendError(self.name, f"'{tensor.name}' is {where}, not in host memory")
