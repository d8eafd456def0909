"""What browser tests share: sizes of windows, and questions to a page."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from playwright.sync_api import Page

__all__ = ["DESKTOP", "PHONE", "OpenPage", "overflow"]

#: Windows, in CSS pixels.
PHONE, DESKTOP = (390, 844), (1440, 900)


class OpenPage(Protocol):
    """Opens a file in a window of its own, offline."""

    def __call__(self, path: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False, fragment: str = "") -> Page:
        """Open it."""


def overflow(page: Page) -> int:
    """Return by how many pixels a page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
