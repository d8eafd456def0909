"""Small HTML tables for ``_repr_html_``, which notebooks show.

Styles are attributes of the elements, because viewers of notebooks drop style sheets and one table must not change
another. The notebook sets text and background colours, so that tables fit its light and dark themes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice

__all__ = ["MAX_ROWS", "Bar", "html_table"]

#: Further rows are counted, not shown.
MAX_ROWS = 50

_TABLE = "width:auto;margin:.5em 0;border-collapse:collapse;font-variant-numeric:tabular-nums"
_CAPTION = "caption-side:top;text-align:left;font-weight:bold;padding:.3em 0;color:inherit;white-space:nowrap"
_CELL = "text-align:{};vertical-align:top;padding:.2em 1.2em .2em 0"
# both greys and the blue are visible on white and on black
_TRACK = "display:inline-block;width:8em;height:.7em;background:rgba(128,128,128,.25)"
_FILL = "display:block;width:{:.1f}%;height:100%;background:#4c8ed9"


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell that shows a share of 1 as a bar and in per cent.

    Examples
    --------
    >>> str(Bar(0.25))
    '25%'
    """

    share: float

    def __str__(self) -> str:
        return f"{self.share:.0%}"

    def html(self) -> str:
        """Return the bar as HTML."""
        fill = _FILL.format(100 * min(max(self.share, 0.0), 1.0))
        return f'<span style="{_TRACK}"><span style="{fill}"></span></span> {self}'


def html_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    n_rows: int,
    right: Collection[str] = (),
) -> str:
    """Return a table; every text in it is escaped.

    Parameters
    ----------
    title : str
        The caption.
    columns : sequence of str
        Headings; not shown if all are empty.
    rows : iterable of sequences
        Cells, shown with ``str`` or as a `Bar`; at most `MAX_ROWS` rows are used.
    n_rows : int
        The total number of rows.
    right : collection of str
        The columns with numbers, which are right-aligned.

    Examples
    --------
    >>> import re
    >>> re.sub(' style="[^"]*"', "", html_table("<t>", ["n"], [[1]], n_rows=1))
    '<table><caption>&lt;t&gt;</caption><tr><th>n</th></tr><tr><td>1</td></tr></table>'
    """
    styles = [_CELL.format("right" if name in right else "left") for name in columns]
    lines = [_row("th", columns, styles)] if any(columns) else []
    lines += [_row("td", row, styles) for row in islice(rows, MAX_ROWS)]
    if n_rows > MAX_ROWS:
        lines.append(f'<tr><td colspan="{len(columns)}" style="{styles[0]}">and {n_rows - MAX_ROWS:,} more</td></tr>')
    return f'<table style="{_TABLE}"><caption style="{_CAPTION}">{escape(title)}</caption>{"".join(lines)}</table>'


def _row(tag: str, cells: Sequence[object], styles: Sequence[str]) -> str:
    made = (
        f'<{tag} style="{style}">{cell.html() if isinstance(cell, Bar) else escape(str(cell))}</{tag}>'
        for cell, style in zip(cells, styles, strict=True)
    )
    return f"<tr>{''.join(made)}</tr>"
