"""Writes the timelines and pages of `run` and `splits`, and describes models and devices in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..types import DeviceType
from ._model_options import is_model_option, placing_words

if TYPE_CHECKING:
    from ..backend import Backend
    from ..clock import VirtualClock
    from ..gguf import GGUFFile
    from ..models.source import ModelFacts
    from ..record import Record

__all__ = ["about_devices", "about_model", "check_outputs", "given_options", "write_records"]


def check_outputs(source: Path | None, *paths: Path | None) -> None:
    """Refuse outputs that are a folder, or in none, that are what is read, or the same file, before anything is computed.

    Raises
    ------
    click.UsageError
        An output is refused.
    """
    written: list[Path] = []
    for path in paths:
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise click.UsageError(f"{path}: its folder does not exist")
        if path.is_dir():
            raise click.UsageError(f"{path} is a folder: name a file in it")
        if source is not None and _is_part(path, source):
            raise click.UsageError(f"{path} is read and would be overwritten: choose another file")
        if any(_same(path, other) for other in written):
            raise click.UsageError(f"{path} is given for two outputs: choose a different file for each")
        written.append(path)


def _same(a: Path, b: Path) -> bool:
    if not (a.exists() and b.exists()):
        return a.absolute() == b.absolute() or a.resolve() == b.resolve()
    return a.samefile(b) and a.is_file()


def _is_part(path: Path, model: Path) -> bool:
    """Return whether a file is the model, or one of the other files of a split model."""
    if not path.exists() or not model.exists():
        return False
    a, b = (re.sub(r"-\d{5}-of-", "-N-of-", str(p.resolve())) for p in (path, model))
    return _same(path, model) or a == b


def about_model(file: GGUFFile, hparams: ModelFacts) -> dict[str, Any]:
    """Return the facts about a model for pages and JSON."""
    return {
        "path": str(file.path),
        "name": hparams.name,
        "arch": hparams.arch,
        "n_layer": hparams.n_layer,
        "n_expert": hparams.n_expert,
        "n_expert_used": hparams.n_expert_used,
    }


def about_devices(backends: Sequence[Backend], clock: VirtualClock | None = None) -> list[dict[str, Any]]:
    """Return the facts about devices for pages and JSON: memory sizes and, with a clock, its assumptions."""
    described = [b.device.description for b in backends]
    if clock is not None:
        described = [p.description for p in clock.profiles]
    return [
        {
            "name": b.name,
            "description": text,
            "memory_bytes": None if b.device.type is DeviceType.CPU else b.device.memory()[1] or None,
        }
        for b, text in zip(backends, described, strict=True)
    ]


def given_options() -> str:
    """Return the shared options of the running command, as given."""
    ctx = click.get_current_context(silent=True)
    if ctx is None:
        return ""
    words = placing_words(ctx)
    for param in ctx.command.params:
        name = param.name or ""
        if not is_model_option(name) or ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            words.append(param.opts[-1] if value else (param.secondary_opts or param.opts)[-1])
        else:
            values: Sequence[Any] = value if isinstance(value, tuple) else (value,)
            words += [f"{param.opts[-1]} {v}" for v in values]
    return " ".join(words)


def write_records(
    records: Iterable[Record], about: dict[str, Any], *, timeline: Path | None, html: Path | None, name: str
) -> None:
    """Write records as a timeline, as a page, or as both.

    Parameters
    ----------
    records : iterable of Record
        In the order in which things happened.
    about : dict
        Facts that are not in the records; see `view_of_records`.
    timeline, html : Path or None
        Where to.
    name : str
        Of the page.

    Raises
    ------
    PyggmlError
        A file cannot be written.
    """
    kept = list(records)
    if timeline is not None:
        from ..timeline import write_timeline

        write_timeline(timeline, kept, about=about)
    if html is not None:
        from ..viz import view_of_records, write_page

        write_page(html, view_of_records(kept, name=name, about=about))
