"""What a scheduler reports: counts, records for observers, and virtual times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import config
from ..clock import VirtualClock
from ..record import Identity, MicroBatchRecord, Observer, Observers, Record, Recorder, Statistics
from .check_copies import CopyCheck
from .ids import IdsSource
from .log import RunLog
from .state import Machine, SchedGraph

if TYPE_CHECKING:
    from ..alloc import Gallocr
    from ..buffer import BufferType
    from .plan import Plan
    from .resources import Resources

__all__ = ["Observed"]


class Observed:
    """The part of a scheduler that reports.

    Attributes
    ----------
    stats : Statistics
        Counts of copies, launches and waits since the scheduler was made, or since ``stats.clear()``.
    ids_source : IdsSource
        Reads which experts a micro-batch uses; a plan without data replaces it.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        observers: Iterable[Observer | Recorder],
        recorder: Recorder | None,
        clock: VirtualClock | None,
    ) -> None:
        self.machine = machine
        self.stats = Statistics()
        self._clock = clock
        self._n_clocks = self._n_graphs = self._n_runs = 0
        self._is_announced = False  # whether the latest run has begun, but not its compute
        self.ids_source = IdsSource()
        self._recorder = recorder
        self._observers = tuple(observers)
        self._told: Observers | None = None
        self._checked: tuple[CopyCheck, Observers] | None = None  # of the latest cut, once asked for
        self._noted_resources: set[BufferType] = set()
        self._noted_sizes = [0] * len(machine.bufts)  # of compute buffers, as last recorded
        self._rebuild_observers()

    @property
    def observers(self) -> tuple[Observer | Recorder, ...]:
        """The observers besides the recorder; can be set between two calls."""
        return self._observers

    @observers.setter
    def observers(self, observers: Iterable[Observer | Recorder]) -> None:
        self._observers = tuple(observers)
        self._rebuild_observers()

    @property
    def recorder(self) -> Recorder | None:
        """The recorder, which receives all records; can be set between two calls."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._rebuild_observers()

    @property
    def _every_observer(self) -> list[Observer | Recorder]:
        return [*self._observers, *([] if self._recorder is None else [self._recorder])]

    def _rebuild_observers(self) -> None:
        every = self._every_observer
        self._told = Observers(every) if every else None
        self._checked = None

    @property
    def clock(self) -> VirtualClock | None:
        """The virtual clock; may be set between two calls."""
        return self._clock

    @clock.setter
    def clock(self, clock: VirtualClock | None) -> None:
        if self._clock is not None and clock is not self._clock:
            self._n_clocks = self._i_clock + 1
        self._clock = clock

    @property
    def _i_clock(self) -> int:
        return self._n_clocks + (0 if self._clock is None else self._clock.n_resets)

    @property
    def planned(self) -> Identity:
        """Numbers of the latest graph and of its run; -1: none."""
        i_run = self._n_runs - 1 if self._is_announced else -1
        return Identity(i_graph=self._n_graphs - 1, i_run=i_run, i_clock=self._i_clock)

    def announce(self, n_tokens: int, n_past: int, n_outputs: int) -> None:
        """Record the micro-batch of the next run, which begins here.

        Parameters
        ----------
        n_tokens : int
            Tokens of the micro-batch.
        n_past : int
            Tokens in the KV cache before.
        n_outputs : int
            Tokens whose logits are wanted.
        """
        self._n_runs += 1
        self._is_announced = True
        if self._told is not None:
            of = {"i_run": self._n_runs - 1, "i_clock": self._i_clock}
            self._told.record(MicroBatchRecord(n_tokens, n_past, n_outputs, **of))

    def _begin_run(self) -> None:
        """Give the compute that begins a number."""
        if not self._is_announced:
            self._n_runs += 1
        self._is_announced = False

    def record(self, record: Record) -> None:
        """Pass a record to all observers that take its kind."""
        if self._told is not None:
            self._told.record(record)

    def new_log(self, observers: Observers | None = None, of: Identity | None = None) -> RunLog:
        """Return the log of a compute: it counts in `stats`, calls observers and advances the clock.

        Parameters
        ----------
        observers : Observers, optional
            By default those of the scheduler.
        of : Identity, optional
            The graph and run of its records; by default the latest.
        """
        if of is None and (observers or self._told) is not None:
            of = Identity(i_graph=self._n_graphs - 1, i_run=self._n_runs - 1, i_clock=self._i_clock)
        return RunLog(self.machine, self.stats, observers or self._told, self._clock, self.ids_source, of)

    def _checking_observers(self, plan: Plan) -> Observers | None:
        """Return the observers; with ``PYGGML_CHECK``, unless strict, also one that verifies copies."""
        mended = self.machine.repairs
        if not config.check() or not (mended.shared_experts and mended.stale_ids and mended.stale_copies):
            return self._told
        if self._checked is None:
            check = CopyCheck(plan)
            self._checked = check, Observers([check, *self._every_observer])
        return self._checked[1]

    def _note_resources(self, resources: Resources) -> None:
        """Record the policy's memory."""
        if self._told is None:
            return
        log, held, at = self.new_log(of=self.planned), resources.sizes(), resources.backend_of()
        log.holds("policy", [(at[buft], buft, size) for buft, size in held.items()], log.now())
        gone = self._noted_resources - held.keys()
        owners = {b.buffer_type: i for i, b in enumerate(self.machine.backends)}
        log.holds("policy", [(owners.get(buft, self.machine.cpu), buft, 0) for buft in gone], log.now())
        self._noted_resources = set(held)

    @contextmanager
    def _noting_buffers(self, galloc: Gallocr, graph: SchedGraph) -> Iterator[None]:
        """Record the compute buffers that change in the block, also if it fails."""
        if self._told is None:
            yield
            return
        log = self.new_log(of=self.planned)
        start_s = log.now()
        try:
            yield
        finally:
            nodes = graph.nodes
            sizes = [galloc.buffer_size(i) for i in range(len(self.machine.bufts))]
            changed = [(i, self.machine.bufts[i], n) for i, n in enumerate(sizes) if n != self._noted_sizes[i]]
            log.holds("compute", changed, start_s, graph=nodes[-1].name if nodes else "")
            self._noted_sizes = sizes
