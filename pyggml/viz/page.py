"""Writes the page: views, drawing code and styles in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import aside
from .view import View

__all__ = ["fill", "html_page", "page_html", "static_text", "write_page"]

#: In the order of their dependencies.
_VENDOR = ("dispatch", "timer", "ease", "color", "interpolate", "selection", "transition", "drag", "zoom", "array")
_SCRIPTS = (
    "model.js", "words.js", "totals.js", "timeline.js", "timeline_draw.js", "find.js", "detail.js", "tables.js", "heatmap.js",
    "memory.js", "graph.js", "main.js",
)  # fmt: skip


def page_html(*views: View, title: str = "") -> str:
    """Return the page of one view, or of two side by side.

    Parameters
    ----------
    views : View
        One or two.
    title : str
        The title of the page; by default the views' names.

    Raises
    ------
    ValueError
        There is no view, or there are more than two.
    """
    if not 1 <= len(views) <= 2:
        raise ValueError(f"a page shows one view or two, not {len(views)}")
    shown = title or " against ".join(v.name for v in views if v.name) or "pyggml"
    data = {"title": shown, "version": __version__, "views": [{**v.model, "name": v.name} for v in views]}
    scripts = [static_text(f"vendor/d3-{name}.min.js") for name in _VENDOR] + [static_text(name) for name in _SCRIPTS]
    parts = {
        "LICENSES": escape(static_text("vendor/LICENSES.txt")),
        "SCRIPTS": "\n".join(f"<script>\n{script}\n</script>" for script in scripts),
    }
    return fill(static_text("page.html"), shown, data, **parts)


def fill(page: str, title: str, data: Any, **parts: str) -> str:  # what goes through JSON
    """Return a page with its title, the style of all pages, its data as JSON, and further parts, each for ``{{NAME}}``."""
    # texts of a model must not end the element or begin a comment
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts |= {"TITLE": escape(title), "STYLE": static_text("page.css"), "DATA": text}
    before, *pieces = page.split("{{")
    out = [before]
    for piece in pieces:  # one pass, so that text inside a part is not replaced
        key, _, rest = piece.partition("}}")
        out += [parts[key], rest]
    # names that are not UTF-8 have lone surrogates, which JSON escapes
    return "".join(out).encode("utf-8", "backslashreplace").decode()


def write_page(path: Path, *views: View, title: str = "") -> None:
    """Write the page of one view, or of two side by side; see `page_html`.

    Raises
    ------
    PyggmlError
        The file cannot be written; an existing file is kept.
    """
    with aside(path) as part:
        part.write_text(page_html(*views, title=title), encoding="utf-8")


def html_page(title: str, style: str, body: Sequence[str], *, script: str = "") -> str:
    """Return a page of elements without data, in the style of all pages and its own."""
    end = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{static_text('page.css')}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n{end}</body>\n</html>\n"
    )


def static_text(name: str) -> str:
    """Return the text of a file in `static/`."""
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")
