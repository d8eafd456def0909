"""How many slots a cache of a given size has: which layers share slots, and how the budget is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import SchedError

__all__ = ["CacheGroup", "ExpertTensor", "HostLayer", "group_layers", "plan_cache", "slots_that_fit"]


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A weight with one matrix for each expert.

    Attributes
    ----------
    name : str
    layout : tuple
        Type, ``ne`` and strides, which layers that share slots must have in common.
    n_expert : int
    expert_bytes : int
        Bytes from one expert to the next, ``nb[2]``.
    """

    name: str
    layout: tuple[object, ...]
    n_expert: int
    expert_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of all experts."""
        return self.n_expert * self.expert_bytes


@dataclass(frozen=True, slots=True)
class HostLayer:
    """A layer whose experts are all in host memory, and the device that computes it.

    Attributes
    ----------
    index : int
    device : int
    experts : tuple of ExpertTensor
        Gate and up (fused or separate) and down, as far as the layer has them, in this order.
    """

    index: int
    device: int
    experts: tuple[ExpertTensor, ...]


@dataclass(slots=True)
class CacheGroup:
    """Layers of one device with equal expert tensors, which share slots.

    Attributes
    ----------
    device : int
    experts : tuple of ExpertTensor
        Expert tensors of its first layer; the banks have the same layouts.
    layers : list of int
    host_bytes : int
        Bytes of all experts of its layers.
    n_slots : int
        Slots; 0: the budget is too small, and the layers are not cached.
    n_transit : int
        Further slots, for experts that are used once and not kept; llama.cpp has none.
    """

    device: int
    experts: tuple[ExpertTensor, ...]
    layers: list[int] = field(default_factory=list)
    host_bytes: int = 0
    n_slots: int = 0
    n_transit: int = 0

    @property
    def n_expert(self) -> int:
        """Number of experts of each layer."""
        return self.experts[0].n_expert

    @property
    def expert_bytes(self) -> int:
        """Bytes of a slot: one expert in all tensors of a layer."""
        return sum(t.expert_bytes for t in self.experts)

    @property
    def share(self) -> float:
        """Slots divided by all experts of its layers."""
        return self.n_slots / (len(self.layers) * self.n_expert)

    def bank_bytes(self, n_slots: int, alignment: int) -> int:
        """Return the device memory of slots, in bytes, with a spare one because kernels read past the last."""
        return sum(-(-t.expert_bytes * (n_slots + 1) // alignment) * alignment for t in self.experts)

    def __str__(self) -> str:
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        return f"{layers} with {self.n_slots} slots ({100 * self.share:.1f} %)"


def slots_that_fit(group: CacheGroup, budget_bytes: int, alignment: int) -> int:
    """Return the number of slots that fit into a budget, at most the experts of the group."""
    low, high = 0, len(group.layers) * group.n_expert
    while low < high:
        middle = (low + high + 1) // 2
        if group.bank_bytes(middle, alignment) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def plan_cache(
    layers: Sequence[HostLayer],
    size_bytes: int,
    *,
    n_used: int,
    alignments: Sequence[int],
    weights: Sequence[float],
) -> list[CacheGroup]:
    """Return the groups of layers that share slots, with the slots of each.

    Parameters
    ----------
    layers : sequence of HostLayer
        In order; at least one.
    size_bytes : int
        Size of the cache, over all devices.
    n_used : int
        Most experts that a token uses in any layer.
    alignments : sequence of int
        Alignment of each device's memory, in bytes.
    weights : sequence of float
        Relative share of the budget for each device: its share of the layers (``-ts``) if given, else its free memory.
        Devices without layers here do not count. If all weights are 0, devices get equal shares.

    Raises
    ------
    SchedError
        No group holds the experts of one token.

    Notes
    -----
    Mirrors the constructor of `llama_moe_cache::impl`, with the same order of rounded sums.
    """
    groups = group_layers(layers)
    host_bytes = [0] * len(weights)
    for group in groups:
        host_bytes[group.device] += group.host_bytes
    shares = [float(w) if n else 0.0 for w, n in zip(weights, host_bytes, strict=True)]
    if sum(shares) == 0.0:
        shares = [1.0 if n else 0.0 for n in host_bytes]
    total = sum(shares)
    for group in groups:
        budget = int(size_bytes * shares[group.device] / total * group.host_bytes / host_bytes[group.device])
        group.n_slots = slots_that_fit(group, budget, alignments[group.device])
        if group.n_slots < n_used:
            group.n_slots = 0
    if not any(group.n_slots for group in groups):
        raise SchedError(
            "the expert cache is too small to hold the experts of one token",
            hint=f"a token uses {n_used} experts of {max(g.expert_bytes for g in groups):,} bytes in each layer",
        )
    return groups


def group_layers(layers: Sequence[HostLayer]) -> list[CacheGroup]:
    """Return the groups of layers that can share a bank (equal expert tensors, one device), without slots."""
    groups: list[CacheGroup] = []
    for layer in layers:
        group = next((g for g in groups if g.device == layer.device and _are_alike(g.experts, layer.experts)), None)
        if group is None:
            group = CacheGroup(layer.device, layer.experts)
            groups.append(group)
        group.layers.append(layer.index)
        group.host_bytes += sum(tensor.n_bytes for tensor in layer.experts)
    return groups


def _are_alike(a: Sequence[ExpertTensor], b: Sequence[ExpertTensor]) -> bool:
    return [(t.layout, t.expert_bytes) for t in a] == [(t.layout, t.expert_bytes) for t in b]
