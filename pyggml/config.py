"""Every environment variable that pyggml reads, parsed in one place."""

from __future__ import annotations

import os


def sched_debug() -> int:
    """Return the level of ``GGML_SCHED_DEBUG``; 0 if it is not set or no number."""
    text = os.environ.get("GGML_SCHED_DEBUG", "").strip()
    return int(text) if text.lstrip("-").isdigit() else 0


def check() -> bool:
    """Return whether ``PYGGML_CHECK`` asks for invariants to be verified."""
    return os.environ.get("PYGGML_CHECK", "") not in ("", "0")
