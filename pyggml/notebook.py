"""Small tables in HTML, as notebooks show an object that has a ``_repr_html_``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

__all__ = ["MAX_ROWS", "html_table"]

#: More rows than these are counted, not shown.
MAX_ROWS = 50


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, n_rows: int) -> str:
    """Return a table; every text in it is escaped.

    Parameters
    ----------
    title : str
        Shown above it.
    columns : sequence of str
        Headings.
    rows : iterable of sequences
        Cells, shown as ``str`` gives them; no more than `MAX_ROWS` are taken.
    n_rows : int
        How many there are in all.

    Examples
    --------
    >>> html_table("<t>", ["n"], [[1]], n_rows=1)
    '<table><caption>&lt;t&gt;</caption><tr><th>n</th></tr><tr><td>1</td></tr></table>'
    """
    lines = ["<tr>" + "".join(f"<th>{escape(c)}</th>" for c in columns) + "</tr>"]
    for row in islice(rows, MAX_ROWS):
        lines.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>")
    if n_rows > MAX_ROWS:
        lines.append(f'<tr><td colspan="{len(columns)}">and {n_rows - MAX_ROWS:,} more</td></tr>')
    return f"<table><caption>{escape(title)}</caption>{''.join(lines)}</table>"
