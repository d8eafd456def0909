"""`Session`: a model, its KV cache and a scheduler over devices; what runs and users drive.

::

    with Session.open("model.gguf", devices=["sim:rtx4090-pcie4"], placement=PlacementFlags(cpu_moe=True)) as session:
        logits = session.decode([1, 15043])                    # float32, (1, n_vocab): of the last token
        for id in session.generate([3186], 20):                # goes on where the cache ends
            ...

A decode cuts its tokens into micro-batches, finds cells for all of them, and for each builds a graph, or uses the last
one again where nothing but the inputs' values differs: then a token costs filling a few small arrays and one call.
`Session.open(..., data=False)` plans without reading a weight: see `Session.plan_batch`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from .backend import REGISTRY, Backend, Device
from .buffer import Buffer, BufferType
from .dialect import DEFAULT_DIALECT, Dialect
from .errors import ComputeError, GraphError, OutOfMemoryError, SchedError
from .gguf import GGUFFile
from .models.architectures import build_graph, weight_specs
from .models.batch import Batch, MicroBatch, Outputs
from .models.context import ContextFlags, ContextParams
from .models.graph import GraphParams, ModelGraph
from .models.hparams import HParams
from .models.inputs import InputFiller
from .models.kv_cache import CacheFullError, CacheView, KVCache, Slot
from .models.loading import LoadedWeights, Progress, allocate_cache, load_weights, plan_cache, plan_weights
from .models.placement import Placement, PlacementFlags, norm_pins, place
from .models.weights import resolve_specs
from .record import Recorder
from .sampling import Sampler, greedy
from .sched.assign import OffloadOp
from .sched.policies import InputCopier
from .sched.scheduler import Scheduler
from .sched.state import Split
from .tensor import Tensor

__all__ = ["BatchRecord", "Memory", "PlannedGraph", "Session"]

OnBatch = Callable[["BatchRecord"], None]


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What one micro-batch came to."""

    n_tokens: int
    n_outputs: int
    n_past: int  #: tokens in the cache before it
    n_splits: int
    n_nodes: int
    is_reused: bool  #: the graph before was used again
    seconds: float  #: of building, allocating, copying and computing, until the results were there
    bytes_copied: int  #: between backends
    bytes_full: int  #: that copying every weight whole would have moved


@dataclass(frozen=True, slots=True)
class PlannedGraph:
    """What one micro-batch would come to, if its graph is a new one.

    Attributes
    ----------
    graph : ModelGraph
        Its sources are rewritten to copies until the next plan or decode.
    splits : list of Split
        As upstream would cut it.
    compute_bytes : list of int
        Compute buffer of each backend.
    """

    graph: ModelGraph
    part: MicroBatch
    splits: list[Split]
    compute_bytes: list[int]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a session takes of one buffer type (or would take)."""

    buft: str
    weights: int
    cache: int
    compute: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.compute


class Session:
    """A model in use: see the module's text. Made by `Session.open`.

    Attributes
    ----------
    file : GGUFFile
        The model's file.
    hparams, params, placement
        Of the model, of the context, of its weights.
    sched : Scheduler
        Over ``backends``: the devices', then the CPU's.
    cache : KVCache
        The book of tokens seen.
    loaded : LoadedWeights
        The weights and their buffers.
    n_reused : int
        How often a graph was used again.
    abort : callable or None
        Asked before each micro-batch; True raises `ComputeError` with status 1.
    on_batch : callable or None
        Told of each micro-batch once its results are there.
    """

    def __init__(
        self,
        file: GGUFFile,
        backends: Sequence[Backend],
        *,
        placement: PlacementFlags,
        context: ContextFlags,
        data: bool,
        progress: Progress | None,
        strict: bool,
        dialect: Dialect,
        copier: InputCopier | None,
        offload_rule: OffloadOp | None,
        recorder: Recorder | None,
        debug: int | None,
    ) -> None:
        self.file = file
        self.data = data
        self.backends = tuple(backends)
        self.hparams = hp = HParams.from_gguf(file)
        self.params = ContextParams.resolve(context, hp)
        devices = [b.device for b in self.backends[:-1]]
        specs = resolve_specs(weight_specs(hp, file.tensors), file.tensors, file.path)
        self.placement: Placement = place(hp, specs, file.tensors, devices, self.backends[-1].device, placement)
        self.cache = KVCache(hp, self.params, v_trans=not self.params.flash_attn)
        self.abort: Callable[[], bool] | None = None
        self.on_batch: OnBatch | None = None
        self.n_reused = 0
        self._current: ModelGraph | None = None
        self._filler: InputFiller | None = None
        self._closed = False
        self._cache_buffers: list[Buffer] = []
        self._planned_compute: list[int] = [0] * len(self.backends)
        self._new_sched = lambda parallel: Scheduler(
            self.backends,
            bufts=self._compute_bufts(),
            parallel=parallel,
            op_offload=self.params.op_offload,
            dialect=dialect,
            strict=strict,
            copier=copier,
            offload_rule=offload_rule,
            recorder=recorder,
            debug=debug,
        )
        self.loaded: LoadedWeights = (
            load_weights(file, self.placement, hp, progress=progress) if data else plan_weights(self.placement, hp)
        )
        try:
            if data:
                self._cache_buffers = allocate_cache(self.cache, self.placement, self.params)
                self._cache_bytes: dict[BufferType, int] = {}
                for buffer in self._cache_buffers:
                    self._cache_bytes[buffer.buft] = self._cache_bytes.get(buffer.buft, 0) + buffer.size
            else:
                self._cache_bytes = plan_cache(self.cache, self.placement, self.params)
            self._reserve()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] | GGUFFile,
        *,
        devices: Sequence[str | Device | Backend] = (),
        cpu: str | Device | Backend = "cpu",
        placement: PlacementFlags | None = None,
        context: ContextFlags | None = None,
        data: bool = True,
        progress: Progress | None = None,
        strict: bool = False,
        dialect: Dialect = DEFAULT_DIALECT,
        copier: InputCopier | None = None,
        offload_rule: OffloadOp | None = None,
        recorder: Recorder | None = None,
        debug: int | None = None,
    ) -> Session:
        """Load a model and reserve the memory that it needs.

        Parameters
        ----------
        model : path or GGUFFile
            A file that is opened here stays open until its last user is gone.
        devices : sequence of str, Device or Backend
            Beside the CPU, in order: names such as ``sim:rtx4090-pcie4``, or opened ones.
        cpu : str, Device or Backend
            The last backend.
        placement : PlacementFlags, optional
            ``-ngl``, ``-ot``, ``--cpu-moe``, ``-ts``, ...
        context : ContextFlags, optional
            ``-c``, ``-b``, ``-ub``, ``-fa``, ``-ctk``, ``--no-kv-offload``, ...
        data : bool
            False plans only: no weight is read, nothing is allocated, nothing can be decoded.
        progress : callable, optional
            Told ``(done_bytes, total_bytes)`` while weights are copied.
        strict, dialect, copier, offload_rule, recorder, debug
            Of the `Scheduler`.

        Raises
        ------
        FormatError
            The file is damaged, incomplete, or of an architecture that is not supported.
        GraphError
            A flag cannot be.
        DeviceUnavailableError
            There is no such device.
        OutOfMemoryError
            A device has not enough memory.
        """
        file = model if isinstance(model, GGUFFile) else GGUFFile.open(model)
        return cls(
            file,
            [*(_backend_of(d) for d in devices), _backend_of(cpu)],
            placement=placement or PlacementFlags(),
            context=context or ContextFlags(),
            data=data,
            progress=progress,
            strict=strict,
            dialect=dialect,
            copier=copier,
            offload_rule=offload_rule,
            recorder=recorder,
            debug=debug,
        )

    # -- memory --------------------------------------------------------------

    def _compute_bufts(self) -> list[BufferType]:
        """Results on the CPU go to the first device's pinned memory, if it has such, as upstream has it."""
        bufts = [b.buffer_type for b in self.backends]
        if len(self.backends) > 1:
            bufts[-1] = self.backends[0].device.host_buffer_type or bufts[-1]
        return bufts

    def _can_pipeline(self) -> bool:
        """Mirrors the conditions of pipeline parallelism in the constructor of `llama_context`."""
        devices = self.placement.devices
        return (
            len(devices) > 1
            and self.placement.is_full_offload
            and self.params.offload_kqv
            and not self.placement.has_overrides
            and all(device.event_new() is not None for device in devices)
        )

    def _reserve(self) -> None:
        """Settle flash attention and reserve compute buffers for the largest graphs.

        Notes
        -----
        Mirrors `llama_context::sched_reserve` and `resolve_fused_ops`. Differs: ops of architectures that are not
        supported here are not probed.
        """
        parallel = self._can_pipeline()
        self.sched = self._new_sched(parallel)
        n_seqs, n_tokens = self.params.n_seq_max, min(self.params.n_ctx, self.params.n_ubatch)
        if self.params.auto_flash_attn:
            self._settle_flash_attention(n_seqs)
        n_outputs = min(n_tokens, self.params.n_batch)
        try:
            self._reserve_graph(n_tokens, n_seqs, n_outputs)
        except OutOfMemoryError:
            if not parallel:
                raise
            self.sched.close()
            self.sched = self._new_sched(False)
            self._reserve_graph(n_tokens, n_seqs, n_outputs)
        self._reserve_graph(n_seqs, n_seqs, n_seqs)
        self._reserve_graph(n_tokens, n_seqs, n_outputs)

    def _settle_flash_attention(self, n_seqs: int) -> None:
        """Keep flash attention if every FLASH_ATTN_EXT lands on its layer's device."""
        probe = self._build_reserve_graph(n_seqs, n_seqs, n_seqs)
        self.sched.split_graph(probe.graph)
        on = True
        for node, layer in probe.flash_nodes:
            backend = self.sched.tensor_backend(node)
            on = on and backend is not None and backend.device is self.placement.layers[layer]
        if not on and self.params.type_v.is_quantized:
            raise GraphError(
                f"a V cache of {self.params.type_v.ggml_name} needs flash attention, which a device cannot run",
                hint="use -ctv f16 or f32",
            )
        self.params = replace(self.params, flash_attn=on, auto_flash_attn=False)

    def _build_reserve_graph(self, n_tokens: int, n_seqs: int, n_outputs: int) -> ModelGraph:
        part = MicroBatch.reserve(n_tokens, n_seqs, n_outputs)
        self.sched.reset()
        self._current = None
        return self._build(part, n_outputs, self.cache.full_view())

    def _reserve_graph(self, n_tokens: int, n_seqs: int, n_outputs: int) -> None:
        graph = self._build_reserve_graph(n_tokens, n_seqs, n_outputs)
        if self.data:
            self.sched.reserve(graph.graph)
        else:
            sizes = self._reserve_size(graph)
            self._planned_compute = [max(a, b) for a, b in zip(self._planned_compute, sizes, strict=True)]

    def _reserve_size(self, graph: ModelGraph) -> list[int]:
        self.sched.reset()
        self._pin(graph)
        return self.sched.reserve_size(graph.graph)

    def memory(self) -> list[Memory]:
        """Return what the session takes of each buffer type, or would take."""
        if self.data:
            compute = {
                buft: sum(
                    self.sched.buffer_size(b) for b, t in zip(self.backends, self.sched.bufts, strict=True) if t is buft
                )
                for buft in self.sched.bufts
            }
        else:
            compute = {buft: 0 for buft in self.sched.bufts}
            for buft, size in zip(self.sched.bufts, self._planned_compute, strict=True):
                compute[buft] += size
        weights = self.placement.weight_bytes()
        bufts = dict.fromkeys([*self.sched.bufts, *weights, *self._cache_bytes])
        return [
            Memory(buft.name, weights.get(buft, 0), self._cache_bytes.get(buft, 0), compute.get(buft, 0))
            for buft in bufts
        ]

    # -- graphs --------------------------------------------------------------

    def _build(self, part: MicroBatch, n_outputs: int, view: CacheView) -> ModelGraph:
        """Build a graph and tell the scheduler, which is reset, what is pinned."""
        graph = build_graph(GraphParams(self.hparams, self.params, part, n_outputs, view), self.loaded.weights)
        self._pin(graph)
        return graph

    def _pin(self, graph: ModelGraph) -> None:
        backends = {b.device: b for b in self.backends}
        for tensor, device in norm_pins(graph, self.placement):
            self.sched.set_tensor_backend(tensor, backends[device])
        if not self.params.offload_kqv:
            for tensor in graph.attn_outputs:
                self.sched.set_tensor_backend(tensor, self.backends[-1])

    def plan_batch(self, n_tokens: int, *, outputs: Outputs = "last") -> list[PlannedGraph]:
        """Return the graphs that a decode of so many tokens of one sequence would make, from an empty cache.

        Parameters
        ----------
        n_tokens : int
            Cut by ``n_batch``, then into micro-batches.
        outputs : str
            ``"last"`` or ``"all"``.

        Raises
        ------
        CacheFullError
            So many tokens do not fit into the context.

        Notes
        -----
        A micro-batch that would use the graph before again makes none. Each graph is split and sized anew, so only
        the last one's splits are still the scheduler's; `Split`s and names of the others stay readable.
        """
        self.cache.clear()
        self._current = None
        planned: list[PlannedGraph] = []
        try:
            for batch in self._batches([0] * n_tokens, 0, outputs):
                for part, slot in self.cache.prepare(batch, self.params.n_ubatch):
                    self.cache.apply(part, slot)
                    p = GraphParams(self.hparams, self.params, part, part.n_outputs, self.cache.view(slot))
                    if planned and planned[-1].graph.key == p.key:
                        continue
                    self.sched.reset()
                    graph = self._build(part, part.n_outputs, p.view)
                    splits = list(self.sched.split_graph(graph.graph))
                    copy = self.sched.graph_copy
                    sizes = self.sched.galloc.reserve_n_size(copy, copy.node_backend_ids, copy.leaf_backend_ids)
                    planned.append(PlannedGraph(graph, part, splits, sizes))
        finally:
            self.cache.clear()
        return planned

    # -- decoding ------------------------------------------------------------

    @property
    def n_past(self) -> int:
        """Tokens of sequence 0 in the cache."""
        return self.cache.seq_pos_max(0) + 1

    def _batches(self, tokens: Sequence[int], seq: int, outputs: Outputs) -> list[Batch]:
        """Cut tokens by ``n_batch`` and check all of them before anything is computed."""
        n_past = self.cache.seq_pos_max(seq) + 1
        stream = self.cache.streams[seq if self.cache.n_stream > 1 else 0] if seq < self.params.n_seq_max else None
        if stream is not None and len(tokens) > self.cache.n_cells - stream.n_used:
            raise CacheFullError(len(tokens), stream.n_used, self.cache.n_cells)
        whole = Batch.of(tokens, n_past, seq=seq, outputs=outputs)
        whole.check(self.hparams.n_vocab, self.params.n_seq_max)
        step = self.params.n_batch
        return [
            Batch(
                whole.tokens[i : i + step],
                whole.pos[i : i + step],
                whole.seqs[i : i + step],
                whole.outputs[i : i + step],
            )
            for i in range(0, whole.n_tokens, step)
        ]

    def decode(
        self, tokens: Sequence[int], *, outputs: Outputs = "last", seq: int = 0, topk: TopK | None = None
    ) -> npt.NDArray[np.float32]:
        """Evaluate the next tokens of a sequence.

        Parameters
        ----------
        tokens : sequence of int
            Ids, which follow what the cache holds of the sequence.
        outputs : str
            Whose logits are wanted: ``"last"``, ``"all"`` or ``"none"``.
        topk : TopK, optional
            Takes the experts that each MoE layer chose for each of the tokens.

        Returns
        -------
        float32, (n_outputs, n_vocab)

        Raises
        ------
        GraphError
            An id or the sequence is out of bounds; nothing was computed.
        CacheFullError
            The tokens do not fit into the context; nothing was computed.
        ComputeError, ExpertIdError, OutOfMemoryError
            Of the scheduler. The tokens of the failed micro-batch and after are not in the cache; the session can go on.
        """
        self._check_open()
        batches = self._batches(tokens, seq, outputs)
        out = [self.decode_batch(batch, topk=topk) for batch in batches]
        return out[0] if len(out) == 1 else np.concatenate(out)

    def decode_batch(self, batch: Batch, *, topk: TopK | None = None) -> npt.NDArray[np.float32]:
        """Evaluate a batch of any sequences and positions; its logits come in the batch's order. See `decode`.

        Notes
        -----
        Mirrors `llama_context::decode`.
        """
        self._check_open()
        batch.check(self.hparams.n_vocab, self.params.n_seq_max)
        parts = self.cache.prepare(batch, self.params.n_ubatch)
        rows = np.cumsum(batch.outputs) - 1  # of each token whose logits are wanted, its row
        logits = np.empty((int(np.count_nonzero(batch.outputs)), self.hparams.n_vocab), np.float32)
        if topk is not None:
            topk.start(self.hparams, batch.n_tokens)
        for part, slot in parts:
            own = rows[part.idxs[part.outputs]]
            in_place = len(own) == 0 or bool((np.diff(own) == 1).all())
            into = (
                logits[own[0] : own[-1] + 1]
                if in_place and len(own)
                else np.empty((len(own), logits.shape[1]), np.float32)
            )
            self._run(part, slot, into, topk)
            if not in_place:
                logits[own] = into
        return logits

    def _run(self, part: MicroBatch, slot: Slot, into: npt.NDArray[np.float32], topk: TopK | None) -> None:
        """Evaluate one micro-batch; on any failure the cache forgets it.

        Notes
        -----
        Mirrors `llama_context::process_ubatch`.
        """
        start_s, n_past = time.perf_counter(), self.cache.n_used
        stats = self.sched.stats
        copied, full = stats.bytes_copied, stats.bytes_full
        self.cache.apply(part, slot)
        try:
            if self.abort is not None and self.abort():
                raise ComputeError(self.backends[-1].name, "aborted", status=1)
            graph, is_reused = self._graph_for(part, slot)
            assert self._filler is not None
            self._filler.fill(part, slot)
            self.sched.set_eval_callback(topk.watch(graph, part) if topk is not None else None)
            self.sched.compute_async(graph.graph)
            if into.size:
                backend = self.sched.tensor_backend(graph.logits)
                assert backend is not None
                backend.get_tensor_async(graph.logits, into.ctypes.data, 0, into.nbytes)
            self.sched.synchronize()
        except BaseException:
            self._forget(part)
            raise
        if self.on_batch is not None:
            self.on_batch(
                BatchRecord(
                    part.n_tokens,
                    len(into),
                    n_past,
                    self.sched.n_splits,
                    len(graph.graph.nodes),
                    is_reused,
                    time.perf_counter() - start_s,
                    stats.bytes_copied - copied,
                    stats.bytes_full - full,
                )
            )

    def _graph_for(self, part: MicroBatch, slot: Slot) -> tuple[ModelGraph, bool]:
        """Return an allocated graph for a micro-batch, the last one if it fits."""
        p = GraphParams(self.hparams, self.params, part, part.n_outputs, self.cache.view(slot))
        if self._current is not None and self._current.key == p.key:
            self.n_reused += 1
            if self.sched.n_copies > 1:
                self.sched.synchronize()  # inputs that are still read must not change
            return self._current, True
        self._current = None
        self.sched.reset()
        graph = self._build(part, part.n_outputs, p.view)
        self.sched.alloc_graph(graph.graph)
        self._filler = InputFiller(graph.inputs, self.cache)
        self._current = graph
        return graph, False

    def _forget(self, part: MicroBatch) -> None:
        """Take the tokens of a failed micro-batch out of the cache."""
        self._current = None
        for seq in part.seqs_unq:
            self.cache.seq_rm(seq, int(part.pos[part.seqs == seq].min()))
        self.sched.set_eval_callback(None)

    def rewind(self, n_past: int, *, seq: int = 0) -> None:
        """Forget a sequence's tokens from position ``n_past`` on, so that decoding goes on there."""
        self.cache.seq_rm(seq, n_past)

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.clear()

    def generate(
        self,
        prompt: Sequence[int],
        n_predict: int,
        sampler: Sampler = greedy,
        *,
        stop: Collection[int] = (),
        seq: int = 0,
    ) -> Iterator[int]:
        """Evaluate a prompt and yield the tokens that follow, one by one.

        Parameters
        ----------
        prompt : sequence of int
            Ids, which follow what the cache holds.
        n_predict : int
            At most so many are yielded.
        sampler : callable
            From logits, float32 ``(n_vocab,)``, to an id.
        stop : collection of int
            Ids that end it, such as ``Tokenizer.eog_ids``; they are not yielded.

        Yields
        ------
        int
            Ends early at a token of ``stop``, and when the context is full.

        Raises
        ------
        GraphError, CacheFullError
            As `decode`, before the first token.
        """
        logits = self.decode(prompt, outputs="last", seq=seq)
        return self._continue(logits[-1], n_predict, sampler, stop, seq)

    def _continue(
        self, logits: npt.NDArray[np.float32], n_predict: int, sampler: Sampler, stop: Collection[int], seq: int
    ) -> Iterator[int]:
        for i in range(n_predict):
            token = sampler(logits)
            if token in stop:
                return
            yield token
            if i + 1 < n_predict:
                try:
                    logits = self.decode([token], outputs="last", seq=seq)[-1]
                except CacheFullError:
                    return

    # -- the end -------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise SchedError("the session is closed")
        if not self.data:
            raise SchedError("the session has no data", hint="open it without data=False to decode")

    def close(self) -> None:
        """Give all memory back now."""
        if self._closed:
            return
        self._closed = True
        self._current = None
        if hasattr(self, "sched"):
            self.sched.close()
        for t in (*self.cache.k, *self.cache.v):
            t.buffer = t.data = None
        for buffer in self._cache_buffers:
            buffer.close()
        self.loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(b.name for b in self.backends)
        return f"<Session of {self.hparams.arch} {self.hparams.name!r} on {names}: {self.cache.n_used} tokens>"


class TopK:
    """Takes the experts that each MoE layer chooses.

    Attributes
    ----------
    ids : int32, (n_moe_layer, n_token, n_used)
        Of the latest batch; -1 where a layer did not run for a token, as the last may not where only the last
        token's logits are wanted.
    """

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.int32] = np.empty((0, 0, 0), np.int32)
        self._n_before: int = 0

    def start(self, hparams: HParams, n_tokens: int) -> None:
        """Prepare for a batch; ids of earlier batches stay before its own."""
        n_layer = hparams.n_layer if hparams.is_moe else 0
        if self.ids.shape[0] != n_layer or self.ids.shape[2:] != (hparams.n_expert_used,):
            self.ids = np.empty((n_layer, 0, hparams.n_expert_used), np.int32)
        self._n_before = self.ids.shape[1]
        fresh = np.full((n_layer, n_tokens, hparams.n_expert_used), -1, np.int32)
        self.ids = np.concatenate([self.ids, fresh], axis=1)

    def watch(self, graph: ModelGraph, part: MicroBatch) -> Callable[[Tensor, bool], bool]:
        """Return the eval callback that reads the ids of one micro-batch."""
        layers = {tensor: i for i, tensor in enumerate(graph.topk)}
        places = part.idxs + self._n_before

        def see(tensor: Tensor, ask: bool) -> bool:
            layer = layers.get(tensor)
            if ask or layer is None:
                return layer is not None if ask else True
            rows = places if tensor.ne[1] == part.n_tokens else places[part.outputs]
            self.ids[layer, rows] = tensor.numpy().reshape(len(rows), -1)
            return True

        return see


def _backend_of(what: str | Device | Backend) -> Backend:
    if isinstance(what, Backend):
        return what
    return (REGISTRY.open(what) if isinstance(what, str) else what).backend()

