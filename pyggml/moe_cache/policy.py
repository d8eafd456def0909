"""`MoeCachePolicy`: the copy policy that fills an expert cache, and copies from it for large micro-batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import SchedError
from ..opset import expert_sources, uses_experts
from ..sched.policies import CopyPolicy, UsedExpertCopier
from ..sched.prefetch import ExpertPrefetch, Guess, PrefetchedExperts
from ..sched.resources import CopyQueue
from ..tensor import Tensor
from ..types import Op
from .running import MoeCache

if TYPE_CHECKING:
    from ..sched.plan import Plan
    from ..sched.transfer import Feed, Transfer
    from .cache import Transfer as Uploads

__all__ = ["MoeCachePolicy", "prefetch_of"]


class MoeCachePolicy(CopyPolicy):
    """Fills the slots of a cache when a layer's slot map is copied; other inputs are copied by another policy.

    Parameters
    ----------
    cache : MoeCache
    inner : CopyPolicy, optional
        Copies inputs that are not slot maps; by default `UsedExpertCopier`. If it is one, used experts of a weight that
        is copied to its layer's device are copied from the cache if they are in it. With `PrefetchedExperts`, misses of
        the next cached layer are guessed and sent ahead; what the cache holds and evicts does not change.

    Raises
    ------
    SchedError
        The cache leaves misses to the CPU, and they are to be sent ahead, too.

    Notes
    -----
    Mirrors `llama_context::sched_copy_experts` and `llama_moe_cache::copy`. A failed compute empties the cache, because
    it is unknown which uploads were made.

    Differs: upstream always uploads what is missing first. If the CPU computes it (`CacheRule.misses`), the rows that it
    needs are read before the device gets the layer's products, so that the CPU does not wait for them; experts that the
    cache admits are uploaded on a queue meanwhile, and used from the next step on.
    """

    def __init__(self, cache: MoeCache, inner: CopyPolicy | None = None) -> None:
        self.cache = cache
        self.inner = UsedExpertCopier() if inner is None else inner
        self.repairs = self.inner.repairs
        self._feeds: dict[int, list[tuple[Feed, Tensor]]] = {}
        self._plan: Plan | None = None
        self._last = -1
        self._is_running = False
        self.prefetch = self.inner.prefetch if isinstance(self.inner, PrefetchedExperts) else None
        if cache.host is not None and self.prefetch is not None:
            raise SchedError(
                "misses are computed on the CPU, so no expert is awaited that could be sent ahead",
                hint="choose one: --moe-cache-misses cpu, or --expert-copy prefetch",
            )
        self._sides: dict[int, _Sides] = {}  # by layer, with a host that computes misses
        self._early: list[Tensor] = []  # host memory, the same for each layer
        self._fetched: dict[Transfer, Tensor] = {}  # what was read before its transfer is offered
        self._queues: dict[int, CopyQueue] = {}
        self._ahead: dict[int, _Ahead] = {}  # by backend
        self._guess: tuple[tuple[int, int], Guess] | None = None  # the latest, and the layer that it is for

    def reserve(self, plan: Plan) -> None:
        """Lend the cache's banks to the plan, request the feeds, and check the lookups."""
        if self.inner.overrides("reserve"):
            self.inner.reserve(plan)
        for backend, bank in self.cache.banks:
            plan.lend(backend, bank)
        self._fetched.clear()
        self._feeds.clear()
        self._last = len(plan.splits) - 1
        for transfers in plan.transfers:
            for transfer in transfers:
                layer = self.cache.layer_of.get(transfer.source)
                if layer is not None:
                    self._check(plan, transfer, layer)
                    pairs = self.cache.experts(layer)
                    self._feeds[layer] = [(plan.feed(w, transfer.backend), bank) for w, bank in pairs]
        if self.cache.host is not None:
            self._reserve_sides(plan)
        if self.prefetch is not None and self._feeds:
            self._reserve_ahead(plan, self.prefetch)

    def _reserve_sides(self, plan: Plan) -> None:
        """Find what the products of host and device read; ask for queues, and for memory of what the host's products read."""
        self._sides = {layer: _Sides() for layer in self._feeds}
        for i, split in enumerate(plan.splits):
            for node in split.graph.nodes:
                if uses_experts(node.op) is None:
                    continue
                weight, ids = expert_sources(node)
                layer = self.cache.layer_read(weight)
                if layer is None or layer not in self._sides:
                    continue
                sides = self._sides[layer]
                if split.backend_id == plan.machine.cpu:
                    sides.host_ids, sides.host_split = ids.view_src or ids, i
                else:
                    sides.device_ids = ids.view_src or ids
        sizes: dict[int, int] = {}
        for layer, sides in self._sides.items():
            feed = self._feeds[layer][0][0]
            self._queues.setdefault(feed.backend_id, plan.queue(feed.backend))
            self._feeds[layer] = [(feed, self.cache.bank(feed.source)) for feed, _ in self._feeds[layer]]
            for feed, view in self._feeds[layer]:
                plan.lend(feed.backend, view, has_queues=True)
            first = next(
                i for i, ts in enumerate(plan.transfers) if any(self.cache.layer_of.get(t.source) == layer for t in ts)
            )
            made = {node for split in plan.splits[first : sides.host_split] for node in split.graph.nodes}
            for transfer in plan.transfers[sides.host_split]:
                root = transfer.source.view_src or transfer.source
                if transfer.kind == "activation" and root not in made:
                    sizes[len(sides.early)] = max(sizes.get(len(sides.early), 0), transfer.source.nbytes)
                    sides.early.append(transfer)
        self._early = [plan.memory(plan.backends[-1], n, f"what misses read {j}") for j, n in sorted(sizes.items())]

    def _reserve_ahead(self, plan: Plan, prefetch: ExpertPrefetch) -> None:
        """Ask for a queue and memory of as many experts as are guessed, on each device."""
        layers = sorted(self._feeds)
        prefetch.predictor.begin(layers, self._feeds[layers[0]][0][0].n_expert)
        n, sizes = prefetch.n_guess or self.cache.n_used, dict[int, int]()
        backends = {self._feeds[il][0][0].backend_id: self._feeds[il][0][0].backend for il in layers}
        for il in layers:
            b = self._feeds[il][0][0].backend_id
            sizes[b] = max(sizes.get(b, 0), sum(self.cache.cache(il).expert_bytes))
        made = {
            b: _Ahead(plan.queue(backend), [plan.memory(backend, sizes[b], f"prefetched expert {i}") for i in range(n)])
            for b, backend in backends.items()
        }
        if {b: a.memory for b, a in made.items()} != {b: a.memory for b, a in self._ahead.items()}:
            self._guess = None
        self._ahead = made

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
                self._guess = None
            self._is_running = True
            self._fetched.clear()
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
            (self._fill if self.cache.host is None else self._fill_one_side)(transfer, layer)
            return True
        fetched = self._fetched.pop(transfer, None)
        if fetched is not None:
            transfer.send_from(fetched, 0, 0, transfer.source.nbytes)
            return True
        if transfer.kind == "experts" and isinstance(self.inner, UsedExpertCopier):
            place = self.cache.place_of(transfer.source, transfer.backend)
            if place is not None:
                place = place if self.cache.host is None else (*place[:2], self.cache.bank(transfer.source))
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
        ahead = {} if self.prefetch is None else self._judge(layer, chosen, self.prefetch)
        found, uploads = cache.update(layer, chosen)
        self.cache.note(layer, found.slots, found.evicted, found.uploads)
        used = set(found.slots)
        at = 0
        for (feed, bank), size in zip(feeds, cache.expert_bytes, strict=True):
            feed.announce(ids, used)
            for upload in _cut(uploads, ahead):
                memory = ahead.get(upload.expert)
                if memory is None:
                    feed.send(upload.expert * size, upload.n_experts * size, into=bank, at=upload.slot * size)
                else:
                    feed.send_within(memory, at, size, into=bank, to=upload.slot * size)
            at += size
        transfer.note_count(lookup, len(used))
        transfer.send()
        if self.prefetch is not None:
            self._send_ahead(layer, self.prefetch)

    def _fill_one_side(self, transfer: Transfer, layer: int) -> None:
        """Tell device and host what each computes, read what the host needs, and upload what the cache admits on a queue."""
        lookup = transfer.node
        assert lookup is not None
        ids = lookup.src[1]
        assert ids is not None
        feeds, cache, sides = self._feeds[layer], self.cache.cache(layer), self._sides[layer]
        chosen = transfer.read_ids(ids, feeds[0][0].source, cache.n_used)
        found, uploads = cache.update(layer, chosen, only_kept=True)
        coming = {upload.expert for upload in found.uploads}
        there = {expert: slot for expert, slot in found.slots.items() if expert not in coming}
        self.cache.note_sides(layer, found.slots, there)
        for early, memory in zip(sides.early, self._early, strict=False):
            early.fetch(memory)
            self._fetched[early] = memory
        read = {*there.values(), *([self.cache.other_slot(layer)] if len(there) < len(found.slots) else ())}
        for (feed, view), size in zip(feeds, cache.expert_bytes, strict=True):
            feed.await_sent(view, [(slot * size, size) for slot in read])
            feed.announce(ids, {*there, *(e for u in uploads for e in range(u.expert, u.expert + u.n_experts))})
        for named, n in ((sides.device_ids, len(read)), (sides.host_ids, len(found.slots) - len(there))):
            assert named is not None
            transfer.note_count(named, n)
        transfer.send()
        queue = self._queues[transfer.backend_id]
        for (feed, view), size in zip(feeds, cache.expert_bytes, strict=True):
            for upload in uploads:
                feed.send(upload.expert * size, upload.n_experts * size, into=view, at=upload.slot * size, queue=queue)

    def _judge(self, layer: int, chosen: Sequence[int], prefetch: ExpertPrefetch) -> dict[int, Tensor]:
        """Judge the guess of a layer whose ids are known, and return where its experts are that were sent ahead."""
        cache, feed = self.cache.cache(layer), self._feeds[layer][0][0]
        found, self._guess = self._guess, None
        guess = Guess([]) if found is None or found[0] != (prefetch.n_clears, layer) else found[1]
        prefetch.judge(
            guess, set(chosen), lambda e: cache.policy.slot_of(layer, e) is not None, sum(cache.expert_bytes), feed.virtual_s()
        )  # fmt: skip
        prefetch.predictor.saw(layer, list(dict.fromkeys(chosen)))
        return dict(zip(guess.sent, self._ahead[feed.backend_id].memory, strict=False))

    def _send_ahead(self, layer: int, prefetch: ExpertPrefetch) -> None:
        """Send what the next cached layer is expected to use and does not hold; the first layer comes after the last one."""
        layers = sorted(self._feeds)
        after = layers[(layers.index(layer) + 1) % len(layers)]
        feeds, cache = self._feeds[after], self.cache.cache(after)
        ahead = self._ahead[feeds[0][0].backend_id]
        guess = Guess(prefetch.predictor.best(after, len(ahead.memory)))
        absent = [e for e in guess.experts if cache.policy.slot_of(after, e) is None]
        for expert, memory in zip(absent, ahead.memory, strict=False):
            at = 0
            for (feed, _), size in zip(feeds, cache.expert_bytes, strict=True):
                feed.send(expert * size, size, into=memory, at=at, queue=ahead.queue)
                at += size
            guess.sent[expert] = feeds[0][0].arrives_s(memory)
        self._guess = (prefetch.n_clears, after), guess

    def _take(self, transfer: Transfer, layer: int, i_tensor: int, bank: Tensor) -> None:
        """Copy the used experts of a weight, from the cache if they are in it, else from the host."""
        size = transfer.expert_bytes
        for part in self.cache.cache(layer).partial_copies(layer, transfer.ids(), i_tensor):
            if part.slot is None:
                transfer.send(part.expert * size, part.n_experts * size + part.pad_bytes)
            else:
                transfer.send_from(bank, part.slot * size, part.expert * size, part.n_experts * size)


def prefetch_of(policy: CopyPolicy) -> ExpertPrefetch | None:
    """Return the prefetch of a copy policy, if it has one."""
    return policy.prefetch if isinstance(policy, MoeCachePolicy | PrefetchedExperts) else None


@dataclass(slots=True)
class _Sides:
    """What the products of a layer read, on its device and on the host.

    Attributes
    ----------
    device_ids, host_ids : Tensor
        The roots of their ids.
    host_split : int
        The split that has the host's.
    early : list of Transfer
        What that split reads of the device, which can be fetched before the device gets its products.
    """

    device_ids: Tensor | None = None
    host_ids: Tensor | None = None
    host_split: int = 0
    early: list[Transfer] = field(default_factory=list)


@dataclass(slots=True)
class _Ahead:
    """A device's queue, and memory for the experts of one guess."""

    queue: CopyQueue
    memory: list[Tensor]


def _cut(uploads: Sequence[Uploads], ahead: Collection[int]) -> list[Uploads]:
    """Return uploads of which those that were sent ahead are single."""
    made: list[Uploads] = []
    for upload in uploads:
        joined = False
        for i in range(upload.n_experts):
            expert = upload.expert + i
            if joined and expert not in ahead:
                made[-1] = made[-1]._replace(n_experts=made[-1].n_experts + 1)
            else:
                made.append(upload._replace(expert=expert, slot=upload.slot + i, n_experts=1))
            joined = expert not in ahead
    return made
