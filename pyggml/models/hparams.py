"""`HParams`: the sizes and constants of a model, read from its metadata and checked once.

Graph builders, placement and the KV cache read it instead of the file.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import FormatError
from ..gguf import TensorInfo
from ..ops import RopeType

if TYPE_CHECKING:
    from ..gguf import GGUFFile

__all__ = ["MAX_LAYERS", "NOT_BUILT", "Gating", "HParams", "KeyReader", "round_f32"]

#: What to do about a file that needs another graph.
NOT_BUILT = "pyggml does not build this variant: `splits --graph llama` plans and `run --engine llama` runs what llama.cpp loads"

#: How a router's logits become probabilities; ``softmax_weight`` applies a softmax to the chosen experts only.
Gating = Literal["softmax", "sigmoid", "softmax_weight"]

_LARGEST_F32 = 3.4028234e38
#: Upstream's `llama_expert_gating_func_type`.
_GATINGS: dict[int, Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax_weight"}
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
#: Upstream's `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS`.
MAX_LAYERS, _MAX_EXPERTS = 512, 1024


def round_f32(value: float) -> float:
    """Return the float32 nearest to a number; upstream keeps constants as float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


@dataclass(frozen=True, slots=True)
class HParams:
    """The sizes and constants of a model.

    Notes
    -----
    Mirrors `llama_hparams` and `llama_model_base::load_hparams`. Differs: only families with `Architecture.uneven_keys`
    may have layers of different sizes; other such files are refused.
    """

    arch: str
    name: str
    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_rot: int
    n_ff: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int  #: width of one expert; 0: not in the file
    norm_rms_eps: float
    rope_type: RopeType
    rope_scaling: str  #: none, linear, yarn or longrope
    rope_freq_base: float
    rope_freq_scale: float
    rope_attn_factor: float
    n_ctx_orig_yarn: int
    n_swa: int = 0  #: positions that a token sees in layers with a sliding window, itself included
    swa_layers: frozenset[int] = frozenset()  #: layers with a sliding window
    rope_freq_base_swa: float = 0.0  #: of those layers
    rope_freq_scale_swa: float = 1.0
    n_layer_nextn: int = 0  #: layers after the others that predict further tokens; no graph runs them
    n_layer_dense_lead: int = 0  #: layers without experts, before those with
    n_expert_shared: int = 0  #: shared experts, which every token uses, stored as one
    n_ff_shexp: int = 0  #: width of the shared expert; 0: not in the file
    expert_gating: Gating = "softmax"
    expert_weights_norm: bool = False  #: divide the weights of the chosen experts by their sum
    expert_weights_scale: float = 0.0  #: factor of the weights of experts; 0 and 1 change nothing
    n_expert_groups: int = 0  #: groups of experts, of which the best are used; 0 and 1: no groups
    n_group_used: int = 0
    n_lora_q: int = 0  #: width of the latent space of Q; 0: none
    n_lora_kv: int = 0  #: width of the latent space in which K and V are stored
    n_embd_head_k_mla: int = 0  #: head size of K outside the latent space; 0: no MLA
    n_embd_head_v_mla: int = 0
    rope_yarn_log_mul: float = 0.0
    embedding_scale: float = 0.0  #: factor of the embeddings; 0: none
    token_scale: float = 1.0  #: factor of token embeddings only, not of images'
    stream_scale: float = 0.0  #: factor of what the first layer reads; 0: none
    residual_scale: float = 0.0  #: factor of what is added to the residual stream; 0: none
    attention_scale: float = 0.0  #: factor of Q times K; 0: one over the root of the head size
    attention_softcap: float = 0.0  #: bound of Q times K, by tanh; 0: none
    logit_scale: float = 0.0  #: divisor of the logits, in families that have one
    logit_softcap: float = 0.0  #: bound of the logits, by tanh; 0: none
    n_embd_head_swa: int = 0  #: head size in layers with a sliding window; 0: as in the others
    n_rot_swa: int = 0  #: elements of such a head that rotate; 0: as in the others
    n_head_kv_by_layer: tuple[int, ...] = ()  #: if layers differ; `n_head_kv` and `n_ff` are then the largest
    n_ff_by_layer: tuple[int, ...] = ()
    n_layer_shared_kv: int = 0  #: last layers, which use K and V of earlier layers
    n_embd_per_layer: int = 0  #: width of the embedding that each layer has of its own; 0: none
    rope_sections: tuple[int, ...] = ()  #: pairs that rotate by each of a token's positions, if it has several
    recurrent_layers: frozenset[int] = frozenset()  #: layers with a state instead of attention
    n_ssm_kernel: int = 0  #: tokens that a recurrent layer's convolution reads
    n_ssm_inner: int = 0  #: elements of all V heads of a recurrent layer
    n_ssm_state: int = 0  #: head size of its Q and K; 0: no layer is recurrent
    n_ssm_head: int = 0  #: its V heads
    n_ssm_group: int = 0  #: its Q and K heads

    def of_layer(self, layer: int) -> HParams:
        """Return the hyper-parameters with the sizes of one layer: heads, rotation, feed-forward."""
        is_even = not (self.n_embd_head_swa or self.n_head_kv_by_layer or self.n_ff_by_layer)
        return self if is_even else _sizes_of_layer(self, layer)

    def kv_layer(self, layer: int) -> int:
        """Return the layer whose K and V a layer uses: itself, except with `n_layer_shared_kv`.

        Notes
        -----
        Mirrors the reuse of layers in `llama_model::create_memory`.
        """
        n_own = self.n_layer_all - self.n_layer_shared_kv
        return layer if layer < n_own else n_own - (2 if layer in self.swa_layers else 1)

    @property
    def n_embd_v_gqa_max(self) -> int:
        """Elements of all V heads of a token, in the layer that has the most."""
        return max(self.of_layer(i).n_embd_v_gqa for i in range(self.n_layer))

    @property
    def n_embd_k_gqa(self) -> int:
        """Elements of all K heads of a token."""
        return self.n_embd_head_k * self.n_head_kv

    @property
    def n_embd_v_gqa(self) -> int:
        """Elements of all V heads of a token."""
        return self.n_embd_head_v * self.n_head_kv

    @property
    def n_pos_per_token(self) -> int:
        """Number of positions of a token: 4 with M-RoPE, otherwise 1."""
        return 4 if self.rope_type in (RopeType.MROPE, RopeType.IMROPE) else 1

    @property
    def n_ssm_head_v(self) -> int:
        """Elements of a V head of a recurrent layer."""
        return self.n_ssm_inner // self.n_ssm_head

    @property
    def n_conv_channels(self) -> int:
        """Elements of a token in a recurrent layer's convolution: its Q, K and V."""
        return self.n_ssm_inner + 2 * self.n_ssm_group * self.n_ssm_state

    @property
    def n_embd_r(self) -> int:
        """Elements of a sequence's last tokens that a recurrent layer keeps for the convolution."""
        return (self.n_ssm_kernel - 1) * self.n_conv_channels

    @property
    def n_embd_s(self) -> int:
        """Elements of a sequence's state in a recurrent layer."""
        return self.n_ssm_state * self.n_ssm_inner

    @property
    def n_layer_all(self) -> int:
        """Number of layers with the `n_layer_nextn` that no graph runs: placement counts them."""
        return self.n_layer + self.n_layer_nextn

    @property
    def n_layer_moe(self) -> int:
        """Layers with experts."""
        return self.n_layer - self.n_layer_dense_lead if self.is_moe else 0

    @property
    def is_mla(self) -> bool:
        """Whether K and V are kept as one vector of a latent space."""
        return self.n_embd_head_k_mla > 0

    @property
    def is_moe(self) -> bool:
        """Whether its feed-forward layers have experts."""
        return self.n_expert > 0

    @property
    def n_ff_expert(self) -> int:
        """Width of one expert; if the file has none, the experts in use are together as wide as a dense layer."""
        return self.n_ff_exp or self.n_ff // self.n_expert_used


@functools.lru_cache(maxsize=1024)
def _sizes_of_layer(hp: HParams, layer: int) -> HParams:
    sizes: dict[str, Any] = {}  # Any: sizes of fields with different types
    if hp.n_embd_head_swa and layer in hp.swa_layers:
        sizes = {"n_embd_head_k": hp.n_embd_head_swa, "n_embd_head_v": hp.n_embd_head_swa, "n_rot": hp.n_rot_swa}
    if hp.n_head_kv_by_layer:
        sizes["n_head_kv"] = hp.n_head_kv_by_layer[layer]
    if hp.n_ff_by_layer:
        sizes["n_ff"] = hp.n_ff_by_layer[layer]
    return replace(hp, **sizes)


class KeyReader:
    """Reads the keys of one architecture from a file, with errors that name the key."""

    def __init__(self, file: GGUFFile, arch: str, uneven_keys: tuple[str, ...] = ()) -> None:
        self.file, self.arch, self.uneven_keys = file, arch, uneven_keys
        self.metadata: Mapping[str, Any] = file.metadata  # Any: the file says each value's type

    def error(self, key: str, message: str) -> FormatError:
        """Return the error for a key; the text is the full key and ``message``."""
        return FormatError(self.file.path, f"'{self.arch}.{key}' {message}", hint="the model was converted wrongly")

    def unsupported(self, key: str, message: str) -> FormatError:
        """Return the error for a value of a key that other graphs need than those that are built."""
        return FormatError(self.file.path, f"'{self.arch}.{key}' {message}", hint=NOT_BUILT)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return an integer; of an array by layer, the common value, or for `uneven_keys` the largest."""
        full = f"{self.arch}.{key}"
        if default is not None and full not in self.metadata:
            return default
        if full in self.metadata and not isinstance(self.metadata[full], int | float | str):
            values = set(self.whole_numbers(key))
            if not values or (len(values) > 1 and key not in self.uneven_keys):
                raise FormatError(
                    self.file.path,
                    f"'{full}' differs between layers ({', '.join(map(str, sorted(values)))})",
                    hint="only models whose layers are all of one size are supported",
                )
            value = max(values)
        else:
            value = self.file.require(full, int)
        if value < least:
            raise self.error(key, f"is {value}, at least {least} is needed")
        if value >= 1 << 31:
            raise self.error(key, f"is {value}, more than a number of 32 bits holds")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number that fits in a float32."""
        full = f"{self.arch}.{key}"
        if default is not None and full not in self.metadata:
            return default
        value = self.file.require(full, float)
        if not abs(value) <= _LARGEST_F32:
            raise self.error(key, f"is {value:g}, no number that a float32 holds")
        return value

    def whole_numbers(self, key: str) -> list[int]:
        """Return the integers of an array by layer."""
        values = self.metadata[f"{self.arch}.{key}"]
        if isinstance(values, list) or values.dtype.kind not in "iub":
            kind = "strings" if isinstance(values, list) else str(values.dtype)
            raise self.error(key, f"is an array of {kind}, not of whole numbers")
        return [int(v) for v in values]

    def n_vocab(self) -> int:
        """Return the length of the token list, else the key, else the embedding's rows. Mirrors `llama_vocab::load`."""
        if "tokenizer.ggml.tokens" in self.metadata:
            length = self.file.metadata.entry("tokenizer.ggml.tokens").length
            if length is not None:
                return length
        embedding: TensorInfo = self.file.tensor("token_embd.weight")
        return self.integer("vocab_size", embedding.ne[1])

    def common(self, rope: RopeType, *, has_experts: bool, needs_experts: bool) -> HParams:
        """Return the hyper-parameters that all families have.

        Parameters
        ----------
        rope : RopeType
            The family's kind of rotation.
        has_experts, needs_experts : bool
            Whether models of the family may, or must, have experts.
        """
        n_embd = self.integer("embedding_length")
        n_layer = self.integer("block_count")
        if n_layer > MAX_LAYERS:
            raise self.error("block_count", f"is {n_layer}, more than the {MAX_LAYERS} possible")
        n_layer_nextn = self.integer("nextn_predict_layers", 0, least=0)
        if n_layer_nextn >= n_layer:
            raise self.error("nextn_predict_layers", f"is {n_layer_nextn} of {n_layer} layers")
        n_head = self.integer("attention.head_count")
        n_head_kv = self.integer("attention.head_count_kv", n_head)
        if n_head % n_head_kv:
            raise self.error("attention.head_count", f"is {n_head}, no multiple of {n_head_kv} heads of K and V")
        n_ctx_train = self.integer("context_length")
        n_embd_head_k = self.integer("attention.key_length", n_embd // n_head)
        if not self.file.require(f"{self.arch}.attention.causal", bool, True):
            raise self.unsupported("attention.causal", "is false: attention to what comes later is not supported")
        return HParams(
            arch=self.arch,
            name=self.file.require("general.name", str, ""),
            n_vocab=self.n_vocab(),
            n_ctx_train=n_ctx_train,
            n_embd=n_embd,
            n_layer=n_layer - n_layer_nextn,
            n_layer_nextn=n_layer_nextn,
            n_head=n_head,
            n_head_kv=n_head_kv,
            n_embd_head_k=n_embd_head_k,
            n_embd_head_v=self.integer("attention.value_length", n_embd // n_head),
            n_rot=self.integer("rope.dimension_count", n_embd_head_k),
            n_ff=self.integer("feed_forward_length", 0, least=0),
            n_ff_exp=self.integer("expert_feed_forward_length", 0, least=0),
            norm_rms_eps=round_f32(self.number("attention.layer_norm_rms_epsilon")),
            rope_type=rope,
            n_ctx_orig_yarn=self.integer("rope.scaling.original_context_length", 0, least=0) or n_ctx_train,
            **self._experts(has_experts=has_experts, needs_experts=needs_experts),
            **self._rotation(),
        )

    def _experts(self, *, has_experts: bool, needs_experts: bool) -> dict[str, Any]:
        """Return the numbers of experts and groups, checked as upstream does."""
        if not has_experts:
            return {"n_expert": 0, "n_expert_used": 0}
        n_expert = self.integer("expert_count", 0, least=0)
        n_used = self.integer("expert_used_count", 0, least=0)
        if n_used > n_expert or (n_expert and not n_used) or n_expert > _MAX_EXPERTS:
            raise self.error("expert_used_count", f"is {n_used} of {n_expert} experts")
        if needs_experts and not n_expert:
            raise self.error("expert_count", "is missing or 0, and this architecture has experts")
        n_groups = self.integer("expert_group_count", 0, least=0)
        n_group_used = self.integer("expert_group_used_count", 0, least=0)
        if n_groups > 1 and (n_groups >= n_expert or n_expert % n_groups or not 0 < n_group_used < n_groups):
            found = f"is {n_groups}, of which {n_group_used} are used, for {n_expert} experts"
            raise self.error("expert_group_count", found)
        return {
            "n_expert": n_expert, "n_expert_used": n_used, "n_expert_groups": n_groups, "n_group_used": n_group_used,
        }  # fmt: skip

    def _rotation(self) -> dict[str, Any]:
        """Return the parameters of ROPE."""
        scaling = self.file.require(f"{self.arch}.rope.scaling.type", str, "linear")
        if scaling not in _ROPE_SCALINGS:
            raise self.error("rope.scaling.type", f"is '{scaling}'; known are {', '.join(_ROPE_SCALINGS)}")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0))
        if factor < 0.0 or 0.0 < factor < 1e-30:
            raise self.error("rope.scaling.factor", f"is {factor:g}, a number above 0 is needed")
        return {
            "rope_scaling": scaling,
            "rope_freq_base": self.freq_base("rope.freq_base", 10000.0),
            "rope_freq_scale": 1.0 if factor == 0.0 else round_f32(1.0 / round_f32(factor)),
            "rope_attn_factor": self.number("rope.scaling.attn_factor", 1.0),
        }

    def check_heads(self, hp: HParams, *, may_be_partial: bool) -> None:
        """Verify that graphs support the head sizes.

        Raises
        ------
        FormatError
            K and V have different sizes, or only a part of a head rotates in a family that rotates all.
        """
        n_rot, head_k, head_v = hp.n_rot, hp.n_embd_head_k, hp.n_embd_head_v
        is_partial = may_be_partial and n_rot < head_k and n_rot % 2 == 0
        if not hp.is_mla and ((n_rot != head_k and not is_partial) or head_k != head_v):
            raise self.error("rope.dimension_count", f"is {n_rot}, with heads of {head_k} (K) and {head_v} (V)")

    def freq_base(self, key: str, default: float) -> float:
        """Return a base of rotary frequencies. Differs: 0 or less is refused; upstream computes NaN with it."""
        base = round_f32(self.number(key, default))
        if not 0 < base < math.inf:
            raise self.error(key, f"is {base:g}, a number above 0 is needed")
        return base

    def rope_sections(self) -> list[int]:
        """Return the pairs of a head that rotate by each of several positions; empty if the file has no such key."""
        given = self.metadata.get(f"{self.arch}.rope.dimension_sections")
        if given is None:
            return []
        return [given] * 4 if isinstance(given, int) else self.whole_numbers("rope.dimension_sections")

    def mrope_sections(self) -> tuple[int, ...]:
        """Return `rope_sections` of a model that rotates by four positions; another number of them is an error."""
        sections = tuple(self.rope_sections())
        if len(sections) != 4:
            raise self.error("rope.dimension_sections", f"has {len(sections)} numbers, 4 are needed")
        return sections

    def size_vocab(self) -> int:
        """Return the number of tokens by which some families distinguish their models."""
        return self.integer("vocab_size", 0, least=0) or self.n_vocab()

    def n_layer_dense_lead(self, n_layer: int) -> int:
        """Return the number of layers before the first with experts."""
        n_lead = self.integer("leading_dense_block_count", 0, least=0)
        if n_lead > n_layer:
            raise self.error("leading_dense_block_count", f"is {n_lead} of {n_layer} layers")
        return n_lead

    def gating(self, default: Gating | None = None) -> Gating:
        """Return how a router's logits become probabilities; without a default, the key is required."""
        number = self.integer("expert_gating_func", 0, least=0)
        gating = _GATINGS.get(number) if number else default
        if gating is None:
            raise self.error("expert_gating_func", f"is {number}; known are {', '.join(map(str, _GATINGS))}")
        return gating

    def expert_weights(self) -> dict[str, Any]:
        """Return the norm and the factor of the experts' weights."""
        return {
            "expert_weights_norm": self.file.require(f"{self.arch}.expert_weights_norm", bool, False),
            "expert_weights_scale": round_f32(self.number("expert_weights_scale", 0.0)),
        }

    def recurrent(self, hp: HParams) -> dict[str, Any]:
        """Return the hyper-parameters of layers with a gated delta net instead of attention.

        Notes
        -----
        Mirrors `load_arch_hparams` of `llama_model_qwen3next` and others: a file may name each layer, or give the
        interval of layers with attention. Differs: contradicting sizes are refused; upstream ends the process.
        """
        out: dict[str, Any] = {
            name: self.integer(f"ssm.{key}")
            for name, key in (
                ("n_ssm_kernel", "conv_kernel"), ("n_ssm_inner", "inner_size"), ("n_ssm_state", "state_size"),
                ("n_ssm_head", "time_step_rank"), ("n_ssm_group", "group_count"),
            )
        }  # fmt: skip
        state, n_head, n_group = out["n_ssm_state"], out["n_ssm_head"], out["n_ssm_group"]
        if out["n_ssm_inner"] != state * n_head:
            raise self.error("ssm.inner_size", f"is {out['n_ssm_inner']}, with {n_head} heads of {state}")
        if n_head % n_group:
            raise self.error("ssm.time_step_rank", f"is {n_head} heads, no multiple of {n_group} groups")
        if out["n_ssm_kernel"] < 2:
            raise self.error("ssm.conv_kernel", f"is {out['n_ssm_kernel']}, at least 2 is needed")
        if f"{self.arch}.attention.recurrent_layers" in self.metadata:
            flags = self.flags("attention.recurrent_layers", hp.n_layer_all)
            layers = frozenset(i for i in range(hp.n_layer) if flags[i])
        else:
            interval = self.integer("full_attention_interval", 4)
            layers = frozenset(i for i in range(hp.n_layer) if (i + 1) % interval)
        return out | {"recurrent_layers": layers}

    def has(self, key: str) -> bool:
        """Return whether the file has a key."""
        return f"{self.arch}.{key}" in self.metadata

    def by_layer(self, key: str, n_layer: int, default: int) -> tuple[int, ...]:
        """Return an integer for each layer, from an array or one value for all."""
        given = self.metadata.get(f"{self.arch}.{key}", default)
        values = [int(given)] * n_layer if isinstance(given, int | float) else self.whole_numbers(key)
        if len(values) < n_layer:
            raise self.error(key, f"has {len(values)} values for {n_layer} layers")
        if min(values[:n_layer]) < 1:
            raise self.error(key, f"is {min(values[:n_layer])} in a layer, at least 1 is needed")
        return tuple(values[:n_layer])

    def flags(self, key: str, n_layer: int) -> list[bool]:
        """Return a flag for each layer, from an array or one value for all."""
        given = self.metadata[f"{self.arch}.{key}"]
        if isinstance(given, bool | int):
            return [bool(given)] * n_layer
        values = self.whole_numbers(key)
        if len(values) < n_layer:
            raise self.error(key, f"has {len(values)} values for {n_layer} layers")
        return [v > 0 for v in values]

    def sliding_window(
        self, hp: HParams, *, period: int, is_own: bool = False, default: int | None = None
    ) -> dict[str, Any]:
        """Return the hyper-parameters of layers with a sliding window.

        Parameters
        ----------
        period : int
            If the file does not name the layers: every ``period``-th layer has no window.
        is_own : bool
            Layers with a window have their own rotation.
        default : int, optional
            The window of a file that does not say it.

        Notes
        -----
        Mirrors `llama_model_base::load_swa_pattern`: a file may name each layer, or give the period.
        """
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            own, common = (self.metadata.get(f"{self.arch}.{name}{suffix}") for suffix in ("_swa", ""))
            if own is not None and own != common:
                raise self.error(f"{name}_swa", f"is {own}, another size than that of the other layers ({common})")
        return {
            "n_swa": self.integer("attention.sliding_window", default),
            "swa_layers": self.swa_layers(hp.n_layer, period),
            "rope_freq_base_swa": self.freq_base("rope.freq_base_swa", 10000.0 if is_own else hp.rope_freq_base),
            "rope_freq_scale_swa": 1.0 if is_own else hp.rope_freq_scale,
        }

    def swa_layers(self, n_layer: int, period: int) -> frozenset[int]:
        """Return the layers with a sliding window."""
        key = "attention.sliding_window_pattern"
        given = self.metadata.get(f"{self.arch}.{key}")
        if given is None or isinstance(given, int):
            period = period if given is None else int(given)
            return frozenset(i for i in range(n_layer) if period == 0 or i % period < period - 1)
        flags = self.whole_numbers(key)
        if len(flags) < n_layer:
            raise self.error(key, f"has {len(flags)} values for {n_layer} layers")
        return frozenset(i for i in range(n_layer) if flags[i] > 0)
