"""Memory and cores of the host: pages, buffers in them, thread pools, and the plans that run on them.

Shared by the backends that compute on host memory, which do not import each other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pyggml.kernels.cpu.loading import LOADING

from ...buffer import Buffer, BufferType
from ...errors import AllocError, BackendError, ComputeError, DeviceUnavailableError, OutOfMemoryError
from ...graph import GraphView, Snapshot
from ...tensor import Tensor
from .plan import HostPlan
from .race_watch import HOST, access_to, host_access

if TYPE_CHECKING:
    from pyggml.kernels.cpu.pool import Pool

__all__ = [
    "HostBlock",
    "HostBuffer",
    "HostBufferType",
    "available_cores",
    "is_writable",
    "physical_memory",
    "plan_of",
    "shared_pool",
    "threads_of",
]

#: Upstream's `GGML_MAX_N_THREADS`.
MAX_THREADS = 512
#: Mirrors `TENSOR_ALIGNMENT`; tensors in a mapped GGUF have no larger alignment, so kernels assume no more.
TENSOR_ALIGNMENT = 32


def physical_memory() -> tuple[int, int]:
    """Return the machine's available and total memory in bytes; zeros if the system does not report them."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, 0
    return total, total


def available_cores() -> int:
    """Return the number of cores that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(name: str, threads: int | None) -> int:
    """Return the number of threads of a backend; by default one for each core that the process may use.

    Raises
    ------
    DeviceUnavailableError
        It is below 1 or above ggml's limit.
    """
    if threads is None:
        return available_cores()
    if not 1 <= threads <= MAX_THREADS:
        raise DeviceUnavailableError(name, f"{threads} threads cannot compute", hint=f"give 1 to {MAX_THREADS}")
    return threads


def _map_pages(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):  # the default, shared memory, has no huge pages
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class HostBlock:
    """Pages of the process, zeroed and touched only when used.

    Attributes
    ----------
    address : int
        Address of the first byte, a multiple of the page size.
    size : int
        Bytes.

    Raises
    ------
    OutOfMemoryError
        The machine has too little memory.
    """

    __slots__ = ("_map", "address", "size")

    def __init__(self, size: int, *, owner: str, purpose: str) -> None:
        available, total = physical_memory()
        if total and size > total:
            raise OutOfMemoryError(owner, size, available, purpose, hint="the machine has not so much memory")
        try:
            self._map: mmap.mmap | None = _map_pages(size)
        except (OSError, ValueError, OverflowError) as error:
            raise OutOfMemoryError(owner, size, available or None, purpose) from error
        if hasattr(mmap, "MADV_HUGEPAGE") and size >= 1 << 21:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.size = size

    def fill(self, value: int) -> None:
        """Set all bytes to a value."""
        ctypes.memset(self.address, value, self.size)

    def close(self) -> None:
        """Free the pages; every address in them becomes invalid."""
        if self._map is not None:
            block, self._map = self._map, None
            block.close()


# -- buffers ---------------------------------------------------------------------------------


class HostBufferType(BufferType):
    """Host memory.

    Notes
    -----
    Mirrors `ggml_backend_cpu_buffer_type`.
    """

    __slots__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name, alignment=TENSOR_ALIGNMENT, is_host=True)

    def _alloc(self, size: int) -> HostBuffer:
        block = HostBlock(size, owner=self.name, purpose="a buffer")
        return HostBuffer(self, block.address, size, block)


def bytes_at(address: int, size: int) -> memoryview:
    """Return memory of the process as bytes; the caller keeps it alive."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


class HostBuffer(Buffer):
    """Host memory: its own, or other memory that ``owner`` keeps alive.

    Parameters
    ----------
    is_writable : bool
        Whether the pages may be written; False for a mapped file.
    """

    __slots__ = ("n_users", "owner")

    def __init__(self, buft: BufferType, address: int, size: int, owner: object, *, is_writable: bool = True) -> None:
        super().__init__(buft, size, address)
        self.owner = owner
        self.is_writable = is_writable
        self.n_users = 0  #: computes in progress that use it; guarded by `_USE`

    def _writable(self, tensor: Tensor) -> int:
        if not self.is_writable:
            raise AllocError(
                f"'{tensor.name}' lies in read-only memory of {self.buft.name} and cannot be written",
                hint="copy it to a tensor in a buffer of its own",
            )
        return self._address(tensor)

    def _address(self, tensor: Tensor) -> int:
        self.check_open(tensor)
        assert tensor.data is not None
        return tensor.data

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into the tensor."""
        if HOST.is_busy:
            _watch(tensor, offset, size, is_write=True)
            HOST.by_host([host_access(address, size, tensor, is_write=False)])
        at = tensor.data
        if (
            at is None
            or self.owner is None
            or not self.is_writable
            or (tensor.view_src is not None and tensor.is_stale_view)
        ):
            at = self._writable(tensor)  # raises
        ctypes.memmove(at + offset, address, size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of the tensor to host memory."""
        if HOST.is_busy:
            _watch(tensor, offset, size, is_write=False)
        at = tensor.data
        if at is None or self.owner is None or (tensor.view_src is not None and tensor.is_stale_view):
            at = self._address(tensor)  # raises
        ctypes.memmove(address, at + offset, size)

    def peek(self, tensor: Tensor, offset: int, size: int) -> memoryview | None:
        """Return the tensor's bytes without copying."""
        return None if self.owner is None else bytes_at(self._address(tensor) + offset, size)

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Set bytes of the tensor."""
        _watch(tensor, offset, size, is_write=True)
        ctypes.memset(self._writable(tensor) + offset, value, size)

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Copy from host memory; return False for other sources."""
        storage = src.storage
        if storage is None or not storage.is_host or src.data is None:
            return False
        self.set_tensor(dst, src.data, 0, src.nbytes)
        return True

    def clear(self, value: int) -> None:
        """Set all bytes to a value."""
        if not self.is_writable or self.owner is None:
            state = "was closed" if self.owner is None else "is read-only"
            raise AllocError(f"a buffer of {self.buft.name} cannot be cleared: it {state}")
        ctypes.memset(self.base, value, self.size)

    @property
    def is_closed(self) -> bool:
        """Whether the memory was freed."""
        return self.owner is None

    def close(self) -> None:
        """Free own pages; memory of an ``owner`` stays with it.

        Raises
        ------
        BackendError
            Another thread computes in it.
        """
        with _USE:
            if self.n_users:
                raise BackendError(
                    self.buft.name,
                    "a buffer cannot be closed while another thread computes in it",
                    hint="wait for the computation, or stop it, first",
                )
            owner, self.owner = self.owner, None
        if isinstance(owner, HostBlock):
            owner.close()


_USE = threading.Lock()


class InUse:
    """A block in which host buffers cannot be closed.

    Parameters
    ----------
    buffers : iterable of Buffer
        Those in host memory are held.
    backend : str
        Name for errors.

    Raises
    ------
    BackendError
        On entry, if a buffer is closed already.
    """

    __slots__ = ("_backend", "_held")

    def __init__(self, buffers: Iterable[Buffer], backend: str) -> None:
        self._held = [b for b in buffers if isinstance(b, HostBuffer)]
        self._backend = backend

    def __enter__(self) -> None:
        with _USE:
            for b in self._held:
                if b.owner is None:
                    raise BackendError(self._backend, "a buffer that the nodes use was closed")
            for b in self._held:
                b.n_users += 1

    def __exit__(self, *error: object) -> None:
        with _USE:
            for b in self._held:
                b.n_users -= 1


def _watch(tensor: Tensor, offset: int, size: int, *, is_write: bool) -> None:
    """Check the host's access for hazards while a simulated device works late."""
    if HOST.is_busy and tensor.data is not None:
        HOST.by_host([access_to(tensor, is_write=is_write, offset=offset, size=size)])


def is_writable(owner: object) -> bool:
    """Return whether an owner's memory may be written: not if it has Python's buffer interface and is read-only."""
    try:
        with memoryview(owner) as view:  # type: ignore[arg-type]  # whether it can be viewed is the question
            return not view.readonly
    except TypeError:
        return True


# -- computing -------------------------------------------------------------------------------

_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()
_pools_lock = threading.Lock()


def shared_pool(threads: int) -> Pool:
    """Return the pool of ``threads`` threads; it ends with its last user.

    Backends share it, because waiting threads of two pools would compete for the cores.
    """
    with LOADING:
        from pyggml.kernels.cpu.pool import Pool

    with _pools_lock:
        pool = _pools.get(threads)
        if pool is None:
            pool = _pools[threads] = Pool(threads)
        return pool


class _KeptPlan:
    """A plan with the conditions under which it is valid."""

    __slots__ = ("buffers", "owner", "plan", "snapshot")

    def __init__(self, plan: HostPlan, owner: object, nodes: Sequence[Tensor]) -> None:
        self.plan, self.owner = plan, owner
        self.snapshot = Snapshot(nodes)
        used = {t.storage for t in self.snapshot.tensors}
        self.buffers = tuple(b for b in used if b is not None)


def plan_of(graph: GraphView, owner: object, name: str, address_of: Callable[[Tensor], int]) -> HostPlan:
    """Return the plan of a range of nodes, which is made on first use and kept in the range.

    A new plan is made if a node changed, a tensor moved in memory, a buffer was closed, or ``owner`` is another device.

    Parameters
    ----------
    owner : object
        The device of the plan.
    name : str
        The backend's name, for errors.
    address_of : callable
        Returns the host address of a tensor; raises if the backend cannot reach it.

    Raises
    ------
    UnsupportedOpError
        The kernels cannot run a node.
    ComputeError
        A node has no memory yet.
    """
    kept = graph.plan
    if isinstance(kept, _KeptPlan) and kept.owner is owner and kept.snapshot.serves(graph):
        for buffer in kept.buffers:
            if buffer.is_closed:
                break
        else:
            return kept.plan
    nodes = graph.nodes
    for node in nodes:
        if not node.op.is_empty and not node.is_empty and node.data is None:
            raise ComputeError(name, "a node has no memory yet", node=node.name, hint="allocate the graph first")
    plan = HostPlan(nodes, address_of, backend=name)
    graph.plan = kept = _KeptPlan(plan, owner, nodes)
    plan.in_use = InUse(kept.buffers, name)
    return plan
