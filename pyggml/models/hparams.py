"""`HParams`: the sizes and constants of a model, read from its metadata and checked once.

Graph builders, placement and the KV cache take what they need from here and never look into the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import FormatError
from ..gguf import TensorInfo
from ..ops import RopeType

if TYPE_CHECKING:
    from ..gguf import GGUFFile

__all__ = ["ARCHITECTURES", "MAX_LAYERS", "Gating", "HParams", "round_f32"]

#: How a router's logits become probabilities; ``softmax_weight`` does so for the chosen alone.
Gating = Literal["softmax", "sigmoid", "softmax_weight"]

#: Architectures with a graph here, and how their rows rotate.
ARCHITECTURES: dict[str, RopeType] = {
    "llama": RopeType.NORMAL,
    "qwen3": RopeType.NEOX,
    "qwen3moe": RopeType.NEOX,
    "gpt-oss": RopeType.NEOX,
    "glm4moe": RopeType.NEOX,
    "qwen2": RopeType.NEOX,
    "qwen2moe": RopeType.NEOX,
    "olmoe": RopeType.NEOX,
    "granitemoe": RopeType.NORMAL,
    "deepseek2": RopeType.NORMAL,
    "minimax-m2": RopeType.NEOX,
    "dots1": RopeType.NEOX,
    "ernie4_5-moe": RopeType.NORMAL,
    "gemma3": RopeType.NEOX,
}
_LARGEST_F32 = 3.4028234e38
#: Of these, the ones that are nothing without experts.
_MOE_ONLY = frozenset(
    {
        "qwen2moe",
        "qwen3moe",
        "olmoe",
        "granitemoe",
        "gpt-oss",
        "glm4moe",
        "deepseek2",
        "minimax-m2",
        "dots1",
        "ernie4_5-moe",
    }
)
#: Those that may rotate a part of each head only.
_PARTIAL_ROPE = frozenset({"glm4moe", "minimax-m2"})
#: Those whose file says how experts are chosen, and how they are if it does not; None: it must.
_GATED: dict[str, Gating | None] = {"glm4moe": "sigmoid", "deepseek2": "softmax", "minimax-m2": None, "dots1": None}
#: Those that may have layers without experts before the others.
_LED = frozenset({"glm4moe", "deepseek2", "dots1", "ernie4_5-moe"})
#: Those whose file says how many experts are shared, and by what weights are multiplied.
_SHARED = frozenset({"glm4moe", "deepseek2", "dots1"})
#: Those whose file says how wide the shared expert is.
_SHARED_WIDTH = frozenset({"qwen2moe", "granitemoe", "ernie4_5-moe"})
#: Those that rotate by several positions if the file has sections.
_SECTIONED = frozenset({"glm4moe"})
#: Those with attention over a latent space.
_MLA = frozenset({"deepseek2"})
#: Those that multiply embeddings, residuals, attention and logits by constants of the file.
_SCALED = frozenset({"granitemoe"})
#: Upstream's `llama_expert_gating_func_type`.
_GATINGS: dict[int, Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax_weight"}
#: Architectures with a sliding window in some layers: of so many layers the last has none.
_SWA_PERIODS = {"gpt-oss": 2, "gemma3": 6}
#: Those that may do without a window, and whose layers with one have rotations of their own.
_OWN_WINDOW = frozenset({"gemma3"})
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
#: Upstream's `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS`.
MAX_LAYERS, _MAX_EXPERTS = 512, 1024


def round_f32(value: float) -> float:
    """Return the float32 nearest to a number, as upstream keeps its constants."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


@dataclass(frozen=True, slots=True)
class HParams:
    """The sizes and constants of a model.

    Notes
    -----
    Mirrors `llama_hparams` and `llama_model_base::load_hparams`. Differs: layers are all of one size; a file whose
    layers differ is refused.
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
    n_ff_exp: int  #: of one expert; 0 where the file does not say
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
    n_layer_nextn: int = 0  #: layers behind the others that predict further tokens, and which nothing here runs
    n_layer_dense_lead: int = 0  #: layers without experts, before those with
    n_expert_shared: int = 0  #: experts that every token goes through, kept as one
    n_ff_shexp: int = 0  #: of the shared expert; 0 where the file does not say
    expert_gating: Gating = "softmax"
    expert_weights_norm: bool = False  #: weights of the chosen experts add up to 1
    expert_weights_scale: float = 0.0  #: by which weights of experts are multiplied; 0 and 1 leave them
    n_expert_groups: int = 0  #: experts are chosen from the best groups; 0 and 1: from all
    n_group_used: int = 0
    n_lora_q: int = 0  #: width of the space that Q goes through; 0: none
    n_lora_kv: int = 0  #: width of the space in which K and V are kept
    n_embd_head_k_mla: int = 0  #: of K unfolded from that space; 0: attention is not of this kind (MLA)
    n_embd_head_v_mla: int = 0
    rope_yarn_log_mul: float = 0.0
    embedding_scale: float = 0.0  #: 0 leaves the embeddings as they are
    token_scale: float = 1.0  #: of embeddings of tokens, which those of images would not be multiplied by
    residual_scale: float = 0.0  #: of what is added to the residual stream; 0 leaves it
    attention_scale: float = 0.0  #: of Q times K; 0 takes one over the root of the heads' size
    logit_scale: float = 0.0  #: by which logits are divided, where the architecture does so
    logit_softcap: float = 0.0  #: logits are bent so that none is larger; 0 leaves them

    @property
    def n_embd_k_gqa(self) -> int:
        """Elements of all K heads of a token."""
        return self.n_embd_head_k * self.n_head_kv

    @property
    def n_embd_v_gqa(self) -> int:
        """Elements of all V heads of a token."""
        return self.n_embd_head_v * self.n_head_kv

    @property
    def n_layer_all(self) -> int:
        """Layers with those that nothing here runs: placement counts them."""
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

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> HParams:
        """Read the hyper-parameters of a file.

        Raises
        ------
        FormatError
            The architecture is not supported, or a key is missing, of another kind, or out of bounds.
        """
        return _Reader(file).read()


class _Reader:
    """Reads keys of one architecture, with errors that name the key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.metadata: Mapping[str, Any] = file.metadata  # Any: a value's type is the file's to say
        self.arch = file.require("general.architecture", str)
        if self.arch not in ARCHITECTURES:
            raise FormatError(
                file.path,
                f"the architecture '{self.arch}' is not supported",
                hint=f"supported are {', '.join(ARCHITECTURES)}; `pyggml splits` plans any that llama.cpp loads",
            )

    def error(self, key: str, message: str) -> FormatError:
        return FormatError(self.file.path, f"'{self.arch}.{key}' {message}", hint="the model was converted wrongly")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a number, or the one number that an array of one for each layer holds."""
        full = f"{self.arch}.{key}"
        if default is not None and full not in self.metadata:
            return default
        if full in self.metadata and not isinstance(self.metadata[full], int | float | str):
            values = set(self.whole_numbers(key))
            if len(values) != 1:
                raise FormatError(
                    self.file.path,
                    f"'{full}' differs between layers ({', '.join(map(str, sorted(values)))})",
                    hint="only models whose layers are all of one size are supported",
                )
            value = values.pop()
        else:
            value = self.file.require(full, int)
        if value < least:
            raise self.error(key, f"is {value}, at least {least} is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        full = f"{self.arch}.{key}"
        if default is not None and full not in self.metadata:
            return default
        value = self.file.require(full, float)
        if not abs(value) <= _LARGEST_F32:
            raise self.error(key, f"is {value:g}, no number that a float32 holds")
        return value

    def whole_numbers(self, key: str) -> list[int]:
        """Return the numbers of an array that has one for each layer."""
        values = self.metadata[f"{self.arch}.{key}"]
        if isinstance(values, list) or values.dtype.kind not in "iub":
            kind = "strings" if isinstance(values, list) else str(values.dtype)
            raise self.error(key, f"is an array of {kind}, not of whole numbers")
        return [int(v) for v in values]

    def n_vocab(self) -> int:
        """Mirrors `llama_vocab::load`: the tokens' number, else the key, else the embedding's rows."""
        if "tokenizer.ggml.tokens" in self.metadata:
            length = self.file.metadata.entry("tokenizer.ggml.tokens").length
            if length is not None:
                return length
        embedding: TensorInfo = self.file.tensor("token_embd.weight")
        return self.integer("vocab_size", embedding.ne[1])

    def read(self) -> HParams:
        n_embd = self.integer("embedding_length")
        n_layer = self.integer("block_count")
        if n_layer > MAX_LAYERS:
            raise self.error("block_count", f"is {n_layer}, more than the {MAX_LAYERS} possible")
        n_layer_nextn = self.integer("nextn_predict_layers", 0, least=0)
        if n_layer_nextn >= n_layer:
            raise self.error("nextn_predict_layers", f"is {n_layer_nextn} of {n_layer} layers")
        n_layer -= n_layer_nextn
        n_head = self.integer("attention.head_count")
        n_head_kv = self.integer("attention.head_count_kv", n_head)
        if n_head % n_head_kv:
            raise self.error("attention.head_count", f"is {n_head}, no multiple of {n_head_kv} heads of K and V")
        n_expert = self.integer("expert_count", 0, least=0)
        n_used = self.integer("expert_used_count", 0, least=0)
        if n_used > n_expert or (n_expert and not n_used) or n_expert > _MAX_EXPERTS:
            raise self.error("expert_used_count", f"is {n_used} of {n_expert} experts")
        if self.arch in _MOE_ONLY and not n_expert:
            raise self.error("expert_count", "is missing or 0, and this architecture has experts")
        n_ctx_train = self.integer("context_length")
        head_k = self.integer("attention.key_length", n_embd // n_head)
        head_v = self.integer("attention.value_length", n_embd // n_head)
        n_rot = self.integer("rope.dimension_count", head_k)
        is_partial = self.arch in _PARTIAL_ROPE and n_rot < head_k and n_rot % 2 == 0
        if self.arch in _MLA:
            head_v = self.integer("attention.kv_lora_rank")  # whatever the file says: V is a part of K
        if self.arch not in _MLA and ((n_rot != head_k and not is_partial) or head_k != head_v):
            raise self.error("rope.dimension_count", f"is {n_rot}, with heads of {head_k} (K) and {head_v} (V)")
        self.refuse_what_changes_the_graph()
        scaling = self.file.require(f"{self.arch}.rope.scaling.type", str, "linear")
        if scaling not in _ROPE_SCALINGS:
            raise self.error("rope.scaling.type", f"is '{scaling}'; known are {', '.join(_ROPE_SCALINGS)}")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0))
        freq_base = self.freq_base("rope.freq_base", 10000.0)
        if factor < 0.0 or 0.0 < factor < 1e-30:
            raise self.error("rope.scaling.factor", f"is {factor:g}, a number above 0 is needed")
        freq_scale = 1.0 if factor == 0.0 else round_f32(1.0 / round_f32(factor))
        return HParams(
            arch=self.arch,
            name=self.file.require("general.name", str, ""),
            n_vocab=self.n_vocab(),
            n_ctx_train=n_ctx_train,
            n_embd=n_embd,
            n_layer=n_layer,
            n_layer_nextn=n_layer_nextn,
            n_head=n_head,
            n_head_kv=n_head_kv,
            n_embd_head_k=head_k,
            n_embd_head_v=head_v,
            n_rot=n_rot,
            n_ff=self.integer("feed_forward_length", 0, least=0),
            n_expert=n_expert,
            n_expert_used=n_used,
            n_ff_exp=self.integer("expert_feed_forward_length", 0, least=0),
            n_ff_shexp=self.integer("expert_shared_feed_forward_length", 0, least=0)
            if self.arch in _SHARED_WIDTH
            else 0,
            norm_rms_eps=round_f32(self.number("attention.layer_norm_rms_epsilon")),
            rope_type=ARCHITECTURES[self.arch],
            rope_scaling=scaling,
            rope_freq_base=freq_base,
            rope_freq_scale=freq_scale,
            rope_attn_factor=self.number("rope.scaling.attn_factor", 1.0),
            n_ctx_orig_yarn=self.integer("rope.scaling.original_context_length", 0, least=0) or n_ctx_train,
            **self.sliding_window(n_layer, freq_base, freq_scale),
            **self.routing(n_layer),
            **self.scales(n_embd, n_layer, n_head, head_k),
            **self.groups(n_expert),
            **self.latent(n_layer, head_k, head_v, n_rot, n_head_kv),
        )

    def freq_base(self, key: str, default: float) -> float:
        """Return a base of rotary frequencies. Differs: one of 0 or less, with which upstream computes NaN, is refused."""
        base = round_f32(self.number(key, default))
        if not 0 < base < math.inf:
            raise self.error(key, f"is {base:g}, a number above 0 is needed")
        return base

    def refuse_what_changes_the_graph(self) -> None:
        """Refuse keys that upstream reads and whose graphs are not built here; see docs/upstream.md.

        Raises
        ------
        FormatError
            One is set; the text names it.
        """
        if not self.file.require(f"{self.arch}.attention.causal", bool, True):
            raise self.error("attention.causal", "is false: attention to what comes later is not supported")
        key = "rope.dimension_sections"
        if self.arch not in _SECTIONED or f"{self.arch}.{key}" not in self.metadata:
            return
        given = self.metadata[f"{self.arch}.{key}"]
        sections = [given] * 2 if isinstance(given, int) else self.whole_numbers(key)
        if sum(n > 0 for n in sections[:2]) == 2:
            raise self.error(key, "asks for rotation by several positions, which is not supported")

    def size_vocab(self) -> int:
        """Return the number of tokens as some architectures count them to tell models apart."""
        return self.integer("vocab_size", 0, least=0) or self.n_vocab()

    def groups(self, n_expert: int) -> dict[str, Any]:
        """Return the groups that experts are chosen from, checked as upstream does."""
        n_groups = self.integer("expert_group_count", 0, least=0)
        n_used = self.integer("expert_group_used_count", 0, least=0)
        if n_groups > 1 and (n_groups >= n_expert or n_expert % n_groups or not 0 < n_used < n_groups):
            raise self.error("expert_group_count", f"is {n_groups}, of which {n_used} are used, for {n_expert} experts")
        return {"n_expert_groups": n_groups, "n_group_used": n_used}

    def latent(self, n_layer: int, head_k: int, head_v: int, n_rot: int, n_head_kv: int) -> dict[str, Any]:
        """Return what concerns attention over a latent space.

        Notes
        -----
        Mirrors `llama_model_deepseek2::load_arch_hparams`. Differs: files from before K and V were unfolded by weights
        of their own, and scaling by the position, are refused.
        """
        if self.arch not in _MLA:
            return {}
        if self.number("attention.temperature_scale", 0.0):
            raise self.error("attention.temperature_scale", "is set, which is not supported")
        k_mla, v_mla = (self.integer(f"attention.{which}_length_mla", 0, least=0) for which in ("key", "value"))
        rank = self.integer("attention.kv_lora_rank")
        if not k_mla or not v_mla:
            raise self.error("attention.key_length_mla", "is missing: the model was converted before MLA was kept so")
        if (head_k, head_v, n_head_kv) != (rank + n_rot, rank, 1) or k_mla <= n_rot or n_rot % 2:
            sizes = f"{head_k} (K), {head_v} (V), {k_mla} (K unfolded), {n_rot} rotated, {n_head_kv} heads"
            raise self.error("attention.kv_lora_rank", f"is {rank}, which does not go with {sizes}")
        # which models have no narrow space for Q is known by their size alone
        is_lite = n_layer in (26, 27) or (n_layer == 48 and self.size_vocab() == 128256)
        log_mul = round_f32(self.number("rope.scaling.yarn_log_multiplier", 0.0))
        return {
            "n_lora_q": 0 if is_lite else self.integer("attention.q_lora_rank", least=0),
            "n_lora_kv": rank,
            "n_embd_head_k_mla": k_mla,
            "n_embd_head_v_mla": v_mla,
            "rope_yarn_log_mul": round_f32(log_mul / round_f32(0.1)),
        }

    def scales(self, n_embd: int, n_layer: int, n_head: int, head_k: int) -> dict[str, Any]:
        """Return by what embeddings, residuals, attention and logits are multiplied, in architectures that do so.

        Notes
        -----
        Mirrors `llama_model_gemma3::load_arch_hparams`, which knows the largest model by its layers.
        """
        if self.arch == "gemma3":
            return {
                "token_scale": round_f32(math.sqrt(n_embd)),
                "attention_scale": round_f32(1.0 / round_f32(math.sqrt(n_embd // n_head if n_layer == 62 else head_k))),
                "logit_softcap": round_f32(self.number("final_logit_softcapping", 0.0)),
            }
        if self.arch not in _SCALED:
            return {}
        logit_scale = round_f32(self.number("logit_scale"))
        if not logit_scale:
            raise self.error("logit_scale", "is 0, and logits are divided by it")
        return {
            "embedding_scale": round_f32(self.number("embedding_scale", 0.0)),
            "residual_scale": round_f32(self.number("residual_scale", 0.0)),
            "attention_scale": round_f32(self.number("attention.scale", 0.0)),
            "logit_scale": logit_scale,
        }

    def routing(self, n_layer: int) -> dict[str, Any]:
        """Return how experts are chosen, where the file says so."""
        out: dict[str, Any] = {}
        if self.arch in _LED:
            n_lead = self.integer("leading_dense_block_count", 0, least=0)
            if n_lead > n_layer:
                raise self.error("leading_dense_block_count", f"is {n_lead} of {n_layer} layers")
            out["n_layer_dense_lead"] = n_lead
        if self.arch == "ernie4_5-moe" and (step := self.integer("interleave_moe_layer_step")) != 1:
            raise self.error("interleave_moe_layer_step", f"is {step}; only 1 is supported")
        if self.arch in _SHARED:
            out["n_expert_shared"] = self.integer("expert_shared_count", least=0)
            out["expert_weights_norm"] = self.file.require(f"{self.arch}.expert_weights_norm", bool, False)
            out["expert_weights_scale"] = round_f32(self.number("expert_weights_scale", 0.0))
        if self.arch in _GATED:
            number = self.integer("expert_gating_func", 0, least=0)
            gating = _GATINGS.get(number) if number else _GATED[self.arch]
            # the first files of GLM-4.7-Flash lack the key; they are known by their size alone
            if not number and self.arch == "deepseek2" and n_layer in (47, 48) and self.size_vocab() == 154880:
                gating = "sigmoid"
            if gating is None:
                raise self.error("expert_gating_func", f"is {number}; known are {', '.join(map(str, _GATINGS))}")
            out["expert_gating"] = gating
        return out

    def sliding_window(self, n_layer: int, freq_base: float, freq_scale: float) -> dict[str, Any]:
        """Return what concerns layers with a sliding window; nothing where the architecture has none.

        Notes
        -----
        Mirrors `llama_model_base::load_swa_pattern`: a file may name each layer, or say which of how many is dense.
        """
        if self.arch not in _SWA_PERIODS:
            return {}
        is_own = self.arch in _OWN_WINDOW
        if is_own and not self.integer("attention.sliding_window", 0, least=0):
            return {}
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            own, common = (self.metadata.get(f"{self.arch}.{name}{suffix}") for suffix in ("_swa", ""))
            if own is not None and own != common:
                raise self.error(f"{name}_swa", f"is {own}, another size than that of the other layers ({common})")
        key = f"{self.arch}.attention.sliding_window_pattern"
        given = self.metadata.get(key)
        if given is None or isinstance(given, int):
            period = _SWA_PERIODS[self.arch] if given is None else int(given)
            layers = frozenset(i for i in range(n_layer) if period == 0 or i % period < period - 1)
        else:
            flags = self.whole_numbers("attention.sliding_window_pattern")
            if len(flags) < n_layer:
                raise self.error("attention.sliding_window_pattern", f"has {len(flags)} values for {n_layer} layers")
            layers = frozenset(i for i in range(n_layer) if flags[i] > 0)
        return {
            "n_swa": self.integer("attention.sliding_window"),
            "swa_layers": layers,
            "rope_freq_base_swa": self.freq_base("rope.freq_base_swa", 10000.0 if is_own else freq_base),
            "rope_freq_scale_swa": 1.0 if is_own else freq_scale,
        }
