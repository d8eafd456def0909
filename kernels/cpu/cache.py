"""The folder of compiled kernels in the user's cache, named after a hash of the kernels' sources.

Numba checks only the file that holds a function, not the files of what it calls, so one changed source must give a new
folder. This module is imported before Numba, because Numba reads the folder from the environment once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

#: Seconds without use after which folders of older sources are removed.
KEEP_S = 30 * 24 * 3600
#: Length of the digest before the data of a cached kernel.
_DIGEST_BYTES = 16


def source_hash() -> str:
    """Return a short hash of all sources in this folder."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def user_cache_dir() -> Path:
    """Return pyggml's folder among the platform's caches.

    Raises
    ------
    RuntimeError
        There is no home folder.
    """
    folder = user_cache_path("pyggml", appauthor=False, opinion=False)
    if not folder.is_absolute():  # "~" stays where there is no home
        raise RuntimeError("there is no home folder")
    return folder


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _forget_old(root: Path, current: Path) -> None:
    for folder in root.iterdir():
        if folder != current and folder.is_dir() and time.time() - folder.stat().st_mtime > KEEP_S:
            shutil.rmtree(folder, ignore_errors=True)


def set_cache_dir() -> str:
    """Tell Numba where to keep compiled code, and return the folder.

    Notes
    -----
    ``NUMBA_CACHE_DIR`` wins, with the hash below it, for its owner cannot know when a source changes. A folder that
    cannot be written to is replaced by a temporary one, which lasts as long as the process.
    """
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given and Path(given).name == source_hash():
        return given  # set by this function, in this process or the one that started it
    try:
        root = Path(given) if given else user_cache_dir() / "kernels"
        folder = root / source_hash()
    except RuntimeError:  # no home folder
        root = folder = Path(os.devnull)
    if _writable(folder):
        os.utime(folder)
        if not given:
            _forget_old(root, folder)
    else:
        folder = Path(tempfile.mkdtemp(prefix="pyggml-kernels-"))
        import atexit

        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    if "numba" in sys.modules:  # imported by someone before us: it has read the environment already
        sys.modules["numba"].config.CACHE_DIR = str(folder)
    return str(folder)


CACHE_DIR = set_cache_dir()


def guard_files() -> None:
    """Make Numba store a digest with each file in the folder, so that a damaged kernel is compiled again.

    A file that was cut or changed is dropped, and one that cannot be written is left out. Without this, Numba fails at
    such a file in every process, or runs the damaged code.
    """
    from numba.core import caching

    plain = caching.IndexDataCacheFile

    class GuardedFiles(plain):
        def save(self, key: Any, data: Any) -> None:
            with contextlib.suppress(OSError):
                super().save(key, data)

        def _load_index(self) -> Any:
            try:
                return super()._load_index()
            except Exception:  # noqa: BLE001  (whatever a pickle of any bytes raises)
                return {}

        def _dump(self, obj: Any) -> bytes:
            raw: bytes = super()._dump(obj)
            return hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).digest() + raw

        def _save_index(self, overloads: Any) -> None:
            raw = plain._dump(self, (self._source_stamp, overloads))
            with self._open_for_write(self._index_path) as file:
                file.write(pickle.dumps(self._version, protocol=-1) + raw)

        def _load_data(self, name: str) -> Any:
            raw = Path(self._data_path(name)).read_bytes()
            digest, raw = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
            if hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).digest() != digest:
                raise OSError(f"{name} is damaged")  # Numba compiles again, as if the file were not there
            return pickle.loads(raw)

    def files(cache_path: str, filename_base: str, source_stamp: Any) -> Any:
        kind = GuardedFiles if Path(cache_path).is_relative_to(CACHE_DIR) else plain
        return kind(cache_path, filename_base, source_stamp)

    if plain.__name__ == "IndexDataCacheFile":  # not guarded yet
        caching.IndexDataCacheFile = files
