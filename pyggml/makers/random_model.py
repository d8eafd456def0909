"""Keys and random weights of each architecture, for `make_moe`.

Weights are made from raw PCG64 words and integer sums, so that they are equal on every machine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..gguf import ValueType
from ..types import Type
from .quantize import quantize

if TYPE_CHECKING:
    from .make_moe import Recipe

__all__ = ["ARCHS", "RandomModel", "Weight", "noise"]

_Floats = npt.NDArray[np.float32]


def noise(seed: int, stream: str, n: int) -> Callable[[int], _Floats]:
    """Return a function that returns the next values of a random stream: nearly normal, mean 0, deviation 1.

    Parameters
    ----------
    seed : int
    stream : str
        Streams with different names are independent.
    n : int
        Most values that may be taken in total.

    Notes
    -----
    A value is the sum of the four 16-bit pieces of a raw PCG64 word: integers up to the last step, so that values are
    equal on every machine.
    """
    source = np.random.PCG64([seed, zlib.crc32(stream.encode())])
    left = n

    def take(count: int) -> _Floats:
        nonlocal left
        left -= count
        assert left >= 0, f"stream {stream} is used up"
        pieces = source.random_raw(count).astype("<u8", copy=False).view("<u2").reshape(count, 4)
        total = pieces[:, 0].astype(np.int32)
        for i in (1, 2, 3):
            total += pieces[:, i]
        total -= 2 * 65535
        return total.astype(np.float32) * np.float32(1.0 / 37837.0)  # deviation of the sum: sqrt(4 (65536² - 1) / 12)

    return take


class Role(Enum):
    """The role of a weight, which determines its type."""

    FLOAT = "float"  #: always F32
    DENSE = "dense"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight without values."""

    name: str
    stream: str  #: name of its random stream
    shape: tuple[int, ...]  #: numpy order
    std: float
    mean: float
    role: Role


class RandomModel:
    """The keys and weights of a recipe, in the file's order."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.sizes = recipe, recipe.sizes
        self.arch = recipe.arch.removesuffix("-dense")
        self.keys: list[tuple[str, ValueType, object]] = [("general.architecture", ValueType.STRING, self.arch)]
        self.weights: list[Weight] = []
        self._tokenizer()
        self._common()

    # keys

    def count(self, name: str, value: int) -> None:
        """Add a number of the architecture."""
        self.keys.append((f"{self.arch}.{name}", ValueType.UINT32, value))

    def scale(self, name: str, value: float) -> None:
        """Add a float of the architecture."""
        self.keys.append((f"{self.arch}.{name}", ValueType.FLOAT32, value))

    def _tokenizer(self) -> None:
        key = "tokenizer.ggml."
        if self.recipe.tokenizer == "none":
            self.keys.append((key + "model", ValueType.STRING, "none"))
            return
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        types = [2, 3, 3] + [6] * 256  # unknown, control, control, bytes
        n_pad = max(0, self.sizes.vocab - len(tokens))
        types += [5] * n_pad  # unused
        tokens += [f"<pad{len(tokens) + i}>" for i in range(n_pad)]
        self.keys += [
            (key + "model", ValueType.STRING, "llama"),
            (key + "tokens", ValueType.STRING, tokens),
            (key + "scores", ValueType.FLOAT32, [0.0] * len(tokens)),
            (key + "token_type", ValueType.INT32, types),
            (key + "bos_token_id", ValueType.UINT32, 1),
            (key + "eos_token_id", ValueType.UINT32, 2),
            (key + "unknown_token_id", ValueType.UINT32, 0),
            (key + "add_bos_token", ValueType.BOOL, False),
            (key + "add_space_prefix", ValueType.BOOL, False),
        ]

    def _common(self) -> None:
        sizes, arch = self.sizes, self.recipe.arch
        self.keys.append(("general.name", ValueType.STRING, f"tiny-{arch}"))
        self.keys.append(("general.quantization_version", ValueType.UINT32, 2))
        self.count("context_length", sizes.ctx)
        self.count("embedding_length", sizes.embd)
        self.count("block_count", sizes.layers)
        experts_only = arch in ("llama", "granitemoe", "olmoe", "gpt-oss")
        self.count("feed_forward_length", sizes.ff_exp if experts_only else sizes.ff)
        self.count("attention.head_count", sizes.heads)
        self.scale("attention.layer_norm_rms_epsilon", 1e-5)
        self.count("vocab_size", sizes.vocab)
        if not arch.endswith("-dense"):
            self.count("expert_count", sizes.experts)
            self.count("expert_used_count", sizes.used)
        if arch != "deepseek2":
            self.count("attention.head_count_kv", sizes.kv_heads)
            self.count("attention.key_length", sizes.head_dim)
            self.count("attention.value_length", sizes.head_dim)
            self.count("rope.dimension_count", sizes.head_dim)
            self.scale("rope.freq_base", 10000.0)
        self.matrix("token_embd", sizes.vocab, sizes.embd, gain=math.sqrt(sizes.embd))
        self.norm("output_norm", sizes.embd)
        self.matrix("output", sizes.vocab, sizes.embd, gain=2.0)

    def replace(self, name: str, kind: ValueType, value: object) -> None:
        """Replace the value of a key of the architecture."""
        key = f"{self.arch}.{name}"
        self.keys = [known for known in self.keys if known[0] != key] + [(key, kind, value)]

    # weights

    def matrix(
        self,
        name: str,
        rows: int,
        cols: int,
        *,
        gain: float = 1.0,
        stacked: int | None = None,
        role: Role | None = None,
    ) -> None:
        """Add a matrix, or a stack of them, scaled so that products keep the magnitude of their input."""
        shape = (rows, cols) if stacked is None else (stacked, rows, cols)
        role = role or (Role.DENSE if stacked is None else Role.EXPERTS)
        std = float(np.float32(gain) / np.sqrt(np.float32(cols)))
        self.weights.append(Weight(name + ".weight", name, shape, std, 0.0, role))

    def vector(
        self, name: str, *shape: int, std: float = 0.1, mean: float = 0.0, suffix: str = ".bias", own: bool = True
    ) -> None:
        """Add float values; ``own``: the suffix is part of their stream's name."""
        stream = name + suffix if own else name
        self.weights.append(Weight(name + suffix, stream, shape, std, mean, Role.FLOAT))

    def norm(self, name: str, n: int) -> None:
        """Add a norm's weight, near 1."""
        self.vector(name, n, mean=1.0, suffix=".weight")

    def layers(self) -> Iterator[tuple[int, str]]:
        """Yield each layer and its prefix of names, after adding the layer's norm."""
        for i in range(self.sizes.layers):
            self.norm(f"blk.{i}.attn_norm", self.sizes.embd)
            yield i, f"blk.{i}"

    def qkv(self, block: str, *, bias: bool = False) -> None:
        """Add the attention's matrices."""
        sizes = self.sizes
        for which, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
            self.matrix(f"{block}.attn_{which}", heads * sizes.head_dim, sizes.embd)
            if bias:
                self.vector(f"{block}.attn_{which}", heads * sizes.head_dim)
        self.matrix(f"{block}.attn_output", sizes.embd, sizes.heads * sizes.head_dim)

    def qk_norms(self, block: str, n_q: int, n_k: int) -> None:
        """Add norms of queries and keys."""
        self.norm(f"{block}.attn_q_norm", n_q)
        self.norm(f"{block}.attn_k_norm", n_k)

    def experts(self, block: str, *, bias: bool = False) -> None:
        """Add router and experts. The router's logits are large, so that rounding seldom changes the choice."""
        sizes = self.sizes
        self.matrix(f"{block}.ffn_gate_inp", sizes.experts, sizes.embd, gain=2.0)
        self.matrix(f"{block}.ffn_gate_exps", sizes.ff_exp, sizes.embd, stacked=sizes.experts)
        self.matrix(f"{block}.ffn_up_exps", sizes.ff_exp, sizes.embd, stacked=sizes.experts)
        self.matrix(f"{block}.ffn_down_exps", sizes.embd, sizes.ff_exp, stacked=sizes.experts)
        if bias:
            self.vector(f"{block}.ffn_gate_inp", sizes.experts)
            self.vector(f"{block}.ffn_gate_exps", sizes.experts, sizes.ff_exp)
            self.vector(f"{block}.ffn_up_exps", sizes.experts, sizes.ff_exp)
            self.vector(f"{block}.ffn_down_exps", sizes.experts, sizes.embd)

    def dense(self, block: str, suffix: str = "", ff: int | None = None) -> None:
        """Add a dense or shared feed-forward network."""
        ff = ff or self.sizes.ff
        self.matrix(f"{block}.ffn_gate{suffix}", ff, self.sizes.embd)
        self.matrix(f"{block}.ffn_up{suffix}", ff, self.sizes.embd)
        self.matrix(f"{block}.ffn_down{suffix}", self.sizes.embd, ff)

    def routed_keys(self, lead: int) -> None:
        """Add the keys of sigmoid routing with a shared expert."""
        self.count("expert_feed_forward_length", self.sizes.ff_exp)
        self.count("expert_shared_count", 1)
        self.count("leading_dense_block_count", lead)
        self.scale("expert_weights_scale", 1.5)
        self.keys.append((f"{self.arch}.expert_weights_norm", ValueType.BOOL, True))
        self.count("expert_gating_func", 2)

    def routed(self, i: int, block: str, lead: int) -> None:
        """Add a layer's feed-forward: dense in the leading layers, then experts with a shared one."""
        if i < lead:
            self.dense(block)
            return
        self.experts(block)
        self.vector(f"{block}.exp_probs_b", self.sizes.experts, std=0.05)
        self.dense(block, "_shexp", self.sizes.ff_exp)

    # bytes

    def type_of(self, weight: Weight) -> Type:
        """Return the type of a weight: Q8_0 or F16 if the recipe's blocks do not divide its rows."""
        recipe = self.recipe
        if weight.role is Role.FLOAT:
            return Type.F32
        kind = recipe.type
        if weight.role is Role.DENSE:
            kind = recipe.dense_type or (Type.Q8_0 if kind is Type.MXFP4 else kind)
        n = weight.shape[-1]
        return kind if n % kind.block_size == 0 else Type.Q8_0 if n % 32 == 0 else Type.F16

    def pieces(self, weight: Weight, kind: Type) -> Iterator[memoryview]:
        """Yield a weight's bytes, one expert at a time."""
        n = math.prod(weight.shape)
        take = noise(self.recipe.seed, weight.stream, n)
        part = weight.shape[-2:]
        for _ in range(n // math.prod(part)):
            values = take(math.prod(part)) * np.float32(weight.std) + np.float32(weight.mean)
            values = self._skewed(weight, values.reshape(part))
            yield np.ascontiguousarray(quantize(values, kind)).data

    def _skewed(self, weight: Weight, values: _Floats) -> _Floats:
        """Add a common direction to all tokens' embeddings, and to the routers a different response for each expert."""
        sizes, skew = self.sizes, self.recipe.skew
        if not skew or not (weight.name == "token_embd.weight" or weight.name.endswith("ffn_gate_inp.weight")):
            return values
        common = noise(self.recipe.seed, "common direction", sizes.embd)(sizes.embd)
        if weight.name == "token_embd.weight":
            return values + common
        order = noise(self.recipe.seed, weight.stream + " ranks", sizes.experts)(sizes.experts).argsort(kind="stable")
        offsets = np.empty(sizes.experts, np.float32)
        offsets[order] = [-skew * math.log(rank) for rank in range(1, sizes.experts + 1)]
        # the norm before the router leaves about √½ of the common part, because the tokens' own part is as large
        return values + offsets[:, None] * common * np.float32(math.sqrt(2.0) / sizes.embd)


# architectures


def _llama(model: RandomModel) -> None:
    """Llama with experts, as Mixtral: softmax over all experts, weights of the chosen ones renormalised."""
    for _, block in model.layers():
        model.qkv(block)
        model.norm(f"{block}.ffn_norm", model.sizes.embd)
        model.experts(block)


def _llama_dense(model: RandomModel) -> None:
    for _, block in model.layers():
        model.qkv(block)
        model.norm(f"{block}.ffn_norm", model.sizes.embd)
        model.dense(block)


def _qwen3moe(model: RandomModel) -> None:
    """Qwen3 with experts: norms of each head of Q and K."""
    sizes = model.sizes
    model.count("expert_feed_forward_length", sizes.ff_exp)
    for _, block in model.layers():
        model.qkv(block)
        model.qk_norms(block, sizes.head_dim, sizes.head_dim)
        model.norm(f"{block}.ffn_norm", sizes.embd)
        model.experts(block)


def _olmoe(model: RandomModel) -> None:
    """OLMoE: norms over all heads of Q and K; the experts' weights are not renormalised."""
    sizes = model.sizes
    for _, block in model.layers():
        model.qkv(block)
        model.qk_norms(block, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim)
        model.norm(f"{block}.ffn_norm", sizes.embd)
        model.experts(block)


def _granitemoe(model: RandomModel) -> None:
    """Granite: scaled embeddings, residuals, attention and logits."""
    model.scale("embedding_scale", 2.0)
    model.scale("residual_scale", 0.5)
    model.scale("attention.scale", 0.125)
    model.scale("logit_scale", 0.5)
    _llama(model)


def _gpt_oss(model: RandomModel) -> None:
    """gpt-oss: experts with biases (ADD_ID) and a clamped swiglu, attention sinks, a sliding window."""
    sizes = model.sizes
    model.count("expert_feed_forward_length", sizes.ff_exp)
    model.count("attention.sliding_window", 16)
    for _, block in model.layers():
        model.qkv(block, bias=True)
        model.vector(f"{block}.attn_output", sizes.embd)
        model.vector(f"{block}.attn_sinks", sizes.heads, std=1.0, suffix=".weight")
        model.norm(f"{block}.post_attention_norm", sizes.embd)
        model.experts(block, bias=True)


def _qwen2moe(model: RandomModel) -> None:
    """Qwen2 with experts: a shared expert with a sigmoid gate."""
    sizes = model.sizes
    model.count("expert_feed_forward_length", sizes.ff_exp)
    model.count("expert_shared_feed_forward_length", sizes.ff)
    for _, block in model.layers():
        model.qkv(block, bias=True)
        model.norm(f"{block}.ffn_norm", sizes.embd)
        model.experts(block)
        std = float(np.float32(1) / np.sqrt(np.float32(sizes.embd)))
        model.vector(f"{block}.ffn_gate_inp_shexp", sizes.embd, std=std, suffix=".weight", own=False)
        model.dense(block, "_shexp")


def _glm4moe(model: RandomModel) -> None:
    """GLM-4.5: a dense layer first, then sigmoid routing with a bias, and a shared expert."""
    sizes, lead = model.sizes, 1
    model.routed_keys(lead)
    for i, block in model.layers():
        model.qkv(block, bias=True)
        model.qk_norms(block, sizes.head_dim, sizes.head_dim)
        model.norm(f"{block}.post_attention_norm", sizes.embd)
        model.routed(i, block, lead)


def _deepseek2(model: RandomModel) -> None:
    """DeepSeek: attention over a latent space with one K/V head."""
    sizes, lead = model.sizes, 1
    rank, q_rank, rope, nope, v_dim = 128, 128, 32, 32, 32
    model.routed_keys(lead)
    model.count("attention.head_count_kv", 1)
    model.count("attention.kv_lora_rank", rank)
    model.count("attention.q_lora_rank", q_rank)
    model.count("attention.key_length", rank + rope)
    model.count("attention.value_length", rank)
    model.count("attention.key_length_mla", nope + rope)
    model.count("attention.value_length_mla", v_dim)
    model.count("rope.dimension_count", rope)
    model.scale("rope.freq_base", 10000.0)
    for i, block in model.layers():
        model.matrix(f"{block}.attn_q_a", q_rank, sizes.embd)
        model.norm(f"{block}.attn_q_a_norm", q_rank)
        model.matrix(f"{block}.attn_q_b", sizes.heads * (nope + rope), q_rank)
        model.matrix(f"{block}.attn_kv_a_mqa", rank + rope, sizes.embd)
        model.norm(f"{block}.attn_kv_a_norm", rank)
        model.matrix(f"{block}.attn_k_b", rank, nope, stacked=sizes.heads, role=Role.DENSE)
        model.matrix(f"{block}.attn_v_b", v_dim, rank, stacked=sizes.heads, role=Role.DENSE)
        model.matrix(f"{block}.attn_output", sizes.embd, sizes.heads * v_dim)
        model.norm(f"{block}.ffn_norm", sizes.embd)
        model.routed(i, block, lead)


def _gated_attention(model: RandomModel, block: str) -> None:
    """Add attention whose Q has a gate, with norms of each head of Q and K."""
    sizes = model.sizes
    model.matrix(f"{block}.attn_q", 2 * sizes.heads * sizes.head_dim, sizes.embd)
    for which in "kv":
        model.matrix(f"{block}.attn_{which}", sizes.kv_heads * sizes.head_dim, sizes.embd)
    model.matrix(f"{block}.attn_output", sizes.embd, sizes.heads * sizes.head_dim)
    model.qk_norms(block, sizes.head_dim, sizes.head_dim)


def _n_key_heads(n_head: int) -> int:
    """Return the number of Q and K heads of a delta net: half of the V heads if possible."""
    return n_head if n_head % 2 else n_head // 2


def _delta_net(model: RandomModel, block: str, *, is_joint: bool) -> None:
    """Add a gated delta net with heads as wide as attention's."""
    sizes = model.sizes
    n_head, state = sizes.heads, sizes.head_dim
    inner, channels = n_head * state, n_head * state + 2 * _n_key_heads(sizes.heads) * state
    model.matrix(f"{block}.attn_qkv", channels, sizes.embd)
    model.matrix(f"{block}.attn_gate", inner, sizes.embd)
    model.vector(f"{block}.ssm_conv1d", channels, 4, std=0.5, suffix=".weight")
    model.vector(f"{block}.ssm_dt", n_head)
    model.vector(f"{block}.ssm_a", n_head, mean=-0.5, suffix="")
    if is_joint:
        model.matrix(f"{block}.ssm_ba", 2 * n_head, sizes.embd)
    else:
        model.matrix(f"{block}.ssm_beta", n_head, sizes.embd)
        model.matrix(f"{block}.ssm_alpha", n_head, sizes.embd)
    model.norm(f"{block}.ssm_norm", state)
    model.matrix(f"{block}.ssm_out", sizes.embd, inner)


def _hybrid(model: RandomModel, *, is_joint: bool) -> None:
    """Add attention in every second layer, delta nets in the others; with experts a shared one with a sigmoid gate."""
    sizes, is_moe = model.sizes, not model.recipe.arch.endswith("-dense")
    if is_moe:
        model.count("expert_feed_forward_length", sizes.ff_exp)
        model.count("expert_shared_feed_forward_length", sizes.ff)
    model.count("ssm.conv_kernel", 4)
    model.count("ssm.state_size", sizes.head_dim)
    model.count("ssm.inner_size", sizes.heads * sizes.head_dim)
    model.count("ssm.time_step_rank", sizes.heads)
    model.count("ssm.group_count", _n_key_heads(sizes.heads))
    model.count("full_attention_interval", 2)
    for i, block in model.layers():
        model.norm(f"{block}.post_attention_norm", sizes.embd)
        if i % 2:
            _gated_attention(model, block)
        else:
            _delta_net(model, block, is_joint=is_joint)
        if not is_moe:
            model.dense(block)
            continue
        model.experts(block)
        std = float(np.float32(1) / np.sqrt(np.float32(sizes.embd)))
        model.vector(f"{block}.ffn_gate_inp_shexp", sizes.embd, std=std, suffix=".weight", own=False)
        model.dense(block, "_shexp")


def _qwen3next(model: RandomModel) -> None:
    _hybrid(model, is_joint=True)


def _qwen35(model: RandomModel) -> None:
    """Qwen3.5, with experts or dense: rotation by three positions, which are equal for text."""
    third = model.sizes.head_dim // 2 // 3
    sections = [model.sizes.head_dim // 2 - 2 * third, third, third, 0]
    model.keys.append((f"{model.arch}.rope.dimension_sections", ValueType.INT32, sections))
    _hybrid(model, is_joint=False)


def _gemma4(model: RandomModel) -> None:
    """Gemma 4 with experts: also a dense feed-forward; layers without a window have fewer heads, and K is V."""
    sizes = model.sizes
    model.count("expert_feed_forward_length", sizes.ff_exp)
    kv_heads = [sizes.kv_heads if i % 2 == 0 else max(1, sizes.kv_heads // 2) for i in range(sizes.layers)]
    model.replace("attention.head_count_kv", ValueType.INT32, kv_heads)
    _gemma4_layers(model, kv_heads, [sizes.ff] * sizes.layers, n_own=sizes.layers, n_each=0)


def _gemma4_dense(model: RandomModel) -> None:
    """Gemma 4, dense: per-layer embeddings; the last layers share K and V of earlier ones and are twice as wide."""
    sizes = model.sizes
    n_own = max(2, (sizes.layers - sizes.layers // 3) // 2 * 2)
    ff = [sizes.ff if i < n_own else 2 * sizes.ff for i in range(sizes.layers)]
    model.replace("feed_forward_length", ValueType.INT32, ff)
    model.count("attention.shared_kv_layers", max(0, sizes.layers - n_own))
    _gemma4_layers(model, [sizes.kv_heads] * sizes.layers, ff, n_own=n_own, n_each=32)


def _gemma4_layers(model: RandomModel, kv_heads: list[int], ff: list[int], *, n_own: int, n_each: int) -> None:
    """Add layers with a window in every second one; heads of the others are twice as wide."""
    sizes = model.sizes
    is_moe = not n_each
    model.count("attention.sliding_window", 16)
    model.replace("attention.sliding_window_pattern", ValueType.BOOL, [i % 2 == 0 for i in range(sizes.layers)])
    for which in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        model.replace(which, ValueType.UINT32, 2 * sizes.head_dim)
        model.count(f"{which}_swa", sizes.head_dim)
    model.count("embedding_length_per_layer_input", n_each)
    model.scale("final_logit_softcapping", 30.0)
    if n_each:
        model.matrix("per_layer_token_embd", sizes.vocab, n_each * sizes.layers, gain=math.sqrt(n_each * sizes.layers))
        model.matrix("per_layer_model_proj", n_each * sizes.layers, sizes.embd)
        model.norm("per_layer_proj_norm", n_each)
    if sizes.layers > 1:
        model.norm("rope_freqs", sizes.head_dim)
    for i, block in model.layers():
        head = sizes.head_dim * (1 + i % 2)
        model.matrix(f"{block}.attn_q", sizes.heads * head, sizes.embd)
        model.norm(f"{block}.attn_q_norm", head)
        if i < n_own:
            model.matrix(f"{block}.attn_k", kv_heads[i] * head, sizes.embd)
            model.norm(f"{block}.attn_k_norm", head)
            if not (is_moe and i % 2):
                model.matrix(f"{block}.attn_v", kv_heads[i] * head, sizes.embd)
        model.matrix(f"{block}.attn_output", sizes.embd, sizes.heads * head)
        for name in ("post_attention_norm", "ffn_norm", "post_ffw_norm"):
            model.norm(f"{block}.{name}", sizes.embd)
        model.dense(block, ff=ff[i])
        model.vector(f"{block}.layer_output_scale", 1, mean=1.0, suffix=".weight")
        if is_moe:
            model.experts(block)
            model.vector(f"{block}.ffn_gate_inp", sizes.embd, mean=math.sqrt(sizes.embd), suffix=".scale")
            model.vector(f"{block}.ffn_down_exps", sizes.experts, mean=1.0, suffix=".scale")
            for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
                model.norm(f"{block}.{name}", sizes.embd)
        if n_each:
            model.matrix(f"{block}.inp_gate", n_each, sizes.embd)
            model.matrix(f"{block}.proj", sizes.embd, n_each)
            model.norm(f"{block}.post_norm", sizes.embd)


#: Architectures by llama.cpp's names; with the suffix ``-dense`` they have no experts.
ARCHS: dict[str, Callable[[RandomModel], None]] = {
    "llama": _llama,
    "qwen3moe": _qwen3moe,
    "gpt-oss": _gpt_oss,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "qwen2moe": _qwen2moe,
    "glm4moe": _glm4moe,
    "deepseek2": _deepseek2,
    "qwen3next": _qwen3next,
    "qwen35moe": _qwen35,
    "qwen35-dense": _qwen35,
    "gemma4": _gemma4,
    "gemma4-dense": _gemma4_dense,
    "llama-dense": _llama_dense,
}
