"""Recurrent layers: a short convolution, then a gated delta net whose state is kept from batch to batch.

The order of calls is the order of nodes, as in `blocks.py`. Letters are those of "Gated Delta Networks"
(arXiv:2412.06464): q reads the state, beta is the strength with which k and v are written into it, and g is the
logarithm of its decay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .. import ops
from ..tensor import Tensor
from .blocks import Builder
from .delta_unfused import in_chunks, one_token
from .hparams import round_f32
from .weights import LayerWeights

__all__ = ["DeltaInputs", "delta_layer"]


class DeltaInputs(NamedTuple):
    """The projections of a layer's tokens, before the convolution.

    Attributes
    ----------
    qkv : Tensor
        f32, [n_channel, n_seq_token, n_seq]: Q, K and V.
    z : Tensor
        f32, as many elements as V: the gate of the result.
    beta, gate : Tensor
        f32, [1, n_head, n_seq_token, n_seq].
    """

    qkv: Tensor
    z: Tensor
    beta: Tensor
    gate: Tensor


def _state_rows(b: Builder, all_states: Tensor, n_embd: int) -> Tensor:
    """Return the state rows of a micro-batch's sequences: f32, [n_embd, n_seq], zeros for a sequence that begins.

    Notes
    -----
    Mirrors `llm_graph_context::build_rs`: one row is zeroed and copied to every sequence that begins. Rows of other
    sequences in the range of cells move to the cells that they now have.
    """
    view, n_seqs = b.view.states, b.part.n_seqs
    assert view is not None
    assert b.inputs.state_sources is not None
    row = all_states.nb[1]
    states = ops.reshape_2d(all_states, n_embd, all_states.ne[1])
    has_zero = view.zero >= 0
    zero = ops.view_1d(states, n_embd if has_zero else 0, view.zero * row if has_zero else 0)
    b.graph.expand(ops.scale_inplace(zero, 0.0))
    moved = ops.get_rows(states, b.inputs.state_sources)
    out = ops.view_2d(moved, n_embd, n_seqs, moved.nb[1], 0)
    b.graph.expand(out)
    n_extra = view.n - n_seqs
    extra = ops.view_2d(moved, n_embd, n_extra, moved.nb[1], n_seqs * moved.nb[1])
    b.graph.expand(ops.cpy(extra, ops.view_2d(all_states, n_embd, n_extra, row, (view.head + n_seqs) * row)))
    return out


def _convolved(b: Builder, w: LayerWeights, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, K and V after the convolution, [n_channel, n_seq_token, n_seq], and the delta net's state.

    Notes
    -----
    Mirrors `llm_build_delta_net_base::build_conv_state` and the nodes between it and the delta net.
    """
    hp, il, n_seqs = b.hp, w.layer, b.part.n_seqs
    view = b.view.states
    assert view is not None
    r, s, kernel = view.r[il], view.s[il], w["ssm_conv1d.weight"]
    n_kept, n_channels = kernel.ne[0] - 1, hp.n_conv_channels
    states = b.name(_state_rows(b, r, hp.n_embd_r), "conv_states", il)
    states = b.name(ops.reshape_3d(states, n_kept, n_channels, n_seqs), "conv_states_reshaped", il)
    by_token = b.name(ops.transpose(qkv), "qkv_mixed_transposed", il)
    cur = b.name(ops.concat(states, by_token, 0), "conv_input", il)
    last = ops.view_3d(
        cur, n_kept, n_channels, n_seqs, cur.nb[1], cur.nb[2], cur.type.row_size(cur.ne[0] - n_kept)
    )  # fmt: skip
    b.name(last, "conv_state_last", il)
    place = ops.view_2d(r, n_kept * n_channels, n_seqs, r.nb[1], view.head * r.nb[1])
    b.graph.expand(ops.cpy(last, b.name(place, "conv_state_update", il)))
    state = _state_rows(b, s, hp.n_embd_s)
    n = hp.n_ssm_head_v
    state = b.name(ops.reshape_4d(state, n, n, hp.n_ssm_head, n_seqs), "state_predelta", il)
    cur = b.name(ops.ssm_conv(cur, kernel), "conv_output_raw", il)
    return b.name(ops.silu(cur), "conv_output_silu", il), state


def delta_layer(b: Builder, w: LayerWeights, x: DeltaInputs, *, are_heads_interleaved: bool) -> Tensor:
    """Return the output of a recurrent layer, after ``ssm_out``: f32, [n_embd, n_token].

    Parameters
    ----------
    are_heads_interleaved : bool
        If Q and K have fewer heads than V: True repeats each head in place (0 0 1 1), False repeats all (0 1 0 1).

    Notes
    -----
    Mirrors `build_layer_attn_linear` of `llama_model_qwen3next`, `llama_model_qwen35` and `llama_model_qwen35moe`.
    """
    hp, il = b.hp, w.layer
    n, n_each, n_seqs = hp.n_ssm_head_v, b.part.n_seq_tokens, b.part.n_seqs
    mixed, state = _convolved(b, w, x.qkv)
    q, k, v = _split(b, mixed, il)
    q, k = _normed(b, q), _normed(b, k)
    if hp.n_ssm_group != hp.n_ssm_head:
        if are_heads_interleaved:
            q, k = _interleaved(b, q, k)
        elif not (b.cp.fused_delta_one and b.cp.fused_delta_many):
            q, k = (ops.repeat_4d(t, t.ne[0], hp.n_ssm_head, n_each, n_seqs) for t in (q, k))
    for tensor, name in ((q, "q_conv_predelta"), (k, "k_conv_predelta"), (v, "v_conv_predelta")):
        b.name(tensor, name, il)
    out = _recurrent(b, w, q, k, v, x.gate, x.beta, state)
    z = ops.reshape_4d(x.z, n, hp.n_ssm_head, n_each, n_seqs)
    normed = b.norm(out, w["ssm_norm.weight"], il)
    cur = ops.mul(normed, ops.silu(z))
    cur = b.name(ops.reshape_3d(cur, n * hp.n_ssm_head, n_each, n_seqs), "final_output", il)
    cur = b.name(b.project(w, "ssm_out", cur), "linear_attn_out", il)
    return ops.reshape_2d(cur, hp.n_embd, n_each * n_seqs)


def _split(b: Builder, mixed: Tensor, il: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K and V as [n, n_head, n_seq_token, n_seq]."""
    hp, n_each, n_seqs = b.hp, b.part.n_seq_tokens, b.part.n_seqs
    row = mixed.type.row_size
    whole = row(hp.n_conv_channels)
    n_keys = hp.n_ssm_state * hp.n_ssm_group
    sizes = (
        ("q_conv", hp.n_ssm_state, hp.n_ssm_group, 0),
        ("k_conv", hp.n_ssm_state, hp.n_ssm_group, n_keys),
        ("v_conv", hp.n_ssm_head_v, hp.n_ssm_head, 2 * n_keys),
    )
    views = [
        ops.view_4d(mixed, n, n_head, n_each, n_seqs, row(n), whole, whole * n_each, row(start))
        for _, n, n_head, start in sizes
    ]
    q, k, v = (b.name(view, name, il) for view, (name, *_) in zip(views, sizes, strict=True))
    return q, k, v


def _normed(b: Builder, cur: Tensor) -> Tensor:
    """Return the rows scaled to length 1. Mirrors `build_gdn_l2_norm`."""
    n = float(cur.ne[0])
    cur = ops.rms_norm(cur, round_f32(b.hp.norm_rms_eps / n))
    return ops.scale(cur, round_f32(1.0 / round_f32(math.sqrt(n))))


def _interleaved(b: Builder, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and K with as many heads as V, each head repeated in place."""
    hp, n_each, n_seqs = b.hp, b.part.n_seq_tokens, b.part.n_seqs
    n, n_group, n_tokens = hp.n_ssm_state, hp.n_ssm_group, n_each * n_seqs
    n_times = hp.n_ssm_head // n_group
    apart = [ops.reshape_4d(t, n, 1, n_group, n_tokens) for t in (q, k)]
    apart = [ops.repeat_4d(t, n, n_times, n_group, n_tokens) for t in apart]
    q, k = (ops.reshape_4d(t, n, hp.n_ssm_head, n_each, n_seqs) for t in apart)
    return q, k


def _recurrent(
    b: Builder, w: LayerWeights, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """Return the output of the delta net, and store its new state.

    Notes
    -----
    Mirrors `llm_build_delta_net_base::build_recurrent_attn`.
    """
    il, n_seqs, view = w.layer, b.part.n_seqs, b.view.states
    assert view is not None
    is_one = q.ne[2] == 1
    if b.cp.fused_delta_one if is_one else b.cp.fused_delta_many:
        out, new = _fused(b, q, k, v, g, beta, state, il)
    else:
        out, new = (one_token if is_one else in_chunks)(b, q, k, v, g, beta, state, il)
    b.name(out, "attn_output", il)
    b.name(new, "new_state", il)
    s = view.s[il]
    b.graph.expand(ops.cpy(new, ops.view_2d(s, b.hp.n_embd_s, n_seqs, s.nb[1], view.head * s.nb[1])))
    return out


def _fused(
    b: Builder, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, il: int
) -> tuple[Tensor, Tensor]:
    """Mirrors `build_delta_net_fused`."""
    n, n_head, n_each, n_seqs = v.ne
    both = ops.gated_delta_net(q, k, v, g, beta, state, 1)
    b.delta_nodes.append((both, il))
    row = both.type.row_size
    out = ops.view_4d(both, n, n_head, n_each, n_seqs, row(n), row(n * n_head), row(n * n_head * n_each), 0)
    new = ops.view_4d(
        both, n, n, n_head, n_seqs, row(n), row(n * n), row(n * n * n_head), row(n * n_head * n_each * n_seqs)
    )
    return out, new
