"""`Session`: a model, its KV cache and a scheduler on devices: the way to run a model.

::

    with Session.open("model.gguf", devices=["sim:rtx4090-pcie4"], placement=PlacementFlags(cpu_moe=True)) as session:
        logits = session.decode([1, 15043])                    # float32, (1, n_vocab): of the last token
        for id in session.generate([3186], 20):                # continues where the cache ends
            ...

A decode divides its tokens into micro-batches and finds cells for all of them. For each it builds a graph, or uses the
last graph again if only the values of the inputs differ; then a token costs filling a few small arrays and one call.
`Planner.open(..., data=False)` plans without reading weights: see `Planner.plan_batch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from .clock import VirtualClock
from .errors import AllocError, ComputeError, SchedError
from .generation import Generator
from .memory_rows import Memory
from .models.batch import Batch, MicroBatch, Outputs
from .models.context import ContextFlags
from .models.graph import GraphParams, ModelGraph
from .models.hparams import HParams
from .models.inputs import InputFiller
from .models.kv_cache import KVCache, Slot
from .models.loading import LoadedWeights
from .models.placement import PlacementFlags
from .models.source import BuiltSource
from .models.topk import TopK
from .planning import PlannedGraph, Planner
from .sched.state import is_computed
from .tensor import Tensor
from .types import BufferUsage, Type

__all__ = ["BatchRecord", "ContextFlags", "Memory", "PlacementFlags", "PlannedGraph", "Session", "TopK"]


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """The result of one micro-batch."""

    n_tokens: int
    n_outputs: int
    n_past: int  #: tokens in the cache before it
    n_splits: int
    n_nodes: int
    is_reused: bool  #: the previous graph was used again
    seconds: float  #: for building, allocating, copying and computing, until the results were available
    bytes_copied: int  #: between backends
    bytes_full: int  #: if every weight had been copied whole
    virtual_s: float | None = None  #: duration on the scheduler's virtual clock, if there is one


class Watcher(Protocol):
    """Reads tensors while a micro-batch is computed."""

    def watch(self, graph: ModelGraph, part: MicroBatch) -> Callable[[Tensor, bool], bool]:
        """Return the eval callback of one micro-batch; see `Scheduler.set_eval_callback`."""


class Session(Planner, Generator):
    """A model that can decode. Made by `Session.open`.

    Attributes
    ----------
    n_reused : int
        How often a graph was used again.
    abort : callable or None
        Called before each micro-batch; if it returns True, `ComputeError` is raised with status 1.
    watcher : Watcher or None
        Provides the eval callback of each micro-batch; `TopK` is an example.
    on_batch : callable or None
        Called with a `BatchRecord` after each micro-batch, when its results are available.
    """

    n_reused: int = 0
    abort: Callable[[], bool] | None = None
    on_batch: Callable[[BatchRecord], None] | None = None
    watcher: Watcher | None = None
    source: BuiltSource
    _is_built_only: ClassVar[bool] = True
    _current: ModelGraph | None = None
    _filler: InputFiller | None = None
    _step: tuple[MicroBatch, Slot] | None = None  # of the latest token that was decoded alone

    @property
    def hparams(self) -> HParams:
        """The sizes and constants of the model."""
        return self.source.hparams

    @property
    def cache(self) -> KVCache:
        """The KV cache."""
        return self.source.cache

    @property
    def loaded(self) -> LoadedWeights:
        """The weights and their buffers."""
        return self.source.loaded

    # -- decoding ------------------------------------------------------------

    @property
    def n_past(self) -> int:
        """The number of tokens of sequence 0 in the cache."""
        return self.cache.seq_pos_max(0) + 1

    def decode(
        self, tokens: Sequence[int], *, outputs: Outputs = "last", seq: int = 0, topk: TopK | None = None
    ) -> npt.NDArray[np.float32]:
        """Evaluate the next tokens of a sequence.

        Parameters
        ----------
        tokens : sequence of int
            Ids that follow the sequence's tokens in the cache.
        outputs : str
            The tokens whose logits are returned: ``"last"``, ``"all"`` or ``"none"``.
        topk : TopK, optional
            Receives the experts that each MoE layer chose for each token.

        Returns
        -------
        float32, (n_outputs, n_vocab)

        Raises
        ------
        GraphError
            An id or the sequence is out of bounds; nothing was computed.
        CacheFullError
            The tokens do not fit in the context; nothing was computed.
        ComputeError
            The logits contain NaN; the text names the first node that produced NaN.
        ComputeError, ExpertIdError, OutOfMemoryError
            Raised by the scheduler. The failed micro-batch and later ones are not in the cache; the session stays
            usable. For a model with recurrent layers, all tokens of its sequences are removed.
        """
        self._check_open()
        if len(tokens) == 1 and outputs == "last" and topk is None and self._take_step(tokens[0], seq):
            assert self._step is not None
            logits = np.empty((1, self.hparams.n_vocab), np.float32)
            self._run(*self._step, logits, None)
            return logits
        batches = self.source.batches(tokens, seq, outputs)
        self._step = None
        out = [self._decode(batch, topk, is_own=True) for batch in batches]
        return out[0] if len(out) == 1 else np.concatenate(out)

    def decode_batch(self, batch: Batch, *, topk: TopK | None = None) -> npt.NDArray[np.float32]:
        """Evaluate a batch with any sequences and positions; the logits are in the batch's order. See `decode`.

        Notes
        -----
        Mirrors `llama_context::decode`.
        """
        self._check_open()
        batch.check(self.hparams.n_vocab, self.params.n_seq_max)
        return self._decode(batch, topk)

    def _take_step(self, token: int, seq: int) -> bool:
        """Write the next token of a sequence to the latest micro-batch of one token, and its cell; return whether that is possible.

        It is if nothing but token, position and cell differ, and the cell is the one after all that are used.
        """
        if self._step is None or self.watcher is not None or type(token) is not int:
            return False
        part, slot = self._step
        cell = self.cache.next_cell()
        if cell is None or part.seqs_unq != (seq,) or not 0 <= token < self.hparams.n_vocab:
            return False
        part.tokens[0], part.pos[0], slot.cells[0, 0] = token, self.cache.seq_pos_max(seq) + 1, cell
        return True

    def _decode(self, batch: Batch, topk: TopK | None, *, is_own: bool = False) -> npt.NDArray[np.float32]:
        """Evaluate a checked batch; its arrays may be used again if they are the session's own."""
        parts = self.cache.prepare(batch, self.params.n_ubatch)
        logits = np.empty((int(np.count_nonzero(batch.outputs)), self.hparams.n_vocab), np.float32)
        if topk is not None:
            topk.start(self.hparams, batch.n_tokens)
        if len(parts) == 1 and not parts[0][0].equal_seqs:  # in the batch's order
            self._run(*parts[0], logits, topk)
            if is_own and batch.n_tokens == len(logits) == 1 and topk is self.watcher is None:
                self._step = parts[0]
            return logits
        rows = np.cumsum(batch.outputs) - 1  # the row of each token whose logits are returned
        for part, slot in parts:
            own = rows[part.idxs[part.outputs]]
            in_place = len(own) < 2 or bool((np.diff(own) == 1).all())
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
        """Evaluate one micro-batch; after a failure it is removed from the cache.

        Notes
        -----
        Mirrors `llama_context::process_ubatch`.
        """
        start_s, n_past = time.perf_counter(), self.cache.n_used
        stats = self.sched.stats
        copied, full = stats.bytes_copied, stats.bytes_full
        clock = self.sched.clock
        virtual_start_s = 0.0 if clock is None else clock.host_s
        self.cache.apply(part, slot)
        try:
            if self.abort is not None and self.abort():
                raise ComputeError(self.backends[-1].name, "aborted", status=1)
            self.sched.announce(part.n_tokens, n_past, part.n_outputs)
            graph, is_reused = self._graph_for(part, slot)
            sched = self.sched
            assert self._filler is not None
            self._filler.fill(part, slot)
            looks = [watcher.watch(graph, part) for watcher in (self.watcher, topk) if watcher is not None]
            sched.set_eval_callback(_all_look(looks) if looks else None)
            sched.compute_async(graph.graph)
            if into.size:
                backend = sched.tensor_backend(graph.logits)
                assert backend is not None
                log = sched.new_log()
                read_s = log.now()
                backend.get_tensor_async(graph.logits, into.ctypes.data, 0, into.nbytes)
                backend.synchronize()
                log.was_read(None, graph.logits, self.backends.index(backend), read_s)
            sched.synchronize()
            if into.size and math.isnan(np.maximum.reduce(into, axis=None)):  # the largest is NaN if one is
                raise self._nan_error(graph, part, slot)
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
                    None if clock is None else clock.host_s - virtual_start_s,
                )
            )

    def _nan_error(self, graph: ModelGraph, part: MicroBatch, slot: Slot) -> ComputeError:
        """Compute a micro-batch again, node by node, and return an error that names the first node with NaN."""
        found: list[Tensor] = []

        def look(node: Tensor, ask: bool) -> bool:
            if ask:
                return not found and is_computed(node) and node.view_src is None and node.type is Type.F32
            if np.isnan(node.numpy()).any():
                found.append(node)
            return True  # not stopped: the next split would read ids that were not computed

        assert self._filler is not None
        self._filler.fill(part, slot)
        self.sched.set_eval_callback(look)
        self.sched.compute(graph.graph)
        if not found:
            where = self.sched.tensor_backend(graph.logits) or self.backends[-1]
            return ComputeError(
                where.name,
                "the logits contained NaN, but not when the batch was computed again: unwritten memory was read",
                node=graph.logits.name,
                hint="PYGGML_CHECK=1 finds incomplete copies",
            )
        node = found[0]
        weights = [
            s for s in node.src if s is not None and s.storage is not None and s.storage.usage is BufferUsage.WEIGHTS
        ]
        bad = [w.name for w in weights if np.isnan(w.numpy()).any()]
        where = self.sched.tensor_backend(node) or self.backends[-1]
        because = f": its weight '{bad[0]}' contains NaN" if bad else ""
        return ComputeError(
            where.name,
            f"the logits contain NaN: {node.op_desc} produces the first{because}",
            node=node.name,
            hint="the file is damaged, or a number in it is too large" if bad else "",
        )

    def _graph_for(self, part: MicroBatch, slot: Slot) -> tuple[ModelGraph, bool]:
        """Return an allocated graph for a micro-batch: the last one if it fits."""
        p = GraphParams(self.hparams, self.params, part, part.n_outputs, self.cache.view(slot), self.source.banks)
        if self._current is not None and self._current.key == p.key:
            self.n_reused += 1
            if self.sched.n_copies > 1:
                self.sched.synchronize()  # inputs must not change while they are read
            return self._current, True
        graph = self._adopt(lambda: self.source.build(p))
        assert isinstance(graph, ModelGraph)
        self.sched.alloc_graph(graph.graph)
        self._filler = InputFiller(graph.inputs, self.cache)
        self._current = graph
        return graph, False

    def _forget(self, part: MicroBatch) -> None:
        """Remove the tokens of a failed micro-batch from the cache."""
        self._current = None
        self.sched.synchronize()
        self.cache.forget(part)
        self.sched.set_eval_callback(None)

    @property
    def clock(self) -> VirtualClock | None:
        """The scheduler's clock."""
        return self.sched.clock

    def count_splits(self) -> tuple[dict[str, int], int]:
        """Return the number of splits of the latest graph by backend, and the number of their inputs."""
        by_name: dict[str, int] = {}
        for split in self.sched.splits:
            name = self.backends[split.backend_id].name
            by_name[name] = by_name.get(name, 0) + 1
        return by_name, sum(len(s.inputs) for s in self.sched.splits)

    def rewind(self, n_past: int, *, seq: int = 0) -> None:
        """Remove a sequence's tokens from position ``n_past`` on, so that decoding continues there.

        Raises
        ------
        AllocError
            Layers with a sliding window have dropped tokens that the next token needs, or layers without attention
            have one state for all tokens; nothing was removed. See `can_rewind`.
        """
        if not self.can_rewind(n_past, seq=seq):
            is_state = self.cache.states is not None
            why = "without attention have one state for all tokens"
            raise AllocError(
                f"the cache cannot go back to {n_past} tokens: layers "
                + (why if is_state else "with a sliding window keep only the last tokens"),
                hint="rewind to 0 and decode all tokens again"
                + ("" if is_state else ", or open the session with swa_full"),
            )
        self.cache.seq_rm(seq, n_past)

    def can_rewind(self, n_past: int, *, seq: int = 0) -> bool:
        """Return whether decoding can continue from position ``n_past`` of a sequence."""
        return n_past == 0 or n_past >= self.cache.reaches_back_to(seq)

    def reset(self) -> None:
        """Remove all tokens from the cache."""
        self.cache.clear()

    def _check_open(self) -> None:
        if self.is_closed:
            raise SchedError("the session is closed")
        if not self.data:
            raise SchedError("the session has no data", hint="open it without data=False to decode")


def _all_look(looks: list[Callable[[Tensor, bool], bool]]) -> Callable[[Tensor, bool], bool]:
    """Combine eval callbacks: a tensor is shown if one of them requests it, and computing continues if all agree."""

    def see(tensor: Tensor, ask: bool) -> bool:
        said = [look(tensor, ask) for look in looks]
        return any(said) if ask else all(said)

    return see
