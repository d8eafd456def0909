"""Reads text files of other programs with bounded memory, and errors that say where."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import FormatError

__all__ = ["as_ids", "as_int", "load_json", "open_lines", "read_start", "read_text"]

#: Most bytes of text that are read, after decompression.
MAX_TEXT = 1 << 30
MAX_LINE = 1 << 26


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_start(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file, decompressed.

    Raises
    ------
    FormatError
        The file does not exist, or its compression is damaged.
    """
    try:
        if _is_gzip(path):
            with gzip.open(path) as file:
                return file.read(n_bytes)
        with path.open("rb") as raw:
            return raw.read(n_bytes)
    except FileNotFoundError:
        raise FormatError(str(path), "no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(str(path), f"cannot be read ({error})") from None


def read_text(path: Path) -> str:
    """Return a whole text file, decompressed.

    Raises
    ------
    FormatError
        It is not UTF-8 text, or longer than `MAX_TEXT`.
    """
    data = read_start(path, MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise FormatError(str(path), f"more than {MAX_TEXT >> 20} MiB of text", hint="cut the trace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(str(path), "not UTF-8 text", offset=error.start) from None


def open_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers from 1, decompressed; only one line is held.

    Raises
    ------
    FormatError
        A line is not UTF-8 text, or the file is longer than `MAX_TEXT`.
    """
    n_read = 0
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                n_read += len(line)
                if len(line) == MAX_LINE or n_read > MAX_TEXT:
                    raise FormatError(str(path), f"line {number}: more text than a trace has", offset=n_read)
                yield number, line.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(str(path), "not UTF-8 text", offset=n_read) from None
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(str(path), f"cannot be read ({error})", offset=n_read) from None


def load_json(path: Path | str, text: str, *, where: str = "") -> Any:  # of JSON's values
    """Return the value of a JSON text.

    Raises
    ------
    FormatError
        It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(str(path), f"{where}not JSON ({error.msg})", offset=error.pos) from None
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of too many digits
        raise FormatError(str(path), f"{where}not JSON that can be read ({error})") from None


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
