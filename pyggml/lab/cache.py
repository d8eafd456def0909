"""`Cache`: one pool that decides event by event, with a policy for what leaves and one for what may enter.

The same object serves replays and running models: `Cache.event` takes the keys of an event and returns the loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import GraphError
from ..kernels.lab import slots as compiled

__all__ = ["Admission", "Cache", "Decision", "Events", "Eviction", "Load", "too_small"]


class Load(NamedTuple):
    """A key that enters, and its slot."""

    key: int
    slot: int


class Decision(NamedTuple):
    """The effect of an event on a cache.

    Attributes
    ----------
    hits : tuple of int
        Keys that were resident before.
    loads : tuple of Load
        Misses that enter now; their bytes are to be copied into the slots.
    declined : tuple of int
        Misses that do not enter: their bytes are needed, but elsewhere.
    evicted : tuple of int
    prefetched : tuple of Load
        Keys that enter although no event has used them yet.
    """

    hits: tuple[int, ...]
    loads: tuple[Load, ...]
    declined: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    prefetched: tuple[Load, ...] = ()


class Events(NamedTuple):
    """All events of a request, as arrays: what `Eviction.replay_events` gets.

    Attributes
    ----------
    offsets : int64, (n_event + 1,)
        Keys of event ``i`` are ``keys[offsets[i]:offsets[i + 1]]``.
    keys : int32, (n_touch,)
        Distinct within an event, in slot order.
    pool, step, layer : int64, (n_event,)
        The pool, step and layer of each event.
    slots : int64, (n_pool,)
        The size of each pool.
    n_key : int
        Keys of a pool are below it.
    """

    offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int32]
    pool: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    n_key: int


class Eviction(ABC):
    """Chooses what leaves. An instance serves one pool; its methods are called for everything that happens there.

    The order of calls: `begin` with the event; `used` for each of its keys, in slot order. For each key that enters,
    `victim` and `left` until there is room, then `entered`.
    """

    #: Whether keys are kept apart from the event's need, so that `Cache` must not admit others.
    must_admit = True

    #: Optional: a static method that replays all events at once, with all misses admitted, for replays as fast as the compiled ones.
    #: It returns which touches hit, bool, (n_touch,), and must agree with the object's own decisions, which a cache that runs asks.
    replay_events: ClassVar[Callable[[Events], npt.NDArray[np.bool_]] | None] = None

    def __init__(self, n_slot: int, n_key: int) -> None:
        self.n_slot, self.n_key = n_slot, n_key

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Receive an event before it is decided."""
        return

    @abstractmethod
    def used(self, key: int, is_hit: bool) -> None:
        """Receive a key that an event uses."""

    def entered(self, key: int) -> None:
        """Receive a key that is resident now."""
        return

    def left(self, key: int) -> None:
        """Receive a key that was evicted."""
        return

    @abstractmethod
    def victim(self, resident: Collection[int], protected: Collection[int]) -> int | None:
        """Return the resident key to evict, which must not be protected; None if there is none."""

    def worth(self, key: int) -> float:
        """Return a key's worth, for admissions that compare: by default its uses, recent ones counting more."""
        return 0.0


class Admission:
    """Decides which misses may enter. An instance serves one pool; this class admits all."""

    #: Whether an event's misses always enter.
    must_admit = True

    def begin(self, step: int, layer: int, keys: Sequence[int]) -> None:
        """Receive an event before it is decided."""

    def may_enter(self, key: int, victim: int | None) -> bool:
        """Return whether a miss may enter, replacing ``victim`` if the pool is full."""
        return True

    #: Whether keys become resident only with the next step, and victims stay until then.
    publishes_next_step = False

    def numbers(self) -> tuple[int, int, int, float]:
        """Return the admission's number in the compiled replay, ``n``, ``m`` and a half-life."""
        return compiled.ALWAYS, 1, 1, 1.0


def too_small(budget: int, *, is_bytes: bool) -> GraphError:
    """Return the error of a cache whose policy must admit an event that does not fit."""
    return GraphError(
        f"a cache of {budget:,} {'bytes' if is_bytes else 'slots'} cannot hold the experts of one event",
        hint="a larger cache, or a policy that may decline",
    )


class Cache:
    """A pool of slots or bytes, and the keys in it.

    Parameters
    ----------
    budget : int
        Slots; bytes if ``sizes`` are given.
    eviction : Eviction
    admission : Admission
    sizes : sequence of int, optional
        Bytes of each key. Without sizes, each key takes one slot, see `slot_of`.
    """

    def __init__(
        self, budget: int, eviction: Eviction, admission: Admission | None = None, *, sizes: Sequence[int] | None = None
    ) -> None:
        self.budget, self.eviction, self.admission = budget, eviction, admission or Admission()
        self.sizes = sizes
        self.slot_of: dict[int, int] = {}
        self.used = 0
        self._free = list(range(budget if sizes is None else 0))[::-1]
        self._n_slot = len(self._free)
        self._step: int | None = None
        self._pending: list[int] = []

    @property
    def must_admit(self) -> bool:
        """Whether each event's misses always enter."""
        return self.eviction.must_admit and self.admission.must_admit

    def __contains__(self, key: int) -> bool:
        return key in self.slot_of

    def event(self, step: int, layer: int, keys: Sequence[int]) -> Decision:
        """Decide an event: first its hits are counted, then its misses enter in slot order. None of its keys leaves.

        Parameters
        ----------
        keys : sequence of int
            Distinct, in slot order.

        Raises
        ------
        GraphError
            The event's keys do not fit, and the policies must admit them; or a policy names a victim that cannot leave.
        """
        evicted: list[int] = []
        loads: list[Load] = []
        if step != self._step:
            self._publish(loads, evicted)
            self._step = step
        self.eviction.begin(step, layer, keys)
        self.admission.begin(step, layer, keys)
        hits = tuple(key for key in keys if key in self.slot_of)
        misses = [key for key in keys if key not in self.slot_of]
        for key in keys:
            self.eviction.used(key, key in self.slot_of)
        protected = set(keys)
        declined = []
        if self.admission.publishes_next_step:
            self._pending += [key for key in misses if self.admission.may_enter(key, None)]
            declined = misses
        else:
            for key in misses:
                if not self._enter(key, protected, loads, evicted):
                    declined.append(key)
        return Decision(hits, tuple(loads), tuple(declined), tuple(evicted))

    def prefetch(self, keys: Sequence[int], protected: Collection[int] = ()) -> Decision:
        """Let keys enter that no event has used yet; those without a victim to replace stay out."""
        loads: list[Load] = []
        evicted: list[int] = []
        shield = {*protected, *keys}
        for key in keys:
            if key not in self.slot_of:
                self._make_room_and_add(key, shield, loads, evicted)
        return Decision((), (), (), tuple(evicted), tuple(loads))

    def _publish(self, loads: list[Load], evicted: list[int]) -> None:
        """Make the keys of the previous step resident."""
        pending, self._pending = list(dict.fromkeys(self._pending)), []
        for key in pending:
            if key not in self.slot_of:
                self._make_room_and_add(key, set(pending), loads, evicted)

    def _enter(self, key: int, protected: Collection[int], loads: list[Load], evicted: list[int]) -> bool:
        victim = None
        if self._size(key) > self.budget - self.used:
            victim = self._victim(protected)
            if victim is None:
                if self.must_admit:
                    raise too_small(self.budget, is_bytes=self.sizes is not None)
                return False
        if not self.admission.may_enter(key, victim):
            return False
        return self._make_room_and_add(key, protected, loads, evicted, victim)

    def _victim(self, protected: Collection[int]) -> int | None:
        victim = self.eviction.victim(self.slot_of.keys(), protected)
        if victim is not None and (victim not in self.slot_of or victim in protected):
            why = "protected" if victim in protected else "not resident"
            hint = "return a key of `resident` that is not in `protected`, or None if there is none"
            raise GraphError(f"{type(self.eviction).__name__}.victim() returned {victim!r}, which is {why}", hint=hint)
        return victim

    def _make_room_and_add(
        self, key: int, protected: Collection[int], loads: list[Load], evicted: list[int], victim: int | None = None
    ) -> bool:
        size = self._size(key)
        while size > self.budget - self.used:
            if victim is None:
                victim = self._victim(protected)
            if victim is None:
                return False
            self.used -= self._size(victim)
            self._free.append(self.slot_of.pop(victim))
            self.eviction.left(victim)
            evicted.append(victim)
            victim = None
        if not self._free:
            self._free.append(self._n_slot)
            self._n_slot += 1
        slot = self.slot_of[key] = self._free.pop()
        self.used += size
        self.eviction.entered(key)
        loads.append(Load(key, slot))
        return True

    def _size(self, key: int) -> int:
        return 1 if self.sizes is None else self.sizes[key]
