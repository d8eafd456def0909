"""Where compiled kernels are kept: a folder of the user's cache, named after a hash of the kernels' sources.

Numba checks only the file that holds a function, not the files of what it calls, so one changed source must give a new
folder. This module is imported before Numba, because Numba reads the folder from the environment once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from platformdirs import user_cache_path

#: Folders of older sources are removed after so long without use.
KEEP_S = 30 * 24 * 3600


def source_hash() -> str:
    """Return a short hash over all sources beside this file."""
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
