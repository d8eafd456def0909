"""`Architecture`: all that tells a family of models from the others, as one object, and the decoder that walks its layers.

A family is one module of `pyggml.models.families`, which ends in an `Architecture`: the names that files give it, what its
metadata says beside what all families have, the weights of a layer, and the nodes of a layer. `decoder_graph` does what is
around the layers; a family whose graph is of another form brings a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .. import ops
from ..gguf import TensorInfo
from ..ops import RopeType
from ..tensor import Tensor
from .blocks import Builder
from .graph import GraphParams, ModelGraph
from .hparams import HParams, KeyReader, round_f32
from .weights import LayerWeights, Weights, WeightSpec, layer_specs, nextn_rows, scale_specs, skipped, trunk_specs

__all__ = ["Architecture", "decoder_graph", "finish_decoder"]

Present = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models. What a field leaves at its default, llama.cpp has of most families.

    Attributes
    ----------
    names : tuple of str
        What files call it (``general.architecture``).
    moe_names : tuple of str
        More such names, of models that are nothing without experts.
    may_have_experts : bool
        Models under `names` may have experts; else they are dense, whatever their files say.
    rope : RopeType
        Which elements of a row rotate together.
    layer_weights : callable
        From hyper-parameters, a layer and the tensors of the file to the weights of the layer, in upstream's order.
    layer : callable
        Adds the nodes of a layer to the graph and returns what the next one takes: f32, [n_embd, n_token].
    graph : callable
        Makes the whole graph instead, where `decoder_graph` does not fit.
    hparams : callable
        Adds what the metadata of this family says, and refuses what is not supported.
    has_tied_head : bool
        The head may be the embedding once more.
    has_partial_rope : bool
        A part of each head may rotate only.
    has_exact_sums : bool
        Half precision is too coarse for the sums of attention's and the feed-forward's last product.
    has_ffn_scales : bool
        Scales beside the weights of the feed-forward are part of the graph; of other families, llama.cpp reads them and
        computes without.
    has_recurrent_scales : bool
        Likewise, scales beside the weights of recurrent layers.
    embedding_name : str
        Of the node with the embedded tokens.
    uneven_keys : tuple of str
        Keys whose numbers may differ between layers.
    more_weights : callable
        Adds weights that are of no layer.
    """

    names: tuple[str, ...] = ()
    moe_names: tuple[str, ...] = ()
    may_have_experts: bool = False
    rope: RopeType
    layer_weights: Callable[[HParams, int, Present], list[WeightSpec]]
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
            A key is missing, of another kind, out of bounds, or asks for what is not supported.
        """
        is_moe = keys.arch in self.moe_names
        hp = keys.common(self.rope, has_experts=is_moe or self.may_have_experts, needs_experts=is_moe)
        if self.hparams is not None:
            hp = self.hparams(keys, hp)
        keys.check_heads(hp, may_be_partial=self.has_partial_rope)
        return hp

    def weight_specs(self, hp: HParams, present: Present) -> list[WeightSpec]:
        """Return the tensors that a model uses, in upstream's order, then what files have and nothing here uses."""
        specs = trunk_specs(hp, present, tied_head=self.has_tied_head)
        if self.more_weights is not None:
            specs += self.more_weights(hp)
        for i in range(hp.n_layer):
            specs += self.layer_weights(hp, i, present)
        for i in range(hp.n_layer, hp.n_layer_all):
            specs += skipped(self.layer_weights(hp, i, present) + layer_specs(i, nextn_rows(hp)))
        scales = scale_specs(hp, specs, present, of_ffn=self.has_ffn_scales, of_recurrent=self.has_recurrent_scales)
        return [*specs, *scales]

    def build_graph(self, p: GraphParams, weights: Weights) -> ModelGraph:
        """Return the graph of a micro-batch."""
        return decoder_graph(self, p, weights) if self.graph is None else self.graph(p, weights)


def decoder_graph(arch: Architecture, p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a decoder: the embedding, the layers, a norm and the head.

    Notes
    -----
    Mirrors what the constructors of `llama_model_*::graph` have in common.
    """
    assert arch.layer is not None
    b = Builder(p, weights, has_exact_sums=arch.has_exact_sums)
    cur = b.name(b.input_embd(), arch.embedding_name)
    b.make_inputs()
    for w in weights.layers:
        cur = arch.layer(b, w, cur)
    return finish_decoder(b, cur)


def finish_decoder(b: Builder, cur: Tensor) -> ModelGraph:
    """Return the graph with the last norm and the head behind the last layer."""
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
