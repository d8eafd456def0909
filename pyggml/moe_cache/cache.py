"""`ExpertCache`: what is copied to and from the slots of one group, with counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..sched.experts import EXPERT_PAD_BYTES
from .policies import Lookup, SlotTable, Upload

__all__ = ["MAX_CACHED_TOKENS", "Counters", "ExpertCache", "PartialCopy", "Transfer", "merge_uploads"]

#: Larger micro-batches bypass the cache: they use most experts, and would evict those of generation
#: (`llama_moe_cache::impl::max_batch`).
MAX_CACHED_TOKENS = 32
#: Most tokens of a lookup that is counted as small (`llama_moe_cache::impl::stats_small`).
SMALL_TOKENS = 8
_MIB = 1024 * 1024


class Transfer(NamedTuple):
    """Adjacent experts that go to adjacent slots: one copy for each tensor of the layer."""

    expert: int
    slot: int
    n_experts: int


class PartialCopy(NamedTuple):
    """A part of the copy of a whole weight, for a micro-batch that bypasses the cache.

    Attributes
    ----------
    expert, n_experts : int
        The first expert, and how many; 0: only padding.
    slot : int or None
        The slot to copy from, within the device; None: the host.
    pad_bytes : int
        Bytes of the next expert that are also sent from the host.
    """

    expert: int
    n_experts: int
    slot: int | None
    pad_bytes: int = 0


@dataclass(slots=True)
class _Count:
    hits: int = 0
    misses: int = 0
    n_bytes: int = 0

    def line(self, name: str) -> str:
        total = self.hits + self.misses
        return (
            f"{name}: hits = {self.hits}, misses = {self.misses}, hit rate = {100 * self.hits / total:.2f}%, "
            f"uploaded = {self.n_bytes / _MIB:.2f} MiB"
        )


@dataclass(slots=True)
class Counters:
    """Counts of a cache, in one group or in all.

    Attributes
    ----------
    small, large
        Hits, misses and uploaded bytes of micro-batches of at most 8 tokens, and of more.
    copied : int
        Experts that micro-batches which bypass the cache copied from it.
    copied_bytes : int
    """

    small: _Count = field(default_factory=_Count)
    large: _Count = field(default_factory=_Count)
    copied: int = 0
    copied_bytes: int = 0

    @property
    def hits(self) -> int:
        """Number of lookups of an expert that found it."""
        return self.small.hits + self.large.hits

    @property
    def misses(self) -> int:
        """Number of lookups of an expert after which it was uploaded."""
        return self.small.misses + self.large.misses

    @property
    def uploaded_bytes(self) -> int:
        """Bytes copied into slots."""
        return self.small.n_bytes + self.large.n_bytes

    @property
    def hit_rate(self) -> float | None:
        """Hits divided by hits and misses; None without lookups."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    @classmethod
    def sum(cls, parts: Iterable[Counters]) -> Counters:
        """Return the sum of several counters."""
        total = cls()
        for part in parts:
            for own, more in ((total.small, part.small), (total.large, part.large)):
                own.hits, own.misses, own.n_bytes = (
                    own.hits + more.hits,
                    own.misses + more.misses,
                    own.n_bytes + more.n_bytes,
                )
            total.copied += part.copied
            total.copied_bytes += part.copied_bytes
        return total

    def as_dict(self) -> dict[str, int | float | None]:
        """Return the counts for JSON."""
        return {
            "hits": self.hits, "misses": self.misses, "hit_rate": self.hit_rate, "uploaded_bytes": self.uploaded_bytes,
            "copied_experts": self.copied, "copied_bytes": self.copied_bytes,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Return the lines that llama.cpp prints when it frees the cache, without those whose counts are 0."""
        named = (("ubatch <= 8", self.small), ("ubatch  > 8", self.large))
        lines = [count.line(name) for name, count in named if count.hits + count.misses]
        if self.copied:
            lines.append(
                f"large batches: {self.copied} experts copied from the cache, {self.copied_bytes / _MIB:.2f} MiB"
            )
        return [f"llama_moe_cache: {line}" for line in lines]


class ExpertCache:
    """The slots of one group of layers, without their bytes.

    Parameters
    ----------
    policy : SlotTable
        Decides which experts stay.
    expert_bytes : sequence of int
        Bytes of one expert in each of a layer's tensors.
    n_used : int
        Most experts that a token uses in any layer of the model.
    counters : Counters, optional
        Shared by the groups of a model.
    """

    def __init__(
        self,
        policy: SlotTable,
        expert_bytes: Sequence[int],
        *,
        n_used: int,
        counters: Counters | None = None,
    ) -> None:
        self.policy = policy
        self.expert_bytes = tuple(expert_bytes)
        self.n_used = n_used
        self.counters = Counters() if counters is None else counters

    def serves(self, n_tokens: int, n_used: int) -> bool:
        """Return whether a layer reads its experts from the slots, for a micro-batch of ``n_tokens``.

        Notes
        -----
        Mirrors `llama_moe_cache::get_slot_map`.
        """
        policy = self.policy
        return 0 < n_tokens <= MAX_CACHED_TOKENS and min(n_tokens * n_used, policy.n_expert) <= policy.most

    def update(self, layer: int, ids: Sequence[int], *, only_kept: bool = False) -> tuple[Lookup, list[Transfer]]:
        """Give slots to the experts that a layer chose.

        Parameters
        ----------
        ids : sequence of int32
            All ids of the layer, with repeats: small and large micro-batches are counted separately by their number.
        only_kept : bool
            Upload no experts that the policy does not keep.

        Returns
        -------
        Lookup
            The slots of the experts.
        list of Transfer
            The uploads to make, in order.

        Notes
        -----
        Mirrors the part of `llama_moe_cache::copy` for a slot map.
        """
        found = self.policy.lookup(layer, ids)
        count = self.counters.small if len(ids) <= SMALL_TOKENS * self.n_used else self.counters.large
        count.hits += len(found.hits)
        count.misses += len(found.misses)
        uploads = [u for u in found.uploads if u.slot < self.policy.n_slots] if only_kept else found.uploads
        count.n_bytes += len(uploads) * sum(self.expert_bytes)
        return found, merge_uploads(uploads)

    def partial_copies(self, layer: int, used: Iterable[int], i_tensor: int) -> list[PartialCopy]:
        """Return the copies of a weight's used experts to its input copy, for a micro-batch that bypasses the cache.

        Experts in the cache are copied within the device and counted, the others from the host; slots do not change.

        Notes
        -----
        Mirrors `llama_context::sched_copy_experts` with a cache, and `llama_moe_cache::copy_experts`: a run of used
        experts is divided at cached ones. The last part sends padding, even if no expert is left in it.
        """
        n_expert = self.policy.n_expert
        pad = min(self.expert_bytes[i_tensor], EXPERT_PAD_BYTES)
        wanted = set(used)
        parts: list[PartialCopy] = []
        first = 0
        while first < n_expert:
            if first not in wanted:
                first += 1
                continue
            end = first
            while end < n_expert and end in wanted:
                end += 1
            start = at = first
            while at < end:
                slot = self.policy.slot_of(layer, at)
                if slot is None:
                    at += 1
                    continue
                n = 1
                while at + n < end and self.policy.slot_of(layer, at + n) == slot + n:
                    n += 1
                parts.append(PartialCopy(at, n, slot))
                if start < at:  # upstream sends the experts before it afterwards
                    parts.append(PartialCopy(start, at - start, None))
                self.counters.copied += n
                self.counters.copied_bytes += n * self.expert_bytes[i_tensor]
                at += n
                start = at
            tail = pad if end < n_expert else 0
            if end > start or tail:
                parts.append(PartialCopy(start, end - start, None, tail))
            first = end
        return parts


def merge_uploads(uploads: Sequence[Upload]) -> list[Transfer]:
    """Merge uploads with adjacent experts and slots."""
    merged: list[Transfer] = []
    for expert, slot in uploads:
        if merged:
            last = merged[-1]
            if (expert, slot) == (last.expert + last.n_experts, last.slot + last.n_experts):
                merged[-1] = last._replace(n_experts=last.n_experts + 1)
                continue
        merged.append(Transfer(expert, slot, 1))
    return merged
