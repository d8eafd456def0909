"""A simulated device: separate memory, which host code cannot reach, and the CPU's kernels.

Addresses of its tensors are numbers that no process address can have; only `memory.py` knows where the bytes are. Fresh
memory is NaN. The device counts everything that goes in or out, independently of the scheduler's statistics. All work
passes through `SimBackend._submit`. Without a seed it is done at once. With a seed it is done late, in any order that
the waits between streams and host allow, so that a missing wait can give a wrong number.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ... import config
from ...backend import Backend, Device, Event, answers_by_kind, op_batch_size
from ...buffer import BufferType
from ...cost import DeviceProfile, parse_profile
from ...errors import BackendError, ComputeError, DeviceUnavailableError, OutOfMemoryError
from ...graph import GraphView
from ...opset import plans_op, supports_op
from ...tensor import Tensor
from ...types import DeviceType, TensorFlag
from ..host.dataless import FIRST_ADDRESS, DatalessHostBufferType
from ..host.machine import HostBlock, HostBufferType, plan_of, shared_pool, threads_of
from ..host.race_watch import HOST, Access, Hazard, HazardWatch, Stream, access_to, accesses_of, host_access
from .faults import Faults, Moment
from .memory import POISON, SimBuffer, SimBufferType, Traffic

if TYPE_CHECKING:
    from ...kernels.cpu.pool import Pool
    from ..host.plan import HostPlan


#: Each device and each buffer has its own piece of the addresses that no process has.
_DEVICE_BYTES = 1 << 52


class SimDevice(Device):
    """A simulated device.

    Parameters
    ----------
    profile : DeviceProfile
        The size of its memory, and the speed of the device and its link.
    index : int
        The number in its name: ``SIM0``.
    data : bool
        False: it only plans; memory has a size but no bytes.
    seed : int, optional
        Do work late, in an allowed order that depends on the seed.

    Attributes
    ----------
    traffic : Traffic
        The bytes and calls that went in and out of its memory so far.
    is_lost : bool
        Whether the device is lost: every call fails until `recover`.
    watch : HazardWatch or None
        With a seed, finds accesses to memory that no wait orders; see `hazards`.
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
        """The device's memory."""
        return self._buft

    @property
    def host_buffer_type(self) -> BufferType | None:
        """Pinned host memory, if the profile has it."""
        return self._host_buft

    def memory(self) -> tuple[int, int]:
        """Return the free and the total memory, in bytes."""
        return self.profile.memory_bytes - self.used_bytes, self.profile.memory_bytes

    def alloc(self, buft: SimBufferType, size: int) -> SimBuffer:
        """Return a new buffer.

        Raises
        ------
        OutOfMemoryError
            The device has too little memory left.
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
        """Count a freed buffer."""
        self.used_bytes -= size

    @answers_by_kind
    def supports_op(self, op: Tensor) -> bool:
        """Return whether the CPU's kernels can run the node in the device's memory; see `plans_op` for plans."""
        return supports_op(op) if self.has_data else plans_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Return whether it is this device's memory."""
        return buft is self._buft

    @answers_by_kind
    def offload_op(self, op: Tensor) -> bool:
        """Return whether the batch is large enough that copying the weights pays.

        Notes
        -----
        Mirrors `ggml_backend_cuda_device_offload_op`.
        """
        return op_batch_size(op) >= self._offload_min_batch

    def event_new(self) -> SimEvent:
        """Return a new event."""
        return SimEvent()

    def backend(self, *, threads: int | None = None) -> SimBackend:
        """Return a new stream of work that computes with ``threads`` threads; by default one per core."""
        backend = SimBackend(self, threads=threads)
        self._backends.append(weakref.ref(backend))
        return backend

    def finish(self) -> None:
        """Do all pending work of all streams, and ignore failures."""
        for known in self._backends:
            backend = known()
            while backend is not None and backend.n_done < backend.n_submitted:
                try:
                    backend.synchronize()
                except BackendError:
                    continue

    def next_seed(self) -> str:
        """Return the seed of the next stream."""
        return f"{self.seed}/{self._index}/{len(self._backends)}"

    def next_stream(self) -> Stream:
        """Return the order of the next stream's work."""
        n = len(self._backends)
        return Stream(self.name if n == 0 else f"{self.name} (stream {n})", self.watch)

    def reseed(self, seed: int | None) -> None:
        """Do the work of all streams late, in an order of the seed, or at once (None); forget earlier hazards."""
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
        """The accesses found so far that no wait orders, to its memory or by it to host memory; empty without a seed."""
        return [] if self.watch is None else list(self.watch.hazards)

    # -- faults --------------------------------------------------------------

    def fail_at(self, moment: Moment, *, after: int = 0) -> None:
        """Make an allocation, copy or compute fail once, after ``after`` more of its kind. Can be called several times.

        With ``lost`` the device is lost after ``after`` more calls of any kind.
        """
        self._faults.ask(moment, after)

    def slow_link(self, factor: float, *, after: int = 0) -> None:
        """Make copies take ``factor`` times as long, after ``after`` more copies, until another factor is set.

        This changes only virtual time. Copies of schedulers with a clock are counted.
        """
        if not factor > 0:
            raise BackendError(self.name, f"a link cannot take {factor} times as long", hint="2.0 halves its rate")
        self._faults.slow_down(factor, after)

    def link_slowdown(self) -> float:
        """Return the factor by which the next copy is slower than the profile, and count the copy."""
        return self._faults.next_slowdown()

    def clear_faults(self) -> None:
        """Remove all pending faults, and restore the speed of the link."""
        self._faults.clear()

    @property
    def repeats(self) -> bool:
        """Whether equal work has equal effects: it is done at once, and no fault is pending."""
        return self.has_data and self.seed is None and not self.is_lost and self._faults.is_clear

    @property
    def only_counts(self) -> bool:
        """Whether copies and computes do nothing but count: there are no data, and no fault is pending."""
        return not self.has_data and self.seed is None and not self.is_lost and self._faults.is_clear

    def counters(self) -> list[tuple[Any, str]]:
        """Return what is counted of calls: an object and the name of the attribute, or a dict and the key."""
        return self._faults.counters()

    def recover(self) -> None:
        """Bring a lost device back with fresh memory; its contents are lost."""
        self.finish()
        self.is_lost = False
        for buffer in self._buffers:
            buffer.clear(POISON)

    def at(self, moment: Moment, what: str) -> None:
        """Raise a pending fault if its moment has come."""
        faults = self._faults
        if faults.is_quiet and not self.is_lost:
            counts = faults.counts
            counts["lost"] += 1
            counts[moment] += 1
            return
        if faults.comes("lost"):
            self.is_lost = True
        if self.is_lost:
            raise DeviceUnavailableError(
                self.name, f"the device was lost before {moment} of '{what}'", hint="recover() brings it back, empty"
            )
        if not faults.comes(moment):
            return
        if moment == "compute":
            raise ComputeError(self.name, "computing failed (a fault that was asked for)", node=what)
        raise BackendError(self.name, f"{moment} of '{what}' failed (a fault that was asked for)")


class SimEvent(Event):
    """A point in a stream.

    Attributes
    ----------
    backend : SimBackend or None
        The backend of the stream; None until it is recorded.
    n_submitted : int
        The number of pieces of work submitted before the point.
    """

    __slots__ = ("backend", "n_submitted")

    def __init__(self) -> None:
        self.backend: SimBackend | None = None
        self.n_submitted = 0

    def synchronize(self) -> None:
        """Make the host wait until the point is reached."""
        if self.backend is not None:
            self.backend.stream.host_waits(self.n_submitted)
            self.backend.wait_for(self.n_submitted)


class SimBackend(Backend):
    """A stream of work on a simulated device.

    Parameters
    ----------
    threads : int, optional
        The number of threads that compute; by default one for each core that the process may use.

    Attributes
    ----------
    n_submitted, n_done : int
        The number of pieces of work submitted and done; equal after each call if there is no seed.
    stream : Stream
        The order of its work, to find hazards.
    """

    def __init__(self, device: SimDevice, *, threads: int | None = None) -> None:
        self.device: SimDevice = device
        self.name = device.name
        self._buft = device.buffer_type
        self.threads = threads_of(device.name, threads)
        self.n_submitted = self.n_done = 0
        self.stream = device.next_stream()
        self._late: deque[Callable[[], None]] = deque()
        self._parts_read: dict[Tensor, Sequence[tuple[int, int]]] = {}
        self._random = None if device.seed is None else random.Random(device.next_seed())
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The threads, shared with all backends that have the same number."""
        if self._pool is None:
            self._pool = shared_pool(self.threads)
        return self._pool

    # -- the stream ----------------------------------------------------------

    def _submit(self, work: Callable[[], None]) -> None:
        """Submit one piece of work to the stream. With a seed it is done at any time until someone waits for it."""
        self.n_submitted += 1
        if self._random is None and not self._late:
            self.n_done += 1
            work()
            return
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
        """Make the host wait until all work is done."""
        n, stream = self.n_submitted, self.stream
        if n > stream.n_host or stream.waits:
            stream.host_waits(n)
        if self.n_done < n:
            self.wait_for(n)

    def event_record(self, event: Event) -> None:
        """Record an event after all work submitted so far."""
        assert isinstance(event, SimEvent)
        event.backend, event.n_submitted = self, self.n_submitted

    def event_wait(self, event: Event) -> None:
        """Make the stream wait for an event, also of another simulated device."""
        assert isinstance(event, SimEvent)
        if event.backend is not None:
            self._wait_in_stream(event.backend, event.n_submitted)

    def _wait_in_stream(self, backend: SimBackend, n: int) -> None:
        """Make later work of the stream wait for n pieces of work of another."""
        if n > backend.stream.n_host:
            self.stream.waits.append((self.n_submitted + 1, backend.stream, n))
        self._submit(lambda: backend.wait_for(n))

    def _watch(self, device: SimDevice, *accesses: Access) -> None:
        """With a seed, check the next piece of work's accesses to a device's or the host's memory."""
        if device.watch is None:
            return
        on_host = [a for a in accesses if a.start < FIRST_ADDRESS]
        device.watch.by_stream(self.stream, self.n_submitted + 1, [a for a in accesses if a.start >= FIRST_ADDRESS])
        if on_host:
            HOST.by_stream(self.stream, self.n_submitted + 1, on_host)

    def _watch_host(self, address: int, size: int, tensor: Tensor, *, is_write: bool) -> None:
        """With a seed, check the next copy's access to host memory; a host without data has none."""
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
        """Copy from a simulated device in the source's stream; return False for any other memory.

        Notes
        -----
        Mirrors `ggml_backend_cuda_cpy_tensor_async`: the receiving stream waits for an event after the copy. The copy
        does not wait for earlier work of the receiving stream: the scheduler must do that.
        """
        storage = src.storage
        if storage is None or storage.is_host:
            return False  # most copies
        if not isinstance(backend_src, SimBackend) or not isinstance(storage, SimBuffer):
            return False
        if src.is_empty:
            return True
        work = self._own(dst).copying(src, dst)
        backend_src._watch(storage.device, access_to(src, is_write=False))
        backend_src._watch(self.device, access_to(dst, is_write=True, size=src.nbytes))
        backend_src._submit(work)
        if backend_src is not self:
            self._wait_in_stream(backend_src, backend_src.n_submitted)
        return True

    def graph_compute(self, graph: GraphView) -> None:
        """Run the nodes' plan in the device's memory; a device without data only checks where the tensors are.

        Raises
        ------
        BackendError
            A tensor of a node is in other memory: a split input was not copied.
        ComputeError
            A row index is out of bounds, the computation was stopped, or a fault was pending.
        ExpertIdError
            An id is out of range.
        """
        first = graph.graph.nodes[graph.i_start].name if len(graph) else ""
        plan = self.plan_of(graph) if self.device.has_data else None
        if plan is None:
            self._check_places(graph.nodes)

        def compute() -> None:
            self.device.at("compute", first)
            if plan is not None:
                plan.run(self.pool)

        if self.device.watch is not None:
            self._watch(self.device, *accesses_of(graph, self._parts_read))
        self._submit(compute)

    def plan_of(self, graph: GraphView) -> HostPlan:
        """Return the plan of a range of nodes; see `pyggml.backends.host.machine.plan_of`."""
        return plan_of(graph, self.device, self.name, self._arena_address)

    def will_read(self, tensor: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        """Record which bytes of a tensor nodes read, to find hazards."""
        if self.device.watch is not None:
            self._parts_read[tensor] = parts

    def _check_places(self, nodes: Sequence[Tensor]) -> None:
        buft, compute = self._buft, int(TensorFlag.COMPUTE)
        for node in nodes:
            if not node.op.is_empty and node.flags & compute:
                for tensor in (node, *node.src):
                    if tensor is not None:
                        storage = (tensor.view_src or tensor).buffer
                        if (storage is None or storage.buft is not buft or tensor.data is None) and not tensor.is_empty:
                            self._check_own(tensor)  # tells what is wrong

    def _check_own(self, tensor: Tensor) -> None:
        storage = tensor.storage
        if storage is None or storage.buft is not self.device.buffer_type or tensor.data is None:
            where = "in no memory" if storage is None else f"in {storage.buft.name}"
            raise BackendError(
                self.name, f"'{tensor.name}' is {where}, not in the device's memory", hint="it was not copied"
            )

    def _own(self, tensor: Tensor) -> SimBuffer:
        self._check_own(tensor)
        assert isinstance(tensor.storage, SimBuffer)
        return tensor.storage

    def _arena_address(self, tensor: Tensor) -> int:
        return self._own(tensor).arena(tensor)

    def close(self) -> None:
        """Stop the threads; they start again when needed."""
        self._pool = None


@contextmanager
def counted(device: SimDevice) -> Iterator[Traffic]:
    """Count what goes in and out of a device's memory within a block.

    Yields
    ------
    Traffic
        Contains the counts when the block has ended.
    """
    before = Traffic(**{f: getattr(device.traffic, f) for f in Traffic.__slots__})
    seen = Traffic()
    try:
        yield seen
    finally:
        for f in Traffic.__slots__:
            setattr(seen, f, getattr(device.traffic, f) - getattr(before, f))


def devices() -> list[SimDevice]:
    """Return no device: simulated devices are created by name."""
    return []


def open_device(spec: str, *, index: int = 0, data: bool = True) -> SimDevice:
    """Return a device with a profile, by default ``rtx4090-pcie4``.

    Raises
    ------
    DeviceUnavailableError
        The profile does not exist.
    """
    return SimDevice(parse_profile(spec or "rtx4090-pcie4"), index=index, data=data)


def why_missing() -> str:
    """Return how to name a simulated device."""
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
        The name of a card, or ``custom:24GiB,1000GB/s,25GB/s``.
    index : int
        The number in its name, ``SIM0``; each device of a scheduler needs another one.
    data : bool
        False: it only plans; memory has a size but no bytes.
    threads : int, optional
        The number of threads that compute; by default one per core.
    seed : int, optional
        Do work late, in an order that depends on the seed, so that a missing wait can give a wrong number or NaN.

    Examples
    --------
    >>> Sim("custom:1GiB,100GB/s,10GB/s").device.memory()
    (1073741824, 1073741824)
    """
    return SimDevice(parse_profile(profile), index=index, data=data, seed=seed).backend(threads=threads)
