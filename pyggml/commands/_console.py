"""Consoles for commands: reports go to stdout, progress and warnings to stderr, colour only to a terminal."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["n_bytes", "print_json", "progress", "report", "table", "warn"]

#: Columns of a report that does not go to a terminal: wide enough that no cell of ours is folded.
PIPE_WIDTH = 160


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the program, which is quiet about it."""
        raise  # noqa: PLE0704  # rich calls this where it handles the error


def report() -> Console:
    """Return the console for what the user asked for."""
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


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns in ``right`` hold numbers."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def progress() -> Progress:
    """Return a progress display on stderr; it shows nothing where that is no terminal."""
    console = _errors()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def n_bytes(n: int) -> str:
    """Return a size as people read it.

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
