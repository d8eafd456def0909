"""The expert lab: routing traces in, cache policies compared.

`trace.py` has the one form of a trace, `formats/` reads and writes files, `validate.py` names what misleads in them.
"""

from __future__ import annotations

from .formats import open_trace, save_trace
from .trace import Finding, Phase, Trace

__all__ = ["Finding", "Phase", "Trace", "open_trace", "save_trace"]
