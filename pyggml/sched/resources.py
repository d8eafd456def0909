"""What a copy policy can have in addition to the scheduler's buffers: device memory, and queues for copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..alloc import Context
from ..backend import Backend, Event
from ..buffer import BufferType
from ..errors import SchedError
from ..tensor import Tensor

__all__ = ["CopyQueue", "Mark", "Resources"]


@dataclass(eq=False, slots=True)
class CopyQueue:
    """Another stream of a device, for copies while its backend computes.

    Attributes
    ----------
    backend : Backend
        The stream.
    of : int
        The index of the scheduler's backend.
    number : int
        The number of the queue on that backend, from 1.
    """

    backend: Backend
    of: int
    number: int

    def __repr__(self) -> str:
        return f"<CopyQueue {self.number} of {self.backend.name}>"


@dataclass(eq=False, slots=True)
class Mark:
    """A point in the work of a stream that others can wait for."""

    event: Event | None  #: None: the device has none, and the host waits instead
    stream: Backend | None = None  #: the stream that it was recorded on; None: not yet
    virtual_s: float = 0.0  #: when the stream gets there, on the virtual clock


@dataclass(eq=False, slots=True)
class OwnMemory:
    """Device memory of a policy, and its last uses."""

    context: Context | None  #: None: the policy allocated it, and frees it
    tensor: Tensor
    backend_id: int
    written: Mark
    read: Mark
    has_queues: bool = True  #: False: all its uses are in one stream


class Resources:
    """Device memory and queues of a scheduler's policy; kept from graph to graph until the scheduler is closed.

    Parameters
    ----------
    backends : sequence of Backend
        The scheduler's.
    changed : callable
        Called when memory was allocated or freed.
    """

    def __init__(self, backends: tuple[Backend, ...], changed: Callable[[], None]) -> None:
        self._backends = backends
        self._changed = changed
        self.queues: dict[tuple[int, int], CopyQueue] = {}
        self.owned: dict[Tensor, OwnMemory] = {}
        self._by_name: dict[tuple[int, str], OwnMemory] = {}
        self._marks: dict[tuple[str, CopyQueue | int], Mark] = {}

    def memory(self, backend_id: int, n_bytes: int, name: str) -> Tensor:
        """Return device memory by name: the existing memory if it is large enough, otherwise new memory."""
        if n_bytes <= 0:
            raise SchedError(f"a policy asks for {n_bytes} bytes on {self._backends[backend_id].name}")
        kept = self._by_name.get((backend_id, name))
        if kept is not None and kept.tensor.nbytes >= n_bytes:
            return kept.tensor
        if kept is not None:
            self._backends[backend_id].synchronize()
            self._free(kept)
        backend = self._backends[backend_id]
        context = Context()
        tensor = context.new_tensor("i8", (n_bytes,), name=name)
        context.alloc(backend)
        marks = Mark(backend.device.event_new()), Mark(backend.device.event_new())
        own = self._by_name[backend_id, name] = OwnMemory(context, tensor, backend_id, *marks)
        self.owned[tensor] = own
        self._changed()
        return tensor

    def lend(self, backend_id: int, tensor: Tensor, *, has_queues: bool) -> None:
        """Record memory that a policy allocated itself."""
        if tensor not in self.owned:
            device = self._backends[backend_id].device
            marks = (Mark(device.event_new()), Mark(device.event_new())) if has_queues else (Mark(None), Mark(None))
            self.owned[tensor] = OwnMemory(None, tensor, backend_id, *marks, has_queues)

    def queue(self, backend_id: int, number: int = 1) -> CopyQueue:
        """Return a queue of a backend's device; it is made on first use."""
        made = self.queues.get((backend_id, number))
        if made is None:
            stream = self._backends[backend_id].device.backend()
            made = self.queues[backend_id, number] = CopyQueue(stream, backend_id, number)
        return made

    def mark(self, what: str, stream: CopyQueue | int) -> Mark:
        """Return a mark of a queue, or of a backend's own stream, by its purpose."""
        found = self._marks.get((what, stream))
        if found is None:
            backend = self._backends[stream] if isinstance(stream, int) else stream.backend
            found = self._marks[what, stream] = Mark(backend.device.event_new())
        return found

    def sizes(self) -> dict[BufferType, int]:
        """Return the bytes held of each buffer type."""
        held: dict[BufferType, int] = {}
        for own in self.owned.values():
            storage = own.tensor.storage
            if storage is not None and own.context is not None:
                held[storage.buft] = held.get(storage.buft, 0) + storage.size
        return held

    def backend_of(self) -> dict[BufferType, int]:
        """Return the backend that holds memory of each buffer type."""
        return {o.tensor.storage.buft: o.backend_id for o in self.owned.values() if o.tensor.storage is not None}

    def _free(self, own: OwnMemory) -> None:
        for queue in self.queues.values():
            queue.backend.synchronize()
        del self.owned[own.tensor]
        self._by_name = {key: kept for key, kept in self._by_name.items() if kept is not own}
        if own.context is not None:
            own.context.close()

    def close(self) -> None:
        """Wait for the queues, and free everything."""
        if not self.owned and not self.queues:
            return
        for own in list(self.owned.values()):
            self._free(own)
        for queue in self.queues.values():
            queue.backend.synchronize()
            queue.backend.close()
        self.queues.clear()
        self._marks.clear()
        self._changed()
