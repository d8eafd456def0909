"""The expert cache: device memory that keeps experts of layers whose weights lie on the host.

`policies.py` decides which experts stay (`LRU`, `SLRU`), `budget.py` how many fit (`plan_cache`), `cache.py` what moves and
what is counted (`ExpertCache`): these know ids, slots and bytes, and no device. `running.py` has the memory and what a graph
reads (`MoeCache`), `policy.py` the copies (`MoeCachePolicy`).
"""

from __future__ import annotations

from .budget import CacheGroup, ExpertTensor, HostLayer, group_layers, plan_cache, slots_that_fit
from .cache import MAX_CACHED_TOKENS, Counters, ExpertCache, PartialCopy, Transfer
from .policies import EVICTIONS, LRU, SLRU, EvictionPolicy, Lookup, SlotTable, Upload, slots_without_hits
from .policy import MoeCachePolicy
from .running import CacheRule, LlamaCache, MoeCache

__all__ = [
    "EVICTIONS", "LRU", "MAX_CACHED_TOKENS", "SLRU", "CacheGroup", "CacheRule", "Counters", "EvictionPolicy", "ExpertCache",
    "ExpertTensor", "HostLayer", "LlamaCache", "Lookup", "MoeCache", "MoeCachePolicy", "PartialCopy", "SlotTable", "Transfer",
    "Upload", "group_layers", "plan_cache", "slots_that_fit", "slots_without_hits",
]  # fmt: skip
