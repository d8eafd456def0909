"""`ModelGraph`: the graph of one micro-batch, with its inputs, results and the nodes that a session pins or reads.

Nothing here computes or allocates. Builders do not know the scheduler, so nodes to be pinned (`norms`,
`attn_outputs`, `pins`) are lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..backend import Backend
from ..graph import Graph
from ..tensor import Tensor
from .batch import MicroBatch
from .cache_view import CacheView
from .context import ContextParams
from .hparams import HParams

if TYPE_CHECKING:
    from ..moe_cache import ExpertSides
    from .repeats import Listing

__all__ = ["AttnInputs", "ExpertBanks", "GraphInputs", "GraphKey", "GraphParams", "ModelGraph"]


class ExpertBanks(Protocol):
    """Tensors that a graph reads instead of expert weights: an expert cache, such as `moe_cache.MoeCache`."""

    def slots(self, layer: int, ids: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the slots to use as ids, and the node to pin; None if the layer reads its weights."""

    def bank(self, weight: Tensor) -> Tensor:
        """Return the tensor that a product reads instead of a weight."""

    def backend(self, layer: int) -> Backend:
        """Return the backend that computes a cached layer."""

    @property
    def host(self) -> Backend | None:
        """The backend that computes what a bank lacks; None: it is copied into the bank first."""

    def sides(self, layer: int, ids: Tensor, weights: Sequence[Tensor]) -> ExpertSides | None:
        """Return what device and host read, if there is a `host`; None if the layer reads its weights."""

    def beside(self, tensor: Tensor, backend: Backend) -> Tensor:
        """Return the biases or scales of experts, or a copy of them, in memory of ``backend``."""


@dataclass(frozen=True, slots=True)
class GraphParams:
    """Everything that determines a graph, except the weights.

    Notes
    -----
    Mirrors `llm_graph_params`.
    """

    hparams: HParams
    params: ContextParams
    part: MicroBatch
    n_outputs: int
    view: CacheView
    banks: ExpertBanks | None = None
    listing: Listing | None = None  #: notes what is made, for graphs with repeated layers

    @property
    def key(self) -> GraphKey:
        """Key that two micro-batches must share to use one graph."""
        part, states = self.part, self.view.states
        return GraphKey(
            part.n_tokens,
            part.n_seq_tokens,
            part.n_seqs,
            len(part.seqs_unq),
            part.equal_seqs,
            part.seqs_unq if part.equal_seqs else (),
            self.n_outputs,
            self.view.n_kv,
            0 if self.view.swa is None else self.view.swa.n_kv,
            () if states is None else (states.n, states.head, states.zero),
        )


class GraphKey(NamedTuple):
    """A graph can be used for another micro-batch if its key is equal.

    Notes
    -----
    Mirrors `llm_graph_params::allow_reuse` and the `can_reuse` of each input, for batches of tokens.
    """

    n_tokens: int
    n_seq_tokens: int
    n_seqs: int
    n_seqs_unq: int
    equal_seqs: bool
    seqs_unq: tuple[int, ...]
    n_outputs: int
    n_kv: int
    n_kv_swa: int  #: of layers with a sliding window; 0 if there are none
    states: tuple[int, ...] = ()  #: cells of recurrent states, the first, and the one that is cleared


@dataclass(eq=False, slots=True)
class AttnInputs:
    """The inputs of attention over one cache; None for those that the cache does not need."""

    k_idxs: Tensor
    v_idxs: Tensor | None
    kq_mask: Tensor
    k_rot: Tensor | None = None
    v_rot: Tensor | None = None


@dataclass(eq=False, slots=True)
class GraphInputs:
    """The inputs of a graph that are filled before it is computed."""

    tokens: Tensor
    pos: Tensor
    attn: AttnInputs
    attn_swa: AttnInputs | None  #: of layers with a sliding window, if any
    out_ids: Tensor
    state_sources: Tensor | None = None  #: the cell that each recurrent state is read from, if any
    layer_tokens: Tensor | None = None  #: a second input of tokens, for the embeddings of each layer
    token_scale: Tensor | None = None  #: factor of token embeddings, if the model has one


@dataclass(eq=False, slots=True)
class ModelGraph:
    """The graph of one micro-batch.

    Attributes
    ----------
    graph : Graph
        The nodes in upstream's order.
    key : GraphKey
        The micro-batches that it can be used for.
    inputs : GraphInputs
        To be filled before computing.
    logits, embd : Tensor
        The results, flagged as outputs: logits [n_vocab, n_outputs], the last norm [n_embd, n_outputs].
    topk : list of Tensor
        The chosen experts of each layer with experts: i32, [n_expert_used, n_tokens].
    norms : list of (Tensor, int)
        Nodes named ``norm``, with their layers; see `placement.norm_pins`.
    attn_outputs : list of Tensor
        Results of attention without FLASH_ATTN_EXT, pinned to the CPU if the KV cache is there.
    flash_nodes : list of (Tensor, int)
        FLASH_ATTN_EXT nodes with their layers, for the probe that decides whether flash attention stays on.
    pins : list of (Tensor, Backend)
        Nodes that must run on a given backend: lookups of an expert cache.
    delta_nodes : list of (Tensor, int)
        GATED_DELTA_NET nodes with their layers, for a probe like that of flash attention.

    Notes
    -----
    Mirrors `llm_graph_result`.
    """

    graph: Graph
    key: GraphKey
    inputs: GraphInputs
    logits: Tensor
    embd: Tensor
    topk: list[Tensor] = field(default_factory=list)
    norms: list[tuple[Tensor, int]] = field(default_factory=list)
    attn_outputs: list[Tensor] = field(default_factory=list)
    flash_nodes: list[tuple[Tensor, int]] = field(default_factory=list)
    pins: list[tuple[Tensor, Backend]] = field(default_factory=list)
    delta_nodes: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the micro-batch."""
        return self.key.n_tokens

    def __repr__(self) -> str:
        return f"<ModelGraph of {self.key.n_tokens} tokens, {self.key.n_kv} cells: {self.graph!r}>"
