"""`GraphSource`: provides a planner with a model's graphs, weights and caches; `BuiltSource` builds the graphs itself.

The other source is `pyggml.llama.CapturedSource`, which captures graphs from llama.cpp.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Protocol

from ..backend import Backend, Device
from ..buffer import Buffer, BufferType
from ..gguf import GGUFFile
from ..graph import Graph
from ..moe_cache import MoeCache
from ..tensor import Tensor
from ..types import TensorFlag
from .architectures import build_graph, read_hparams, weight_specs
from .batch import Batch, MicroBatch, Outputs
from .caches import make_cache
from .context import ContextFlags, ContextParams
from .graph import ExpertBanks, GraphKey, GraphParams, ModelGraph
from .hparams import HParams
from .kv_cache import CacheFullError, KVCache
from .loading import LoadedWeights, Progress, allocate_cache, load_weights, plan_cache, plan_weights
from .placement import Placement, PlacementFlags, place
from .repeats import Pattern, build_repeated
from .weights import resolve_specs

__all__ = ["N_GRAPHS", "BuiltSource", "GraphSource", "ModelFacts", "PlannableGraph"]


class ModelFacts(Protocol):
    """Facts about a model of any family, for plans and reports."""

    @property
    def arch(self) -> str:
        """Name of the architecture."""

    @property
    def name(self) -> str:
        """Name of the model; may be empty."""

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""

    @property
    def n_ctx_train(self) -> int:
        """Context that the model was trained with, in tokens."""

    @property
    def n_layer(self) -> int:
        """Number of layers."""

    @property
    def n_expert(self) -> int:
        """Number of experts of a layer; 0 for dense models."""

    @property
    def n_expert_used(self) -> int:
        """Number of experts that each token uses."""

    @property
    def n_layer_dense_lead(self) -> int:
        """Number of layers before the first with experts."""


class PlannableGraph(Protocol):
    """What a planner reads of the graph of a micro-batch."""

    @property
    def graph(self) -> Graph:
        """The nodes in upstream's order."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the micro-batch."""

    @property
    def logits(self) -> Tensor:
        """The result that is read."""

    @property
    def norms(self) -> list[tuple[Tensor, int]]:
        """Nodes that may be pinned to their layers' devices."""

    @property
    def attn_outputs(self) -> list[Tensor]:
        """Nodes that are pinned to the CPU if the KV cache is there."""

    @property
    def delta_nodes(self) -> list[tuple[Tensor, int]]:
        """GATED_DELTA_NET nodes with their layers, until a probe has decided whether the op stays on."""

    @property
    def flash_nodes(self) -> list[tuple[Tensor, int]]:
        """FLASH_ATTN_EXT nodes with their layers, until a probe has decided whether the op stays on."""

    @property
    def pins(self) -> list[tuple[Tensor, Backend]]:
        """Nodes that must run on a given backend."""


#: Most graphs that are kept for plans; the least recently used is dropped. A decode has two or three, a search twenty; each
#: has about 2 MB.
N_GRAPHS = 32
#: Makes a graph after a reset of the scheduler; None: the previous graph is used again.
Build = Callable[[], PlannableGraph] | None


class GraphSource(ABC):
    """Provides a planner with a model's graphs, weights and caches.

    Attributes
    ----------
    hparams : ModelFacts
        Of the model.
    params : ContextParams
        Of the context.
    placement : Placement
        Where weights and layers are.
    """

    hparams: ModelFacts
    params: ContextParams
    placement: Placement
    tensor_split: tuple[float, ...] = ()  #: the user's shares of the devices, if any
    banks: ExpertBanks | None = None  #: what the graphs read instead of expert weights

    @abstractmethod
    def expert_weights(self) -> dict[int, list[Tensor]]:
        """Return the expert weights of each layer: gate and up, fused or separate, and down.

        Raises
        ------
        SchedError
            The graphs cannot read anything else instead of them.
        """

    def expert_vectors(self) -> dict[int, list[Tensor]]:
        """Return the biases and scales of the experts of each layer; none unless the graphs are built here."""
        return {}

    def read_banks(self, cache: MoeCache, free_bytes: Mapping[Device, int]) -> None:
        """Let graphs read an expert cache instead of weights from now on.

        Parameters
        ----------
        free_bytes : mapping of Device to int
            Free memory of each device besides weights and KV cache.

        Raises
        ------
        SchedError
            The graphs cannot read this cache.
        """
        self.banks = cache

    @abstractmethod
    def load(self, *, data: bool, progress: Progress | None) -> None:
        """Load weights to their placement; with ``data=False``, into buffers without bytes."""

    @abstractmethod
    def make_cache(self, *, data: bool) -> Mapping[BufferType, int]:
        """Allocate the KV cache, or plan it; return its bytes by buffer type."""

    @abstractmethod
    def reserved(self, n_tokens: int, n_seqs: int, n_outputs: int) -> PlannableGraph:
        """Return a graph of ``n_tokens`` tokens over the whole cache, for reserving memory."""

    @abstractmethod
    def parts(
        self, n_tokens: int, outputs: Outputs, *, depth: int = 0, is_generated: bool = False
    ) -> Iterator[tuple[MicroBatch, Build]]:
        """Yield the micro-batches of a decode of ``n_tokens`` tokens of one sequence.

        Parameters
        ----------
        depth : int
            The tokens of the sequence that are in the cache before.
        is_generated : bool
            Decode one token at a time.
        """

    def settle_flash_attention(self, on: bool) -> None:
        """Record whether flash attention stays on, as its probe decided."""
        self.params = replace(self.params, flash_attn=on, auto_flash_attn=False)

    #: Tokens per sequence of the graphs that decide whether GATED_DELTA_NET stays on.
    delta_probes: tuple[int, ...] = ()

    def settle_delta_net(self, n_each: int, on: bool) -> None:
        """Record whether GATED_DELTA_NET stays on for ``n_each`` tokens per sequence, as its probe decided."""
        if n_each == 1:
            self.params = replace(self.params, fused_delta_one=on)
        else:
            self.params = replace(self.params, fused_delta_many=on)

    def forget_pipeline(self) -> None:
        """Make graphs kept from earlier plans as they were before pipeline copies, which flag inputs as outputs, or drop them."""
        return

    @abstractmethod
    def changed(self, placement: PlacementFlags, context: ContextFlags) -> GraphSource:
        """Return a source of the same model with other flags, for plans; it replaces this one.

        Raises
        ------
        GraphError
            A flag is invalid. This source is unchanged.
        """

    @abstractmethod
    def close(self) -> None:
        """Free all memory."""


class BuiltSource(GraphSource):
    """Graphs that pyggml builds itself, node for node as llama.cpp does.

    Attributes
    ----------
    cache : KVCache
        The KV cache and the tokens in it.
    loaded : LoadedWeights
        The weights and their buffers.

    Raises
    ------
    FormatError
        The file is damaged, incomplete, or of an architecture that is not supported.
    GraphError
        A flag is invalid.
    """

    hparams: HParams
    loaded: LoadedWeights

    def __init__(
        self,
        file: GGUFFile,
        devices: Sequence[Device],
        cpu: Device,
        *,
        placement: PlacementFlags,
        context: ContextFlags,
    ) -> None:
        self.file, self.tensor_split = file, placement.tensor_split
        self.hparams = hp = read_hparams(file)
        self.params = ContextParams.resolve(context, hp)
        self._specs = resolve_specs(weight_specs(hp, file.tensors), file.tensors, file.path)
        self.placement = place(hp, self._specs, file.tensors, devices, cpu, placement)
        self.cache: KVCache = make_cache(hp, self.params, v_trans=not self.params.flash_attn)
        self._cache_buffers: list[Buffer] = []
        self.delta_probes = (1, 16) if hp.n_ssm_state else ()
        #: graphs kept for plans, in which only the places of weights change; None with data
        self._graphs: dict[tuple[KVCache, ContextParams, GraphKey], ModelGraph] | None = None
        self._patterns: dict[ContextParams, list[Pattern]] = {}  #: the structures of those graphs
        self._to_follow: set[ModelGraph] = set()  #: those of them that were made before weights or cache moved

    def load(self, *, data: bool, progress: Progress | None) -> None:
        """Bring weights to their places."""
        if data:
            self.loaded = load_weights(self.file, self.placement, self.hparams, progress=progress)
        else:
            before = None if self._graphs is None else self.loaded
            self.loaded = plan_weights(self.placement, self.hparams, before)
            if before is None or before.weights is not self.loaded.weights:
                self._graphs, self._patterns = {}, {}

    def make_cache(self, *, data: bool) -> Mapping[BufferType, int]:
        """Allocate the KV cache, or plan it."""
        if not data:
            sizes = plan_cache(self.cache, self.placement, self.params)
            self._to_follow = set((self._graphs or {}).values())
            return sizes
        self._cache_buffers = allocate_cache(self.cache, self.placement, self.params)
        sizes = {}
        for buffer in self._cache_buffers:
            sizes[buffer.buft] = sizes.get(buffer.buft, 0) + buffer.size
        return sizes

    def build(self, p: GraphParams) -> ModelGraph:
        """Return the graph of a micro-batch; for plans, equal keys give the same object."""
        if self._graphs is None or p.banks is not None:
            return build_graph(p, self.loaded.weights)
        # these have no effect on the graph
        params = replace(p.params, n_batch=0, n_ubatch=0, op_offload=True, offload_kqv=True, n_outputs_max=0)
        key = self.cache, params, p.key
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = build_repeated(build_graph, p, self.loaded.weights, self._patterns.setdefault(params, []))
        if graph in self._to_follow:
            self._to_follow.remove(graph)
            _make_views_follow(graph.graph)
        self._graphs[key] = graph
        if len(self._graphs) > N_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def changed(self, placement: PlacementFlags, context: ContextFlags) -> BuiltSource:
        """Return a source with other flags; weights, cache and graphs are reused if only their places change."""
        made = copy(self)
        made.banks, made.tensor_split = None, placement.tensor_split
        hp = self.hparams
        made.params = params = ContextParams.resolve(context, hp)
        made.placement = place(
            hp, self._specs, self.file.tensors, self.placement.devices, self.placement.cpu, placement
        )
        cache = make_cache(hp, params, v_trans=not params.flash_attn)
        caches = dict.fromkeys([self.cache, *(known for known, _, _ in self._graphs or ())])
        made.cache = next((known for known in caches if cache.is_like(known)), cache)
        return made

    def forget_pipeline(self) -> None:
        """Remove the flags of outputs from inputs of kept graphs; builders flag no input so."""
        for graph in (self._graphs or {}).values():
            for leaf in graph.graph.leafs:
                if leaf.flags & TensorFlag.INPUT:
                    leaf.flags &= ~TensorFlag.OUTPUT

    def expert_weights(self) -> dict[int, list[Tensor]]:
        """Return the expert weights of each layer."""
        kinds = [f"ffn_{kind}_exps.weight" for kind in ("gate_up", "gate", "up", "down")]
        layers = enumerate(self.loaded.weights.layers)
        return {il: [t for kind in kinds if (t := layer.get(kind)) is not None] for il, layer in layers}

    def expert_vectors(self) -> dict[int, list[Tensor]]:
        """Return the biases and scales of the experts of each layer."""
        kinds = [f"ffn_{kind}_exps.{what}" for kind in ("gate_up", "gate", "up", "down") for what in ("bias", "scale")]
        layers = enumerate(self.loaded.weights.layers)
        return {il: [t for kind in kinds if (t := layer.get(kind)) is not None] for il, layer in layers}

    def reserved(self, n_tokens: int, n_seqs: int, n_outputs: int) -> ModelGraph:
        """Return a graph of ``n_tokens`` tokens over the whole cache."""
        part = MicroBatch.reserve(n_tokens, n_seqs, n_outputs)
        return self.build(GraphParams(self.hparams, self.params, part, n_outputs, self.cache.full_view(), self.banks))

    def parts(
        self, n_tokens: int, outputs: Outputs, *, depth: int = 0, is_generated: bool = False
    ) -> Iterator[tuple[MicroBatch, Build]]:
        """Yield the micro-batches of a decode; the cache is empty afterwards."""
        n_ubatch = 1 if is_generated else self.params.n_ubatch
        self.cache.clear()
        if depth + n_tokens > self.cache.n_cells:  # before making that many micro-batches
            raise CacheFullError(n_tokens, depth, self.cache.n_cells)
        key: GraphKey | None = None
        try:
            for batch in self.batches([0] * depth, 0, "last") if depth else ():
                for part, slot in self.cache.prepare(batch, self.params.n_ubatch):
                    self.cache.apply(part, slot)
            for batch in self.batches([0] * n_tokens, 0, "all" if is_generated else outputs):
                for part, slot in self.cache.prepare(batch, n_ubatch):
                    self.cache.apply(part, slot)
                    p = GraphParams(self.hparams, self.params, part, part.n_outputs, self.cache.view(slot), self.banks)
                    yield part, None if key == p.key else partial(self.build, p)
                    key = p.key
        finally:
            self.cache.clear()

    def batches(self, tokens: Sequence[int], seq: int, outputs: Outputs) -> list[Batch]:
        """Return a sequence's next tokens in batches of at most ``n_batch``, after checking all of them.

        Raises
        ------
        GraphError
            An id or the sequence is out of range.
        CacheFullError
            The tokens do not fit into the context.
        """
        whole = Batch.of(tokens, 0, seq=seq, outputs=outputs)
        whole.check(self.hparams.n_vocab, self.params.n_seq_max)
        whole.pos[:] += self.cache.seq_pos_max(seq) + 1
        n_free = self.cache.n_free(seq)
        if whole.n_tokens > n_free:
            raise CacheFullError(whole.n_tokens, self.cache.n_cells - n_free, self.cache.n_cells)
        return whole.cut(self.params.n_batch)

    def close(self) -> None:
        """Free weights and cache."""
        for _, tensor in self.cache.tensors():
            tensor.buffer = tensor.data = None
        for buffer in self._cache_buffers:
            buffer.close()
        self.loaded.close()


def _make_views_follow(graph: Graph) -> None:
    """Update views in a kept graph to the current addresses of weights and cache."""
    for node in graph.nodes:
        root = node.view_src
        if root is not None:
            node.buffer = None
            node.data = None if root.data is None else root.data + node.view_offs
