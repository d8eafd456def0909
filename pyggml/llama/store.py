"""Keeps captured graphs in files, so that another plan of the same model and flags starts no child.

An answer is identified by the request and by path, size and modification time of the model's and the library's files.
Failures are not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .. import config
from ..errors import PyggmlError
from ..files import aside
from .library import library_files
from .process import LlamaProcess

__all__ = ["Captures"]

Message = dict[str, Any]  # what goes through JSON

#: Increment it when the format of answers changes.
_VERSION = 5
#: Most kept answers; the oldest are deleted first.
_MOST_FILES = 256


def _identity(paths: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    out = []
    for path in paths:
        about = os.stat(path)
        out.append((str(Path(path).resolve()), about.st_size, about.st_mtime_ns))
    return out


class Captures:
    """Answers about one model with one set of flags, from files if they were kept.

    Parameters
    ----------
    process : LlamaProcess
        The child for answers that are not kept.
    paths : iterable of str
        The model's files, in order.
    about : dict
        ``placement`` and ``context`` of each request.
    """

    def __init__(self, process: LlamaProcess, paths: Iterable[str], about: Message) -> None:
        self.process, self.paths, self.about = process, tuple(paths), about

    def request(self, do: str, **more: object) -> Message:
        """Return a request for the child."""
        return {"model": str(Path(self.paths[0]).absolute()), "do": do, **self.about, **more}

    def ask(self, do: str, **more: object) -> Message:
        """Return the answer to a request.

        Raises
        ------
        ModelError, DeviceUnavailableError
            As `LlamaProcess.ask`.
        """
        request = self.request(do, **more)
        kept = self._file(request)
        if kept is not None:
            with contextlib.suppress(OSError, ValueError, zlib.error):
                found: Message = json.loads(zlib.decompress(kept.read_bytes()))
                return found
        answer: Message = self.process.ask(request)
        if kept is not None:
            self.process.chores.append(partial(_write, kept, answer))
        return answer

    def _file(self, request: Message) -> Path | None:
        try:
            folder = config.cache_dir() / "llama"
            library = _identity(library_files(self.process.library))
            key = json.dumps([_VERSION, library, _identity(self.paths), request], sort_keys=True)
        except (OSError, RuntimeError):
            return None
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.z"


def _write(path: Path, answer: Message) -> None:
    """Write an answer atomically; without a writable folder it is not kept."""
    with contextlib.suppress(OSError, PyggmlError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = sorted(path.parent.glob("*.z"), key=lambda p: p.stat().st_mtime)
        for old in kept[: max(len(kept) + 1 - _MOST_FILES, 0)]:
            old.unlink(missing_ok=True)
        with aside(path) as part:
            part.write_bytes(zlib.compress(json.dumps(answer, separators=(",", ":")).encode(), 1))
