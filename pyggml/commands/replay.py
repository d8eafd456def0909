"""`pyggml replay`: run recorded scheduler cases and write what the scheduler did."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ..dialect import DEFAULT_DIALECT, DIALECTS, Dialect
from ..errors import FormatError
from ..replay import replay_file
from ._console import n_seconds
from ._options import choice, file_option, json_option
from ._page import check_outputs

__all__ = ["command", "trace_name"]

#: What a user may call the dialects: by our name, or by the whole version of ggml that their traces come from.
_VERSIONS = {
    **{name: name for name in DIALECTS},
    "0.20.2": "0.20",
    "0.21.0": "0.21",
    "0.26.0": "0.26",
    "0.27.0": "0.27",
}
#: Ends of trace files, so that those of several dialects can lie in one folder.
_SUFFIXES = {
    "0.20": ".trace.json.gz",
    "0.21": ".trace021.json.gz",
    "0.26": ".trace026.json.gz",
    "0.27": ".trace027.json.gz",
}
_CASE_ENDS = (".case.json.gz", ".case.json", ".json.gz", ".json")
_MANY = 8  #: cases from which on progress is shown: fewer take less than a second


@click.command("replay", short_help="Run scheduler cases and write their traces.")
@click.argument("case", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@file_option("--trace", metavar=None, help="Write the trace to FILE; compressed if it ends in .gz.")
@file_option("--all", "folder", exists=True, file_okay=False, metavar=None, help="Run every case in this folder.")
@file_option("--out", file_okay=False, metavar=None, help="Folder for the traces of --all.")
@choice("--dialect", values=list(_VERSIONS), shown=DEFAULT_DIALECT.version, help="Version of ggml.")
@json_option("Print a summary as JSON.")
def command(
    case: Path | None, trace: Path | None, folder: Path | None, out: Path | None, dialect: str, as_json: bool
) -> None:
    """Run recorded scheduler cases with mock backends and write what the scheduler did.

    Give one CASE with --trace, or a folder with --all and --out.
    """
    if (case is None) == (folder is None):
        raise click.UsageError("give a CASE or --all DIR")
    rules = DIALECTS[_VERSIONS[dialect]]
    if case is not None:
        if trace is None:
            raise click.UsageError("--trace OUT is missing: the file to write the trace to")
        check_outputs(case, trace)
        todo = [(case, trace)]
    else:
        assert folder is not None
        if out is None:
            raise click.UsageError("--out DIR is missing: the folder to write the traces to")
        todo = [(path, out / trace_name(path, rules)) for path in _cases_in(folder)]
        if not todo:
            raise click.ClickException(f"{folder}: no case found (files that end in .case.json or .case.json.gz)")
        out.mkdir(parents=True, exist_ok=True)
    rows = list(_replay_each(todo, rules))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        click.echo(f"Error: {row['error']}", err=True)
    if as_json:
        seconds = round(sum(row["seconds"] for row in rows), 3)
        click.echo(json.dumps({"dialect": rules.version, "n": len(rows), "seconds": seconds, "cases": rows}))
    elif case is None:
        _tell_all(rows, rules, out)
    elif not failed:
        (row,) = rows
        aborts = f", then an abort: {row['abort']}" if "abort" in row else ""
        click.echo(f"{_steps(row['steps'])} in dialect {rules.version}{aborts}: {row['trace']}")
    if failed:
        sys.exit(1)


def _tell_all(rows: list[dict[str, Any]], rules: Dialect, out: Path | None) -> None:
    """Print the results of a folder's cases."""
    done = [row for row in rows if "error" not in row]
    aborts = sum("abort" in row for row in done)
    seconds = sum(row["seconds"] for row in rows)
    click.echo(f"{len(done):,} of {len(rows):,} cases replayed in dialect {rules.version}: {out}")
    click.echo(
        f"{_steps(sum(row['steps'] for row in done))} in {n_seconds(seconds)}, {aborts} with an abort at the end"
    )


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n:,} steps"


def trace_name(case: Path, dialect: Dialect) -> str:
    """Return the name of a case's trace in a dialect."""
    name = case.name
    for end in _CASE_ENDS:
        if name.endswith(end):
            name = name[: -len(end)]
            break
    return name + _SUFFIXES[dialect.version]


def _cases_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(_CASE_ENDS[:2]))


def _replay_each(todo: list[tuple[Path, Path]], dialect: Dialect) -> Iterator[dict[str, Any]]:
    """Run cases one after another, also after a failure."""
    for path, trace in _with_progress(todo):
        start_s = time.perf_counter()
        row: dict[str, Any] = {  # of JSON values
            "case": str(path),
            "trace": str(trace),
        }
        try:
            steps = replay_file(path, trace, dialect=dialect)["steps"]
        except (FormatError, OSError) as error:
            row["error"] = str(error)
        else:
            row["steps"] = len(steps)
            if "abort" in steps[-1]:
                row["abort"] = steps[-1]["abort"]["message"]
        row["seconds"] = round(time.perf_counter() - start_s, 4)
        yield row


def _with_progress(todo: list[tuple[Path, Path]]) -> Iterable[tuple[Path, Path]]:
    if len(todo) < _MANY or not sys.stderr.isatty():
        return todo
    from rich.console import Console
    from rich.progress import track

    return track(todo, description="replay", console=Console(stderr=True), transient=True)
