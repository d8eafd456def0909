"""`Planner`: a model placed on devices: placement, KV cache, scheduler, reserved memory, and what a decode would do.

`Session` adds data and decoding. With ``data=False`` no weight is read and nothing is allocated, so that planning a
model larger than the machine takes milliseconds. The graphs, splits and sizes are those of a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar, Literal, Self

from .backend import REGISTRY, Backend, Device
from .buffer import BufferType
from .catalog import header_path
from .clock import VirtualClock
from .cost import CPU_PROFILE, DeviceProfile
from .dialect import DEFAULT_DIALECT, Dialect
from .errors import DeviceUnavailableError, FormatError, OutOfMemoryError, SchedError
from .fit import Fit, fit_flags
from .gguf import GGUFFile, require_model
from .memory_rows import Memory, MemoryRows
from .models.architectures import ARCHITECTURES
from .models.batch import MicroBatch, Outputs
from .models.context import ContextFlags, ContextParams
from .models.loading import Progress
from .models.placement import Placement, PlacementFlags, norm_pins, warn_of_unmatched
from .models.source import BuiltSource, GraphSource, ModelFacts, PlannableGraph
from .moe_cache import CacheRule, MoeCache, MoeCachePolicy
from .notebook import Bar, html_table
from .record import Recorder
from .sched.assign import OffloadOp
from .sched.plan import Plan
from .sched.policies import CopyPolicy
from .sched.scheduler import Scheduler
from .sched.state import SchedGraph

__all__ = ["GraphChoice", "PlannedGraph", "Planner", "SchedOptions", "virtual_clock"]


#: Who builds the graphs: pyggml, llama.cpp, or pyggml if it knows the architecture.
GraphChoice = Literal["auto", "built", "llama"]


@dataclass(frozen=True, slots=True)
class SchedOptions:
    """Options that a session passes to its `Scheduler`."""

    strict: bool = False
    dialect: Dialect = DEFAULT_DIALECT
    policy: CopyPolicy | Literal["used"] | None = "used"
    offload_rule: OffloadOp | None = None
    recorder: Recorder | None = None
    clock: VirtualClock | None = None
    debug: int | None = None
    expert_cache: CacheRule | None = None


@dataclass(frozen=True, slots=True)
class PlannedGraph:
    """The graph and plan of one micro-batch.

    Attributes
    ----------
    graph : PlannableGraph
        Sources of its nodes are replaced by input copies, as upstream prints them.
    part : MicroBatch
        The tokens of the micro-batch.
    plan : Plan
        The backend of each tensor and its cause, the splits, and a transfer for each of their inputs.
    compute_bytes : list of int
        Bytes of the compute buffer that each backend would need.
    """

    graph: PlannableGraph
    part: MicroBatch
    plan: Plan
    compute_bytes: list[int]


class Planner:
    """A model placed on devices, ready to plan. Made by `Planner.open`.

    Attributes
    ----------
    file : GGUFFile
        The file of the model.
    source : GraphSource
        Builds or captures its graphs.
    hparams, params, placement
        The sizes of the model, the parameters of the context, the places of the weights.
    backends : tuple of Backend
        The backends of the devices, then that of the CPU.
    sched : Scheduler
        The scheduler with these backends.
    expert_cache : MoeCache or None
        The expert cache, with option ``expert_cache``.
    """

    source: GraphSource
    fit: Fit | None = None  #: what was found where ``-ngl auto`` was asked for
    _is_built_only: ClassVar[bool] = False  #: whether captured graphs cannot be used

    def __init__(
        self,
        file: GGUFFile,
        backends: Sequence[Backend],
        source: GraphSource,
        *,
        options: SchedOptions,
        data: bool,
        progress: Progress | None,
    ) -> None:
        self.file, self.data, self.options = file, data, options
        self.backends, self.source = tuple(backends), source
        self.is_closed = self._holds_largest = False
        self._current: PlannableGraph | None = None
        self._largest: SchedGraph | None = None  # of the graph by which memory was planned
        self._cache_bytes: Mapping[BufferType, int] = {}
        self._planned_compute: list[int] = [0] * len(self.backends)
        self.expert_cache: MoeCache | None = None
        self.sched = self._new_sched(parallel=False)
        self._load(progress)

    def _load(self, progress: Progress | None) -> None:
        """Bring weights and cache to their places, and reserve."""
        log = self.sched.new_log()
        start_s = log.now()
        self.source.load(data=self.data, progress=progress)
        log.holds("weights", self._where(self.placement.weight_bytes()), start_s)
        try:
            self._make_cache()
            self._make_expert_cache()
            self._reserve()
        except BaseException:
            self.close()
            raise

    def change(self, placement: PlacementFlags | None = None, context: ContextFlags | None = None) -> None:
        """Plan with other flags on the same devices, as if the model had been opened with them; much faster.

        Parameters
        ----------
        placement, context
            As of `open`; None: the defaults.

        Raises
        ------
        SchedError
            The planner has data.
        GraphError, ModelError
            A flag is invalid, or llama.cpp refuses it. The planner is as it was.
        OutOfMemoryError
            See `open`. The planner is closed.

        Notes
        -----
        Hyper-parameters and weights stay; so do KV cache and graphs as far as they are the same but for their places, and
        what the scheduler knows of graphs before (`Precedents`).
        """
        if self.data:
            raise SchedError(f"{self!r} has data: its weights stay where they are", hint="open it with data=False")
        placement, context = placement or PlacementFlags(), context or ContextFlags()
        if placement.fit:
            self.fit = fit_flags(self, placement, context)
            placement, context = self.fit.placement, self.fit.context
        before = self.sched
        before.close()  # free memory decides about shares of devices, so that nothing may be held
        if self.expert_cache is not None:
            self.expert_cache.close()
            self.expert_cache = None
        self._holds_largest, self._current = False, None
        self._cache_bytes, self._planned_compute = {}, [0] * len(self.backends)
        try:
            self.source = self.source.changed(placement, context)
        finally:
            if before.n_copies > 1:
                self.source.forget_pipeline()
            self.sched = self._new_sched(parallel=False).follow(before)
            self._load(None)

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | GGUFFile,
        *,
        devices: str | Sequence[str | Device | Backend] = (),
        cpu: str | Device | Backend = "cpu",
        placement: PlacementFlags | None = None,
        context: ContextFlags | None = None,
        graph: GraphChoice = "auto",
        data: bool = True,
        progress: Progress | None = None,
        strict: bool = False,
        dialect: Dialect = DEFAULT_DIALECT,
        policy: CopyPolicy | Literal["used"] | None = "used",
        offload_rule: OffloadOp | None = None,
        recorder: Recorder | None = None,
        clock: VirtualClock | None = None,
        debug: int | None = None,
        expert_cache: CacheRule | None = None,
    ) -> Self:
        """Place a model, load it, and reserve the memory that it needs.

        Parameters
        ----------
        model : path or GGUFFile
            A file given by its path stays mapped until its last user is gone. With ``data=False`` also a name from
            `pyggml.catalog.MODELS`, such as ``gpt-oss-120b`` or ``qwen3-30b-a3b:Q6_K``.
        devices : str, or sequence of str, Device or Backend
            The devices besides the CPU, in order: names such as ``sim:rtx4090-pcie4``, or opened devices.
        cpu : str, Device or Backend
            The last backend; ``CPU(threads=2)`` sets its threads.
        placement : PlacementFlags, optional
            ``-ngl``, ``-ot``, ``--cpu-moe``, ``-ts``, ...
        context : ContextFlags, optional
            ``-c``, ``-b``, ``-ub``, ``-fa``, ``-ctk``, ``--no-kv-offload``, ...
        graph : str
            Who builds the graphs: ``"built"``: pyggml; ``"llama"``: an installed llama.cpp, for plans only; ``"auto"``:
            pyggml if it knows the architecture, otherwise llama.cpp.
        data : bool
            False for plans: no weight is read, nothing is allocated, and nothing can be decoded.
        progress : callable, optional
            Called with ``(done_bytes, total_bytes)`` while weights are copied.
        strict, dialect, policy, offload_rule, recorder, clock, debug
            Options of the `Scheduler`.
        expert_cache : CacheRule, optional
            Keep experts of layers with host weights in device memory. `pyggml.moe_cache.LlamaCache` is llama.cpp's
            ``--moe-cache-mib``. Its copy policy calls ``policy`` for all other inputs. Switches pipeline parallelism off.

        Raises
        ------
        FormatError
            The file is damaged, incomplete, or of an architecture that is not supported.
        GraphError
            A flag is invalid.
        DeviceUnavailableError
            A device does not exist.
        OutOfMemoryError
            A device has too little memory.
        ModelError
            llama.cpp refuses the model, or fails on it.
        """
        devices = [devices] if isinstance(devices, str) else devices
        if "cpu" in devices:
            raise DeviceUnavailableError(
                "cpu", "the CPU is always the last device", hint='remove "cpu" from the devices'
            )
        if not data and not isinstance(model, GGUFFile) and not os.path.lexists(model):
            model = header_path(os.fspath(model))
        file = model if isinstance(model, GGUFFile) else GGUFFile.open(model)
        if file.closed:
            raise FormatError(str(file.path), "the file was closed", hint="open it again")
        backends = _open_backends([*devices, cpu], data=data)
        placement, context, fit = placement or PlacementFlags(), context or ContextFlags(), None
        for_data = data or cls._is_built_only
        if placement.fit:
            plain = _open_source(file, backends, graph, replace(placement, fit=False), context, data=for_data)
            with Planner(file, backends, plain, options=SchedOptions(), data=False, progress=None) as planner:
                fit = fit_flags(planner, placement, context)
            placement, context = fit.placement, fit.context
        source = _open_source(file, backends, graph, placement, context, data=for_data)
        if fit is None:  # its patterns are not the user's
            warn_of_unmatched(placement, [b.device for b in backends], [w.spec.name for w in source.placement.weights])
        options = SchedOptions(strict, dialect, policy, offload_rule, recorder, clock, debug, expert_cache)
        made = cls(file, backends, source, options=options, data=data, progress=progress)
        made.fit = fit
        return made

    @property
    def hparams(self) -> ModelFacts:
        """The sizes and constants of the model."""
        return self.source.hparams

    @property
    def params(self) -> ContextParams:
        """The parameters of the context."""
        return self.source.params

    @property
    def placement(self) -> Placement:
        """The places of weights and layers."""
        return self.source.placement

    # -- memory --------------------------------------------------------------

    def _new_sched(self, *, parallel: bool) -> Scheduler:
        options = self.options
        bufts = [b.buffer_type for b in self.backends]
        if len(self.backends) > 1:  # results on the CPU go to the first device's pinned memory, as upstream does
            pinned = self.backends[0].device.host_buffer_type
            if pinned is not None and self.backends[-1].supports_buft(pinned):
                bufts[-1] = pinned
        return Scheduler(
            self.backends,
            bufts=bufts,
            parallel=parallel,
            op_offload=self.params.op_offload,
            dialect=options.dialect,
            strict=options.strict,
            policy=options.policy,
            offload_rule=options.offload_rule,
            recorder=options.recorder,
            clock=options.clock,
            debug=options.debug,
        )

    def _make_cache(self) -> None:
        log = self.sched.new_log()
        start_s = log.now()
        self._cache_bytes = self.source.make_cache(data=self.data)
        log.holds("kv_cache", self._where(self._cache_bytes), start_s)

    def _make_expert_cache(self) -> None:
        """Make the expert cache that was asked for, and let its policy copy.

        Notes
        -----
        Mirrors the constructor of `llama_context`, which makes it once weights and KV cache have their memory.
        """
        rule, placement = self.options.expert_cache, self.placement
        if rule is None:
            return
        log = self.sched.new_log()
        start_s = log.now()
        home = {b.device: b for b in self.backends}
        layers = self.source.expert_weights() if self.hparams.n_expert else {}
        shares = dict(zip(placement.devices, self.source.tensor_split, strict=False))
        if not any(shares.values()):
            shares = {d: float(self._free_bytes(d)) for d in placement.devices}
        cache = self.expert_cache = MoeCache(
            layers, {il: home[d] for il, d in enumerate(placement.layers)}, self.backends, rule,
            n_used=self.hparams.n_expert_used, weights={home[d]: n for d, n in shares.items()}, has_data=self.data,
            vectors=self.source.expert_vectors() if layers and rule.misses == "cpu" else None,
        )  # fmt: skip
        self.source.read_banks(cache, {d: self._free_bytes(d) for d in placement.devices})
        self.sched.policy = MoeCachePolicy(cache, self.sched.policy)
        log.holds("policy", self._where(cache.sizes()), start_s)

    def _free_bytes(self, device: Device) -> int:
        """Return what is free on a device once weights and KV cache lie there."""
        free, buft = device.memory()[0], device.buffer_type
        held = self.placement.weight_bytes().get(buft, 0) + self._cache_bytes.get(buft, 0)
        return free if self.data else max(free - held, 0)

    def _where(self, sizes: Mapping[BufferType, int]) -> Iterator[tuple[int, BufferType, int]]:
        """Yield the backend to which each buffer type belongs; host memory belongs to the last backend."""
        own = {b.device: i for i, b in enumerate(self.backends)}
        cpu = len(self.backends) - 1
        for buft, size in sizes.items():
            yield (cpu if buft.is_host or buft.device is None else own.get(buft.device, cpu)), buft, size

    def _can_pipeline(self) -> bool:
        """Mirrors the conditions of pipeline parallelism in the constructor of `llama_context`."""
        devices = self.placement.devices
        return (
            len(devices) > 1
            and self.options.expert_cache is None
            and self.placement.is_full_offload
            and self.params.offload_kqv
            and not self.placement.has_overrides
            and all(device.event_new() is not None for device in devices)
        )

    def _reserve(self) -> None:
        """Decide on flash attention and reserve compute buffers for the largest graphs.

        Notes
        -----
        Mirrors `llama_context::sched_reserve` and `resolve_fused_ops`. Differs: ops of architectures that pyggml does not
        support are not probed; a plan is sized by the largest graph alone, as with upstream's ``no_alloc``.
        """
        parallel = self._can_pipeline()
        if parallel:
            self.sched.close()
            self.sched = self._new_sched(parallel=True).follow(self.sched)
        n_seqs, n_tokens = self.params.n_seq_max, min(self.params.n_ctx, self.params.n_ubatch)
        if self.params.auto_flash_attn:
            self.source.settle_flash_attention(self._is_on_its_layers(n_seqs, n_seqs, "flash_nodes"))
        for n_each in self.source.delta_probes:
            self.source.settle_delta_net(n_each, self._is_on_its_layers(n_each * n_seqs, n_seqs, "delta_nodes"))
        n_outputs = min(n_tokens, self.params.n_outputs_max or self.params.n_batch)
        try:
            self._reserve_graph(n_tokens, n_seqs, n_outputs)
        except OutOfMemoryError:
            if not parallel:
                raise
            self.sched.close()
            self.sched = self._new_sched(parallel=False)
            self._reserve_graph(n_tokens, n_seqs, n_outputs)
        if self.data:
            self._reserve_graph(n_seqs, n_seqs, n_seqs)
            self._reserve_graph(n_tokens, n_seqs, n_outputs)

    def _is_on_its_layers(self, n_tokens: int, n_seqs: int, nodes: Literal["flash_nodes", "delta_nodes"]) -> bool:
        """Return whether each of some nodes of a graph runs on its layer's device."""
        graph = self._adopt(lambda: self.source.reserved(n_tokens, n_seqs, n_tokens))
        self.sched.split_graph(graph.graph)
        found = ((self.sched.tensor_backend(node), layer) for node, layer in getattr(graph, nodes))
        return all(b is not None and b.device is self.placement.layers[layer] for b, layer in found)

    def reserve(self) -> None:
        """Once reserve memory without bytes for the largest graph, as `memory` returns it; a device that is too small reserves none."""
        if self.data or self._holds_largest:
            return
        self._holds_largest = True
        n_seqs, n_tokens = self.params.n_seq_max, min(self.params.n_ctx, self.params.n_ubatch)
        n_outputs = min(n_tokens, self.params.n_outputs_max or self.params.n_batch)
        with suppress(OutOfMemoryError):
            if self.sched.sched_graph is not self._largest or not self.sched.reserve_measured():
                self.sched.reserve(self._adopt(lambda: self.source.reserved(n_tokens, n_seqs, n_outputs)).graph)

    def _reserve_graph(self, n_tokens: int, n_seqs: int, n_outputs: int) -> None:
        graph = self._adopt(lambda: self.source.reserved(n_tokens, n_seqs, n_outputs))
        if self.data:
            self.sched.reserve(graph.graph)
            return
        self.sched.split_graph(graph.graph)
        self.sched.reserve_policy()
        self._planned_compute, self._largest = self.size_of_split(), self.sched.sched_graph

    def size_of_split(self) -> list[int]:
        """Return the sizes of the compute buffers that the last split graph needs."""
        copy = self.sched.sched_graph
        return self.sched.galloc.measure(copy, copy.node_backend_ids, copy.leaf_buffer_ids(self.sched.machine.cpu))

    def memory(self) -> MemoryRows:
        """Return the memory of each buffer type; the scheduler's buffer types first."""
        bufts = self.sched.bufts
        sizes = [self.sched.buffer_size(b) for b in self.backends] if self.data else self._planned_compute
        compute: dict[BufferType, int] = {}
        for buft, size in zip(bufts, sizes, strict=True):
            compute[buft] = compute.get(buft, 0) + size
        weights, cache = self.placement.weight_bytes(), self._cache_bytes
        policy = self.sched.resources.sizes()
        for buft, size in ({} if self.expert_cache is None else self.expert_cache.sizes()).items():
            policy[buft] = policy.get(buft, 0) + size
        return MemoryRows(
            Memory(buft.name, weights.get(buft, 0), cache.get(buft, 0), compute.get(buft, 0), policy.get(buft, 0))
            for buft in dict.fromkeys([*bufts, *weights, *cache, *policy])
        )

    # -- graphs --------------------------------------------------------------

    def _adopt(self, build: Callable[[], PlannableGraph]) -> PlannableGraph:
        """Reset the scheduler, make a graph, and apply its pins."""
        self._current = None
        self.sched.reset()
        graph = build()
        backends = {b.device: b for b in self.backends}
        for tensor, device in norm_pins(graph.norms, graph.n_tokens, self.placement):
            self.sched.set_tensor_backend(tensor, backends[device])
        for tensor, backend in graph.pins:
            self.sched.set_tensor_backend(tensor, backend)
        if not self.params.offload_kqv:
            for tensor in graph.attn_outputs:
                self.sched.set_tensor_backend(tensor, self.backends[-1])
        return graph

    def plan_batch(self, n_tokens: int, *, outputs: Outputs = "last", depth: int = 0) -> list[PlannedGraph]:
        """Return the graphs and plans of a decode of ``n_tokens`` tokens of a sequence with ``depth`` tokens in the cache.

        Parameters
        ----------
        n_tokens : int
            Divided into batches of ``n_batch``, then into micro-batches.
        outputs : str
            The tokens whose logits are computed: ``"last"`` or ``"all"``.

        Raises
        ------
        CacheFullError
            The tokens do not fit in the context.

        Notes
        -----
        A micro-batch that uses the previous graph again has no entry. The cache is empty afterwards.
        """
        planned: list[PlannedGraph] = []
        for part, current in self.micro_batches(n_tokens, outputs=outputs, depth=depth):
            graph = current()
            if planned and planned[-1].graph is graph:
                continue
            self.sched.split_graph(graph.graph)
            planned.append(PlannedGraph(graph, part, self.sched.plan, self.size_of_split()))
        return planned

    def plan_reserved(self, n_tokens: int, n_seqs: int, n_outputs: int) -> PlannedGraph:
        """Return the plan of one micro-batch with a full cache, for which memory is reserved."""
        graph = self._adopt(lambda: self.source.reserved(n_tokens, n_seqs, n_outputs))
        self.sched.split_graph(graph.graph)
        part = MicroBatch.reserve(n_tokens, n_seqs, n_outputs)
        return PlannedGraph(graph, part, self.sched.plan, self.size_of_split())

    def micro_batches(
        self, n_tokens: int, *, outputs: Outputs = "last", depth: int = 0, is_generated: bool = False
    ) -> Iterator[tuple[MicroBatch, Callable[[], PlannableGraph]]]:
        """Yield each micro-batch of a decode and what builds its graph, resets the scheduler and pins; see `plan_batch`.

        With ``is_generated`` each has one token. The cache is empty afterwards.
        """
        current: Callable[[], PlannableGraph] | None = None
        for part, build in self.source.parts(n_tokens, outputs, depth=depth, is_generated=is_generated):
            if build is not None:
                current = cache(partial(self._adopt, build))
            assert current is not None
            yield part, current

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Free all memory now. The backends stay open."""
        if self.is_closed:
            return
        self.sched.close()  # raises an error while another thread computes
        self.is_closed = True
        self._current = None
        self.source.close()
        log = self.sched.new_log()
        if self.expert_cache is not None:
            log.holds("policy", self._where(dict.fromkeys(self.expert_cache.sizes(), 0)), log.now())
            self.expert_cache.close()
        log.holds("kv_cache", self._where(dict.fromkeys(self._cache_bytes, 0)), log.now())
        log.holds("weights", self._where(dict.fromkeys(self.placement.weight_bytes(), 0)), log.now())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(b.name for b in self.backends)
        return f"<{type(self).__name__} of {self.hparams.arch} '{self.hparams.name}' on {names}>"

    def _repr_html_(self) -> str:
        """Return a table of the memory of each buffer type and its share of the device, for notebooks."""
        from .plan_report import memory_fits

        fits = memory_fits(self.memory(), self.backends)
        names = ", ".join(b.name for b in self.backends)
        title = f"{type(self).__name__} of {self.hparams.name or self.hparams.arch} on {names}: {self.params.n_ctx:,} tokens"
        columns = ("buffer type", "weights", "KV cache", "compute", "total bytes", "of the device", "")
        rows = (
            (
                f.memory.buft, *(f"{n:,}" for n in (f.memory.weights, f.memory.cache, f.memory.compute, f.memory.total)),
                "" if f.total_bytes is None else Bar(f.memory.total / f.total_bytes),
                f"does not fit: {f.missing_bytes:,} bytes are missing" if f.missing_bytes else "",
            )
            for f in fits
        )  # fmt: skip
        return html_table(title, columns, rows, n_rows=len(fits), right=columns[1:5])


def _open_backends(what: Sequence[str | Device | Backend], *, data: bool) -> list[Backend]:
    """Return a backend for each device; names are opened together, so that devices of one kind are numbered."""
    opened = iter(REGISTRY.open_all([name for name in what if isinstance(name, str)], data=data))
    devices = [next(opened) if isinstance(w, str) else w for w in what]
    return [d if isinstance(d, Backend) else d.backend() for d in devices]


def _open_source(
    file: GGUFFile,
    backends: Sequence[Backend],
    graph: GraphChoice,
    placement: PlacementFlags,
    context: ContextFlags,
    *,
    data: bool,
) -> GraphSource:
    """Return the source of a model's graphs; a session can run only built ones."""
    require_model(file)
    devices = [b.device for b in backends]
    is_known = file.metadata.get("general.architecture") in ARCHITECTURES
    if data or graph == "built" or (graph == "auto" and is_known):
        return BuiltSource(file, devices[:-1], devices[-1], placement=placement, context=context)
    from .llama.source import CapturedSource

    return CapturedSource(file, devices[:-1], devices[-1], placement=placement, context=context)


def virtual_clock(backends: Sequence[Backend], host: DeviceProfile = CPU_PROFILE) -> VirtualClock | None:
    """Return a virtual clock if all backends except the last are simulated, otherwise None.

    Parameters
    ----------
    backends : sequence of Backend
        In the scheduler's order; the last is the host.
    host : DeviceProfile
        The profile of the last backend.
    """
    profiles = [b.device.profile for b in backends[:-1]]
    known = [p for p in profiles if p is not None]
    if not known or len(known) < len(profiles):
        return None
    return VirtualClock([*known, host])
