"""`Architecture`: what distinguishes a family of models; `decoder_graph`: the graph that most families share.

A family is one module of `pyggml.models.families`. It ends in an `Architecture`: the family's names in files, its own
metadata keys, and the weights and nodes of a layer. `decoder_graph` adds the embedding, the last norm and the head. A
family with a graph of another form sets `Architecture.graph`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .. import ops
from ..ops import RopeType
from ..tensor import Tensor
from .blocks import Builder
from .graph import GraphParams, ModelGraph
from .hparams import HParams, KeyReader, round_f32
from .weights import (
    LayerWeights,
    Present,
    Row,
    Weights,
    WeightSpec,
    layer_specs,
    nextn_rows,
    scale_specs,
    skipped,
    trunk_specs,
)

__all__ = ["Architecture", "decoder_graph", "finish_decoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models; each default is what most families have.

    Attributes
    ----------
    names : tuple of str
        Its names in files (``general.architecture``).
    moe_names : tuple of str
        Names in files of models that must have experts.
    may_have_experts : bool
        Models under `names` may have experts. If False, keys about experts are ignored.
    rope : RopeType
        Which elements of a row rotate together.
    layer_weights : callable
        Returns a layer's weights as rows for `layer_specs`, from hyper-parameters, layer and the file's tensors.
    layer : callable
        Adds the nodes of a layer to the graph and returns its output: f32, [n_embd, n_token].
    graph : callable
        Makes the whole graph, instead of `layer` and `decoder_graph`.
    hparams : callable
        Reads the family's own keys, and raises `FormatError` for values that are not supported.
    has_tied_head : bool
        If the file has no head, the embedding is used.
    has_partial_rope : bool
        ROPE may rotate only a part of each head.
    has_exact_sums : bool
        The last products of attention and feed-forward are computed with F32 sums (`GGML_PREC_F32`).
    has_ffn_scales : bool
        The graph multiplies by the ``.scale`` tensors of feed-forward weights. Of other families, llama.cpp reads them
        but does not use them.
    has_recurrent_scales : bool
        The same for weights of recurrent layers.
    embedding_name : str
        Name of the node with the embedded tokens.
    uneven_keys : tuple of str
        Keys whose numbers may differ between layers.
    more_weights : callable
        Returns specs of weights outside the layers.
    """

    names: tuple[str, ...] = ()
    moe_names: tuple[str, ...] = ()
    may_have_experts: bool = False
    rope: RopeType
    layer_weights: Callable[[HParams, int, Present], list[Row]]
    layer: Callable[[Builder, LayerWeights, Tensor], Tensor] | None = None
    graph: Callable[[GraphParams, Weights], ModelGraph] | None = None
    hparams: Callable[[KeyReader, HParams], HParams] | None = None
    has_tied_head: bool = True
    has_partial_rope: bool = False
    has_exact_sums: bool = False
    has_ffn_scales: bool = False
    has_recurrent_scales: bool = False
    embedding_name: str = "embd"
    uneven_keys: tuple[str, ...] = ()
    more_weights: Callable[[HParams], list[WeightSpec]] | None = None

    def read(self, keys: KeyReader) -> HParams:
        """Return the hyper-parameters of a file, checked.

        Raises
        ------
        FormatError
            A key is missing, has another type, is out of range, or has a value that is not supported.
        """
        is_moe = keys.arch in self.moe_names
        hp = keys.common(self.rope, has_experts=is_moe or self.may_have_experts, needs_experts=is_moe)
        if self.hparams is not None:
            hp = self.hparams(keys, hp)
        keys.check_heads(hp, may_be_partial=self.has_partial_rope)
        return hp

    def weight_specs(self, hp: HParams, present: Present) -> list[WeightSpec]:
        """Return the specs of the tensors that a model uses, in upstream's order, then of those that no graph uses."""
        specs = trunk_specs(hp, present, tied_head=self.has_tied_head)
        if self.more_weights is not None:
            specs += self.more_weights(hp)
        for i in range(hp.n_layer):
            specs += layer_specs(i, self.layer_weights(hp, i, present))
        for i in range(hp.n_layer, hp.n_layer_all):
            specs += skipped(layer_specs(i, [*self.layer_weights(hp, i, present), *nextn_rows(hp)]))
        scales = scale_specs(hp, specs, present, of_ffn=self.has_ffn_scales, of_recurrent=self.has_recurrent_scales)
        return [*specs, *scales]

    def build_graph(self, p: GraphParams, weights: Weights) -> ModelGraph:
        """Return the graph of a micro-batch."""
        return decoder_graph(self, p, weights) if self.graph is None else self.graph(p, weights)


def decoder_graph(arch: Architecture, p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a decoder: the embedding, the layers, a norm and the head.

    Notes
    -----
    Mirrors the common part of the constructors of `llama_model_*::graph`.
    """
    assert arch.layer is not None
    b = Builder(p, weights, has_exact_sums=arch.has_exact_sums)
    cur = b.input_embd()
    if b.hp.stream_scale:
        cur = ops.scale(cur, b.hp.stream_scale)
    b.name(cur, arch.embedding_name)
    b.make_inputs()
    return finish_decoder(b, b.layers(partial(arch.layer, b), cur))


def finish_decoder(b: Builder, cur: Tensor) -> ModelGraph:
    """Add the last norm and the head, and return the graph."""
    hp = b.hp
    if not b.is_cropped:
        (cur,) = b.choose_outputs(cur)
    embd = b.name(b.norm(cur, b.weights["output_norm.weight"], -1), "result_norm")
    logits = b.head(embd)
    if hp.logit_scale:
        logits = ops.scale(logits, round_f32(1.0 / hp.logit_scale))
    if hp.logit_softcap:
        logits = ops.scale(ops.tanh(ops.scale(logits, 1.0 / hp.logit_softcap)), hp.logit_softcap)
    return b.finish(b.name(logits, "result_output"), embd)
