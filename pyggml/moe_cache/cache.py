"""`ExpertCache`: what is copied to the slots of one group, and from them, and what is counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..sched.experts import EXPERT_PAD_BYTES
from .policies import Lookup, SlotTable, Upload

__all__ = ["MAX_CACHED_TOKENS", "Counters", "ExpertCache", "PartialCopy", "Transfer", "merge_uploads"]

#: Larger micro-batches use most experts of a layer: they gain little, and would evict what generation uses
#: (`llama_moe_cache::impl::max_batch`).
MAX_CACHED_TOKENS = 32
#: Up to so many tokens a lookup is counted as one of a small micro-batch (`llama_moe_cache::impl::stats_small`).
SMALL_TOKENS = 8
_MIB = 1024 * 1024


class Transfer(NamedTuple):
    """Neighbouring experts that go to neighbouring slots: one copy for each tensor of the layer."""

    expert: int
    slot: int
    n_experts: int


class PartialCopy(NamedTuple):
    """A part of the copy of a whole weight, for a micro-batch that goes past the cache.

    Attributes
    ----------
    expert, n_experts : int
        Which experts; none where only padding is left.
    slot : int or None
        Where they are in the cache, to be copied within the device; None: they come from the host.
    pad_bytes : int
        Bytes of the next expert that the host sends too.
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
    """What a cache did, in one group or in all.

    Attributes
    ----------
    small, large
        Hits, misses and uploaded bytes of micro-batches of at most 8 tokens, and of more.
    copied : int
        Experts that micro-batches past the cache took out of it.
    copied_bytes : int
    """

    small: _Count = field(default_factory=_Count)
    large: _Count = field(default_factory=_Count)
    copied: int = 0
    copied_bytes: int = 0

    @property
    def hits(self) -> int:
        """Experts that were found."""
        return self.small.hits + self.large.hits

    @property
    def misses(self) -> int:
        """Experts that had to be uploaded."""
        return self.small.misses + self.large.misses

    @property
    def uploaded_bytes(self) -> int:
        """Bytes that went into slots."""
        return self.small.n_bytes + self.large.n_bytes

    @property
    def hit_rate(self) -> float | None:
        """Hits of all lookups; None if there were none."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    @classmethod
    def sum(cls, parts: Iterable[Counters]) -> Counters:
        """Return the sum of several."""
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
        """Return them for JSON."""
        return {
            "hits": self.hits, "misses": self.misses, "hit_rate": self.hit_rate, "uploaded_bytes": self.uploaded_bytes,
            "copied_experts": self.copied, "copied_bytes": self.copied_bytes,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Return what llama.cpp prints when it frees the cache; a line that would tell of nothing is left out."""
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
        Who stays.
    expert_bytes : sequence of int
        Bytes of one expert in each of a layer's tensors.
    n_used : int
        Experts that a token uses, at most over the model's layers.
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
        """Whether a layer of a micro-batch reads its experts from the slots.

        Notes
        -----
        Mirrors `llama_moe_cache::get_slot_map`.
        """
        policy = self.policy
        return 0 < n_tokens <= MAX_CACHED_TOKENS and min(n_tokens * n_used, policy.n_expert) <= policy.most

    def update(self, layer: int, ids: Sequence[int]) -> tuple[Lookup, list[Transfer]]:
        """Make room for the experts that a layer chose.

        Parameters
        ----------
        ids : sequence of int32
            All of the layer's, repeats included: their number tells small micro-batches from large ones.

        Returns
        -------
        Lookup
            Where the experts are now.
        list of Transfer
            What must be uploaded for that, in order.

        Notes
        -----
        Mirrors the part of `llama_moe_cache::copy` for a slot map.
        """
        found = self.policy.lookup(layer, ids)
        count = self.counters.small if len(ids) <= SMALL_TOKENS * self.n_used else self.counters.large
        count.hits += len(found.hits)
        count.misses += len(found.misses)
        count.n_bytes += len(found.uploads) * sum(self.expert_bytes)
        return found, merge_uploads(found.uploads)

    def partial_copies(self, layer: int, used: Iterable[int], i_tensor: int) -> list[PartialCopy]:
        """Return how the used experts of a weight get into its copy, for a micro-batch that goes past the cache.

        Those that are in the cache are copied within the device, the others come from the host; the cache itself does not
        change. What is taken out of it is counted.

        Notes
        -----
        Mirrors `llama_context::sched_copy_experts` with a cache, and `llama_moe_cache::copy_experts`: a run of used
        experts is cut where it is in the cache; the last part brings padding, even if nothing else is left of it.
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
                if start < at:  # upstream sends what comes before it afterwards
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
    """Put uploads together whose experts and slots are neighbours."""
    merged: list[Transfer] = []
    for expert, slot in uploads:
        if merged:
            last = merged[-1]
            if (expert, slot) == (last.expert + last.n_experts, last.slot + last.n_experts):
                merged[-1] = last._replace(n_experts=last.n_experts + 1)
                continue
        merged.append(Transfer(expert, slot, 1))
    return merged
