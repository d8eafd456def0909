"""Consoles for commands: reports go to stdout, progress and warnings to stderr, colour only to a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from ..errors import visible

__all__ = ["ROOMY_WIDTH", "Bar", "n_bytes", "n_seconds", "print_json", "progress", "report", "table", "warn"]

#: Columns of a report that does not go to a terminal: wide enough that no cell of ours is folded.
PIPE_WIDTH = 160
BAR_WIDTH, MIN_BAR_WIDTH = 10, 5
#: Of a column of words.
MIN_FREE_WIDTH = 16
#: A longer word of a free column may be broken.
MAX_WORD_WIDTH = 24
#: Columns from which on a table of long names has room for bars.
ROOMY_WIDTH = 100


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:  # of what rich prints
        """Print; outside a terminal, lines get no trailing spaces."""
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as kept:
            super().print(*objects, **options)
        self.file.write("\n".join(line.rstrip() for line in kept.get().split("\n")))

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments; control characters in names from files are made visible."""
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                segment = Segment(visible(segment.text), segment.style)
            yield segment

    def on_broken_pipe(self) -> NoReturn:
        """Do nothing; the program handles the error quietly."""
        raise  # noqa: PLE0704  # rich calls this where it handles the error


def report() -> Console:
    """Return the console for results, on stdout."""
    console = _Console(highlight=False, emoji=False, markup=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def _errors() -> Console:
    return _Console(stderr=True, highlight=False, emoji=False, markup=False)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    _errors().print(f"Warning: {text}", style="yellow")


def print_json(value: Any) -> None:  # of JSON's values
    """Print one JSON document to stdout."""
    report().file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


class _Table(Table):
    """A table that breaks no number: only its free columns are folded.

    With less room headers are folded between words, gaps are narrower, and a column of one value is said once above.
    Where that is still too wide, each row is a paragraph of names and values.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = [str(self.title)] if self.title else []  # wrapped by the terminal's width, not the table's
        for form, told in self._forms():
            if form._fits(options.max_width):
                yield from (Text(line, style="table.title") for line in (*title, *told))
                form.title = None
                yield from Table.__rich_console__(form, console, options)
                return
        yield from (Text(line, style="table.title") for line in title)
        for i, row in enumerate(self.rows):
            cells = [(column, column._cells[i]) for column in self.columns]
            pieces = [
                _piece(column, cell, not k) for k, (column, cell) in enumerate(cells) if not isinstance(cell, Bar)
            ]
            for line in _paragraph(console, [piece for piece in pieces if piece], options.max_width):
                line.stylize(row.style or "")
                yield line

    @property
    def _gap(self) -> int:
        return self.padding[1]

    def _fits(self, width: int) -> bool:
        """Return whether no number and no word is broken in some columns; then the columns of words share what is free."""
        gaps = self._gap * (len(self.columns) - 1)
        room = width - gaps - sum(_width(column, is_least=True) for column in self.columns)
        if room < 0:
            return False
        free = [column for column in self.columns if not column.no_wrap and not _has_bars(column)]
        for n, column in zip(range(len(free), 0, -1), free, strict=True):
            least = _width(column, is_least=True)
            more = min(_width(column, is_least=False) - least, room // n)
            column.width, room = least + more, room - more
        return True

    def _forms(self) -> Iterator[tuple[_Table, list[str]]]:
        """Yield the table in forms that need less and less room, and what is said before the last."""
        whole, folded = copy(self), copy(self)
        whole.columns = [replace(column) for column in self.columns]
        folded.columns = [replace(column, header=str(column.header).replace(" ", "\n")) for column in self.columns]
        yield from ((whole, []), (folded, []))
        close = copy(folded)
        close.padding = (0, 1, 0, 0)
        yield close, []
        same = [c for c in self.columns if c.header and len(c._cells) > 1 and len(set(map(str, c._cells))) == 1]
        if same and len(same) < len(self.columns):
            some = copy(close)
            kept = [column for column, old in zip(close.columns, self.columns, strict=True) if old not in same]
            some.columns = [replace(column, _index=i) for i, column in enumerate(kept)]
            yield some, ["  ".join(f"{_joined(c.header)}: {_joined(c._cells[0])}" for c in same)]


def _has_bars(column: Column) -> bool:
    return any(isinstance(cell, Bar) for cell in column.cells)


def _width(column: Column, *, is_least: bool) -> int:
    """Return the width of a column's longest line, or if it is free the least with which no word is broken; bars need none."""
    lines = [
        line for cell in (column.header, *column.cells) if not isinstance(cell, Bar) for line in str(cell).splitlines()
    ]
    longest = max(map(cell_len, lines), default=0)
    if not is_least or column.no_wrap:
        return longest
    word = max((cell_len(word) for line in lines for word in line.split()), default=0)
    return min(max(word, MIN_FREE_WIDTH), longest, MAX_WORD_WIDTH)


def _joined(cell: object) -> Text:
    """Return the text of a cell on one line, with its styles."""
    text = cell if isinstance(cell, Text) else Text(str(cell))
    return Text(" ").join(text.split("\n"))


def _piece(column: Column, cell: object, is_first: bool) -> Text:
    """Return what a paragraph says of a cell; of the row's name, only the name."""
    text = _joined(cell)
    if not text or not column.header or (is_first and column.justify == "left"):
        return text
    return Text.assemble((f"{_joined(column.header)}: ", "bold"), text)


def _paragraph(console: Console, pieces: Iterable[Text], width: int) -> list[Text]:
    """Return pieces as lines, two columns between them and at the start of further lines; one that is too long is wrapped."""
    lines = [Text()]
    for piece in pieces:
        if lines[-1] and lines[-1].cell_len + 2 + piece.cell_len > width:
            lines.append(Text())
        first, *rest = piece.wrap(console, max(width - 2, 1), overflow="fold") or [Text()]
        lines[-1].append("  " if lines[-1] or len(lines) > 1 else "").append_text(first)
        lines += [Text("  ").append_text(line) for line in rest]
    return lines


def table(title: str, *columns: str, right: tuple[str, ...] = (), free: tuple[str, ...] = ("",)) -> Table:
    """Return an empty table; columns in ``right`` hold numbers, columns in ``free`` may be folded or left out."""
    made = _Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        justify: JustifyMethod = "right" if name in right else "left"
        made.add_column(name, justify=justify, overflow="fold", no_wrap=name not in free)
    return made


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of 1 as a bar. If there is little room, it is shorter or empty.

    Examples
    --------
    >>> Bar(0.42).text(10), Bar(0.42).text(5), Bar(0.42).text(4)
    ('████░░░░░░', '██░░░', '')
    """

    share: float

    def text(self, width: int) -> str:
        """Return the bar in ``columns`` columns; empty if they are too few."""
        if width < MIN_BAR_WIDTH:
            return ""
        n_full = round(width * min(max(self.share, 0.0), 1.0))
        return "█" * n_full + "░" * (width - n_full)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, min(BAR_WIDTH, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(min(BAR_WIDTH, options.max_width)))


class _Counted(MofNCompleteColumn):
    def render(self, task: Task) -> Text:
        """Return what is done of all, and nothing where all is unknown."""
        return Text() if task.total is None else super().render(task)


def progress() -> Progress:
    """Return a progress display on stderr; outside a terminal it shows nothing."""
    console = _errors()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Counted(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def n_bytes(n: int) -> str:
    """Return a readable size.

    Examples
    --------
    >>> n_bytes(512), n_bytes(3 * 1024**2)
    ('512 B', '3.0 MiB')
    """
    size, units = float(n), iter(("KiB", "MiB", "GiB", "TiB"))
    if n < 1024:
        return f"{n} B"
    unit = "B"
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:,.1f} {unit}"


def n_seconds(s: float) -> str:
    """Return a readable time.

    Examples
    --------
    >>> n_seconds(1.5), n_seconds(0.00305), n_seconds(2.5e-5)
    ('1.50 s', '3.05 ms', '25.00 µs')
    """
    if s >= 1:
        return f"{s:,.2f} s"
    return f"{s * 1e3:.2f} ms" if s >= 1e-3 else f"{s * 1e6:.2f} µs"
