"""Shows a page in the user's browser or in a notebook."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .page import write_page
from .view import View

__all__ = ["Page", "show_page"]

#: Height of the page inside a notebook, in CSS pixels.
_HEIGHT = 720


@dataclass(frozen=True, slots=True)
class Page:
    """A written page. It can be used as a path, and a notebook shows it below the cell.

    Attributes
    ----------
    path : Path
        The file.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        """Return the page in a frame, so that its styles and the notebook's do not mix."""
        page = escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width:100%;height:{_HEIGHT}px;border:1px solid #8884"></iframe>'


def show_page(*views: View, title: str = "", path: str | os.PathLike[str] | None = None) -> Page:
    """Write the page of one view, or of two side by side, and open it in the user's browser or show it in the notebook.

    Parameters
    ----------
    views : View
        One or two.
    title : str
        See `page_html`.
    path : path-like, optional
        The file to write; by default a temporary file.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    if path is None:
        handle, name = tempfile.mkstemp(prefix="pyggml-", suffix=".html")
        os.close(handle)
        path = name
    page = Page(Path(path).absolute())
    write_page(page.path, *views, title=title)
    if not _is_notebook():
        webbrowser.open(page.path.as_uri())
    return page


def _is_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel, which shows the last value of a cell."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")
