"""Caches of experts are run with every copy verified."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify copies, and results against those of whole copies."""
    monkeypatch.setenv("PYGGML_CHECK", "2")
