"""`Builder`: adds the parts of models to a graph: inputs, norms, projections, attention with its cache, feed-forward.

A family calls the methods in upstream's order, because the order of calls and of `expand`s is the order of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from .. import ops
from ..backend import Backend
from ..graph import Graph
from ..ops import OpHint, Prec
from ..tensor import Tensor
from ..types import TensorFlag, Type
from .cache_view import CacheView
from .graph import AttnInputs, GraphInputs, GraphParams, ModelGraph
from .hparams import round_f32
from .weights import LayerWeights, Weights

__all__ = ["Builder", "kq_scale"]


def kq_scale(n_embd_head: int) -> float:
    """Return ``1 / sqrt(n_embd_head)``, computed in float32."""
    return round_f32(1.0 / round_f32(math.sqrt(n_embd_head)))


class Builder:
    """Makes the graph of one micro-batch.

    Parameters
    ----------
    has_exact_sums : bool
        See `Architecture`.

    Attributes
    ----------
    is_cropped : bool
        Whether only the rows of wanted logits are left.

    Notes
    -----
    Mirrors `llm_graph_context`.
    """

    def __init__(self, p: GraphParams, weights: Weights, *, has_exact_sums: bool = False) -> None:
        self.hp, self.cp, self.part, self.view = p.hparams, p.params, p.part, p.view
        self.n_tokens, self.n_outputs, self.key = p.part.n_tokens, p.n_outputs, p.key
        self.weights, self.banks = weights, p.banks
        self.has_exact_sums = has_exact_sums
        self.is_cropped = False
        self.layer_tokens: Tensor | None = None
        self.listing = p.listing
        self.graph = Graph() if p.listing is None else p.listing.graph
        self.topk: list[Tensor] = []
        self.norms: list[tuple[Tensor, int]] = []
        self.attn_outputs: list[Tensor] = []
        self.flash_nodes: list[tuple[Tensor, int]] = []
        self.pins: list[tuple[Tensor, Backend]] = []
        self.delta_nodes: list[tuple[Tensor, int]] = []

    def name(self, tensor: Tensor, name: str, layer: int = -1) -> Tensor:
        """Name a node, with its layer, and list it in `norms` if the name is ``norm``.

        Notes
        -----
        Mirrors `llama_context::graph_get_cb`.
        """
        tensor.name = f"{name}-{layer}" if layer >= 0 else name
        if layer >= 0 and name == "norm":
            self.norms.append((tensor, layer))
        return tensor

    def finish(self, logits: Tensor, embd: Tensor) -> ModelGraph:
        """Add the results to the graph and return the `ModelGraph`."""
        self.graph.expand(logits)
        logits.set_output()
        embd.set_output()
        return ModelGraph(
            self.graph, self.key, self.inputs, logits, embd, self.topk, self.norms, self.attn_outputs, self.flash_nodes,
            self.pins,
            self.delta_nodes,
        )  # fmt: skip

    # -- inputs --------------------------------------------------------------

    def _input(self, type: Type, ne: tuple[int, ...], name: str) -> Tensor:
        tensor = Tensor(type, ne, name=name, flags=TensorFlag.INPUT)
        if self.listing is not None:
            self.listing.add(tensor)
        return tensor

    def input_embd(self) -> Tensor:
        """Return the embedded tokens. Two unused inputs are also added to the graph, as upstream does.

        Notes
        -----
        Mirrors `llm_graph_context::build_inp_embd`.
        """
        embedding = self.weights["token_embd.weight"]
        n_embd, n = self.hp.n_embd, self.n_tokens
        self.inp_tokens = self._input(Type.I32, (n,), "inp_tokens")
        vectors = self._input(Type.F32, (n_embd, n), "inp_embd")
        mixed_tokens = self._input(Type.I32, (n,), "inp_mixed_tokens")
        mixed_slots = self._input(Type.I64, (n,), "inp_mixed_slots")
        mixed_embd = self._input(Type.F32, (n_embd, n), "inp_mixed_embd")
        by_token = ops.get_rows(embedding, self.inp_tokens)
        mixed = ops.set_rows(ops.dup(mixed_embd), ops.get_rows(embedding, mixed_tokens), mixed_slots)
        cur = self.graph.select([by_token, vectors, mixed], 0)
        if self.hp.embedding_scale:
            cur = ops.scale(cur, self.hp.embedding_scale)
        self.token_scale: Tensor | None = None
        if self.hp.token_scale != 1.0:
            self.token_scale = self._input(Type.F32, (1, n), "inp_scale_rows")
            cur = ops.mul(cur, self.token_scale)
        self.name(cur, "embd")
        self.graph.expand(cur)
        return cur

    def input_layer_tokens(self) -> Tensor:
        """Return a second input of tokens, without a name: i32, [n_token]."""
        self.layer_tokens = self._input(Type.I32, (self.n_tokens,), "")
        return self.layer_tokens

    def make_inputs(self) -> None:
        """Make the inputs of attention, and the indices of the tokens whose logits are wanted.

        Notes
        -----
        Mirrors `build_inp_pos`, `build_inp_mem_hybrid`, `build_attn_inp_kv` or `build_attn_inp_kv_iswa`, and
        `build_inp_out_ids`.
        """
        swa, states = self.view.swa, self.view.states
        self.inputs = GraphInputs(
            self.inp_tokens,
            self._input(Type.I32, (self.n_tokens * self.hp.n_pos_per_token,), "inp_pos"),
            self._attn_inputs(self.view),
            None if swa is None else self._attn_inputs(swa),
            self._input(Type.I32, (self.n_outputs,), "out_ids"),
            None if states is None else self._input(Type.I32, (states.n,), "rs_s_copy"),
            self.layer_tokens,
            self.token_scale,
        )

    def _attn_inputs(self, view: CacheView) -> AttnInputs:
        """Make the inputs of attention over one cache."""
        cache, n = view.cache, self.n_tokens
        n_v = n * self.hp.n_embd_v_gqa_max if cache.v_trans else n
        is_mla = self.hp.is_mla  # V is a part of K
        n_stream = 1 if self.cp.kv_unified else len(self.part.seqs_unq)
        mask_type = Type.F16 if self.cp.flash_attn else Type.F32
        inputs = AttnInputs(
            self._input(Type.I64, (n,), "attn_inp_k_idxs"),
            None if is_mla else self._input(Type.I64, (n_v,), "attn_inp_v_idxs"),
            self._input(mask_type, (view.n_kv, n // n_stream, 1, n_stream), "attn_inp_kq_mask"),
        )
        if cache.n_rot_k and not is_mla:
            inputs.k_rot = self._input(Type.F32, (cache.n_rot_k,) * 2, "attn_inp_k_rot")
        if cache.n_rot_v and not is_mla:
            inputs.v_rot = self._input(Type.F32, (cache.n_rot_v,) * 2, "attn_inp_v_rot")
        return inputs

    # -- layers --------------------------------------------------------------

    def layers(self, build: Callable[[LayerWeights, Tensor], Tensor], cur: Tensor) -> Tensor:
        """Return the output of the last layer; ``build`` adds one, given its weights and the output of the one before."""
        for w in self.weights.layers:
            cur = build(w, cur) if self.listing is None else self.listing.layer(partial(build, w), cur)
        return cur

    # -- norms and projections -----------------------------------------------

    def norm(self, cur: Tensor, weight: Tensor, layer: int) -> Tensor:
        """Return the RMS norm times its weight. Mirrors `build_norm` with `LLM_NORM_RMS`."""
        cur = self.name(ops.rms_norm(cur, self.hp.norm_rms_eps), "norm", layer)
        return ops.mul(cur, weight)

    def norm_by(self, w: LayerWeights, weight: str, cur: Tensor, name: str = "") -> Tensor:
        """Return the RMS norm times a weight of a layer, named ``name`` or after the weight."""
        return self.name(self.norm(cur, w[f"{weight}.weight"], w.layer), name or weight, w.layer)

    def name_qkv(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Name Q, K and V as upstream does before attention."""
        return self.name(q, "Qcur", layer), self.name(k, "Kcur", layer), self.name(v, "Vcur", layer)

    def qkv(self, w: LayerWeights, cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V as [n_embd_head, n_head, n_token], from one weight or from three.

        Notes
        -----
        Mirrors `llm_graph_context::build_qkv`.
        """
        hp, n, il = self.hp, self.n_tokens, w.layer
        sizes = (
            ("q", hp.n_embd_head_k, hp.n_head),
            ("k", hp.n_embd_head_k, hp.n_head_kv),
            ("v", hp.n_embd_head_v, hp.n_head_kv),
        )
        parts: list[Tensor] = []
        if w.get("attn_qkv.weight") is not None:
            qkv = self._fused_qkv(w, cur)
            offset = 0
            for _, n_embd_head, n_head in sizes:
                row = qkv.type.row_size
                parts.append(ops.view_3d(qkv, n_embd_head, n_head, n, row(n_embd_head), qkv.nb[1], row(offset)))
                offset += n_embd_head * n_head
        else:
            for letter, _, _ in sizes:
                part = self.name(self.project(w, f"attn_{letter}", cur), f"{letter.upper()}cur", il)
                bias = w.get(f"attn_{letter}.bias")
                if bias is not None:
                    part = self.name(ops.add(part, bias), f"{letter.upper()}cur", il)
                parts.append(part)
            parts = [
                ops.reshape_3d(part, n_embd_head, n_head, n)
                for part, (_, n_embd_head, n_head) in zip(parts, sizes, strict=True)
            ]
        for part, (letter, _, _) in zip(parts, sizes, strict=True):
            self.name(part, f"{letter.upper()}cur", il)
        q, k, v = parts
        return q, k, v

    def qkv_rows(self, w: LayerWeights, cur: Tensor, *, n_q_each: int = 1) -> list[Tensor]:
        """Return Q, K and V without names and with the heads of a token in one row: [n_embd, n_token].

        Parameters
        ----------
        n_q_each : int
            Q has this many times the elements of its heads.

        Notes
        -----
        Mirrors `llm_graph_context::build_qkv` with ``reshape`` false.
        """
        hp = self.hp
        if w.get("attn_qkv.weight") is not None:
            qkv = self._fused_qkv(w, cur)
            sizes = (n_q_each * hp.n_embd_head_k * hp.n_head, hp.n_embd_k_gqa, hp.n_embd_v_gqa)
            starts = (0, sizes[0], sizes[0] + sizes[1])
            row = qkv.type.row_size
            views = [
                ops.view_2d(qkv, n, self.n_tokens, qkv.nb[1], row(start))
                for n, start in zip(sizes, starts, strict=True)
            ]
            return [ops.cont(view) for view in views]
        parts: list[Tensor] = []
        for letter in "qkv":
            part, bias = self.project(w, f"attn_{letter}", cur), w.get(f"attn_{letter}.bias")
            parts.append(part if bias is None else ops.add(part, bias))
        return parts

    def qkv_normed_whole(self, w: LayerWeights, cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K and V, [n_embd_head, n_head, n_token]; Q and K are normed over all heads at once."""
        hp, n = self.hp, self.n_tokens
        q, k, v = self.name_qkv(w.layer, *self.qkv_rows(w, cur))
        q = self.norm_by(w, "attn_q_norm", q, "Qcur_normed")
        k = self.norm_by(w, "attn_k_norm", k, "Kcur_normed")
        q = self.rope(ops.reshape_3d(q, hp.n_embd_head_k, hp.n_head, n))
        k = self.rope(ops.reshape_3d(k, hp.n_embd_head_k, hp.n_head_kv, n))
        return self.name_qkv(w.layer, q, k, ops.reshape_3d(v, hp.n_embd_head_v, hp.n_head_kv, n))

    def _fused_qkv(self, w: LayerWeights, cur: Tensor) -> Tensor:
        qkv = self.name(self.project(w, "attn_qkv", cur), "wqkv", w.layer)
        bias = w.get("attn_qkv.bias")
        if bias is None:
            parts = [w.get(f"attn_{letter}.bias") for letter in "qkv"]
            if all(part is not None for part in parts):
                q, k, v = (part for part in parts if part is not None)
                bias = ops.concat(ops.concat(q, k, 0), v, 0)
        return qkv if bias is None else self.name(ops.add(qkv, bias), "wqkv_b", w.layer)

    def rope_factors(self, w: LayerWeights) -> Tensor | None:
        """Return the frequency factors of a layer.

        Notes
        -----
        Mirrors `llama_model::get_rope_factors`.
        """
        freqs = w.get("rope_freqs.weight")
        if freqs is not None:
            return freqs
        is_long = self.cp.n_ctx_seq > self.hp.n_ctx_orig_yarn
        return w.get("rope_factors_long.weight" if is_long else "rope_factors_short.weight")

    def rope(self, cur: Tensor, factors: Tensor | None = None, *, layer: int = -1) -> Tensor:
        """Rotate Q or K by position. Frequencies are the context's, in layers with a sliding window the model's.

        Notes
        -----
        Mirrors `llama_model::get_rope_freq_base` and `get_rope_freq_scale`.
        """
        hp, cp = self.hp if layer < 0 else self.hp.of_layer(layer), self.cp
        base, scale = cp.freq_base, cp.freq_scale
        if hp.n_pos_per_token > 1:
            return ops.rope_multi(
                cur, self.inputs.pos, factors, hp.n_rot, hp.rope_sections, int(hp.rope_type), cp.n_ctx_orig,
                base, scale, cp.ext_factor, cp.attn_factor, cp.beta_fast, cp.beta_slow,
            )  # fmt: skip
        if layer in hp.swa_layers:
            base, scale = hp.rope_freq_base_swa, hp.rope_freq_scale_swa
        return ops.rope_ext(
            cur, self.inputs.pos, factors, hp.n_rot, int(hp.rope_type), cp.n_ctx_orig,
            base, scale, cp.ext_factor, cp.attn_factor, cp.beta_fast, cp.beta_slow,
        )  # fmt: skip

    # -- attention -----------------------------------------------------------

    @property
    def kq_scale(self) -> float:
        """Factor of Q times K in most families: 1 over the root of the head size."""
        return kq_scale(self.hp.n_embd_head_v)

    def attention(
        self,
        w: LayerWeights,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        scale: float,
        *,
        sinks: Tensor | None = None,
        is_projected: bool = True,
    ) -> Tensor:
        """Store K and V of new tokens, and return attention over the cache, multiplied with ``attn_output``.

        Parameters
        ----------
        k, v : Tensor, optional
            None in a layer that uses those of another layer.
        is_projected : bool
            If False, the result is not multiplied with ``attn_output``.

        Notes
        -----
        Mirrors `llm_graph_context::build_attn` for `llm_graph_input_attn_kv` and `llm_graph_input_attn_kv_iswa`: Q, K
        and V are expanded before the stores, V before K if there is one cache.
        """
        il = w.layer
        view = self.view.of_layer(il)
        inputs = self.inputs.attn if view is self.view else self.inputs.attn_swa
        assert inputs is not None
        assert inputs.v_idxs is not None
        if inputs.k_rot is not None:
            q = _rotate(q, inputs.k_rot)
            k = None if k is None else _rotate(k, inputs.k_rot)
        if inputs.v_rot is not None:
            v = None if v is None else _rotate(v, inputs.v_rot)
        if k is not None and v is not None:
            self.graph.expand(*((q, v, k) if self.view.swa is None else (q, k, v)))
            self.graph.expand(view.cpy_k(k, inputs.k_idxs, il))
            self.graph.expand(view.cpy_v(v, inputs.v_idxs, il))
        else:
            self.graph.expand(q)
        cur = self._mha(q, view.get_k(il), view.get_v(il), inputs.kq_mask, scale, sinks, il)
        self.name(cur, "kqv_out", il)
        if inputs.v_rot is not None:
            cur = _rotate(cur, inputs.v_rot)
        if not is_projected:
            return cur
        cur = self.project(w, "attn_output", cur)
        bias = w.get("attn_output.bias")
        return cur if bias is None else ops.add(cur, bias)

    def mla_attention(self, w: LayerWeights, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store K of new tokens, of which V is a part, and return attention over the cache.

        Notes
        -----
        Mirrors `llm_graph_context::build_attn` for `llm_graph_input_attn_k`.
        """
        inputs, il = self.inputs.attn, w.layer
        self.graph.expand(q, v, k)
        self.graph.expand(self.view.cpy_k(k, inputs.k_idxs, il))
        k = self.view.get_k(il)
        v = ops.view_4d(k, v.ne[0], *k.ne[1:], *k.nb[1:], 0)
        cur = self._mha(q, k, v, inputs.kq_mask, scale, None, il, unfold=w["attn_v_b.weight"])
        return self.project(w, "attn_output", self.name(cur, "kqv_out", il))

    def _mha(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        sinks: Tensor | None,
        il: int,
        *,
        unfold: Tensor | None = None,
    ) -> Tensor:
        """Mirrors `llm_graph_context::build_attn_mha`."""
        v_trans = v.nb[1] > v.nb[2]
        n_stream = k.ne[3]
        n = q.ne[2] // n_stream
        q = ops.view_4d(q, q.ne[0], q.ne[1], n, n_stream, q.nb[1], q.nb[2], q.nb[2] * n, 0)
        q, k, v = (ops.permute(t, 0, 2, 1, 3) for t in (q, k, v))
        if self.cp.flash_attn:
            cur = self._flash(q, k, ops.transpose(v) if v_trans else v, mask, scale, sinks, unfold, il)
        else:
            cur = self._softmax_attention(q, k, v, mask, scale, sinks, unfold, il, v_trans=v_trans)
        self.graph.expand(cur)
        return cur

    def _flash(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        sinks: Tensor | None,
        unfold: Tensor | None,
        il: int,
    ) -> Tensor:
        if k.type is Type.F32:
            k = ops.cast(k, Type.F16)
        if v.type is Type.F32:
            v = ops.cast(v, Type.F16)
        cur = ops.flash_attn_ext(q, k, v, mask, scale, 0.0, self.hp.attention_softcap)
        self.flash_nodes.append((cur, il))
        ops.flash_attn_ext_add_sinks(cur, sinks)
        ops.prec_set_acc(cur, Prec.F32)
        if unfold is not None:
            cur = self.name(ops.mul_mat(unfold, ops.permute(cur, 0, 2, 1, 3)), "fattn_mla", il)
            cur = ops.cont(ops.permute(cur, 0, 2, 1, 3))
        return ops.reshape_2d(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])

    def _softmax_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        scale: float,
        sinks: Tensor | None,
        unfold: Tensor | None,
        il: int,
        *,
        v_trans: bool,
    ) -> Tensor:
        kq = self.name(ops.mul_mat(k, q), "kq", il)
        ops.prec_set_acc(kq, Prec.F32)
        if most := self.hp.attention_softcap:
            kq = self.name(ops.scale(kq, round_f32(1.0 / most)), "kq_scaled_1", il)
            kq = self.name(ops.scale(self.name(ops.tanh(kq), "kq_tanh", il), most), "kq_scaled_2", il)
        kq = ops.soft_max_ext(kq, mask, scale, 0.0)
        ops.soft_max_add_sinks(kq, sinks)
        self.name(kq, "kq_soft_max", il)
        if not v_trans:
            v = self.name(ops.cont(ops.transpose(v)), "v_cont", il)
        kqv = self.name(ops.mul_mat(v, kq), "kqv", il)
        if unfold is not None:
            kqv = self.name(ops.mul_mat(unfold, kqv), "kqv_mla", il)
        cur = ops.permute(kqv, 0, 2, 1, 3)
        cur = ops.cont_2d(cur, cur.ne[0] * cur.ne[1], cur.ne[2] * cur.ne[3])
        self.attn_outputs.append(cur)
        return cur

    # -- feed-forward --------------------------------------------------------

    def ffn(
        self, w: LayerWeights, cur: Tensor, *, suffix: str = "", activation: Literal["swiglu", "geglu"] = "swiglu"
    ) -> Tensor:
        """Return the dense feed-forward; weights are named ``ffn_up`` + ``suffix`` and so on, and that may be gate and up in one.

        Notes
        -----
        Mirrors `llm_graph_context::build_ffn`.
        """
        il = w.layer
        up = self._biased(w, "ffn_up", suffix, cur)
        if w.get(f"ffn_gate{suffix}.weight") is None:
            joined = ops.swiglu(up)
        else:
            gate = self._biased(w, "ffn_gate", suffix, cur)
            joined = ops.swiglu_split(gate, up) if activation == "swiglu" else ops.geglu_split(gate, up)
        cur = self.name(joined, f"ffn_{activation}", il)
        cur = self._mul_mat_exactly(w[f"ffn_down{suffix}.weight"], cur)
        bias, factor = w.get(f"ffn_down{suffix}.bias"), w.get(f"ffn_down{suffix}.scale")
        if bias is not None:
            cur = ops.add(self.name(cur, "ffn_down", il), bias)
        return cur if factor is None else self.name(ops.mul(cur, factor), "ffn_down_s", il)

    def _biased(self, w: LayerWeights, name: str, suffix: str, cur: Tensor) -> Tensor:
        cur = self.name(ops.mul_mat(w[f"{name}{suffix}.weight"], cur), name, w.layer)
        bias, factor = w.get(f"{name}{suffix}.bias"), w.get(f"{name}{suffix}.scale")
        if bias is not None:
            cur = self.name(ops.add(cur, bias), f"{name}_b", w.layer)
        return cur if factor is None else self.name(ops.mul(cur, factor), f"{name}_s", w.layer)

    def project(self, w: LayerWeights, name: str, cur: Tensor) -> Tensor:
        """Return the product with a weight of a layer, times its ``.scale`` if there is one.

        Notes
        -----
        Mirrors `llm_graph_context::build_lora_mm`; `build_attn` marks the product with ``attn_output`` as exact.
        """
        product = self._mul_mat_exactly if name == "attn_output" else ops.mul_mat
        cur, factor = product(w[f"{name}.weight"], cur), w.get(f"{name}.scale")
        return cur if factor is None else ops.mul(cur, factor)

    def head(self, embd: Tensor) -> Tensor:
        """Return the logits, times the ``.scale`` of the head if there is one."""
        logits, factor = ops.mul_mat(self.weights.output, embd), self.weights.get("output.scale")
        return logits if factor is None else ops.mul(logits, factor)

    def _mul_mat_exactly(self, weight: Tensor, cur: Tensor) -> Tensor:
        """Return a product, computed with F32 sums if `has_exact_sums`."""
        cur = ops.mul_mat(weight, cur)
        if self.has_exact_sums:
            ops.prec_set_acc(cur, Prec.F32)
        return cur

    # -- rows of outputs -----------------------------------------------------

    def choose_outputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of wanted logits of each tensor."""
        self.is_cropped = True
        return tuple(ops.get_rows(t, self.inputs.out_ids) for t in tensors)

    def crop(self, cur: Tensor, residual: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return both tensors; in the last layer only their rows of wanted logits."""
        if layer != self.hp.n_layer - 1:
            return cur, residual
        cur, residual = self.choose_outputs(cur, residual)
        return cur, residual

    def add_to_residual(self, cur: Tensor, residual: Tensor, layer: int) -> Tensor:
        """Return the residual stream after attention, cropped in the last layer."""
        return self.name(ops.add(*self.crop(cur, residual, layer)), "ffn_inp", layer)


def _rotate(cur: Tensor, rot: Tensor) -> Tensor:
    """Mirrors `llama_mul_mat_hadamard`."""
    n = rot.ne[0]
    rows = ops.reshape_2d if cur.is_contiguous() else ops.cont_2d
    out = ops.mul_mat(rot, rows(cur, n, cur.numel // n))
    ops.mul_mat_set_hint(out, OpHint.SRC0_IS_HADAMARD)
    return ops.reshape_4d(out, *cur.ne)
