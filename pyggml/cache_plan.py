"""What llama.cpp's expert cache would hold of a planned model, and how often its experts would be found there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import GraphError, SchedError
from .models.placement import Placement
from .moe_cache import (
    EVICTIONS,
    CacheGroup,
    Counters,
    ExpertCache,
    ExpertTensor,
    HostLayer,
    plan_cache,
    slots_without_hits,
)
from .planning import Memory, Planner
from .routing import Routing
from .types import DeviceType

__all__ = ["ExpertCachePlan", "GroupForecast", "plan_expert_cache"]

_MIB = 1024 * 1024
_EXPERTS = re.compile(r"blk\.(\d+)\.(ffn_(?:gate_up|gate|up|down)_exps)\.weight")
_KINDS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # in the order of the banks
#: Tokens of generation that are forecast, from an empty cache on.
N_FORECAST = 256


@dataclass(frozen=True, slots=True)
class GroupForecast:
    """Layers that share slots, and what a generation would find there.

    Attributes
    ----------
    group : CacheGroup
    device : str
    bank_bytes : int
        Device memory of its slots.
    n_tokens : int
        Tokens that were forecast.
    counters : Counters
    upload_s : float or None
        Time of the uploads of a token on the device's link, on average; None if its rate is not known.
    hopeless_up_to : int
        Slots up to which one token a step never hits.
    mib_for_hits : int
        Least size of the whole cache, in MiB, at which this group has more slots than that; 0 if none does.
    """

    group: CacheGroup
    device: str
    bank_bytes: int
    n_tokens: int
    counters: Counters
    upload_s: float | None
    hopeless_up_to: int
    mib_for_hits: int

    @property
    def is_hopeless(self) -> bool:
        """Whether no expert would ever be found."""
        return 0 < self.group.n_slots <= self.hopeless_up_to

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        g, c, n = self.group, self.counters, self.n_tokens
        return {
            "device": self.device, "layers": g.layers, "type": str(g.experts[-1].layout[0]), "n_slots": g.n_slots,
            "share": g.share, "bank_bytes": self.bank_bytes, "host_bytes": g.host_bytes, "n_tokens": n,
            "hits": c.hits, "misses": c.misses, "hit_rate": c.hit_rate,
            "uploaded_bytes_per_token": c.uploaded_bytes / n if n else None, "upload_s_per_token": self.upload_s,
            "never_hits_up_to_slots": self.hopeless_up_to, "hits_from_mib": self.mib_for_hits or None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertCachePlan:
    """The cache of a model: a forecast for each group of layers; none if no layer has all its experts on the host."""

    size_bytes: int
    eviction: str
    n_used: int
    groups: list[GroupForecast]
    map_bytes: int  #: host memory of the slot maps

    def warnings(self) -> Iterator[str]:
        """Yield what a user must know: the first two are llama.cpp's own."""
        if not self.groups:
            yield "no layer has all of its experts in host memory: the expert cache is off"
        for f in self.groups:
            layers = len(f.group.layers)
            if f.group.n_slots == 0:
                yield f"the expert cache is too small for {layers} layers on {f.device}: they are not cached"
            elif f.is_hopeless:
                hint = f"hits begin at --moe-cache-mib {f.mib_for_hits}" if f.mib_for_hits else "no size is enough"
                yield (
                    f"{f.group.n_slots} slots for {layers} layers on {f.device} never hit (0 %) with one token a step: up to "
                    f"(layers - 1) * used = {layers - 1} * {self.n_used} = {f.hopeless_up_to} slots each expert is gone before "
                    f"its layer's next turn; {hint}. With u distinct experts a layer and step it is {layers - 1} * u"
                )

    def memory(self, rows: Sequence[Memory]) -> list[Memory]:
        """Return rows of memory with the cache's: as llama.cpp counts it, with the context's."""
        more: dict[str, int] = {}
        for f in self.groups:
            more[f.device] = more.get(f.device, 0) + f.bank_bytes
        found = [replace(row, cache=row.cache + more.pop(row.buft, 0)) for row in rows]
        if found and self.map_bytes:
            at = next((i for i, row in enumerate(found) if row.buft == "CPU"), len(found) - 1)
            found[at] = replace(found[at], cache=found[at].cache + self.map_bytes)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "size_bytes": self.size_bytes, "eviction": self.eviction, "n_used": self.n_used,
            "map_bytes": self.map_bytes, "groups": [f.as_dict() for f in self.groups],
            "warnings": list(self.warnings()),
        }  # fmt: skip


def plan_expert_cache(
    planner: Planner, size_bytes: int, *, routing: Routing, eviction: str = "slru", tensor_split: Sequence[float] = ()
) -> ExpertCachePlan:
    """Return what a cache of so many bytes would do for a planned model.

    Parameters
    ----------
    size_bytes : int
        ``--moe-cache-mib``, over all devices.
    routing : Routing
        Which experts each token of a generation chooses.
    eviction : str
        ``"lru"`` (llama.cpp b11549, release 0.7.0) or ``"slru"`` (b11739).
    tensor_split : sequence of float
        The user's shares of the devices; their free memory, less what the plan puts there, if not given.

    Raises
    ------
    SchedError
        There is no GPU, the model has no experts, or no group of layers holds the experts of one token.

    Notes
    -----
    Mirrors the constructor of `llama_moe_cache::impl`. What is forecast is generation, one token a step; prompts of more
    than 32 tokens go past the cache.
    """
    placement, facts = planner.placement, planner.hparams
    devices = list(placement.devices)
    if not any(d.type in (DeviceType.GPU, DeviceType.IGPU) for d in devices):
        raise SchedError("the expert cache needs a GPU", hint="leave out --moe-cache-mib, or give a device")
    if not facts.n_expert or not facts.n_expert_used:
        raise SchedError("the expert cache needs a model with experts", hint="leave out --moe-cache-mib")
    layers = _host_layers(placement)
    n_used = facts.n_expert_used
    if not layers:
        return ExpertCachePlan(size_bytes, eviction, n_used, [], 0)
    alignments = [d.buffer_type.alignment for d in devices]
    held = {m.buft: m.weights + m.cache for m in planner.memory()}
    weights = list(tensor_split) if any(tensor_split) else [
        float(max(d.memory()[0] - held.get(d.buffer_type.name, 0), 0)) for d in devices
    ]  # fmt: skip
    weights += [0.0] * (len(devices) - len(weights))

    def groups_of(n_bytes: int) -> list[CacheGroup]:
        return plan_cache(layers, n_bytes, n_used=n_used, alignments=alignments, weights=weights)

    forecasts = []
    for i, group in enumerate(groups_of(size_bytes)):
        bound = slots_without_hits(len(group.layers), n_used)
        mib = _least_mib(groups_of, i, bound)
        banks = group.bank_bytes(group.n_slots, alignments[group.device]) if group.n_slots else 0
        counters, upload_s, n_tokens = _forecast(planner, group, eviction, n_used, routing)
        name = devices[group.device].buffer_type.name
        forecasts.append(GroupForecast(group, name, banks, n_tokens, counters, upload_s, bound, mib))
    alignment = placement.cpu.buffer_type.alignment
    cached = [f.group for f in forecasts if f.group.n_slots]
    maps = sum(len(g.layers) * -(-4 * g.n_expert // alignment) * alignment for g in cached)
    return ExpertCachePlan(size_bytes, eviction, n_used, forecasts, maps)


def _host_layers(placement: Placement) -> list[HostLayer]:
    """Return the layers whose experts all lie in host memory, and whose device is a GPU."""
    by_layer: dict[int, dict[str, tuple[bool, ExpertTensor]]] = {}
    for w in placement.weights:
        found = _EXPERTS.fullmatch(w.spec.name)
        if found:
            ne, kind = w.info.ne, w.info.type
            n_bytes = kind.row_size(ne[0]) * ne[1]
            tensor = ExpertTensor(w.spec.name, (kind.ggml_name, *ne), ne[2], n_bytes)
            by_layer.setdefault(int(found[1]), {})[found[2]] = (w.buft.is_host, tensor)
    layers = []
    for i, tensors in sorted(by_layer.items()):
        device = placement.layers[i]
        if device.type in (DeviceType.GPU, DeviceType.IGPU) and all(is_host for is_host, _ in tensors.values()):
            in_order = tuple(tensors[kind][1] for kind in _KINDS if kind in tensors)
            layers.append(HostLayer(i, placement.devices.index(device), in_order))
    return layers


def _least_mib(groups_of: Any, i: int, bound: int) -> int:  # a function of bytes
    """Return the least whole MiB at which a group has more slots than a bound; 0 if it has not so many experts."""
    low, high = 0, 1 << 24

    def is_enough(mib: int) -> bool:
        try:
            return bool(groups_of(mib * _MIB)[i].n_slots > bound)
        except SchedError:
            return False

    if not is_enough(high):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _forecast(
    planner: Planner, group: CacheGroup, eviction: str, n_used: int, routing: Routing
) -> tuple[Counters, float | None, int]:
    """Return counts and the links' time a token of a generation from an empty cache, and of how many tokens."""
    if not group.n_slots:
        return Counters(), None, 0
    sizes = [t.expert_bytes for t in group.experts]
    cache = ExpertCache(EVICTIONS[eviction](group.n_slots, group.n_expert), sizes, n_used=n_used)
    clock = planner.sched.clock
    link = None if clock is None else clock.profiles[group.device].link
    n_lead = planner.hparams.n_layer_dense_lead
    seconds, n_done = 0.0, 0
    for token in range(N_FORECAST):
        try:
            chosen = [sorted(routing.experts(i - n_lead, [token], group.n_expert, n_used)) for i in group.layers]
        except GraphError:  # a recording that ends here
            if not n_done:
                raise
            break
        for layer, ids in zip(group.layers, chosen, strict=True):
            _, transfers = cache.update(layer, ids)
            if link is not None:
                seconds += sum(link.seconds(t.n_experts * n) for t in transfers for n in sizes)
        n_done += 1
    return cache.counters, None if link is None else seconds / n_done, n_done
