"""Kinds of options: `cloup.option` with what all counts, choices, files and switches of the program have.

A default given as ``shown`` is in the help; of another ``default``, the help says what it means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import cloup

from ._values import DeviceList

__all__ = ["cards_option", "choice", "count", "file_option", "flag", "json_option", "number", "option"]

Decorator = Callable[[Callable[..., Any]], Any]


def option(*names: str, help: str, shown: object = None, **more: Any) -> Decorator:  # of what click's options take
    """Return an option of any value that click makes of a text."""
    if shown is not None:
        more |= {"default": shown, "show_default": True}
    return cloup.option(*names, help=help, **more)


def count(*names: str, least: int = 0, most: int | None = None, metavar: str | None = "N", **more: Any) -> Decorator:
    """Return an option of a whole number."""
    return option(*names, type=click.IntRange(least, most), metavar=metavar, **more)


class _Number(click.FloatRange):
    """A number in a range; ``nan`` and ``inf`` are none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a number.", param, ctx)


def number(*names: str, most: float | None = None, **more: Any) -> Decorator:
    """Return an option of a number that is not negative."""
    return option(*names, type=_Number(0, most), **more)


def choice(*names: str, values: Sequence[str], **more: Any) -> Decorator:
    """Return an option of a few values."""
    return option(*names, type=click.Choice(values), **more)


def cards_option(*, help: str) -> Decorator:
    """Return the option of the cards to plan for; given several times, the lists are one."""
    return option(
        *("-dev", "--device"), type=DeviceList(), multiple=True, help=help,
        callback=lambda ctx, param, lists: ",".join(lists) or None,
    )  # fmt: skip


def file_option(*names: str, help: str, metavar: str | None = "FILE", **kinds: bool) -> Decorator:
    """Return an option of a path; ``kinds`` are those of `click.Path`."""
    return cloup.option(*names, type=click.Path(path_type=Path, **kinds), metavar=metavar, help=help)


def flag(*names: str, help: str) -> Decorator:
    """Return a switch that is off without the option."""
    return cloup.option(*names, is_flag=True, help=help)


def json_option(help: str) -> Decorator:
    """Return the switch that prints a result for programs."""
    return flag("--json", "as_json", help=help)
