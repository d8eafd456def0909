"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import PyggmlError

__all__ = ["aside", "writing"]

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
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
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
