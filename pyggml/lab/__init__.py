"""The expert lab: routing traces in, cache policies compared.

`trace.py` has the one form of a trace, `formats/` reads and writes files, `validate.py` names what misleads in them. `replay.py` says what a policy
and a capacity would have read, by a stated contract. `cache.py` is a pool that is decided event by event, in a replay or while a model runs;
`evictions.py` and `admissions.py` are the policies, and `policies.py` their names.
"""

from __future__ import annotations

from .cache import Admission, Cache, Decision, Eviction
from .formats import open_trace, save_trace
from .policies import POLICIES, Policy
from .pools import Capacity
from .replay import Refusal, Result, Setting, replay
from .trace import Finding, Phase, Trace

__all__ = [
    "POLICIES", "Admission", "Cache", "Capacity", "Decision", "Eviction", "Finding", "Phase", "Policy", "Refusal", "Result", "Setting", "Trace",
    "open_trace", "replay", "save_trace",
]  # fmt: skip
