"""A simulated device: its own memory, which host code cannot reach, and the CPU's kernels to compute in it.

Addresses of its tensors are numbers of its own, which no process can have; only `_sim_memory` knows where the bytes are.
Fresh memory reads as NaN. Everything that enters or leaves is counted, apart from anything that the scheduler says of
itself. Work goes through one door, `SimBackend._submit`. Without a seed it is done at once; with one it is done late, in
any order that the waits between streams and host allow, so that a missing wait shows as a wrong number.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ... import config
from ...backend import Backend, Device, Event, answers_by_kind, op_batch_size
from ...buffer import BufferType
from ...cost import DeviceProfile, parse_profile
from ...errors import BackendError, ComputeError, DeviceUnavailableError, OutOfMemoryError
from ...graph import GraphView
from ...tensor import Tensor
from ...types import DeviceType, TensorFlag
from ..host.dataless import FIRST_ADDRESS, DatalessHostBufferType
from ..host.machine import HostBlock, HostBufferType, available_cores, plan_of, shared_pool
from ..host.race_watch import HOST, Access, Hazard, HazardWatch, Stream, access_to, accesses_of, host_access
from ..host.support import plans_op, supports_op
from .faults import Faults, Moment
from .memory import POISON, SimBuffer, SimBufferType, Traffic

if TYPE_CHECKING:
    from ...kernels.cpu.pool import Pool


#: Each device and each buffer has its own piece of the addresses that no process has.
_DEVICE_BYTES = 1 << 52


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
    seed : int, optional
        Do work late, in an order that it chooses among those that are allowed.

    Attributes
    ----------
    traffic : Traffic
        What crossed the border of its memory so far.
    is_lost : bool
        Whether it fell off the bus: everything fails until `recover`.
    watch : HazardWatch or None
        With a seed, looks for uses of memory that no wait orders; see `hazards`.
    """

    def __init__(self, profile: DeviceProfile, *, index: int = 0, data: bool = True, seed: int | None = None) -> None:
        self.profile: DeviceProfile = profile
        self.name = f"SIM{index}"
        self.description = profile.description
        self.type = DeviceType.GPU
        self.has_data = data
        self.used_bytes = 0
        self.traffic = Traffic()
        self._buft = SimBufferType(self)
        self.seed = seed
        self.watch = None if seed is None else HazardWatch()
        self.is_lost = False
        self._faults = Faults()
        self._backends: list[weakref.ref[SimBackend]] = []
        self._buffers: weakref.WeakSet[SimBuffer] = weakref.WeakSet()
        self._index = index
        self._addresses = itertools.count(FIRST_ADDRESS + index * _DEVICE_BYTES, 1 << 44)
        self._offload_min_batch = config.op_offload_min_batch()
        self._host_buft: BufferType | None = None
        if profile.is_pinned:
            self._host_buft = (HostBufferType if data else DatalessHostBufferType)(f"{self.name}_Host")
            self._host_buft.device = self

    @property
    def buffer_type(self) -> SimBufferType:
        """Its own memory."""
        return self._buft

    @property
    def host_buffer_type(self) -> BufferType | None:
        """Pinned host memory, if the profile has it."""
        return self._host_buft

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
        except DeviceUnavailableError:
            raise
        except BackendError:
            raise OutOfMemoryError(self.name, size, free, "a buffer", hint="a fault that was asked for") from None
        if size > free:
            raise OutOfMemoryError(
                self.name,
                size,
                free,
                "a buffer",
                hint=f"the device has {total / 1024**2:,.0f} MiB in all; place fewer layers or experts there",
            )
        block = None
        if self.has_data:
            block = HostBlock(size, owner=self.name, purpose="a simulated device's memory")
            block.fill(POISON)
        self.used_bytes += size
        buffer = SimBuffer(buft, size, next(self._addresses), block)
        self._buffers.add(buffer)
        return buffer

    def free(self, size: int) -> None:
        """Take note that a buffer was given back."""
        self.used_bytes -= size

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Return whether the CPU's kernels, which compute in the device's memory, can run the node; see `plans_op` for plans."""
        return supports_op(op) if self.has_data else plans_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Whether it is this device's own memory."""
        return buft is self._buft

    @answers_by_kind
    def offload_op(self, op: Tensor) -> bool:
        """Whether the batch is large enough to be worth copying the weights.

        Notes
        -----
        Mirrors `ggml_backend_cuda_device_offload_op`.
        """
        return op_batch_size(op) >= self._offload_min_batch

    def event_new(self) -> SimEvent:
        """Return a new event."""
        return SimEvent()

    def backend(self, *, threads: int | None = None) -> SimBackend:
        """Return a new stream of work; as many threads stand for the device, one for each core if not given."""
        backend = SimBackend(self, threads=threads)
        self._backends.append(weakref.ref(backend))
        return backend

    def finish(self) -> None:
        """Do all work that is still to be done on any stream; what fails is forgotten."""
        for known in self._backends:
            backend = known()
            while backend is not None and backend.n_done < backend.n_submitted:
                try:
                    backend.synchronize()
                except BackendError:
                    continue

    def next_seed(self) -> str:
        """Return what the next stream draws its order from."""
        return f"{self.seed}/{self._index}/{len(self._backends)}"

    def next_stream(self) -> Stream:
        """Return what orders the work of the next stream."""
        n = len(self._backends)
        return Stream(self.name if n == 0 else f"{self.name} (stream {n})", self.watch)

    def reseed(self, seed: int | None) -> None:
        """Do the work of all streams late, in an order drawn anew, or at once (None); hazards found so far are forgotten."""
        self.finish()
        self.seed = seed
        self.watch = None if seed is None else HazardWatch()
        for i, known in enumerate(self._backends):
            backend = known()
            if backend is not None:
                backend.stream.watch = self.watch
                backend._random = None if seed is None else random.Random(f"{seed}/{self._index}/{i}")

    @property
    def hazards(self) -> list[Hazard]:
        """Uses of its memory, or by it of the host's, that no wait orders, found so far; always empty without a seed."""
        return [] if self.watch is None else list(self.watch.hazards)

    # -- faults --------------------------------------------------------------

    def fail_at(self, moment: Moment, *, after: int = 0) -> None:
        """Let an allocation, copy or computing fail, once, ``after`` more of its kind; asked for as often as wanted.

        ``lost`` is the moment at which the device goes away for good, ``after`` more of any kind.
        """
        self._faults.ask(moment, after)

    def slow_link(self, factor: float, *, after: int = 0) -> None:
        """Let copies take ``factor`` times as long, ``after`` more of them, until another factor is asked for.

        In virtual time only: copies are counted as a scheduler with a clock makes them; the bytes are not held back.
        """
        if not factor > 0:
            raise BackendError(self.name, f"a link cannot take {factor} times as long", hint="2.0 halves its rate")
        self._faults.slow_down(factor, after)

    def link_slowdown(self) -> float:
        """Return how many times longer than the profile says the next copy takes, and count it."""
        return self._faults.next_slowdown()

    def clear_faults(self) -> None:
        """Forget all faults that were asked for and did not come yet; a slow link is as its profile says again."""
        self._faults.clear()

    def recover(self) -> None:
        """Bring a lost device back: its memory is fresh, whatever was in it is gone."""
        self.finish()
        self.is_lost = False
        for buffer in self._buffers:
            buffer.clear(POISON)

    def at(self, moment: Moment, what: str) -> None:
        """Raise the fault asked for, if this is the moment."""
        if self._faults.comes("lost"):
            self.is_lost = True
        if self.is_lost:
            raise DeviceUnavailableError(
                self.name, f"the device was lost before {moment} of '{what}'", hint="recover() brings it back, empty"
            )
        if not self._faults.comes(moment):
            return
        if moment == "compute":
            raise ComputeError(self.name, "computing failed (a fault that was asked for)", node=what)
        raise BackendError(self.name, f"{moment} of '{what}' failed (a fault that was asked for)")


class SimEvent(Event):
    """A point in a stream: so much of its work.

    Attributes
    ----------
    backend : SimBackend or None
        Whose stream; None until it is recorded.
    n_submitted : int
        Pieces of work given before the point.
    """

    __slots__ = ("backend", "n_submitted")

    def __init__(self) -> None:
        self.backend: SimBackend | None = None
        self.n_submitted = 0

    def synchronize(self) -> None:
        """Let the host wait until the point is reached."""
        if self.backend is not None:
            self.backend.stream.host_waits(self.n_submitted)
            self.backend.wait_for(self.n_submitted)


class SimBackend(Backend):
    """A stream of work on a simulated device.

    Parameters
    ----------
    threads : int, optional
        That stand for the device; one for each core that the process may use if not given.

    Attributes
    ----------
    n_submitted, n_done : int
        Pieces of work given, and done: the same after each call without a seed, as work is done when it is given.
    stream : Stream
        What orders its work, for the search of hazards.
    """

    def __init__(self, device: SimDevice, *, threads: int | None = None) -> None:
        self.device: SimDevice = device
        self.name = device.name
        self.threads = available_cores() if threads is None else threads
        self.n_submitted = self.n_done = 0
        self.stream = device.next_stream()
        self._late: deque[Callable[[], None]] = deque()
        self._random = None if device.seed is None else random.Random(device.next_seed())
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The threads that stand for the device, shared with all backends that have as many."""
        if self._pool is None:
            self._pool = shared_pool(self.threads)
        return self._pool

    # -- the stream ----------------------------------------------------------

    def _submit(self, work: Callable[[], None]) -> None:
        """Give one piece of work to the stream. With a seed it is done at any time until somebody waits for it."""
        self.n_submitted += 1
        self._late.append(work)
        if self._random is None:
            self.wait_for(self.n_submitted)
        elif self._random.random() < 0.5:  # none as often as some
            self.wait_for(self.n_done + self._random.randint(1, len(self._late)))

    def wait_for(self, n: int) -> None:
        """Do work until n pieces are done."""
        while self.n_done < n:
            self.n_done += 1  # work that fails does not come again
            self._late.popleft()()

    def synchronize(self) -> None:
        """Let the host wait until all work is done."""
        self.stream.host_waits(self.n_submitted)
        self.wait_for(self.n_submitted)

    def event_record(self, event: Event) -> None:
        """Let an event stand for all work given so far."""
        assert isinstance(event, SimEvent)
        event.backend, event.n_submitted = self, self.n_submitted

    def event_wait(self, event: Event) -> None:
        """Let the stream wait for an event, also of another simulated device: for what it stands for now."""
        assert isinstance(event, SimEvent)
        if event.backend is not None:
            self._wait_in_stream(event.backend, event.n_submitted)

    def _wait_in_stream(self, backend: SimBackend, n: int) -> None:
        """Let what comes next in the stream wait for n pieces of work of another."""
        if n > backend.stream.n_host:
            self.stream.waits.append((self.n_submitted + 1, backend.stream, n))
        self._submit(lambda: backend.wait_for(n))

    def _watch(self, device: SimDevice, *accesses: Access) -> None:
        """Let what the next piece of work does with a device's or the host's memory be checked, if work is done late."""
        if device.watch is None:
            return
        on_host = [a for a in accesses if a.start < FIRST_ADDRESS]
        device.watch.by_stream(self.stream, self.n_submitted + 1, [a for a in accesses if a.start >= FIRST_ADDRESS])
        if on_host:
            HOST.by_stream(self.stream, self.n_submitted + 1, on_host)

    def _watch_host(self, address: int, size: int, tensor: Tensor, *, is_write: bool) -> None:
        """Let the next copy's use of host memory be checked, if it is done late; a host without data has none."""
        if self.device.watch is not None and address < FIRST_ADDRESS:
            access = host_access(address, size, tensor, is_write=is_write)
            HOST.by_stream(self.stream, self.n_submitted + 1, [access])

    # -- work ----------------------------------------------------------------

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into a tensor, in stream order."""
        work = self._own(tensor).writing(tensor, address, offset, size)
        self._watch(self.device, access_to(tensor, is_write=True, offset=offset, size=size))
        self._watch_host(address, size, tensor, is_write=False)
        self._submit(work)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of a tensor to host memory, in stream order."""
        work = self._own(tensor).reading(tensor, address, offset, size)
        self._watch(self.device, access_to(tensor, is_write=False, offset=offset, size=size))
        self._watch_host(address, size, tensor, is_write=True)
        self._submit(work)

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Copy from a simulated device in the order of the source's stream; False for any other memory.

        Notes
        -----
        Mirrors `ggml_backend_cuda_cpy_tensor_async`: the receiving stream waits for an event after the copy. What it was
        given before does not hold the copy back: that is for the scheduler to see to.
        """
        if not isinstance(src.storage, SimBuffer) or not isinstance(backend_src, SimBackend):
            return False
        if src.is_empty:
            return True
        work = self._own(dst).copying(src, dst)
        backend_src._watch(src.storage.device, access_to(src, is_write=False))
        backend_src._watch(self.device, access_to(dst, is_write=True, size=src.nbytes))
        backend_src._submit(work)
        if backend_src is not self:
            self._wait_in_stream(backend_src, backend_src.n_submitted)
        return True

    def graph_compute(self, graph: GraphView) -> None:
        """Run the nodes' plan in the device's memory; a device that only plans checks where the tensors lie.

        Raises
        ------
        BackendError
            A tensor of a node lies elsewhere: a split input was not copied.
        ComputeError
            A row index is out of bounds, or the computation was stopped, or a fault was asked for.
        ExpertIdError
            An id that is no expert.
        """
        first = graph.graph.nodes[graph.i_start].name if len(graph) else ""
        plan = plan_of(graph, self.device, self.name, self._arena_address) if self.device.has_data else None
        if plan is None:
            self._check_places(graph.nodes)

        def compute() -> None:
            self.device.at("compute", first)
            if plan is not None:
                plan.run(self.pool)

        if self.device.watch is not None:
            self._watch(self.device, *accesses_of(graph))
        self._submit(compute)

    def _check_places(self, nodes: Sequence[Tensor]) -> None:
        for node in nodes:
            if node.flags & TensorFlag.COMPUTE and not node.op.is_empty:
                for tensor in (node, *node.src):
                    if tensor is not None and not tensor.is_empty:
                        self._check_own(tensor)

    def _check_own(self, tensor: Tensor) -> None:
        storage = tensor.storage
        if storage is None or storage.buft is not self.device.buffer_type or tensor.data is None:
            where = "nowhere" if storage is None else f"in {storage.buft.name}"
            raise BackendError(
                self.name, f"'{tensor.name}' lies {where}, not in the device's memory", hint="it was not copied"
            )

    def _own(self, tensor: Tensor) -> SimBuffer:
        self._check_own(tensor)
        assert isinstance(tensor.storage, SimBuffer)
        return tensor.storage

    def _arena_address(self, tensor: Tensor) -> int:
        return self._own(tensor)._arena(tensor)

    def close(self) -> None:
        """Let the threads go; they start again when needed."""
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


def Sim(
    profile: str = "rtx4090-pcie4",
    *,
    index: int = 0,
    data: bool = True,
    threads: int | None = None,
    seed: int | None = None,
) -> SimBackend:
    """Return a backend on a simulated device.

    Parameters
    ----------
    profile : str
        Of `pyggml.cost.PROFILES`, or ``custom:24GiB,1000GB/s,25GB/s``.
    index : int
        Number in its name, ``SIM0``; each device of a scheduler needs its own.
    data : bool
        False: it only plans; memory has a size but no bytes.
    threads : int, optional
        That compute for it; one for each core if not given.
    seed : int, optional
        Do work late, in an order drawn from it, so that a missing wait shows as a wrong number or NaN.

    Examples
    --------
    >>> Sim("custom:1GiB,100GB/s,10GB/s").device.memory()
    (1073741824, 1073741824)
    """
    return SimDevice(parse_profile(profile), index=index, data=data, seed=seed).backend(threads=threads)
