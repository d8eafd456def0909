"""What browser tests share: sizes of windows, and questions to a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from playwright.sync_api import Page

__all__ = ["DESKTOP", "PHONE", "OpenPage", "overflow", "overlapping_texts", "settled"]

#: Windows, in CSS pixels.
PHONE, DESKTOP = (390, 844), (1440, 900)


class OpenPage(Protocol):
    """Opens a file in a window of its own, offline."""

    def __call__(self, path: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False, fragment: str = "") -> Page:
        """Open it."""


def overflow(page: Page) -> int:
    """Return by how many pixels a page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def settled(page: Page, js: str) -> Any:  # of JSON's values
    """Return the value of an expression after the next frame was drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate(js)


#: Lines of texts with their boxes, cut to what their ancestors let be seen. From the top of the page, wherever a link has
#: scrolled it: there the bar that stays covers nothing.
_TEXT_BOXES = """() => {
  scrollTo({ top: 0, behavior: "instant" });
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(), n = 0; node; node = walk.nextNode(), n++) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, option, noscript")) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom];
      for (let e = element; e && e !== document.documentElement; e = e.parentElement) {
        const style = getComputedStyle(e);
        if (style.overflowX === "visible" && style.overflowY === "visible") continue;
        const clip = e.getBoundingClientRect();
        [left, top] = [Math.max(left, clip.left), Math.max(top, clip.top)];
        [right, bottom] = [Math.min(right, clip.right), Math.min(bottom, clip.bottom)];
      }
      if (right - left > 1 && bottom - top > 1) found.push({ n, text: node.data.trim().slice(0, 40), left, top, right, bottom });
    }
  }
  return found;
}"""
#: Boxes of one line of text are higher than its letters.
_SLACK = 3


def overlapping_texts(page: Page) -> list[tuple[str, str]]:
    """Return pairs of texts that lie upon each other."""
    boxes = sorted(page.evaluate(_TEXT_BOXES), key=lambda b: b["top"])
    pairs = []
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if b["top"] > a["bottom"] - _SLACK:
                break
            width = min(a["right"], b["right"]) - max(a["left"], b["left"])
            height = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            if a["n"] != b["n"] and width > _SLACK and height > _SLACK:
                pairs.append((a["text"], b["text"]))
    return pairs
