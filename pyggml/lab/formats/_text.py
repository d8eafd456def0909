"""Reads text files of other programs with bounded memory, and errors that say where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...files import MOST_BYTES, opened

__all__ = ["as_ids", "as_int", "open_lines", "read_start"]

MAX_LINE = 1 << 26


def read_start(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file, decompressed.

    Raises
    ------
    FormatError
        As `opened`.
    """
    with opened(path) as file:
        return file.read(n_bytes)


def open_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers from 1, decompressed; only one line is held.

    Raises
    ------
    FormatError
        As `opened`, or a line is not UTF-8 text, or the text is longer than `MOST_BYTES`.
    """
    n_read = number = 0
    with opened(path) as file:
        while line := file.readline(MAX_LINE):
            number += 1
            n_read += len(line)
            if len(line) == MAX_LINE or n_read > MOST_BYTES:
                raise FormatError(str(path), f"line {number}: more text than a trace has", offset=n_read)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                raise FormatError(str(path), "not UTF-8 text", offset=n_read) from None
            yield number, text


def as_int(path: Path | str, where: str, value: Any, low: int = 0, high: int = 1 << 40) -> int:  # of JSON's values
    """Return ``value`` if it is an integer from ``low`` to ``high``.

    Raises
    ------
    FormatError
        It is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise FormatError(str(path), f"{where} is {_short(value)}, not a whole number from {low} to {high:,}")
    return value


def as_ids(path: Path | str, where: str, value: Any) -> list[int]:  # of JSON's values
    """Return ``value`` if it is a list of expert ids.

    Raises
    ------
    FormatError
        It is not a list of integers.
    """
    if not isinstance(value, list) or any(type(i) is not int or not -1 <= i < 1 << 31 for i in value):
        raise FormatError(str(path), f"{where} is {_short(value)}, not a list of expert ids")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
