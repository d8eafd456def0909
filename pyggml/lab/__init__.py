"""The expert lab: compares cache policies on routing traces.

`trace.py` has the trace, `formats/` reads and writes files, `validate.py` finds what makes them misleading. `replay.py`
counts what a policy with a capacity would have read, by a stated contract. `cache.py` is a pool that decides event by
event, in a replay or while a model runs. `evictions.py` and `admissions.py` are policies, `policies.py` names them.
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
