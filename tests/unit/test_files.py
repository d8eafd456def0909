"""Files that are read: only regular ones of a bounded size, whichever function reads them."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyggml import files
from pyggml.advisor.calibrate import read_bench
from pyggml.cli import run
from pyggml.commands._conversation import LineError, _read
from pyggml.errors import DeviceUnavailableError, FormatError
from pyggml.gguf import GGUFFile
from pyggml.hardware.files import read_profile
from pyggml.lab.formats import FORMATS, open_trace
from pyggml.replay import read_case
from pyggml.routing import RecordedRouting, UsedCounts
from pyggml.timeline import read_timeline

#: Everything that reads a file which a user names.
READERS: dict[str, Callable[[Path], Any]] = {
    "bench": read_bench,
    "case": read_case,
    "counts": lambda path: UsedCounts.parse(str(path)),
    "message": _read,
    "model": GGUFFile.open,
    "profile": read_profile,
    "routing": RecordedRouting.open,
    "timeline": read_timeline,
    "trace": open_trace,
} | {f"trace as {name}": partial(open_trace, format=name) for name in FORMATS}
COMMANDS = (
    "viz FILE", "viz FILE FILE", "calibrate gpt-oss-20b FILE -dev rtx3090", "replay FILE --trace FILE.out", "experts usage FILE",
    "savings gpt-oss-20b --routing counts:FILE", "splits gpt-oss-20b -dev FILE", "splits gpt-oss-20b --host FILE",
    "splits FILE",
)  # fmt: skip
ERRORS = (FormatError, DeviceUnavailableError, LineError)


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_a_folder_and_a_device_are_refused_at_once(name: str, tmp_path: Path) -> None:
    """No reader waits for a pipe that no one writes to, nor reads a device without an end."""
    pipe, endless, folder = tmp_path / "pipe.json", tmp_path / "endless.json", tmp_path / "folder.json"
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    folder.mkdir()
    for path, said in ((pipe, "not a regular file"), (endless, "not a regular file"), (folder, "this is a folder")):
        with pytest.raises(ERRORS, match=said):
            READERS[name](path)


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"model"}))
def test_a_file_that_is_too_large_is_refused_unread(name: str, tmp_path: Path) -> None:
    """What is larger than any trace or timeline is refused by its size."""
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(files.MOST_BYTES + 1)
    with pytest.raises(ERRORS, match=r"larger than 1,024 MiB"):
        READERS[name](path)


def test_what_a_compressed_file_holds_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that unpacks to more than is read is refused, and one that unpacks to less is read."""
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(b"[" + b" " * 1000 + b"1]"))
    assert files.read_json(path) == [1]
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(FormatError, match="larger than"):
        files.read_json(path)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_refuse_a_pipe_in_one_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that reads a file ends at once, with the reason."""
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    assert run(line.replace("FILE", str(path)).split()) in (1, 2)
    assert "not a regular file" in capsys.readouterr().err


def test_a_missing_file_is_said_by_its_path(tmp_path: Path) -> None:
    """Each reader names the file that is missing."""
    for reader in READERS.values():
        with pytest.raises(ERRORS, match=r"absent\.json.*no such file"):
            reader(tmp_path / "absent.json")
