"""`pyggml viz`: write a page of one timeline, or of two side by side."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from ._options import file_option, option
from ._page import check_outputs

__all__ = ["command"]


EXAMPLES = """
\b
Examples:
  pyggml viz run.json
  pyggml viz used.json full.json -o both.html --name "used experts" --name "full copies"
"""


@cloup.command("viz", epilog=EXAMPLES)
@click.argument("timeline", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@file_option("-o", "--out", metavar=None, help="Write the page to this file. [TIMELINE.html]")
@option("--title", default="", help="Title of the page. [the files' names]")
@option("--name", "names", multiple=True, help="Name of a timeline; repeat it for the second. [the file's name]")
def command(timeline: Path, other: Path | None, out: Path | None, title: str, names: tuple[str, ...]) -> None:
    """Write an HTML page of a TIMELINE from `run --timeline` or `splits --timeline`, or of two side by side.

    The page has a timeline with search, splits with their reasons, experts, bytes and memory. It needs no network.
    """
    from ..timeline import read_timeline
    from ..viz import view_of_records, write_page

    paths = [timeline] if other is None else [timeline, other]
    if len(names) > len(paths):
        raise click.UsageError(f"--name is given {len(names)} times for {len(paths)} timelines")
    into = timeline.with_suffix(".html") if out is None else out
    for path in paths:
        check_outputs(path, into)
    shown = [*names, *(path.stem for path in paths[len(names) :])]
    views = []
    for path, name in zip(paths, shown, strict=True):
        records, about = read_timeline(path)
        views.append(view_of_records(records, name=name, about=about))
    write_page(into, *views, title=title)
    click.echo(str(into))
