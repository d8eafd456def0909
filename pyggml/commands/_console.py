"""Consoles for commands: reports go to stdout, progress and warnings to stderr, colour only to a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
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
#: Of a column of words, before numbers are folded.
MIN_FREE_WIDTH = 16
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
    """A table that folds only its free columns, unless the others alone are too wide."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if sum(map(_least_width, self.columns)) > options.max_width:
            for column in self.columns:
                column.no_wrap = False
        return super().__rich_console__(console, options)


def _least_width(column: Column) -> int:
    """Return the width that a column needs, with the space after it."""
    if not column.no_wrap:
        return MIN_FREE_WIDTH if column.header else 0
    lines = (line for cell in (column.header, *column.cells) for line in str(cell).splitlines())
    return 2 + max(map(cell_len, lines), default=0)


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
