"""`Scheduler`: computes graphs on several backends.

Example::

    import numpy as np
    import pyggml as ggml

    cpu, gpu = ggml.CPU(threads=2), ggml.Sim("rtx4090-pcie4")
    weights = ggml.Context()
    w = weights.new_tensor("q8_0", (256, 512, 8), name="ffn_up_exps.weight")
    weights.alloc(cpu, usage="weights")
    w.set_array(np.random.randn(8, 512, 256))

    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (256, 1, 40), name="x")
        ids = graph.input("i32", (2, 40), name="ids")
        y = ggml.mul_mat_id(w, x, ids).named("y")
    graph.expand(y)

    sched = ggml.Scheduler([gpu, cpu])
    sched.alloc_graph(graph)          # assign, split, allocate
    x.set_array(...); ids.set_array(...)
    sched.compute(graph)              # copy inputs (only the used experts of w), launch, wait
    print(y.numpy(), sched.splits, sched.stats)
    sched.show()                      # a page: splits, what is copied for them, and why

The steps of a graph: `assign` (which backend), `split` (where to cut, what to copy), `alloc` (where in memory),
`compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Self
from weakref import ref

from .. import config
from ..alloc import Gallocr
from ..backend import Backend, Event
from ..buffer import BufferType
from ..clock import VirtualClock
from ..dialect import DEFAULT_DIALECT, DIALECTS, Dialect, Repairs
from ..errors import SchedError, check_kind
from ..graph import Graph, Snapshot
from ..record import Observer, Recorder, SplitRecord
from ..tensor import Tensor
from ..types import SCHED_MAX_COPIES
from .assign import OffloadOp
from .check import check_allocation
from .compute import EvalCallback, SplitRun
from .describe import split_records, splits_table
from .exclusive import Exclusive
from .kept import KeptAlloc
from .observed import Observed
from .passes import Passes
from .plan import Plan
from .policies import CopyCallback, CopyPolicy, choose_policy, default_offload
from .resources import Resources
from .state import Assignment, Cause, Copies, Machine, SchedGraph, Split, check_backends, check_bufts
from .tape import compute_with_tape
from .tenancy import Tenancy

if TYPE_CHECKING:
    import os

    from ..viz.show import Page

__all__ = ["ReallocCallback", "Scheduler"]

#: Called with the scheduler, the graph for the allocator, whether a tensor moved between buffer types, and whether the
#: graph has another size than the one split before; each time a graph does not fit the compute buffers.
ReallocCallback = Callable[["Scheduler", SchedGraph, bool, bool], None]


class Scheduler(Observed):
    """Computes graphs on several backends.

    Parameters
    ----------
    backends : sequence of Backend
        In order of priority. The last is a CPU, which runs what no other backend can.
    bufts : sequence of BufferType, optional
        The buffer type of each backend's results; by default the backend's own.
    parallel : bool
        Keep four pipeline copies of every input, so that the next graph can start before the last one ends.
    op_offload : bool
        Let devices run ops with host weights if they offer to.
    dialect : Dialect
        The version of ggml whose rules apply; the newest by default.
    strict : bool
        Make exactly upstream's calls, including its errors.
    repairs : Repairs, optional
        Which of upstream's errors are corrected; by default all, or none if strict.
    policy : CopyPolicy, "used" or None
        The policy that copies inputs. The default, "used", copies used experts in every dialect, as llama.cpp does:
        `UsedExpertCopier`, or `UpstreamCopier` if strict. None behaves like ggml without llama.cpp, which copies
        experts whole since 0.27 (`Dialect.expert_copy`).
    copy_callback : callable, optional
        Instead of a policy: a function with the arguments of ggml's copy callback; see `CopyCallback`.
    realloc_callback : callable, optional
        Called for each reserve that a graph makes necessary; see `ReallocCallback`.
    offload_rule : callable, optional
        ``(backend, tensor) -> bool``; by default the device's own rule.
    observers : iterable of Observer or Recorder
        Called for everything that happens; see `Observer`.
    recorder : Recorder, optional
        One more observer, which receives all records.
    clock : VirtualClock, optional
        Calculates the times on simulated devices; records contain them.
    eval_callback : callable, optional
        ``(tensor, ask) -> bool``; see `EvalCallback`.
    debug : int, optional
        Level of the text on stderr after each split; by default ``GGML_SCHED_DEBUG``.

    Raises
    ------
    SchedError
        There is no backend, the last is not a CPU, or a backend cannot use its buffer type; a policy and a copy
        callback are both given; a realloc callback is given, but the dialect has none.

    Notes
    -----
    Mirrors `ggml_backend_sched`. Differs: no limits of graph size, backends or names; use by two threads at once, and
    by its own callbacks, is an error; the scheduler is usable after an error; a graph can be allocated again after
    `reset`.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        bufts: Sequence[BufferType] | None = None,
        parallel: bool = False,
        op_offload: bool = True,
        dialect: Dialect = DEFAULT_DIALECT,
        strict: bool = False,
        repairs: Repairs | None = None,
        policy: CopyPolicy | Literal["used"] | None = "used",
        copy_callback: CopyCallback | None = None,
        realloc_callback: ReallocCallback | None = None,
        offload_rule: OffloadOp | None = None,
        observers: Iterable[Observer | Recorder] = (),
        recorder: Recorder | None = None,
        clock: VirtualClock | None = None,
        eval_callback: EvalCallback | None = None,
        debug: int | None = None,
    ) -> None:
        check_kind("the backends", backends, Iterable, hint="give a list", error=SchedError)
        self.backends = tuple(backends)
        check_backends(self.backends)
        self.bufts = tuple(b.buffer_type for b in self.backends) if bufts is None else tuple(bufts)
        check_bufts(self.backends, self.bufts)
        if not isinstance(dialect, Dialect):
            raise SchedError(f"{dialect!r} is not a dialect", hint=f"pyggml.DIALECTS has {', '.join(DIALECTS)}")
        self.dialect = dialect
        self.repairs = (Repairs.strict() if strict else Repairs()) if repairs is None else repairs
        machine = Machine(self.backends, self.bufts, dialect, self.repairs)
        super().__init__(machine, observers=observers, recorder=recorder, clock=clock)
        self.n_copies = SCHED_MAX_COPIES if parallel else 1
        self.cur_copy = self.next_copy = 0
        self.op_offload = op_offload
        self.offload_rule: OffloadOp = default_offload if offload_rule is None else offload_rule
        self.policy = choose_policy(policy, copy_callback, dialect, self.repairs, strict=strict)
        if realloc_callback is not None and not dialect.realloc_callback:
            raise SchedError(f"ggml {dialect.version} has no realloc callback", hint="dialect 0.27 has one")
        self.realloc_callback = realloc_callback
        self.eval_callback = eval_callback
        self.debug = config.sched_debug() if debug is None else debug
        #: type of a compute; a test may set a subclass that leaves out a wait
        self.run_type: type[SplitRun] = SplitRun
        #: device memory and queues of the copy policy
        self.resources = Resources(self.backends, lambda: self._note_resources(self.resources))

        self.assignment = Assignment()
        self.copies: Copies = {}
        self.sched_graph = SchedGraph()
        self.events: list[list[Event | None]] = [
            [b.device.event_new() if parallel else None for _ in range(self.n_copies)] for b in self.backends
        ]
        self.galloc = Gallocr(self.bufts, dialect=dialect, keeps_needed=self.repairs.reused_memory)
        self.is_reset, self.is_alloc = True, False
        self._passes = Passes(self.machine, self.resources)
        self._plan: Plan | None = None  # of the latest cut
        self._reserved_by: CopyPolicy | None = None  # the policy that has read the plan
        self._allocated: ref[Graph] | None = None
        self._snapshot = Snapshot(())  # of the allocated graph
        self._tenancy = Tenancy(self.sched_graph, (), self._passes)  # in the compute buffers
        self._kept: KeptAlloc | None = None
        self._alone = Exclusive()

    # -- questions -----------------------------------------------------------

    @property
    def splits(self) -> Sequence[Split]:
        """The splits of the latest graph, in the order of computation."""
        return () if self._plan is None else self._plan.splits

    @property
    def n_splits(self) -> int:
        """The number of splits of the latest graph."""
        return len(self.splits)

    @property
    def plan(self) -> Plan:
        """What was decided about the latest graph, with its transfers.

        Raises
        ------
        SchedError
            No graph was split.
        """
        plan = self._plan
        if plan is None:
            raise SchedError("no graph was split, so there is no plan", hint="split_graph() or alloc_graph()")
        _ = plan.all_transfers  # made while the graph is as it was cut: whoever has the plan may ask later
        return plan

    def tensor_backend(self, tensor: Tensor) -> Backend | None:
        """Return the backend of a tensor."""
        backend_id = self.assignment.get(tensor)
        return None if backend_id is None else self.backends[backend_id]

    def cause(self, tensor: Tensor) -> Cause | None:
        """Return why a tensor is on its backend."""
        return self.assignment.cause(tensor)

    def buffer_size(self, backend: Backend) -> int:
        """Return the bytes of a backend's compute buffer; 0 if an earlier backend has the same buffer.

        Notes
        -----
        Mirrors `ggml_backend_sched_get_buffer_size`.
        """
        return self.galloc.buffer_size(self.machine.index(backend))

    def chunk_sizes(self, backend: Backend) -> list[int]:
        """Return the bytes of each chunk of a backend's compute buffer."""
        return [b.size for b in self.galloc.chunks(self.machine.index(backend))]

    # -- user's choices ------------------------------------------------------

    def set_tensor_backend(self, tensor: Tensor, backend: Backend) -> None:
        """Pin a tensor to a backend for the next graph; `reset` and `reserve` remove pins.

        Notes
        -----
        Mirrors `ggml_backend_sched_set_tensor_backend`. Differs: if the backend cannot run the op, allocating the graph
        raises an error, and a view stays with the tensor that it shows (`Repairs.unsupported_ops`).
        """
        with self._alone:
            backend_id = self.machine.index(backend)
            self._leave_plan()
            self.assignment.set(tensor, backend_id, Cause.USER)
            self.is_reset = False

    def set_eval_callback(self, callback: EvalCallback | None) -> None:
        """Set or remove the callback that sees nodes while they are computed."""
        self.eval_callback = callback

    # -- planning ------------------------------------------------------------

    def split_graph(self, graph: Graph) -> Sequence[Split]:
        """Assign and cut a graph without allocating it.

        Raises
        ------
        UnsupportedOpError
            No backend can run a node, or the backend that it is pinned to cannot.

        Notes
        -----
        Mirrors `ggml_backend_sched_split_graph`.
        """
        with self._alone:
            return self._split(graph).splits

    def _leave_plan(self) -> None:
        """Copy the assignment before a change if it belongs to a plan."""
        if self._plan is not None and self._plan.assignment is self.assignment:
            self.assignment = self.assignment.copy()

    def _split(self, graph: Graph) -> Plan:
        self._passes.restore(graph)
        self._leave_plan()
        self.is_reset = False
        self._plan = self._checked = self._kept = self._reserved_by = None
        self._n_graphs += 1
        plan, self.sched_graph = self._passes.cut(
            graph, self.assignment, self.offload_rule if self.op_offload else None, self.new_log(of=self.planned),
            n_copies=self.n_copies, cur_copy=self.cur_copy, debug=self.debug,
        )  # fmt: skip
        self._plan, self.copies = plan, plan.copies
        if self._told is not None and self._told.takes(SplitRecord):
            self._told.record_all(split_records(plan, self.planned))
        return plan

    def reserve(self, graph: Graph) -> None:
        """Allocate the compute buffers that a graph needs, without keeping the graph.

        Raises
        ------
        OutOfMemoryError
            A device has too little memory. The scheduler is then not reset, and the next graph gets a new layout.

        Notes
        -----
        Mirrors `ggml_backend_sched_reserve`.
        """
        with self._alone:
            self._synchronize()
            self._split(graph)
            self._reserve_sched_graph()
            self.reserve_policy()
            self._reset()

    def reserve_measured(self) -> bool:
        """Do as `reserve` for the latest graph, if it was split and measured (`Gallocr.measure`) and nothing since; return whether."""
        with self._alone, self._noting_buffers(self.galloc, self.sched_graph):
            self._synchronize()
            if is_done := self.galloc.reserve_measured(self.sched_graph):
                self.reserve_policy()
                self._reset()
            return is_done

    def reserve_size(self, graph: Graph) -> list[int]:
        """Return the size of the compute buffer that a graph would need on each backend.

        Notes
        -----
        Mirrors `ggml_backend_sched_reserve_size`. Differs: a graph that is allocated next gets its buffers.
        """
        with self._alone:
            self._reset()
            self._synchronize()
            self._split(graph)
            self.reserve_policy()
            copy = self.sched_graph
            with self._noting_buffers(self.galloc, self.sched_graph):
                return self.galloc.reserve_n_size(copy, copy.node_backend_ids, copy.leaf_buffer_ids(self.machine.cpu))

    def _reserve_sched_graph(self) -> None:
        copy = self.sched_graph
        with self._noting_buffers(self.galloc, self.sched_graph):
            self.galloc.reserve_n(copy, copy.node_backend_ids, copy.leaf_buffer_ids(self.machine.cpu))

    def reserve_policy(self) -> None:
        """Let the policy read the plan and request memory, once per plan."""
        if self._reserved_by is not self.policy:
            if self.policy.overrides("reserve"):
                self.policy.reserve(self.plan)
            self._reserved_by = self.policy

    def alloc_graph(self, graph: Graph) -> None:
        """Assign, cut and allocate a graph; then its inputs can be set.

        Raises
        ------
        SchedError
            Another graph is allocated: call `reset` first.
        UnsupportedOpError
            No backend can run a node, or the backend that it is pinned to cannot.
        OutOfMemoryError
            A device has too little memory for the compute buffer.

        Notes
        -----
        Mirrors `ggml_backend_sched_alloc_graph`.
        Differs: a failed reserve is an error in every dialect (`reserve_failure`: upstream before 0.26 continues with a
        null buffer).
        """
        with self._alone:
            self._alloc(graph)

    def _alloc(self, graph: Graph) -> None:
        if self.is_alloc:
            held = self._allocated() if self._allocated is not None else None
            raise SchedError(
                f"{held!r} is allocated already" if held is not graph else "the graph is allocated already",
                hint="call reset() before the next alloc_graph",
            )
        self.cur_copy = self.next_copy
        self.next_copy = (self.next_copy + 1) % self.n_copies
        if not self._revive(graph):
            plan = self._split(graph)
            self._alloc_splits()
            self.reserve_policy()
            self._kept = KeptAlloc(plan, self._rules)
            self._snapshot = self._passes.snapshot(graph, self.sched_graph)
            chunks = [c for i in range(len(self.bufts)) for c in self.galloc.chunks(i)]
            self._tenancy = Tenancy(self.sched_graph, chunks if self.repairs.reused_memory else (), self._passes)
            for split in plan.splits:
                split.graph.is_verified = self.repairs.other_graph
        self._allocated = ref(graph)
        self.is_alloc = True

    def _revive(self, graph: Graph) -> bool:
        """Use the latest allocation again if the graph is the same and nothing about it changed.

        Notes
        -----
        Differs: upstream always splits and places again; for an unchanged graph the result is the same.
        """
        kept = self._kept
        if (
            kept is None
            or self.assignment.ids
            or self.n_copies > 1
            or self.debug
            or not kept.serves(graph, self._rules)
            or not self._snapshot.still_holds(graph.nodes)
        ):
            return False
        self.assignment, self.copies = kept.plan.assignment, kept.plan.copies
        self.is_reset = False
        return True

    @property
    def _rules(self) -> tuple[object, ...]:
        """Return the other settings on which assignment and cut depend."""
        return self.op_offload, self.offload_rule

    def _alloc_splits(self) -> None:
        """Place the graph; reserve again if it moved between buffer types or does not fit.

        Notes
        -----
        Mirrors `ggml_backend_sched_alloc_splits`.
        """
        moved = self._passes.moved(self.sched_graph, self.bufts)
        # with one buffer type the allocator reserves by itself
        with self._noting_buffers(self.galloc, self.sched_graph):
            graph = self.sched_graph
            is_placed = not moved and self.galloc.alloc_graph(graph, self._passes.precedent, graph.placeable)
        if not is_placed:
            if self.realloc_callback is not None:
                self.realloc_callback(self, self.sched_graph, moved, self._passes.is_resized)
            # inputs may move in memory; next_copy must not change, so this is no `synchronize`
            self._wait()
            self._reserve_sched_graph()
            self.galloc.alloc_graph(graph, self._passes.precedent, graph.placeable, is_laid_out=True)
        if config.check():
            check_allocation(self.sched_graph, self.galloc)

    # -- computing -----------------------------------------------------------

    def compute(self, graph: Graph) -> None:
        """Compute a graph and wait until it is done; allocate it first if necessary.

        Raises
        ------
        SchedError
            Another graph is allocated, this one was changed since, or an input was overwritten and not set again.
        ComputeError, ExpertIdError
            See `compute_splits`. The graph stays allocated; the next call starts from the beginning.

        Notes
        -----
        Mirrors `ggml_backend_sched_graph_compute`.
        """
        with self._alone:
            try:
                self._compute_async(graph)
            finally:
                self._synchronize()

    def compute_async(self, graph: Graph) -> None:
        """Start computing a graph; allocate it first if necessary. See `compute`.

        Notes
        -----
        Mirrors `ggml_backend_sched_graph_compute_async`.
        """
        with self._alone:
            self._compute_async(graph)

    def _compute_async(self, graph: Graph) -> None:
        if not self.is_reset and not self.is_alloc:
            self._reset()
        if not self.is_alloc:
            self._alloc(graph)
        elif self.repairs.other_graph:
            held = self._allocated() if self._allocated is not None else None
            if held is not graph:
                raise SchedError(
                    f"{held!r} is allocated, {graph!r} was to be computed",
                    hint="call reset(), then alloc_graph() with the graph to compute",
                )
            if not self._snapshot.still_holds(graph.nodes):
                change = self._snapshot.first_change(graph.nodes)
                raise SchedError(
                    f"the graph was changed since it was allocated: {change}",
                    hint="call reset() and alloc_graph(), then set the inputs again",
                )
        self.reserve_policy()  # the policy may have been replaced
        policy, plan = self.policy, self._plan
        assert plan is not None
        self._tenancy.begin()
        self._begin_run()
        run = self.run_type(
            plan, cur_copy=self.cur_copy, events=self.events, policy=policy,
            repairs=self.repairs if policy.repairs is None else policy.repairs, ids=self.ids_source,
            eval_callback=self.eval_callback, resources=self.resources, log=self.new_log(self._checking_observers(plan)),
        )  # fmt: skip
        compute_with_tape(run, self._passes.precedent)
        self._tenancy.end()

    def synchronize(self) -> None:
        """Wait for all work of all backends.

        Notes
        -----
        Mirrors `ggml_backend_sched_synchronize`: if nothing is allocated, the next pipeline copy is the first again.
        """
        with self._alone:
            self._synchronize()

    def _synchronize(self) -> None:
        self._wait()
        if not self.is_alloc:
            self.next_copy = 0

    def _wait(self) -> None:
        """Make the host wait for all work of all backends."""
        log = self.new_log()
        for i, backend in enumerate(self.backends):
            start_s = log.now()
            backend.synchronize()
            log.waited(None, "synchronize", i, None, start_s)
        for queue in self.resources.queues.values():
            queue.backend.synchronize()
            log.waited_for_queue(queue)

    def reset(self) -> None:
        """Remove graph, assignments and pins; keep compute buffers.

        Notes
        -----
        Mirrors `ggml_backend_sched_reset`.
        """
        with self._alone:
            self._reset()

    def _reset(self) -> None:
        if not self.is_reset:
            self.assignment, self.copies, self.is_reset = Assignment(), {}, True
        self.is_alloc, self._allocated = False, None

    def follow(self, other: Scheduler) -> Self:
        """Use the `Precedents` of another scheduler over the same backends; return this one."""
        self._passes.precedents.follow(other._passes.precedents)
        return self

    def close(self) -> None:
        """Free the compute buffers, and restore the sources of graphs. The backends stay open."""
        with self._alone:
            self._synchronize()
            self._reset()
            self._passes.restore_all()
            self._kept = self._plan = self._checked = None
            self.resources.close()
            self.sched_graph = SchedGraph()
            with self._noting_buffers(self.galloc, self.sched_graph):
                self.galloc.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def show(self, path: str | os.PathLike[str] | None = None) -> Page:
        """Open a page in the browser: of the run if the recorder is a `Recording`, otherwise of the latest plan.

        In a notebook it appears below the cell.

        Parameters
        ----------
        path : path-like, optional
            The file to write; by default a temporary file.

        Returns
        -------
        Page
            Its ``path`` is the file.
        """
        from ..viz.objects import view_of_scheduler  # viz imports the scheduler
        from ..viz.show import show_page

        return show_page(view_of_scheduler(self), path=path)

    def __repr__(self) -> str:
        names = ", ".join(b.name for b in self.backends)
        state = f"{self.n_splits} splits" if self.is_alloc else "nothing allocated"
        return f"<Scheduler over {names}: {state}, {self.n_copies} pipeline copies>"

    def _repr_html_(self) -> str:
        """Return a table of the splits, for notebooks: backend, reason, and bytes of their inputs."""
        title = f"Scheduler over {', '.join(b.name for b in self.backends)}: {self.n_splits} splits"
        return splits_table(title, self._plan)
