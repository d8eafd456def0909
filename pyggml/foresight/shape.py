"""`ModelShape`: the products, attention and states of a model's layers, from its tensors alone.

It is made from a file's header or a known model's name, for any architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..catalog import ModelSizes, TypedTensor, shapes, type_tensors
from ..routing import Routing
from ..types import Type

__all__ = ["Attention", "Layer", "ModelShape", "Product", "State"]


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix that activations are multiplied with.

    Attributes
    ----------
    type : Type
    n_in, n_out : int
        Size of one matrix.
    n_matrix : int
        Number of experts; 1 if every token uses the matrix.
    name : str
        Of its weight within the layer, such as ``"ffn_up.weight"``.
    """

    type: Type
    n_in: int
    n_out: int
    n_matrix: int = 1
    is_expert: bool = False
    name: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.type.row_size(self.n_in) * self.n_out * self.n_matrix


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of a layer: heads, widths, and its window in tokens (0: all)."""

    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    window: int = 0
    is_latent: bool = False

    @property
    def n_cached(self) -> int:
        """Elements of K and V per token."""
        return self.head_k * self.n_head_kv + (0 if self.is_latent else self.head_v * self.n_head_kv)


@dataclass(frozen=True, slots=True)
class State:
    """The state of a recurrent layer (gated delta net): a square F32 matrix per head."""

    n_head: int
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 4 * self.n_head * self.size * self.size


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer."""

    products: tuple[Product, ...]
    attention: Attention | None
    state: State | None

    @property
    def has_experts(self) -> bool:
        """Whether some products have experts."""
        return any(p.is_expert for p in self.products)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(p.nbytes for p in self.products if p.is_expert)

    @property
    def other_bytes(self) -> int:
        """Bytes of the weights that every token reads."""
        return sum(p.nbytes for p in self.products if not p.is_expert)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What times and memory of a model are computed from.

    Attributes
    ----------
    name : str
    layers : tuple of Layer
        In order; equal layers are the same object.
    output : Product
        The head: from the last layer's output to logits.
    n_embd, n_expert, n_used : int
    table_bytes : int
        Bytes of tensors in host memory from which only rows are read.
    total_bytes : int
        Bytes of all tensors.
    """

    name: str
    arch: str
    layers: tuple[Layer, ...]
    output: Product
    n_embd: int
    n_expert: int
    n_used: int
    table_bytes: int
    total_bytes: int
    n_streams: int = 1  #: residual streams (hyper-connections)
    has_router_bias: bool = False
    has_expert_biases: bool = False  #: they stay in host memory with the experts, and the CPU adds them
    routing: Routing | None = None  #: how its tokens choose experts, if that is stated
    _index: dict[Layer, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_sizes(cls, s: ModelSizes, quant: str = "", *, file_bytes: float | None = None) -> ModelShape:
        """Return the shape of a known model."""
        tensors = type_tensors(s, shapes(s), quant or s.quant, file_bytes=file_bytes)
        return cls.from_tensors(s, tensors)

    @classmethod
    def from_tensors(cls, s: ModelSizes, tensors: Iterable[TypedTensor]) -> ModelShape:
        """Return the shape of tensors; ``s`` adds what tensors do not show."""
        by_layer: dict[int, list[Product]] = {}
        output = table = None
        total = tables = 0
        has_router_bias = has_expert_biases = False
        for t in tensors:
            has_router_bias |= t.name.endswith("ffn_gate_inp.bias")
            has_expert_biases |= t.name.endswith("_exps.bias")
            total += t.nbytes
            found = re.match(r"blk\.(\d+)\.(.*)", t.name)
            if found:
                i = int(found[1])
                if i < s.n_layer and (product := _product(found[2], t)) is not None:
                    by_layer.setdefault(i, []).append(product)
            elif t.name == "output.weight":
                output = Product(t.type, t.ne[0], t.ne[1])
            elif t.name == "token_embd.weight":
                table = Product(t.type, t.ne[0], t.ne[1])
                tables += t.nbytes
            elif t.name.startswith("per_layer_token_embd"):
                tables += t.nbytes
        assert table is not None
        kept: dict[Layer, Layer] = {}
        layers = []
        for i in range(s.n_layer):
            layer = Layer(tuple(by_layer.get(i, ())), _attention(s, i), _state(s, i))
            layers.append(kept.setdefault(layer, layer))
        return cls(
            s.name, s.arch, tuple(layers), output or table, s.n_embd, s.n_expert, s.n_used, tables, total,
            4 if s.arch in ("deepseek4", "qwen4exp") else 1, has_router_bias, has_expert_biases,
        )  # fmt: skip

    @classmethod
    def from_header(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Any], name: str) -> ModelShape:
        """Return the shape of an opened file."""
        s = sizes_of(metadata, tensors, name)
        return cls.from_tensors(s, [TypedTensor(n, tuple(t.ne), t.type) for n, t in tensors.items()])


def _product(name: str, t: TypedTensor) -> Product | None:
    """Return the product of a layer's weight; None for norms, biases and small tables."""
    if not name.endswith(".weight") or len(t.ne) < 2 or "conv" in name or "_norm" in name or t.ne[-1] == 1 == t.ne[1]:
        return None
    if len(t.ne) > 2 and "_exps" in name:
        return Product(t.type, t.ne[0], t.ne[1], t.ne[2], is_expert=True, name=name)
    n = 1
    for size in t.ne[1:]:
        n *= size
    return Product(t.type, t.ne[0], n, name=name)


def _attention(s: ModelSizes, i: int) -> Attention | None:
    if s.is_recurrent(i):
        return None
    window = s.n_swa if s.has_window(i) else 0
    if s.arch == "deepseek4":  # a window, and the compressed rest
        return Attention(s.n_head, 1, s.head, s.head, 128, is_latent=True)
    if s.kv_lora:
        return Attention(s.n_head, 1, s.kv_lora + s.rope_dim, s.kv_lora, window, is_latent=True)
    n_kv, head = s.heads(i)
    return Attention(s.n_head, n_kv, head, head, window)


def _state(s: ModelSizes, i: int) -> State | None:
    return State(s.ssm_heads, s.ssm_state) if s.is_recurrent(i) else None


def sizes_of(metadata: Mapping[str, Any], tensors: Mapping[str, Any], name: str) -> ModelSizes:
    """Return the sizes from a file's keys; if heads differ by layer, those of the first layer."""
    arch = str(metadata["general.architecture"])

    def key(what: str, default: int = 0) -> int:
        value = metadata.get(f"{arch}.{what}", default)
        if isinstance(value, (list, tuple)) or hasattr(value, "__len__"):
            value = max(value) if len(value) else default
        return int(value)

    n_nextn, n_head = key("nextn_predict_layers"), key("attention.head_count")
    head = key("attention.key_length", key("embedding_length") // max(n_head, 1))
    latent = key("attention.kv_lora_rank")
    window = key("attention.sliding_window")
    interval = key("full_attention_interval", 4 if key("ssm.time_step_rank") else 0)
    return ModelSizes(
        name, arch, key("block_count") - n_nextn, key("embedding_length"), n_head, key("attention.head_count_kv", n_head),
        key("attention.key_length_mla", head) if latent else head, key("feed_forward_length"),
        tensors["token_embd.weight"].ne[1], n_expert=key("expert_count"), n_used=key("expert_used_count"),
        n_swa=window, swa_period={"gpt-oss": 2, "gemma2": 2, "gemma3": 6, "gemma4": 6, "llama4": 4}.get(arch, 0) if window else 0,
        full_interval=interval, ssm_state=key("ssm.state_size", 128), ssm_heads=key("ssm.time_step_rank"),
        kv_lora=latent, rope_dim=key("rope.dimension_count") if latent else 0,
        head_v=key("attention.value_length_mla"), n_nextn=n_nextn,
    )  # fmt: skip
