"""A simulated device: its own memory, which host code cannot reach, and the CPU's kernels to compute in it.

Addresses of its tensors are numbers of its own; only this module knows where the bytes are. Fresh memory reads as NaN.
Everything that enters or leaves is counted, apart from anything that the scheduler says of itself.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import config
from ..backend import Backend, Device, Event
from ..buffer import Buffer, BufferType
from ..cost import DeviceProfile, parse_profile
from ..errors import BackendError, ComputeError, OutOfMemoryError
from ..graph import GraphView
from ..tensor import Tensor
from ..types import DeviceType, Op
from . import _host_ops
from ._machine import HostBlock, available_cores

if TYPE_CHECKING:
    from ..kernels.cpu.pool import Pool

__all__ = ["Sim", "SimBackend", "SimBuffer", "SimBufferType", "SimDevice", "Traffic", "devices", "open_device"]

#: As CUDA's buffers.
ALIGNMENT = 128
#: All bits set is NaN in every float type, and no sensible id.
POISON = 0xFF
#: Device addresses are of a range that no process has mapped; each buffer has its own piece.
_FIRST_ADDRESS = 1 << 56

Moment = Literal["alloc", "copy", "compute"]


@dataclass(slots=True)
class Traffic:
    """Bytes and calls that crossed the border of a device's memory."""

    bytes_in: int = 0
    n_in: int = 0
    bytes_out: int = 0
    n_out: int = 0


class SimBufferType(BufferType):
    """Memory of one simulated device."""

    __slots__ = ("owner",)

    def __init__(self, owner: SimDevice) -> None:
        super().__init__(owner.name, alignment=ALIGNMENT)
        self.owner = owner
        self.device = owner

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes of a tensor; rows of quantised types are padded to 512 elements, as CUDA's kernels read so far.

        Notes
        -----
        Mirrors `ggml_backend_cuda_buffer_type_get_alloc_size`.
        """
        size = tensor.nbytes
        if tensor.type.is_quantized and tensor.ne[0] % 512:
            size += tensor.type.row_size(512 - tensor.ne[0] % 512)
        return size

    def _alloc(self, size: int) -> SimBuffer:
        return self.owner.alloc(self, size)


class SimBuffer(Buffer):
    """A piece of a simulated device's memory.

    Attributes
    ----------
    traffic : Traffic
        What was written and read through this buffer.
    """

    __slots__ = ("_block", "device", "traffic")

    def __init__(self, buft: SimBufferType, size: int, base: int, block: HostBlock | None) -> None:
        super().__init__(buft, size, base)
        self.device = buft.owner
        self.traffic = Traffic()
        self._block = block

    def _arena(self, tensor: Tensor) -> int:
        """Return where the bytes of a tensor really are."""
        if self._block is None:
            raise BackendError(
                self.device.name,
                f"'{tensor.name}' has no data: the device only plans",
                hint="open the device with data to compute",
            )
        assert tensor.data is not None
        return self._block.address + tensor.data - self.base

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into the tensor."""
        self.device.at("copy", tensor.name)
        self._count_in(size)
        if self._block is not None:
            ctypes.memmove(self._arena(tensor) + offset, address, size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        self.device.at("copy", tensor.name)
        source = self._arena(tensor) + offset
        self.traffic.bytes_out += size
        self.traffic.n_out += 1
        self.device.traffic.bytes_out += size
        self.device.traffic.n_out += 1
        ctypes.memmove(address, source, size)

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor."""
        if self._block is not None:
            ctypes.memset(self._arena(tensor) + offset, value, size)

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from another simulated device, directly."""
        storage = src.storage
        if not isinstance(storage, SimBuffer):
            return False
        self.device.at("copy", dst.name)
        self._count_in(src.nbytes)
        if self._block is not None:
            ctypes.memmove(self._arena(dst), storage._arena(src), src.nbytes)
        return True

    def _count_in(self, size: int) -> None:
        self.traffic.bytes_in += size
        self.traffic.n_in += 1
        self.device.traffic.bytes_in += size
        self.device.traffic.n_in += 1

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if self._block is not None:
            self._block.fill(value)

    def close(self) -> None:
        """Give the memory back to the device."""
        if self.size:
            self.device.free(self.size)
            self.size = 0
        if self._block is not None:
            self._block.close()
            self._block = None

    def __del__(self) -> None:
        self.close()


class SimDevice(Device):
    """A device that need not be there.

    Parameters
    ----------
    profile : DeviceProfile
        How much memory it has, and how fast it and its link are.
    index : int
        Number in its name: ``SIM0``.
    data : bool
        False: it only plans; memory has a size but no bytes.

    Attributes
    ----------
    traffic : Traffic
        What crossed the border of its memory so far.
    """

    def __init__(self, profile: DeviceProfile, *, index: int = 0, data: bool = True) -> None:
        self.profile = profile
        self.name = f"SIM{index}"
        self.description = profile.description
        self.type = DeviceType.GPU
        self.has_data = data
        self.used_bytes = 0
        self.traffic = Traffic()
        self._buft = SimBufferType(self)
        self._faults: dict[Moment, int] = {}
        self._addresses = itertools.count(_FIRST_ADDRESS, 1 << 44)

    @property
    def buffer_type(self) -> SimBufferType:
        """Its own memory."""
        return self._buft

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        return self.profile.memory_bytes - self.used_bytes, self.profile.memory_bytes

    def alloc(self, buft: SimBufferType, size: int) -> SimBuffer:
        """Return a new buffer.

        Raises
        ------
        OutOfMemoryError
            The profile has not so much left.
        """
        free, total = self.memory()
        try:
            self.at("alloc", "a buffer")
        except BackendError:
            raise OutOfMemoryError(self.name, size, free, "a buffer", hint="a fault that was asked for") from None
        if size > free:
            raise OutOfMemoryError(
                self.name,
                size,
                free,
                "a buffer",
                hint=f"the device has {total / 1024**3:.1f} GiB; place fewer layers or experts on it",
            )
        block = None
        if self.has_data:
            block = HostBlock(size, owner=self.name, purpose="a simulated device's memory")
            block.fill(POISON)
        self.used_bytes += size
        return SimBuffer(buft, size, next(self._addresses), block)

    def free(self, size: int) -> None:
        """Take note that a buffer was given back."""
        self.used_bytes -= size

    def supports_op(self, op: Tensor) -> bool:
        """Whether there is a kernel; the CPU's kernels compute in the device's memory."""
        return _host_ops.supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether it is this device's own memory."""
        return buft is self._buft

    def offload_op(self, op: Tensor) -> bool:
        """Whether the batch is large enough to be worth copying the weights.

        Notes
        -----
        Mirrors `ggml_backend_cuda_device_offload_op`.
        """
        return _batch_size(op) >= config.op_offload_min_batch()

    def event_new(self) -> SimEvent:
        """Return a new event."""
        return SimEvent()

    def backend(self) -> SimBackend:
        """Return a new stream of work."""
        return SimBackend(self)

    # -- faults --------------------------------------------------------------

    def fail_at(self, moment: Moment, *, after: int = 0) -> None:
        """Let an allocation, copy or computing fail, once, ``after`` more of its kind."""
        self._faults[moment] = after

    def at(self, moment: Moment, what: str) -> None:
        """Raise the fault asked for, if this is the moment."""
        left = self._faults.get(moment)
        if left is None:
            return
        if left > 0:
            self._faults[moment] = left - 1
            return
        del self._faults[moment]
        if moment == "compute":
            raise ComputeError(self.name, "computing failed (a fault that was asked for)", node=what)
        raise BackendError(self.name, f"{moment} of '{what}' failed (a fault that was asked for)")


def _batch_size(op: Tensor) -> int:
    """Mirrors `get_op_batch_size` of upstream's CUDA backend."""
    if op.op is Op.GET_ROWS:
        return 0
    if op.op is Op.MUL_MAT:
        return op.ne[1]
    if op.op in (Op.MUL_MAT_ID, Op.ROPE, Op.ROPE_BACK):
        return op.ne[2]
    return op.nrows


class SimEvent(Event):
    """A point in a stream. Work is done as it is given, so that every recorded point is reached."""

    __slots__ = ()

    def synchronize(self) -> None:
        """Return at once."""


class SimBackend(Backend):
    """A stream of work on a simulated device.

    Copies and kernels are done when they are given, in stream order.
    """

    def __init__(self, device: SimDevice) -> None:
        self.device: SimDevice = device
        self.name = device.name
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The threads that stand for the device."""
        if self._pool is None:
            from ..kernels.cpu.pool import Pool

            self._pool = Pool(available_cores())
        return self._pool

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into a tensor, in stream order."""
        self._own(tensor).set_tensor(tensor, address, offset, size)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of a tensor to host memory, in stream order."""
        self._own(tensor).get_tensor(tensor, address, offset, size)

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Copy from another simulated device, in stream order."""
        return isinstance(src.storage, SimBuffer) and self._own(dst).cpy_tensor(src, dst)

    def event_record(self, event: Event) -> None:
        """Mark the end of what was given so far: it is done."""

    def event_wait(self, event: Event) -> None:
        """Wait for what is done already."""

    def graph_compute(self, graph: GraphView) -> None:
        """Run the nodes' plan in the device's memory.

        Raises
        ------
        BackendError
            A tensor of a node lies elsewhere: a split input was not copied.
        """
        nodes = graph.nodes
        self.device.at("compute", nodes[0].name if nodes else "")
        if not self.device.has_data:
            return
        plan = graph.plan
        if not isinstance(plan, _host_ops.HostPlan):
            plan = graph.plan = _host_ops.HostPlan(nodes, self._arena_address)
        plan.run(self.pool)

    def _own(self, tensor: Tensor) -> SimBuffer:
        storage = tensor.storage
        if not isinstance(storage, SimBuffer) or storage.device is not self.device:
            where = "nowhere" if storage is None else f"in {storage.buft.name}"
            raise BackendError(self.name, f"'{tensor.name}' lies {where}, not in the device's memory")
        return storage

    def _arena_address(self, tensor: Tensor) -> int:
        return self._own(tensor)._arena(tensor)

    def close(self) -> None:
        """Stop the threads; they start again when needed."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


@contextmanager
def counted(device: SimDevice) -> Iterator[Traffic]:
    """Count what crosses the border of a device's memory within a block.

    Yields
    ------
    Traffic
        Filled when the block ends.
    """
    before = Traffic(**{f: getattr(device.traffic, f) for f in Traffic.__slots__})
    seen = Traffic()
    try:
        yield seen
    finally:
        for f in Traffic.__slots__:
            setattr(seen, f, getattr(device.traffic, f) - getattr(before, f))


def devices() -> list[SimDevice]:
    """Return nothing: a simulated device is made when it is named."""
    return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> SimDevice:
    """Return a device of a profile, ``rtx4090-pcie4`` if none is named.

    Raises
    ------
    DeviceUnavailableError
        There is no such profile.
    """
    return SimDevice(parse_profile(spec or "rtx4090-pcie4"), index=index, data=data)


def why_missing() -> str:
    """Say how to get one."""
    return "made when named, as in --device sim:rtx4090-pcie4,cpu"


def Sim(profile: str = "rtx4090-pcie4", *, index: int = 0, data: bool = True) -> SimBackend:
    """Return a backend on a simulated device.

    Examples
    --------
    >>> Sim("custom:1GiB,100GB/s,10GB/s").device.memory()
    (1073741824, 1073741824)
    """
    return SimDevice(parse_profile(profile), index=index, data=data).backend()
