"""`MoeCache`: the banks and slot maps of an expert cache, which graphs read instead of weights.

A cached layer multiplies with a bank instead of its weights, and with slots instead of ids. The device looks the slots
up in the layer's slot map, which is copied there after the missing experts. `MoeCachePolicy` makes these copies, a
`SlotTable` decides which experts stay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .. import ops
from ..alloc import Context
from ..backend import Backend
from ..buffer import Buffer, BufferType, tensor_copy, tensor_set
from ..errors import OutOfMemoryError, SchedError
from ..tensor import Tensor
from ..types import BufferUsage, DeviceType, Type
from .budget import CacheGroup, ExpertTensor, HostLayer, plan_cache
from .cache import Counters, ExpertCache
from .policies import EVICTIONS, SlotTable, slots_without_hits
from .sides import ExpertSides, look_up, make_sides

__all__ = ["CacheRule", "LlamaCache", "Misses", "MoeCache"]

#: What happens to experts that the cache lacks: they are copied into it first, or the CPU computes them.
Misses = Literal["copy", "cpu"]

#: Address of the first tensor of each buffer without bytes; no process has memory there.
_NOWHERE = 1 << 60
_MIB = 1024 * 1024


class CacheRule(Protocol):
    """The size of a cache, which layers share slots, and which experts stay."""

    @property
    def name(self) -> str:
        """Name for reports."""

    @property
    def misses(self) -> Misses:
        """``"copy"``, or ``"cpu"``: the CPU computes what is missing while the device computes the rest."""

    def groups(
        self, layers: Sequence[HostLayer], *, n_used: int, alignments: Sequence[int], weights: Sequence[float]
    ) -> list[CacheGroup]:
        """Return the groups of layers that share a bank, with their slots; see `plan_cache`."""

    def table(self, group: CacheGroup) -> SlotTable:
        """Return an empty table for the slots of a group."""


@dataclass(frozen=True, slots=True)
class LlamaCache:
    """llama.cpp's own cache: ``--moe-cache-mib``.

    Attributes
    ----------
    size_bytes : int
        Bytes over all devices.
    eviction : str
        ``"lru"`` (b11549, release 0.7.0) or ``"slru"`` (b11739).
    misses : str
        See `CacheRule.misses`; llama.cpp copies.
    """

    size_bytes: int
    eviction: str = "slru"
    misses: Misses = "copy"

    @property
    def name(self) -> str:
        """Name for reports."""
        return self.eviction

    def groups(
        self, layers: Sequence[HostLayer], *, n_used: int, alignments: Sequence[int], weights: Sequence[float]
    ) -> list[CacheGroup]:
        """Return llama.cpp's groups, with their slots."""
        return plan_cache(layers, self.size_bytes, n_used=n_used, alignments=alignments, weights=weights)

    def table(self, group: CacheGroup) -> SlotTable:
        """Return an empty table for the slots of a group."""
        return EVICTIONS[self.eviction](group.n_slots, group.n_expert)


@dataclass(eq=False, slots=True)
class _Group:
    """A group with its memory."""

    plan: CacheGroup
    backend: Backend
    cache: ExpertCache
    banks: list[Tensor] = field(default_factory=list)  #: one for each expert tensor of a layer
    transient: list[tuple[int, int]] = field(default_factory=list)  #: layer and expert in the transit slots


class MoeCache:
    """Slots in device memory for experts of layers with host weights.

    Parameters
    ----------
    layers : mapping of int to sequence of Tensor
        By layer, its expert weights: gate and up (fused or separate) and down, as far as the layer has them.
    homes : mapping of int to Backend
        The backend that computes each layer.
    backends : sequence of Backend
        The scheduler's backends; the last is a CPU.
    rule : CacheRule
        `LlamaCache`, or a user's own.
    n_used : int
        Most experts that a token uses in any layer.
    weights : mapping of Backend to float, optional
        Relative share of the budget for each device; by default its free memory.
    has_data : bool
        False: banks and slot maps have no memory, for plans.
    vectors : mapping of int to sequence of Tensor, optional
        By layer, biases and scales of its experts; if the CPU computes misses, device and host each have them.

    Attributes
    ----------
    host : Backend or None
        The CPU's backend if it computes what is missing.
    groups : list of CacheGroup
        Groups, including those without slots because the budget is too small; empty if no layer has only host experts.

    Raises
    ------
    SchedError
        No backend is on a GPU, the model has no experts, or no group can hold the experts of one token.
    OutOfMemoryError
        A device has too little memory.

    Notes
    -----
    Mirrors `llama_moe_cache`. The weights must not change while they are cached; call `clear` if they do.
    """

    def __init__(
        self,
        layers: Mapping[int, Sequence[Tensor]],
        homes: Mapping[int, Backend],
        backends: Sequence[Backend],
        rule: CacheRule,
        *,
        n_used: int,
        weights: Mapping[Backend, float] | None = None,
        has_data: bool = True,
        vectors: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> None:
        self.rule, self.n_used, self._has_data = rule, n_used, has_data
        # a library's CPU beside the last backend is a device, too
        taken = DeviceType.GPU, DeviceType.IGPU, DeviceType.CPU
        self._gpus = [b for b in backends[:-1] if b.device.type in taken]
        self._cpu = backends[-1]
        self.host = self._cpu if rule.misses == "cpu" else None
        if not self._gpus:
            raise SchedError(
                "the expert cache needs a GPU", hint="leave out --moe-cache-mib or --expert-cache, or give a device"
            )
        if not any(layers.values()) or not n_used:
            raise SchedError(
                "the expert cache needs a model with experts", hint="leave out --moe-cache-mib or --expert-cache"
            )
        self.groups: list[CacheGroup] = []
        self._held: list[_Group] = []
        self._group_of: dict[int, _Group] = {}
        self._experts: dict[int, Sequence[Tensor]] = {}
        self._banks: dict[Tensor, Tensor] = {}  # weight -> its bank
        self._views: dict[Tensor, Tensor] = {}  # weight -> the view of its bank that graphs read
        self._maps: dict[int, Tensor] = {}
        self._words: dict[int, ctypes.Array[ctypes.c_int32]] = {}  # contents of the slot maps; none in a plan
        self._layer_read: dict[Tensor, int] = {}
        self._missing: dict[int, Tensor] = {}  # what the host computes, and experts by number; with a `host` only
        self._missing_words: dict[int, ctypes.Array[ctypes.c_int32]] = {}
        self._twins: dict[Tensor, Tensor] = {}  # biases and scales -> a copy on the other side
        self.layer_of: dict[Tensor, int] = {}  #: layer of each slot map
        self._buffers: list[Buffer] = []
        self._sizes: dict[BufferType, int] = {}
        self._host_layers = [
            HostLayer(il, self._gpus.index(homes[il]), tuple(map(_about, experts)))
            for il, experts in sorted(layers.items())
            if experts and homes[il] in self._gpus and all(map(_is_host_weight, experts))
        ]
        if not self._host_layers:
            return
        shares = [float(b.device.memory()[0] if weights is None else weights.get(b, 0.0)) for b in self._gpus]
        self._budget = [b.buffer_type.alignment for b in self._gpus], shares
        self.groups = rule.groups(self._host_layers, n_used=n_used, alignments=self._budget[0], weights=shares)
        try:
            self._allocate(layers, vectors or {})
        except BaseException:
            self.close()
            raise

    # -- memory --------------------------------------------------------------

    def _allocate(self, layers: Mapping[int, Sequence[Tensor]], vectors: Mapping[int, Sequence[Tensor]]) -> None:
        of_device: dict[Backend, list[Tensor]] = {}
        maps: list[Tensor] = []
        for i, plan in enumerate(self.groups):
            if not plan.n_slots:
                continue
            cache = self._new_cache(plan, Counters())
            group = _Group(plan, self._gpus[plan.device], cache)
            self._held.append(group)
            n = plan.n_slots + (1 if self.host is not None else cache.policy.n_transit)  # 1: `other_slot`
            for weight in layers[plan.layers[0]]:
                bank = Tensor(weight.type, (*weight.ne[:2], n + 1), name=f"moe_cache.{i}.{weight.name}")
                group.banks.append(bank)
                of_device.setdefault(group.backend, []).append(bank)
            for il in plan.layers:
                self._group_of[il] = group
                self._experts[il] = layers[il]
                self._banks.update(zip(layers[il], group.banks, strict=True))
                n_words = 1 if self.host is None else 2  # slot, and whose row is right
                made = Tensor(Type.I32, (n_words, plan.n_expert), name=f"moe_cache.slot_map-{il}")
                self._maps[il] = made
                self.layer_of[made] = il
                maps.append(made)
                if self.host is None:
                    continue
                self._missing[il] = Tensor(Type.I32, (2, plan.n_expert), name=f"moe_cache.missing-{il}")
                maps.append(self._missing[il])
                for vector in vectors.get(il, ()):
                    twin = self._twins[vector] = Tensor(vector.type, vector.ne, name=f"moe_cache.{vector.name}")
                    of_device.setdefault(group.backend if _is_on_host(vector) else self._cpu, []).append(twin)
        for backend, banks in of_device.items():
            self._place(banks, backend, 0)
        for weight, bank in self._banks.items():
            view = ops.view_3d(bank, *bank.ne[:2], bank.ne[2] - 1, bank.nb[1], bank.nb[2], 0)
            view.name = f"moe_cache.{weight.name}"
            view.buffer, view.data = bank.buffer, bank.data
            self._views[weight] = view
        self._layer_read = {t: il for il, ws in self._experts.items() for w in ws for t in (w, self._views[w])}
        if maps:
            self._place(maps, self._cpu, 0xFF)
        if self._has_data and self._cpu.device.has_data:
            for il, made in self._maps.items():
                self._words[il] = (ctypes.c_int32 * made.numel)(*[-1] * made.numel)
            for il, made in self._missing.items():
                self._missing_words[il] = (ctypes.c_int32 * made.numel)(
                    *(n for e in range(made.ne[1]) for n in (-1, e))
                )
            for vector, twin in self._twins.items():
                tensor_copy(vector, twin)

    def _place(self, tensors: list[Tensor], backend: Backend, value: int) -> None:
        """Allocate tensors and set all their bytes; in a plan, give them addresses that no process uses."""
        buft = backend.buffer_type
        size = sum(_padded(t, buft) for t in tensors)
        self._sizes[buft] = self._sizes.get(buft, 0) + size
        if not self._has_data and backend.device.has_data:
            buffer, at = buft.alloc_buffer(0), _NOWHERE
            for tensor in tensors:
                tensor.buffer, tensor.data = buffer, at
                at += _padded(tensor, buft)
        else:
            context = Context()
            context.tensors = tensors
            try:
                made = context.alloc(backend, usage=BufferUsage.WEIGHTS)
            except OutOfMemoryError as error:
                raise OutOfMemoryError(
                    error.buft, error.requested_bytes, error.available_bytes, "the expert cache",
                    hint="a smaller cache, or fewer layers on the device (-ngl)",
                ) from error  # fmt: skip
            assert made is not None
            buffer = made
            buffer.clear(value)
        buffer.set_usage(BufferUsage.WEIGHTS)
        self._buffers.append(buffer)

    def sizes(self) -> dict[BufferType, int]:
        """Return the bytes of banks and slot maps by buffer type, in a plan those that they would need."""
        return dict(self._sizes)

    def close(self) -> None:
        """Free the memory."""
        self._words.clear()
        self._missing_words.clear()
        for tensor in (
            *self._banks.values(), *self._views.values(), *self._maps.values(), *self._missing.values(), *self._twins.values()
        ):  # fmt: skip
            tensor.buffer = tensor.data = None
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()
        self._held.clear()

    def _new_cache(self, plan: CacheGroup, counters: Counters) -> ExpertCache:
        sizes = [t.expert_bytes for t in plan.experts]
        return ExpertCache(self.rule.table(plan), sizes, n_used=self.n_used, counters=counters)

    def clear(self, *, counters: bool = False) -> None:
        """Empty the slots; ``counters=True`` also resets the counters."""
        for group in self._held:
            group.cache = self._new_cache(group.plan, Counters() if counters else group.cache.counters)
            group.transient.clear()
        for il, words in self._words.items():
            ctypes.memset(words, 0xFF, ctypes.sizeof(words))
            self._write(il)

    # -- for graphs ----------------------------------------------------------

    def slots(self, layer: int, ids: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Make the nodes that turn a layer's ids into slots; return None if the layer reads its weights.

        Parameters
        ----------
        ids : Tensor
            i32, [n_used, n_token]
        weights : sequence of Tensor
            The weights of the layer's products.

        Returns
        -------
        Tensor, Tensor
            The slots to use as ids: i32, [n_used, n_token]; and the node that looks them up, which must be pinned to
            the layer's device.

        Notes
        -----
        Mirrors `llm_graph_context::build_moe_cache_slots`.
        """
        group = self._group_of.get(layer)
        if group is None or not all(w in self._banks for w in weights):
            return None
        n_used, n_token = ids.ne[:2]
        if not group.cache.serves(n_token, n_used):
            return None
        found = look_up(self._maps[layer], ids, f"ffn_moe_slots-{layer}")
        if not group.backend.device.supports_op(found):
            return None
        return ops.reshape_2d(found, n_used, n_token), found

    def sides(self, layer: int, ids: Tensor, weights: Sequence[Tensor]) -> ExpertSides | None:
        """Make the nodes that tell device and host what each computes; return None if the layer reads its weights.

        Parameters
        ----------
        ids, weights
            As of `slots`.
        """
        group = self._group_of.get(layer)
        n_used, n_token = ids.ne[:2]
        if group is None or not all(w in self._banks for w in weights) or not group.cache.serves(n_token, n_used):
            return None
        made = make_sides(layer, ids, self._maps[layer], self._missing[layer])
        return made if all(map(group.backend.device.supports_op, made.on_device)) else None

    def beside(self, tensor: Tensor, backend: Backend) -> Tensor:
        """Return biases or scales of experts in memory that a backend reads: themselves or their copy there."""
        is_there = _is_on_host(tensor) == (backend is self._cpu)
        return tensor if is_there else self._twins.get(tensor, tensor)

    def bank(self, weight: Tensor) -> Tensor:
        """Return the tensor that a product reads instead of a weight: a view of its bank without the spare slot."""
        return self._views[weight]

    def slot_map(self, layer: int) -> Tensor | None:
        """Return the slot map of a layer; None if the layer is not cached."""
        return self._maps.get(layer)

    def backend(self, layer: int) -> Backend:
        """Return the backend that computes a cached layer."""
        return self._group_of[layer].backend

    # -- for the policy ------------------------------------------------------

    @property
    def banks(self) -> list[tuple[Backend, Tensor]]:
        """All banks, with their devices."""
        return [(group.backend, bank) for group in self._held for bank in group.banks]

    def experts(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return the expert weights of a cached layer with their banks."""
        return [(w, self._banks[w]) for w in self._experts[layer]]

    def cache(self, layer: int) -> ExpertCache:
        """Return the slots of a cached layer's group."""
        return self._group_of[layer].cache

    def layer_read(self, weight: Tensor) -> int | None:
        """Return the layer of a weight, or of the view of a bank that its products read instead; None of another tensor."""
        return self._layer_read.get(weight)

    def place_of(self, weight: Tensor, backend: Backend) -> tuple[int, int, Tensor] | None:
        """Return layer, index among the layer's tensors, and bank of a weight cached on ``backend``, or None."""
        bank = self._banks.get(weight)
        if bank is None:
            return None
        layer = next(il for il, experts in self._experts.items() if weight in experts)
        if self._group_of[layer].backend is not backend:
            return None
        return layer, list(self._experts[layer]).index(weight), bank

    def begin(self) -> None:
        """Begin a compute."""
        for group in self._held:
            group.cache.policy.begin()

    def note(
        self,
        layer: int,
        slots: Mapping[int, int],
        evicted: Sequence[tuple[int, int]],
        uploads: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Update the slot maps with a layer's slots and with the evicted experts."""
        group = self._group_of[layer]
        if not self._words:
            return
        for il, expert in (*evicted, *group.transient):
            self._words[il][expert] = -1
        words = self._words[layer]
        for expert, slot in (*slots.items(), *uploads):
            words[expert] = slot
        for il in {layer, *(il for il, _ in evicted), *(il for il, _ in group.transient)}:
            self._write(il)
        n = group.plan.n_slots
        group.transient = [(layer, expert) for expert, slot in slots.items() if slot >= n]

    def other_slot(self, layer: int) -> int:
        """Return the slot that the device reads for experts that it lacks: zeros, in no pool.

        A product with more rows may sum in another order, so it must not be the slot of an expert that is used.
        """
        return self._group_of[layer].plan.n_slots

    def note_sides(self, layer: int, chosen: Iterable[int], there: Mapping[int, int]) -> None:
        """Update the maps of a layer: the slots of experts that the device computes; the host computes the other chosen ones."""
        if not self._words:
            return
        words, missing = self._words[layer], self._missing_words[layer]
        other = self.other_slot(layer)
        for expert in chosen:
            slot = there.get(expert)
            words[2 * expert], words[2 * expert + 1] = (other, 1) if slot is None else (slot, 0)
            missing[2 * expert] = expert if slot is None else -1
        self._write(layer)

    def _write(self, layer: int) -> None:
        """Write a layer's maps; no device may be reading them."""
        for tensors, words in ((self._maps, self._words), (self._missing, self._missing_words)):
            if layer in words:
                tensor_set(tensors[layer], ctypes.addressof(words[layer]), 0, tensors[layer].nbytes)

    def advance(self, ids: Callable[[int, int, int], Sequence[int]]) -> None:
        """Give slots to what a step chooses, in every cached layer, without a copy: of a plan that does not carry it out.

        Parameters
        ----------
        ids : callable
            Returns the ids of a layer, given its number, that of its experts and of those that a token uses.
        """
        self.begin()
        for il, group in sorted(self._group_of.items()):
            group.cache.update(il, ids(il, group.plan.n_expert, self.n_used))

    # -- for reports ---------------------------------------------------------

    def hopeless_up_to(self, group: CacheGroup) -> int:
        """Return the largest number of slots with which one token per step has no hit, by llama.cpp's rules."""
        return slots_without_hits(len(group.layers), self.n_used)

    def mib_for_hits(self, group: CacheGroup) -> int:
        """Return the smallest size of llama.cpp's cache, in MiB, with which a group has hits; 0 if there is none."""
        i, bound = self.groups.index(group), self.hopeless_up_to(group)

        def is_enough(mib: int) -> bool:
            try:
                alignments, weights = self._budget
                found = plan_cache(
                    self._host_layers, mib * _MIB, n_used=self.n_used, alignments=alignments, weights=weights
                )
            except SchedError:
                return False
            return found[i].n_slots > bound

        return _least(is_enough, 1 << 24)

    def warnings(self) -> list[str]:
        """Return warnings for the user; llama.cpp prints the first two, too."""
        if not self.groups:
            return ["no layer has all of its experts in host memory: the expert cache is off"]
        told = []
        for group in self.groups:
            n, name = len(group.layers), self._gpus[group.device].buffer_type.name
            bound = self.hopeless_up_to(group)
            if not group.n_slots:
                told.append(f"the expert cache is too small for {n} layers on {name}: they are not cached")
            elif isinstance(self.rule, LlamaCache) and group.n_slots <= bound:
                mib = self.mib_for_hits(group)
                hint = f"hits begin at --moe-cache-mib {mib}" if mib else "no size is enough"
                told.append(
                    f"{group.n_slots} slots for {n} layers on {name} never hit (0 %) with one token a step: up to (layers - 1) * used "
                    f"= {n - 1} * {self.n_used} = {bound} slots each expert is gone before its layer's next turn; {hint}. With u distinct "
                    f"experts a layer and step it is {n - 1} * u"
                )
        return told

    @property
    def counters(self) -> Counters:
        """Counters over all groups."""
        return Counters.sum(group.cache.counters for group in self._held)

    def as_dict(self) -> dict[str, Any]:
        """Return groups, memory and counters for JSON."""
        held = {id(group.plan): group for group in self._held}
        groups = []
        for plan in self.groups:
            group = held.get(id(plan))
            backend = self._gpus[plan.device]
            counters = Counters() if group is None else group.cache.counters
            groups.append({
                "device": backend.buffer_type.name, "layers": plan.layers, "type": self._type(plan), "n_slots": plan.n_slots,
                "n_transit": plan.n_transit, "share": plan.share, "bank_bytes": self._bank_bytes(group),
                "host_bytes": plan.host_bytes, **counters.as_dict(), "never_hits_up_to_slots": self.hopeless_up_to(plan),
                "hits_from_mib": self.mib_for_hits(plan) or None,
            })  # fmt: skip
        return {
            "rule": self.rule.name, "misses_on": self.rule.misses, "n_used": self.n_used, "map_bytes": self._map_bytes(), **self.counters.as_dict(),
            "groups": groups, "warnings": self.warnings(),
        }  # fmt: skip

    def _bank_bytes(self, group: _Group | None) -> int:
        if group is None:
            return 0
        return sum(_padded(bank, group.backend.buffer_type) for bank in group.banks)

    def _map_bytes(self) -> int:
        return sum(_padded(t, self._cpu.buffer_type) for t in (*self._maps.values(), *self._missing.values()))

    def start_lines(self) -> list[str]:
        """Return the lines about the cache that llama.cpp logs when it makes a context."""
        lines = []
        for i, backend in enumerate(self._gpus):
            own = [group for group in self.groups if group.device == i]
            if not own:
                continue
            size = self._sizes.get(backend.buffer_type, 0)
            host = sum(group.host_bytes for group in own)
            lines.append(
                f"{backend.buffer_type.name:>10} MoE cache size = {size / _MIB:8.2f} MiB for {host / _MIB:.2f} MiB of host experts"
            )
            lines += [
                f"{len(g.layers):2} layers, {self._type(g)}: {g.n_slots:5} slots ({100 * g.share:.1f}%)" for g in own
            ]
        return [f"llama_moe_cache: {line}" for line in lines]

    def _type(self, group: CacheGroup) -> str:
        return str(group.experts[-1].layout[0])


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.storage is not None and tensor.storage.is_host


def _padded(tensor: Tensor, buft: BufferType) -> int:
    """Return the bytes of a tensor in a buffer, with alignment."""
    return -(-buft.alloc_size(tensor) // buft.alignment) * buft.alignment


def _least(is_enough: Callable[[int], bool], most: int) -> int:
    """Return the smallest number that is enough; 0 if ``most`` is not."""
    low, high = 0, most
    if not is_enough(high):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _about(weight: Tensor) -> ExpertTensor:
    return ExpertTensor(weight.name, (weight.type.ggml_name, *weight.ne), weight.ne[2], weight.nb[2])


def _is_host_weight(weight: Tensor) -> bool:
    buffer = weight.storage
    return buffer is not None and buffer.usage is BufferUsage.WEIGHTS and buffer.is_host
