"""`KnownCalls`: calls of llama.cpp's scheduler that repeat are answered in compiled code; in the child.

A decode of one more token makes hundreds of calls to devices, all of which it made for the token before: copies of the same
tensors, the same graphs, the same waits. Python answers a call the first two times and then describes it in an entry;
`pyggml.kernels.cpu.known_calls` answers it from there on and notes it in a log. After the decode, each event of the log
does to statistics and virtual time what the call would have done. A log that repeats as a whole is an *episode*: its
sums are added, and its calls of the clock repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from pyggml.kernels.cpu import known_calls as k
from pyggml.kernels.cpu.pool import CAN_SLEEP

from ..backends.host.plan import HostPlan
from ..backends.libggml.library import Handle
from ..backends.sim.device import SimDevice
from ..backends.sim.memory import Traffic
from ..clock import VirtualClock

if TYPE_CHECKING:
    from pyggml.kernels.cpu.pool import Pool

    from .ledger import Compute, Ledger
    from .library import DeviceLibrary

__all__ = ["KnownCalls"]

#: Kinds of calls by the slots of ggml's interfaces.
KINDS = {
    "set_tensor": k.SET, "get_tensor": k.GET, "set_tensor_async": k.SET_ASYNC, "get_tensor_async": k.GET_ASYNC,
    "synchronize": k.SYNCHRONIZE, "cpy_tensor_async": k.COPY_ASYNC, "graph_compute": k.COMPUTE,
}  # fmt: skip
#: Most events of a decode; the calls after them go to Python.
_MAX_EVENTS = 8192
#: Places of the table, and the most entries in it.
_PLACES, _MAX_ENTRIES = 1 << 14, 1 << 13
_MAX_EPISODES = 64
_N_ARGUMENTS = 5

Apply = Callable[[int, int, int], None]  # does what a call did, of the host's address, the offset and the size
Words = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A known call: its words, its effects, what it counts, and objects whose memory the words refer to."""

    words: Words
    apply: Apply | None
    traffic: tuple[Traffic, ...]
    kept: tuple[object, ...]


@dataclass(slots=True)
class _Episode:
    """The effects of a log: what it adds to counters, its calls of the clock, and the compute that it leaves."""

    counts: list[tuple[Any, str, int]]
    calls: Sequence[Callable[[], object]]
    compute: Compute


class KnownCalls:
    """The calls of a machine's devices that are answered without Python.

    Parameters
    ----------
    library : DeviceLibrary
    refused : callable
        Called with a plan and its pool if a kernel of a known graph refused an index; raises its error.
    failed : callable
        Receives the exceptions.
    """

    def __init__(
        self,
        library: DeviceLibrary,
        refused: Callable[[HostPlan, Pool], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.library, self.ffi = library, library.ffi
        self._refused, self._failed = refused, failed
        self._struct_words = self.ffi.sizeof("struct ggml_tensor") // 8
        self._state = np.zeros(k.STATE, np.int64)
        self._log = np.zeros((_MAX_EVENTS, k.EVENT), np.int64)
        self._table = np.zeros((_PLACES, 2), np.int64)
        self._entries: list[_Entry] = []
        self._episodes: dict[bytes, _Episode | None] = {}  # None: seen once
        self._is_whole = True  # whether Python answered no call of the decode
        state = self._state
        state[k.LOG], state[k.MAX_EVENTS] = self._log.ctypes.data, _MAX_EVENTS
        state[k.TABLE], state[k.MASK] = self._table.ctypes.data, _PLACES - 1
        state[k.STRUCT_WORDS] = self._struct_words
        state[k.UID_AT] = self.ffi.offsetof("struct cgraph_head", "uid")
        state[k.NODES_AT] = self.ffi.offsetof("struct cgraph_head", "nodes")
        self._refusal = self.ffi.callback("intptr_t(intptr_t)", self._plan_refused, error=-1, onerror=self._told)
        state[k.REFUSED] = self._address(self._refusal)
        self._words = self.ffi.cast("int64_t *", self._state.ctypes.data)

    def _address(self, pointer: Handle) -> int:
        return int(self.ffi.cast("intptr_t", pointer))

    def _told(self, _: object, error: BaseException, __: object) -> None:
        self._failed(error)

    # -- slots ---------------------------------------------------------------

    def cover(self, words: Handle, slots: dict[str, int]) -> None:
        """Answer known calls of an object's functions; others go to the functions that its slots have now."""
        if not (CAN_SLEEP and self.library.has_uids):
            return
        names = [name for name in KINDS if name in slots]
        state = self._state.ctypes.data
        firsts = [(state, KINDS[name], self._address(words[slots[name]])) for name in names]
        for name, made in zip(names, k.bound(k.known_call.address, _N_ARGUMENTS, firsts), strict=True):
            words[slots[name]] = self.library.pointer(made)

    def begin(self, *, is_on: bool) -> None:
        """Begin a decode; ``is_on``: answer known calls."""
        self._words[k.ON], self._is_whole = is_on, True

    @property
    def is_on(self) -> bool:
        """Whether known calls are answered here."""
        return bool(self._words[k.ON])

    @property
    def cycles(self) -> int:
        """Cycles of the processor's counter that computes took."""
        return int(self._words[k.CYCLES])

    def stop(self) -> None:
        """Let all further calls go to Python."""
        self._words[k.ON] = 0

    def forget(self) -> None:
        """Forget all entries, because memory was freed or moved."""
        self._table[:] = 0
        self._entries, self._episodes = [], {}

    # -- entries -------------------------------------------------------------

    def _add(self, key: int, words: Words, apply: Apply | None, traffic: Sequence[Traffic], *kept: object) -> None:
        if len(self._entries) >= _MAX_ENTRIES:
            self.forget()
        words[k.NUMBER] = len(self._entries)
        self._entries.append(_Entry(words, apply, tuple(traffic), kept))
        at = k.place_of.py_func(key, _PLACES - 1)
        while self._table[at, 0] not in (0, key):
            at = (at + 1) % _PLACES
        self._table[at] = key, words.ctypes.data

    def learn_copy(
        self, kind: str, t: Handle, place: int, traffic: Sequence[Traffic], apply: Apply, *, tells_address: bool
    ) -> None:
        """Answer copies between a tensor, whose bytes are at a place, and host memory.

        Parameters
        ----------
        tells_address : bool
            Whether ``apply`` needs the address in host memory.
        """
        words = np.empty(k.STRUCT + self._struct_words, np.int64)
        words[k.PLACE], words[k.TELLS_ADDRESS] = place, tells_address
        words[k.STRUCT :] = np.frombuffer(self.ffi.buffer(t, 8 * self._struct_words), np.int64)
        self._add(self._address(t) | KINDS[kind], words, apply, traffic)

    def learn_stream(self, kind: str, stream: int, apply: Apply | None) -> None:
        """Answer a wait for a stream, or refuse copies from it."""
        self._add(stream | KINDS[kind], np.zeros(1, np.int64), apply, ())

    def learn_graph(
        self, stream: int, uid: int, nodes: int, plan: HostPlan | None, pool: Pool | None, function: int, apply: Apply
    ) -> None:
        """Compute a graph by a plan, or by a function of the library."""
        pieces = () if plan is None else plan.pieces
        words = np.zeros(k.PIECES + 2 * len(pieces), np.int64)
        words[k.STREAM], words[k.NODES], words[k.FUNCTION] = stream, nodes, function
        if plan is not None and pool is not None:
            control, base, size = pool.memory
            words[k.CONTROL], words[k.THREADS], words[k.N_PIECES] = control, pool.n_threads, len(pieces)
            words[k.SHARED_BYTES], words[k.THREAD_BYTES] = plan.shared_bytes, plan.thread_bytes
            words[k.PIECES :] = np.array(pieces, np.int64).ravel()
            self._state[k.SCRATCH], self._state[k.SCRATCH_BYTES] = base, size
        self._add(uid << k.KIND_BITS | k.COMPUTE, words, apply, (), plan, pool)

    def _plan_refused(self, number: int) -> int:
        """Raise the error of a known graph."""
        plan, pool = self._entries[number].kept
        self.take_events(None)
        assert isinstance(plan, HostPlan)
        self._refused(plan, cast("Pool", pool))
        return -1

    # -- events --------------------------------------------------------------

    def take_events(self, ledger: Ledger | None) -> None:
        """Do to statistics and virtual time what the calls in the log would have done.

        Parameters
        ----------
        ledger : Ledger or None
            At the end of a decode, so that a log of the whole decode can be an episode.
        """
        n = self._words[k.N_EVENTS]
        self._is_whole &= ledger is not None
        if not n:
            return
        events = self._log[:n]
        self._words[k.N_EVENTS] = 0
        if ledger is None or not self._is_whole:
            self._apply(events)
            return
        key = events.tobytes()
        episode = self._episodes.get(key)
        if episode is not None and ledger.repeats(episode.compute):
            for thing, name, by in episode.counts:
                if isinstance(thing, dict):
                    thing[name] += by
                else:
                    setattr(thing, name, getattr(thing, name) + by)
            for call in episode.calls:
                call()
        elif key in self._episodes:
            self._episodes[key] = self._learn_episode(ledger, events)
        else:
            if len(self._episodes) >= _MAX_EPISODES:
                self._episodes.clear()
            self._apply(events)
            self._episodes[key] = None

    def _apply(self, events: Words) -> None:
        entries = self._entries
        for number, address, offset, size in events.tolist():
            apply = entries[number].apply
            if apply is not None:
                apply(address, offset, size)

    def _learn_episode(self, ledger: Ledger, events: Words) -> _Episode | None:
        traffic = {id(t): t for n in set(events[:, k.OF_ENTRY].tolist()) for t in self._entries[n].traffic}
        counters = ledger.counters() + [(t, name) for t in traffic.values() for name in Traffic.__slots__]
        before = [_value(*counter) for counter in counters]
        calls = _taped(ledger.clock, partial(self._apply, events))
        compute = ledger.compute()
        if compute is None:
            return None
        counts = [(*c, _value(*c) - b) for c, b in zip(counters, before, strict=True)]
        return _Episode([c for c in counts if c[2]], calls, compute)


def _value(thing: Any, name: str) -> int:
    found: int = thing[name] if isinstance(thing, dict) else getattr(thing, name)
    return found


def _taped(clock: VirtualClock | None, work: Callable[[], None]) -> Sequence[Callable[[], object]]:
    """Do work, and return its calls of a clock."""
    if clock is None:
        work()
        return []
    with clock.taped() as calls:
        work()
    return calls


def repeats(devices: Sequence[object]) -> bool:
    """Return whether calls of devices do the same each time: they are simulated, work at once, and no fault is pending."""
    return all(isinstance(d, SimDevice) and d.repeats for d in devices)
