"""`MoeCachePolicy`: the copy policy that fills an expert cache, and copies from it for large micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SchedError
from ..sched.policies import CopyPolicy, UsedExpertCopier
from ..tensor import Tensor
from ..types import Op
from .running import MoeCache

if TYPE_CHECKING:
    from ..sched.plan import Plan
    from ..sched.transfer import Feed, Transfer

__all__ = ["MoeCachePolicy"]


class MoeCachePolicy(CopyPolicy):
    """Fills the slots of a cache when a layer's slot map is copied; other inputs are copied by another policy.

    Parameters
    ----------
    cache : MoeCache
    inner : CopyPolicy, optional
        Copies inputs that are not slot maps; by default `UsedExpertCopier`. If it is one, used experts of a weight that
        is copied to its layer's device are copied from the cache if they are in it.

    Notes
    -----
    Mirrors `llama_context::sched_copy_experts` and `llama_moe_cache::copy`. A failed compute empties the cache, because
    it is unknown which uploads were made.
    """

    def __init__(self, cache: MoeCache, inner: CopyPolicy | None = None) -> None:
        self.cache = cache
        self.inner = UsedExpertCopier() if inner is None else inner
        self.repairs = self.inner.repairs
        self._feeds: dict[int, list[tuple[Feed, Tensor]]] = {}
        self._plan: Plan | None = None
        self._last = -1
        self._is_running = False

    def reserve(self, plan: Plan) -> None:
        """Lend the cache's banks to the plan, request the feeds, and check the lookups."""
        if self.inner.overrides("reserve"):
            self.inner.reserve(plan)
        for backend, bank in self.cache.banks:
            plan.lend(backend, bank)
        self._feeds.clear()
        self._last = len(plan.splits) - 1
        for transfers in plan.transfers:
            for transfer in transfers:
                layer = self.cache.layer_of.get(transfer.source)
                if layer is not None:
                    self._check(plan, transfer, layer)
                    pairs = self.cache.experts(layer)
                    self._feeds[layer] = [(plan.feed(w, transfer.backend), bank) for w, bank in pairs]

    def _check(self, plan: Plan, transfer: Transfer, layer: int) -> None:
        """Raise `SchedError` if a lookup's ids are computed in its own split, so that they cannot be read before it."""
        lookup = transfer.node
        if lookup is None or lookup.op is not Op.GET_ROWS or transfer.backend is not self.cache.backend(layer):
            raise SchedError(
                f"the slot map of layer {layer} is read by '{lookup and lookup.name}', which looks up no slots"
            )
        ids = lookup.src[1]
        assert ids is not None
        if any(node is ids or node is ids.view_src for node in plan.splits[transfer.split].graph.nodes):
            raise SchedError(f"the experts of layer {layer} are chosen in the split that looks up their slots")

    def before_split(self, i_split: int) -> None:
        """Before the first split: begin a compute, and clear the cache if the previous compute failed."""
        if i_split == 0:
            if self._is_running:
                self.cache.clear()
            self._is_running = True
            self.cache.begin()
        if self.inner.overrides("before_split"):
            self.inner.before_split(i_split)

    def after_split(self, i_split: int) -> None:
        """After the last split: mark the compute as complete."""
        if self.inner.overrides("after_split"):
            self.inner.after_split(i_split)
        if i_split == self._last:
            self._is_running = False

    def copy(self, transfer: Transfer) -> bool:
        """Upload a layer's experts, then copy its slot map; pass other transfers to the inner policy."""
        layer = self.cache.layer_of.get(transfer.source)
        if layer is not None:
            self._fill(transfer, layer)
            return True
        if transfer.kind == "experts" and isinstance(self.inner, UsedExpertCopier):
            place = self.cache.place_of(transfer.source, transfer.backend)
            if place is not None:
                self._take(transfer, *place)
                return True
        return self.inner.copy(transfer)

    def _fill(self, transfer: Transfer, layer: int) -> None:
        """Upload the layer's missing experts, and send its slot map."""
        lookup = transfer.node
        assert lookup is not None
        ids = lookup.src[1]
        assert ids is not None
        feeds = self._feeds[layer]
        cache = self.cache.cache(layer)
        chosen = transfer.read_ids(ids, feeds[0][0].source, cache.n_used)
        found, uploads = cache.update(layer, chosen)
        self.cache.note(layer, found.slots, found.evicted, found.uploads)
        used = set(found.slots)
        for (feed, bank), size in zip(feeds, cache.expert_bytes, strict=True):
            feed.announce(ids, used)
            for upload in uploads:
                feed.send(upload.expert * size, upload.n_experts * size, into=bank, at=upload.slot * size)
        transfer.note_count(lookup, len(used))
        transfer.send()

    def _take(self, transfer: Transfer, layer: int, i_tensor: int, bank: Tensor) -> None:
        """Copy the used experts of a weight, from the cache if they are in it, else from the host."""
        size = transfer.expert_bytes
        for part in self.cache.cache(layer).partial_copies(layer, transfer.ids(), i_tensor):
            if part.slot is None:
                transfer.send(part.expert * size, part.n_experts * size + part.pad_bytes)
            else:
                transfer.send_from(bank, part.slot * size, part.expert * size, part.n_experts * size)
