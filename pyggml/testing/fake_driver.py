"""A CUDA driver without a card: kernels run in the PTX emulator, late, and in any order that CUDA allows.

Work is queued and runs only when something waits for it, in an order that a seed chooses among those that CUDA allows: in
order on one stream, and after the events that a stream waits for. New memory is NaN, and host memory of an asynchronous
copy is read or written when the copy runs. A missing event or wait therefore gives NaN for some seed.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..backends.cuda.driver import PARAM_TYPES, Card, Dim, DriverEvent, Function, Stream
from ..errors import BackendError, OutOfMemoryError
from .ptxemu import Memory, Program, PtxError

__all__ = ["FakeCard", "FakeEvent", "FakeMachine", "FakeStream", "Traffic"]

#: as cuMemAlloc rounds up
GRANULARITY = 256


@dataclass(slots=True)
class Traffic:
    """Counts of one card."""

    bytes_in: int = 0
    bytes_out: int = 0
    bytes_peer: int = 0
    n_launched: int = 0


class FakeMachine:
    """Cards, and the order in which their work is done.

    Parameters
    ----------
    n_card : int
    seed : int
        Seed of the order; each gives one of the orders that the real driver may choose.
    memory_bytes : int
        Of each card.
    has_peers : bool
        Whether cards can access each other's memory.
    """

    def __init__(
        self,
        n_card: int = 1,
        *,
        seed: int = 0,
        memory_bytes: int = 1 << 30,
        has_peers: bool = True,
        cc: tuple[int, int] = (8, 6),
    ) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.has_peers = has_peers
        self.streams: list[FakeStream] = []
        self.cards = [FakeCard(self, i, memory_bytes, cc) for i in range(n_card)]

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Do queued work until a condition holds.

        Raises
        ------
        BackendError
            Every stream waits for an event that will not be recorded.
        """
        while not is_done():
            ready = [s for s in self.streams if s.queue and s.queue[0][1]()]
            if not ready:
                raise BackendError("CUDA", f"deadlock: every stream waits (seed {self.seed})")
            self.rng.choice(ready).queue.popleft()[0]()


class FakeEvent(DriverEvent):
    """A point in a stream, with counts of how often it was recorded and reached."""

    __slots__ = ("_machine", "n_reached", "n_recorded")

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self.n_recorded = self.n_reached = 0

    def synchronize(self) -> None:
        """Do work until the last recorded point is reached."""
        target = self.n_recorded
        self._machine.run_until(lambda: self.n_reached >= target)


def _always() -> bool:
    return True


class FakeStream(Stream):
    """A queue of work."""

    __slots__ = ("card", "queue")

    def __init__(self, card: FakeCard) -> None:
        self.card = card
        #: pieces of work, each with the question whether it may start
        self.queue: deque[tuple[Callable[[], None], Callable[[], bool]]] = deque()
        card.machine.streams.append(self)

    def _add(self, work: Callable[[], None], may_start: Callable[[], bool] = _always) -> None:
        self.queue.append((work, may_start))

    def copy_in(self, dst: int, src: int, size: int) -> None:
        """Queue a copy from the host, which is read when the copy runs."""

        def work() -> None:
            self.card.write(dst, np.frombuffer(ctypes.string_at(src, size), np.uint8))
            self.card.traffic.bytes_in += size

        self._add(work)

    def copy_out(self, dst: int, src: int, size: int) -> None:
        """Queue a copy to the host, which is written when the copy runs."""

        def work() -> None:
            ctypes.memmove(dst, self.card.read(src, size), size)
            self.card.traffic.bytes_out += size

        self._add(work)

    def copy(self, dst_card: Card, dst: int, src: int, size: int) -> None:
        """Queue a copy to the same or another card."""
        assert isinstance(dst_card, FakeCard)

        def work() -> None:
            dst_card.write(dst, np.frombuffer(self.card.read(src, size), np.uint8))
            self.card.traffic.bytes_peer += size if dst_card is not self.card else 0

        self._add(work)

    def fill(self, dst: int, value: int, size: int) -> None:
        """Queue a fill."""
        self._add(lambda: self.card.write(dst, np.full(size, value, np.uint8)))

    def launch(self, function: Function, grid: Dim, block: Dim, args: Sequence[float], types: Sequence[str]) -> None:
        """Queue a kernel, after checking its arguments against their types, which a driver does not."""
        for arg, type in zip(args, types, strict=True):
            limit = 2 ** (8 * ctypes.sizeof(PARAM_TYPES[type]))
            if type != "f32" and not (isinstance(arg, int) and 0 <= arg < limit):
                raise TypeError(f"{arg!r} is no {type}")

        def work() -> None:
            function.launch(grid, block, args, stats=False)
            self.card.traffic.n_launched += 1

        self._add(work)

    def record(self, event: DriverEvent) -> None:
        """Queue the point that an event stands for."""
        assert isinstance(event, FakeEvent)
        event.n_recorded += 1
        number = event.n_recorded

        def work() -> None:
            event.n_reached = max(event.n_reached, number)

        self._add(work)

    def wait(self, event: DriverEvent) -> None:
        """Queue a wait for the last recorded point; without one it does nothing, as in CUDA."""
        assert isinstance(event, FakeEvent)
        target = event.n_recorded
        self._add(lambda: None, lambda: event.n_reached >= target)

    def synchronize(self) -> None:
        """Do work until this queue is empty."""
        try:
            self.card.machine.run_until(lambda: not self.queue)
        except PtxError as error:
            raise BackendError(f"CUDA{self.card.index}", f"a kernel failed: {error}") from error


class FakeCard(Card):
    """A card: its memory and counts.

    Attributes
    ----------
    traffic : Traffic
    n_allocs_left : int or None
        Number of allocations that still succeed; None: all that fit.
    """

    def __init__(self, machine: FakeMachine, index: int, memory_bytes: int, cc: tuple[int, int]) -> None:
        self.machine, self.index, self.cc = machine, index, cc
        self.name = "Fake card"
        self.memory_bytes = memory_bytes
        self.used_bytes = 0
        self.traffic = Traffic()
        self.n_allocs_left: int | None = None
        self._memory = Memory()
        # cards have distinct addresses, as with unified addressing
        self._memory.next = 1 + (index << 16)
        self._pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        return self.memory_bytes - self.used_bytes, self.memory_bytes

    def alloc(self, size: int) -> int:
        """Return the address of new memory, all NaN."""
        size = -(-size // GRANULARITY) * GRANULARITY
        free, _ = self.memory()
        if self.n_allocs_left == 0 or size > free:
            raise OutOfMemoryError(f"CUDA{self.index}", size, free, "a buffer")
        if self.n_allocs_left is not None:
            self.n_allocs_left -= 1
        self.used_bytes += size
        return self._memory.alloc(size, f"memory of card {self.index}").addr

    def free(self, address: int) -> None:
        """Free memory; work that still uses it fails."""
        buffer, offset = self._memory.locate(address)
        assert offset == 0
        self.used_bytes -= buffer.nbytes
        self._memory.free(buffer)

    def alloc_host(self, size: int) -> int:
        """Return the address of host memory."""
        block = ctypes.create_string_buffer(size + GRANULARITY)
        address = -(-ctypes.addressof(block) // GRANULARITY) * GRANULARITY
        self._pinned[address] = block
        return address

    def free_host(self, address: int) -> None:
        """Free host memory."""
        del self._pinned[address]

    def load(self, ptx: str, entry: str) -> Function:
        """Load a kernel into the emulator."""
        return Program(ptx, self._memory).kernel(entry)

    def stream(self) -> FakeStream:
        """Return a new stream."""
        return FakeStream(self)

    def event(self) -> FakeEvent:
        """Return a new event."""
        return FakeEvent(self.machine)

    def can_reach(self, other: Card) -> bool:
        """Return whether memory can be copied directly to another card."""
        return other is self or self.machine.has_peers

    def write(self, address: int, raw: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Write bytes now."""
        buffer, offset = self._memory.locate(address)
        self._memory.write(buffer, raw, offset)

    def read(self, address: int, size: int) -> bytes:
        """Read bytes now."""
        buffer, offset = self._memory.locate(address)
        raw: bytes = self._memory.read(buffer, np.uint8, size, offset).tobytes()
        return raw
