"""Read files of a bounded size, and write files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import FormatError, PyggmlError

__all__ = ["MOST_BYTES", "aside", "check_regular", "opened", "parse_json", "read_json", "read_text", "writing"]

#: Most bytes of a file of text, JSON or arrays that are read, after decompression.
MOST_BYTES = 1 << 30
#: A writer touches its temporary file all the time; one left alone for this long has lost its writer.
_ABANDONED_S = 600.0
_HINTS = {
    errno.ENOSPC: "free some room, or choose another disk",
    errno.EDQUOT: "free some room, or choose another disk",
    errno.EFBIG: "free some room, or choose another disk",
    errno.ENOENT: "make the folder first, or choose another",
    errno.ENOTDIR: "make the folder first, or choose another",
    errno.EISDIR: "name a file in it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the name is a link to itself: remove it, or choose another",
}


def check_regular(path: str | os.PathLike[str], *, most_bytes: int | None = MOST_BYTES) -> None:
    """Refuse what is not a regular file or is too large, without opening it: a pipe would block, a device would not end.

    Raises
    ------
    FormatError
        It is refused.
    OSError
        There is no such file, or it cannot be looked at.
    """
    path = os.fspath(path)
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise FormatError(path, "this is a folder", hint="name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(path, "this is not a regular file", hint="copy it to a regular file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise _too_large(path, most_bytes)


def _too_large(path: str, most_bytes: int) -> FormatError:
    return FormatError(path, f"larger than {most_bytes >> 20:,} MiB, the most that is read", hint="is it another file?")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[io.BufferedIOBase]:
    """Open a regular file for reading, decompressed if it is compressed with gzip; an error while it is read is a `FormatError`.

    Raises
    ------
    FormatError
        The file does not exist, is not a regular file, is too large, cannot be read, or its compression is damaged.
    """
    import gzip

    name = os.fspath(path)
    try:
        check_regular(name)
        with open(name, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(name) if is_gzip else open(name, "rb") as file:
            yield file
    except FileNotFoundError:
        raise FormatError(name, "no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(name, f"damaged gzip: {error}") from None
    except OSError as error:
        raise FormatError(name, f"cannot be read: {error.strerror or error}") from None


def read_text(path: str | os.PathLike[str], *, hint: str = "") -> str:
    """Return a whole text file, decompressed.

    Raises
    ------
    FormatError
        As `opened`, or it is not UTF-8 text, or its text is longer than `MOST_BYTES`.
    """
    with opened(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise _too_large(os.fspath(path), MOST_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(os.fspath(path), "not UTF-8 text", offset=error.start, hint=hint) from None


def parse_json(path: str | os.PathLike[str], text: str, *, where: str = "", hint: str = "") -> Any:  # of JSON's values
    """Return the value of a JSON text, which is that of a file or of the line ``where`` of it.

    Raises
    ------
    FormatError
        It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = "" if where else f", line {error.lineno} column {error.colno}"
        raise FormatError(os.fspath(path), f"{where}not JSON: {error.msg}{at}", hint=hint) from None
    except RecursionError:
        raise FormatError(os.fspath(path), f"{where}not JSON that can be read: nested too deeply", hint=hint) from None
    except ValueError as error:  # an integer of too many digits
        raise FormatError(os.fspath(path), f"{where}not JSON that can be read: {error}", hint=hint) from None


def read_json(path: str | os.PathLike[str], *, hint: str = "") -> Any:  # of JSON's values
    """Return the value of a JSON file, decompressed.

    Raises
    ------
    FormatError
        As `read_text`, or it is not JSON.
    """
    return parse_json(path, read_text(path, hint=hint), hint=hint)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the operating system while ``path`` is written into a `PyggmlError` with path, reason and what to try."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "choose a folder that you may write to")
        raise PyggmlError(f"{path}: cannot write: {error.strerror or error}", hint=hint) from None


@contextlib.contextmanager
def aside(path: str | os.PathLike[str], n_bytes: int | None = None) -> Iterator[Path]:
    """Give a file beside ``path`` to write, which replaces ``path`` if the block ends well, and is removed if not.

    Parameters
    ----------
    path : str or os.PathLike
        The file that shall be written; its folder exists. A pipe or a device is given itself. Links are followed.
    n_bytes : int, optional
        How large it will be: a disk with less room is refused at once.

    Raises
    ------
    PyggmlError
        The folder is missing or full, or may not be written to. The text has the path, the reason and what to try.
        ``path`` is as it was.

    Notes
    -----
    A process that is killed outright leaves a hidden ``.part`` file beside the path. The next writer of the same path
    removes it once it is ten minutes old.
    """
    asked = Path(path)
    with writing(asked):
        target = Path(os.path.realpath(asked))
        if target.is_dir():
            raise OSError(errno.EISDIR, "this is a folder")
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.exists() and not target.is_file():
            yield target
            return
        _remove_abandoned(target)
        if n_bytes is not None and (free := shutil.disk_usage(target.parent).free) < n_bytes:
            raise OSError(errno.ENOSPC, f"{n_bytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
        part = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
        try:
            yield part
            os.replace(part, target)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _remove_abandoned(target: Path) -> None:
    for part in target.parent.glob(f".{_literal(target.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED_S:
                part.unlink()


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "[]*?" else char for char in name)
