"""`plan_header`: bytes of weights and KV cache by buffer type, for a model of any family, from its header alone.

Names of weights give the layer, metadata gives the head sizes. What needs the family's graph is left out: splits,
copies, compute buffers, and layers that keep only some tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..backend import Device
from ..buffer import BufferType
from ..gguf import GGUFFile
from ..types import Type
from .context import ContextFlags
from .placement import PlacementFlags, layer_devices, parse_overrides

__all__ = ["HeaderMemory", "plan_header"]

_LAYER = re.compile(r"(?:\w+\.)?blk\.(\d+)\.")
#: Cells of a cache are a multiple of this.
_STEP = 256


@dataclass(frozen=True, slots=True)
class HeaderMemory:
    """Bytes of one buffer type.

    Attributes
    ----------
    weights : int
        Bytes of the weights placed there.
    cache : int
        Bytes of K and V if each layer keeps every token of the context. Layers with a sliding window, a latent space or
        a recurrent state take less.
    """

    buft: str
    weights: int
    cache: int


def plan_header(
    file: GGUFFile,
    devices: Sequence[Device],
    cpu: Device,
    *,
    placement: PlacementFlags,
    context: ContextFlags,
) -> list[HeaderMemory]:
    """Return the bytes of each buffer type with the given flags.

    Raises
    ------
    GraphError
        A flag is invalid.
    FormatError
        The header has no number of layers.
    """
    arch = file.require("general.architecture", str)
    n_layer = file.require(f"{arch}.block_count", int)
    n_gpu_layers = placement.n_gpu_layers if placement.n_gpu_layers >= 0 else n_layer + 1
    layers = layer_devices(n_layer, n_gpu_layers, placement, devices, cpu)
    overrides = parse_overrides(placement, devices, cpu)
    weights: dict[BufferType, int] = {d.buffer_type: 0 for d in (*devices, cpu)}
    for name, info in file.tensors.items():
        found = _LAYER.match(name)
        device = layers[min(int(found[1]), n_layer)] if found else layers[n_layer]
        is_input = name.startswith(("token_embd", "per_layer_token_embd", "token_types", "position_embd"))
        if is_input:
            device = cpu
        override = next((o for o in overrides if o.pattern.search(name)), None)
        weights[override.buft if override is not None else device.buffer_type] += info.nbytes
        if name == "token_embd.weight" and "output.weight" not in file.tensors and layers[n_layer] is not cpu:
            weights[layers[n_layer].buffer_type] += info.nbytes  # the embedding is also the head
    cache = dict.fromkeys(weights, 0)
    for layer, size in enumerate(_cache_bytes(file, arch, n_layer, context)):
        device = layers[layer] if context.offload_kqv else cpu
        cache[device.buffer_type] += size
    return [HeaderMemory(buft.name, weights[buft], cache[buft]) for buft in weights]


def _cache_bytes(file: GGUFFile, arch: str, n_layer: int, context: ContextFlags) -> list[int]:
    """Return the bytes of K and V of each layer; 0 if the metadata lacks the head sizes."""

    def numbers(key: str, default: int = 0) -> list[int]:
        value = file.metadata.get(f"{arch}.{key}", default)
        if isinstance(value, int | float):
            return [int(value)] * n_layer
        if isinstance(value, str):
            return [default] * n_layer
        given = [int(v) for v in value][:n_layer]
        return given + [default] * (n_layer - len(given))

    n_embd = numbers("embedding_length")[0] if n_layer else 0
    heads = numbers("attention.head_count")
    n_head = max(heads, default=0)
    heads_kv = numbers("attention.head_count_kv", n_head)
    head = n_embd // n_head if n_head else 0
    key, value = numbers("attention.key_length", head), numbers("attention.value_length", head)
    n_ctx = context.n_ctx or max(numbers("context_length"), default=0)
    n_cells = -(-n_ctx // _STEP) * _STEP

    def row(type: Type, n: int) -> int:
        return -(-n // type.block_size) * type.type_size

    return [
        n_cells * (row(context.type_k, heads_kv[i] * key[i]) + row(context.type_v, heads_kv[i] * value[i]))
        for i in range(n_layer)
    ]
