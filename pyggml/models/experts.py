"""The feed-forward with experts: a router chooses experts for each token, whose outputs are added up by weights.

The order of calls is the order of nodes, as in `blocks.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import ops
from ..backend import Backend
from ..tensor import Tensor
from .blocks import Builder
from .graph import ExpertBanks
from .hparams import Gating
from .weights import LayerWeights

if TYPE_CHECKING:
    from ..moe_cache import ExpertSides

__all__ = ["moe_ffn", "routed_ffn", "with_shared"]

#: Smallest sum that expert weights are divided by: the smallest normal F16, as upstream.
_MIN_WEIGHT_SUM = 6.103515625e-5

Activation = Literal["silu", "swiglu_oai", "geglu"]


def routed_ffn(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
    """Return `moe_ffn` with the routing that the file's metadata describes."""
    hp = b.hp
    return moe_ffn(
        b,
        w,
        cur,
        gating=hp.expert_gating,
        norm_weights=hp.expert_weights_norm,
        weights_scale=hp.expert_weights_scale,
    )


def with_shared(b: Builder, w: LayerWeights, cur: Tensor, routed: Tensor, name: str = "ffn_shexp") -> Tensor:
    """Return the chosen experts' outputs plus the shared expert's, if the layer has one."""
    if w.get("ffn_up_shexp.weight") is None:
        return routed
    return ops.add(routed, b.name(b.ffn(w, cur, suffix="_shexp"), name, w.layer))


def moe_ffn(
    b: Builder,
    w: LayerWeights,
    cur: Tensor,
    *,
    gating: Gating = "softmax",
    activation: Activation = "silu",
    norm_weights: bool = True,
    weights_scale: float = 0.0,
    logits: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs: f32, [n_embd, n_token].

    Parameters
    ----------
    cur : Tensor
        f32, [n_embd, n_token]
    gating : str
        How the router's logits become probabilities; ``softmax_weight`` applies a softmax to the chosen experts only.
    norm_weights : bool
        Divide the weights of a token's experts by their sum.
    weights_scale : float
        Factor of the weights; 0 and 1 change nothing.
    logits : Tensor, optional
        The router's logits, [n_expert, n_token]; by default the product with ``ffn_gate_inp``.

    Notes
    -----
    Mirrors `llm_graph_context::build_moe_ffn`: weights are expanded before the experts, views before the sums.
    """
    il, n_used = w.layer, b.hp.n_expert_used
    n_embd, n_tokens = cur.ne[0], cur.ne[1]
    probs = _probabilities(b, w, cur, gating, logits)
    chosen = _choose(b, w, probs)
    b.topk.append(chosen)
    weights = _weigh(b, probs, chosen, il, is_softmax=gating == "softmax_weight", norm_weights=norm_weights)
    if weights_scale not in (0.0, 1.0):
        weights = b.name(ops.scale(weights, weights_scale), "ffn_moe_weights_scaled", il)
    b.graph.expand(weights)
    experts = _chosen_experts(b, w, ops.reshape_3d(cur, n_embd, 1, n_tokens), chosen, activation)
    experts = b.name(ops.mul(experts, weights), "ffn_moe_weighted", il)
    b.graph.expand(experts)
    views = [ops.view_2d(experts, n_embd, n_tokens, experts.nb[2], i * experts.nb[1]) for i in range(n_used)]
    for view in views:
        b.graph.expand(view)
    out = views[0]
    for view in views[1:]:
        out = ops.add(out, view)
        b.graph.expand(out)
    if n_used == 1:
        out = ops.cont(out)  # the caller expects contiguous rows
    return b.name(out, "ffn_moe_out", il)


# -- the router ----------------------------------------------------------------


def _probabilities(b: Builder, w: LayerWeights, cur: Tensor, gating: Gating, logits: Tensor | None) -> Tensor:
    """Return the router's probabilities: f32, [n_expert, n_token]."""
    il = w.layer
    if logits is None:
        logits = b.name(ops.mul_mat(w["ffn_gate_inp.weight"], cur), "ffn_moe_logits", il)
    bias = w.get("ffn_gate_inp.bias")
    if bias is not None:
        logits = b.name(ops.add(logits, bias), "ffn_moe_logits_biased", il)
    probs = logits
    if gating == "softmax":
        probs = ops.soft_max(logits)
    elif gating == "sigmoid":
        probs = ops.sigmoid(logits)
    return b.name(probs, "ffn_moe_probs", il)


def _choose(b: Builder, w: LayerWeights, probs: Tensor) -> Tensor:
    """Return the chosen experts of each token: i32, [n_used, n_token]."""
    il = w.layer
    selection = probs
    bias = w.get("exp_probs_b.bias")
    if bias is not None:
        selection = b.name(ops.add(probs, bias), "ffn_moe_probs_biased", il)
    if b.hp.n_expert_groups > 1 and selection.ne[1]:  # without outputs the last layer has no tokens
        selection = _mask_groups(b, selection, il)
    chosen = ops.argsort_top_k(selection, b.hp.n_expert_used)
    argsort = chosen.src[0]
    assert argsort is not None
    b.name(argsort, "ffn_moe_argsort", il)
    return b.name(chosen, "ffn_moe_topk", il)


def _mask_groups(b: Builder, selection: Tensor, il: int) -> Tensor:
    """Return the probabilities with -inf outside the best groups; a group scores the sum of its two best experts."""
    n_groups, n_expert, n_tokens = b.hp.n_expert_groups, b.hp.n_expert, selection.ne[1]
    groups = ops.reshape_3d(selection, n_expert // n_groups, n_groups, n_tokens)
    best = ops.argsort_top_k(groups, 2)
    scores = ops.get_rows(ops.reshape_4d(groups, 1, *groups.ne[:3]), best)
    scores = ops.sum_rows(ops.reshape_3d(scores, *scores.ne[1:]))
    scores = ops.reshape_2d(scores, scores.ne[1], scores.ne[2])
    kept = b.name(ops.argsort_top_k(scores, b.hp.n_group_used), "ffn_moe_group_topk", il)
    rows = ops.get_rows(groups, kept)
    masked = ops.set_rows(ops.fill(groups, -math.inf), rows, kept)
    return b.name(ops.reshape_2d(masked, n_expert, n_tokens), "ffn_moe_probs_masked", il)


def _weigh(b: Builder, probs: Tensor, chosen: Tensor, il: int, *, is_softmax: bool, norm_weights: bool) -> Tensor:
    """Return the weights of the chosen experts: f32, [1, n_used, n_token]."""
    n_used, n_tokens = chosen.ne[0], probs.ne[1]
    probs = ops.reshape_3d(probs, 1, b.hp.n_expert, n_tokens)
    weights = b.name(ops.get_rows(probs, chosen), "ffn_moe_weights", il)
    if is_softmax:
        weights = ops.soft_max(ops.reshape_2d(weights, n_used, n_tokens))
        weights = b.name(ops.reshape_3d(weights, 1, n_used, n_tokens), "ffn_moe_weights_softmax", il)
    if norm_weights:
        weights = ops.reshape_2d(weights, n_used, n_tokens)
        total = b.name(ops.sum_rows(weights), "ffn_moe_weights_sum", il)
        total = b.name(ops.clamp(total, _MIN_WEIGHT_SUM, math.inf), "ffn_moe_weights_sum_clamped", il)
        weights = b.name(ops.div(weights, total), "ffn_moe_weights_norm", il)
        weights = ops.reshape_3d(weights, 1, n_used, n_tokens)
    return weights


# -- the experts ---------------------------------------------------------------

_KINDS = tuple(f"ffn_{which}_exps.weight" for which in ("up", "gate", "down", "gate_up"))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Where the products of a layer's experts read, and who computes them.

    Attributes
    ----------
    chosen, ids : Tensor
        The chosen experts, and what names them in the weights that are read: i32, [n_used, n_token].
    banks : ExpertBanks or None
        What has other tensors to read than the weights.
    on : Backend or None
        With banks that leave experts to the host, the layer's device or the host; otherwise the scheduler decides.
    """

    chosen: Tensor
    ids: Tensor
    banks: ExpertBanks | None = None
    on: Backend | None = None

    @property
    def is_host(self) -> bool:
        """Whether it computes what a bank lacks."""
        return self.banks is not None and self.on is not None and self.on is self.banks.host

    def mul(self, weight: Tensor, cur: Tensor) -> Tensor:
        """Return the products of rows with the experts that ``ids`` name."""
        if self.is_host:
            return ops.mul_mat_id(weight, cur, self.ids, skip_negative=True)
        return ops.mul_mat_id(weight if self.banks is None else self.banks.bank(weight), cur, self.ids)

    def beside(self, tensor: Tensor | None) -> Tensor | None:
        """Return biases or scales of all experts where they can be read."""
        if tensor is None or self.banks is None or self.on is None:
            return tensor
        return self.banks.beside(tensor, self.on)

    def name(self, b: Builder, tensor: Tensor, name: str, layer: int) -> Tensor:
        """Name a node, and keep one of the host there."""
        if self.is_host:
            assert self.on is not None
            b.pins.append((tensor, self.on))
            name += "_missing"
        return b.name(tensor, name, layer)


def _chosen_experts(b: Builder, w: LayerWeights, cur: Tensor, chosen: Tensor, activation: Activation) -> Tensor:
    """Return the output of each chosen expert for each token, read from weights or from an expert cache: [n_embd, n_used, n_token]."""
    banks, il = b.banks, w.layer
    if banks is not None:
        weights = [t for kind in _KINDS if (t := w.get(kind)) is not None]
        sides = None if banks.host is None else banks.sides(il, chosen, weights)
        if sides is not None:
            return _on_both_sides(b, w, cur, chosen, sides, activation)
        found = banks.slots(il, chosen, weights) if banks.host is None else None
        if found is not None:
            slots, lookup = found
            b.pins.append((lookup, banks.backend(il)))
            return _experts(b, w, cur, _Reader(chosen, slots, banks), activation)
    return _experts(b, w, cur, _Reader(chosen, chosen), activation)


def _on_both_sides(
    b: Builder, w: LayerWeights, cur: Tensor, chosen: Tensor, sides: ExpertSides, activation: Activation
) -> Tensor:
    """Return the outputs of experts in the cache, from the device, and of the others, from the host.

    Both sides have a row for each token and chosen expert; the right one is taken. So each value is that of the backend that
    computed it.

    Notes
    -----
    Upstream copies missing experts to the device first. The device's nodes are first in the graph: the device is computing
    them when the host begins with its own.
    """
    banks, il = b.banks, w.layer
    assert banks is not None
    device, host = banks.backend(il), banks.host
    assert host is not None
    b.pins += [(node, device) for node in sides.on_device] + [(node, host) for node in sides.on_host]
    there = _experts(b, w, cur, _Reader(chosen, sides.slots, banks, device), activation)
    b.graph.expand(there)
    here = _experts(b, w, cur, _Reader(sides.chosen, sides.missing, banks, host), activation)
    n_embd, n_used, n_tokens = there.ne[:3]
    rows = [ops.reshape_3d(side, n_embd, 1, n_used * n_tokens) for side in (there, here)]
    both = ops.concat(rows[0], rows[1], 1)
    b.pins.append((b.name(both, "ffn_moe_both", il), device))
    return ops.reshape_3d(ops.get_rows(both, sides.side), n_embd, n_used, n_tokens)


def _experts(b: Builder, w: LayerWeights, cur: Tensor, reader: _Reader, activation: Activation) -> Tensor:
    """Return the output of each expert that a reader computes for each token: [n_embd, n_used, n_token]."""
    il = w.layer
    if w.get("ffn_gate_up_exps.weight") is not None:
        gate, up = _fused_gate_up(b, w, cur, reader)
        gated = True
    else:
        up = _expert_mul(b, w, "up", cur, reader)
        gated = w.get("ffn_gate_exps.weight") is not None
        gate = _expert_mul(b, w, "gate", cur, reader) if gated else up
    if activation == "swiglu_oai":
        cur = reader.name(b, ops.swiglu_oai(gate, up, 1.702, 7.0), "ffn_moe_swiglu_oai", il)
    elif activation == "geglu":
        cur = reader.name(b, ops.geglu_split(gate, up), "ffn_moe_geglu", il)
    elif gated:
        cur = reader.name(b, ops.swiglu_split(gate, up), "ffn_moe_swiglu", il)
    else:
        cur = reader.name(b, ops.silu(gate), "ffn_moe_silu", il)
    return _expert_mul(b, w, "down", cur, reader)


def _fused_gate_up(b: Builder, w: LayerWeights, cur: Tensor, reader: _Reader) -> tuple[Tensor, Tensor]:
    """Return gate and up as the two halves of one product."""
    both = _expert_mul(b, w, "gate_up", cur, reader)
    n_ff = both.ne[0] // 2
    gate, up = (
        ops.view_3d(both, n_ff, both.ne[1], both.ne[2], both.nb[1], both.nb[2], i * n_ff * both.nb[0]) for i in (0, 1)
    )
    return reader.name(b, gate, "ffn_moe_gate", w.layer), reader.name(b, up, "ffn_moe_up", w.layer)


def _expert_mul(b: Builder, w: LayerWeights, which: str, cur: Tensor, reader: _Reader) -> Tensor:
    """Return the product with one weight of the chosen experts."""
    il = w.layer
    n_tokens = cur.ne[2]
    cur = reader.mul(w[f"ffn_{which}_exps.weight"], cur)
    factors = reader.beside(w.get(f"ffn_{which}_exps.scale"))
    if factors is not None:  # of each expert; mirrors `build_lora_mm_id`
        cur = reader.name(b, cur, f"ffn_moe_{which}_unscaled", il) if reader.is_host else cur
        by_token = ops.repeat_4d(ops.reshape_3d(factors, 1, factors.ne[0], 1), 1, factors.ne[0], n_tokens, 1)
        cur = ops.mul(cur, ops.get_rows(by_token, reader.chosen))
    cur = reader.name(b, cur, f"ffn_moe_{which}" if factors is None else f"ffn_moe_{which}_scaled", il)
    bias = reader.beside(w.get(f"ffn_{which}_exps.bias"))
    if bias is None:
        return cur
    return reader.name(b, ops.add_id(cur, bias, reader.chosen), f"ffn_moe_{which}_biased", il)
