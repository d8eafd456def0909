"""llama.cpp's expert cache: device memory that keeps experts of layers whose weights lie on the host.

`policies.py` decides which experts stay (`LRU`, `SLRU`), `budget.py` how many fit (`plan_cache`), `cache.py` what moves and
what is counted (`ExpertCache`). All of it is pure: it knows ids, slots and bytes, and no device.
"""

from __future__ import annotations

from .budget import CacheGroup, ExpertTensor, HostLayer, plan_cache, slots_that_fit
from .cache import MAX_CACHED_TOKENS, Counters, ExpertCache, PartialCopy, Transfer
from .policies import EVICTIONS, LRU, SLRU, EvictionPolicy, Lookup, Upload, slots_without_hits

__all__ = [
    "EVICTIONS", "LRU", "MAX_CACHED_TOKENS", "SLRU", "CacheGroup", "Counters", "EvictionPolicy", "ExpertCache",
    "ExpertTensor", "HostLayer", "Lookup", "PartialCopy", "Transfer", "Upload", "plan_cache", "slots_that_fit",
    "slots_without_hits",
]  # fmt: skip
