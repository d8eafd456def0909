"""`ModelGraph`: the graph of one micro-batch with what a session needs to know of it.

Nothing here computes or allocates. What a scheduler is to be told (`norms`, `attn_outputs`) is collected as data, since
builders know no scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..backend import Backend
from ..graph import Graph
from ..tensor import Tensor
from .batch import MicroBatch
from .cache_view import CacheView
from .context import ContextParams
from .hparams import HParams

__all__ = ["AttnInputs", "ExpertBanks", "GraphInputs", "GraphKey", "GraphParams", "ModelGraph"]


class ExpertBanks(Protocol):
    """What a graph reads in place of expert weights, where a cache keeps some on the device; `moe_cache.MoeCache` is one."""

    def slots(self, layer: int, ids: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the slots in place of ids, and the node to be pinned; None if the layer reads its weights."""

    def bank(self, weight: Tensor) -> Tensor:
        """Return what a product reads in place of a weight."""

    def backend(self, layer: int) -> Backend:
        """Return the backend that computes a cached layer."""


@dataclass(frozen=True, slots=True)
class GraphParams:
    """All that determines a graph, beside the weights.

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

    @property
    def key(self) -> GraphKey:
        """What must agree for a graph to be used again."""
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


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What must agree for a graph to be used again; compared as a whole.

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
    n_kv_swa: int  #: of layers with a sliding window; 0 where there are none
    states: tuple[int, ...] = ()  #: cells of recurrent states, the first, and the one that is cleared


@dataclass(eq=False, slots=True)
class AttnInputs:
    """The inputs of attention over one cache; None where the cache needs none."""

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
    attn_swa: AttnInputs | None  #: of layers with a sliding window, where there are such
    out_ids: Tensor
    state_sources: Tensor | None = None  #: from which cell each recurrent state comes, where there are such
    layer_tokens: Tensor | None = None  #: the tokens once more, for embeddings of each layer
    token_scale: Tensor | None = None  #: by which embeddings of tokens are multiplied, where the model does so


@dataclass(eq=False, slots=True)
class ModelGraph:
    """The graph of one micro-batch.

    Attributes
    ----------
    graph : Graph
        The nodes in upstream's order.
    key : GraphKey
        For which micro-batches it can be used again.
    inputs : GraphInputs
        To be filled.
    logits, embd : Tensor
        The results, flagged as outputs: logits [n_vocab, n_outputs], the last norm [n_embd, n_outputs].
    topk : list of Tensor
        The chosen experts of each MoE layer: i32, [n_expert_used, n_tokens].
    norms : list of (Tensor, int)
        Nodes that were named ``norm``, with their layers; see `placement.norm_pins`.
    attn_outputs : list of Tensor
        Results of attention without FLASH_ATTN_EXT: they stay with a KV cache that is kept on the CPU.
    flash_nodes : list of (Tensor, int)
        FLASH_ATTN_EXT nodes with their layers, for the probe whether it can stay on.
    pins : list of (Tensor, Backend)
        Nodes that must run on a backend: lookups of an expert cache.
    delta_nodes : list of (Tensor, int)
        GATED_DELTA_NET nodes with their layers, likewise.

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
        """Tokens of the micro-batch."""
        return self.key.n_tokens

    def __repr__(self) -> str:
        return f"<ModelGraph of {self.key.n_tokens} tokens, {self.key.n_kv} cells: {self.graph!r}>"
