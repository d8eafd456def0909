"""The expert cache: slots in device memory for experts of layers with host weights.

`policies.py` decides which experts stay (`LRU`, `SLRU`), `budget.py` how many slots fit (`plan_cache`), `cache.py` what
is copied and counted (`ExpertCache`). These know ids, slots and bytes, but no device. `running.py` has the memory that
graphs read (`MoeCache`), `policy.py` makes the copies (`MoeCachePolicy`).
"""

from __future__ import annotations

from .budget import CacheGroup, ExpertTensor, HostLayer, group_layers, plan_cache, slots_that_fit
from .cache import MAX_CACHED_TOKENS, Counters, ExpertCache, PartialCopy, Transfer
from .policies import EVICTIONS, LRU, SLRU, EvictionPolicy, Lookup, SlotTable, Upload, slots_without_hits
from .policy import MoeCachePolicy, prefetch_of
from .running import CacheRule, LlamaCache, Misses, MoeCache
from .sides import ExpertSides

__all__ = [
    "EVICTIONS", "LRU", "MAX_CACHED_TOKENS", "SLRU", "CacheGroup", "CacheRule", "Counters", "EvictionPolicy", "ExpertCache", "ExpertSides",
    "ExpertTensor", "HostLayer", "LlamaCache", "Lookup", "Misses", "MoeCache", "MoeCachePolicy", "PartialCopy", "SlotTable", "Transfer",
    "Upload", "group_layers", "plan_cache", "prefetch_of", "slots_that_fit",
    "slots_without_hits",
]  # fmt: skip
