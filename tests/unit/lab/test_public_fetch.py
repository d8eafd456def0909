"""Public files, fetched by hash."""

from __future__ import annotations

import errno
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyggml import cli
from pyggml.errors import DownloadError, FormatError, PyggmlError
from pyggml.lab import public

DATA = b'{"a": 1}'


class Host:
    """A server for one file: its answer can be another one, or too short; it keeps what it was asked for."""

    def __init__(self) -> None:
        host = self
        self.asked: list[str] = []
        self.data, self.status, self.n_missing = DATA, 200, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                self.send_response(host.status)
                self.send_header("Content-Length", str(len(host.data)))
                self.end_headers()
                self.wfile.write(host.data[: len(host.data) - host.n_missing])

            def log_message(self, *words: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Give the only host that traces come from, with one trace."""
    host = Host()
    trace = public.PublicTrace("x/a.json", "o/r/c/a b.json", hashlib.sha256(DATA).hexdigest())
    monkeypatch.setattr(public, "TRACES", (trace,))
    monkeypatch.setattr(public, "_HOST", host.url)
    monkeypatch.setattr("time.sleep", lambda s: None)  # before the second try
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield host
    host.close()


def left(folder: Path) -> list[str]:
    """Return the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_once(tmp_path: Path, host: Host) -> None:
    """It is kept as published; it is fetched again only if its bytes are other ones."""
    told: list[tuple[str, int, int]] = []
    (path,) = public.fetch(tmp_path / "deep" / "folder", lambda *news: told.append(news))
    assert path.read_bytes() == DATA
    assert told == [("x/a.json", 0, 1), ("", 1, 1)]
    public.fetch(tmp_path / "deep" / "folder")
    assert host.asked == ["/o/r/c/a%20b.json"]
    path.write_bytes(DATA[:-1])
    public.fetch(tmp_path / "deep" / "folder")
    assert path.read_bytes() == DATA
    assert left(tmp_path) == ["deep/folder/x/a.json"]


def test_another_file_is_refused(tmp_path: Path, host: Host) -> None:
    """A file with another hash is asked for twice, then refused; nothing is left, and the error has its address."""
    host.data = b"other"
    with pytest.raises(FormatError, match="not the file of which results were published") as caught:
        public.fetch(tmp_path)
    assert caught.value.path == f"{host.url}o/r/c/a%20b.json"
    assert len(host.asked) == 2
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "n_missing", "reason"), [(404, 0, "404"), (200, 3, "3 more expected|IncompleteRead")]
)
def test_a_host_that_fails(tmp_path: Path, host: Host, status: int, n_missing: int, reason: str) -> None:
    """An answer without the file, or with half of it, is an error with file, address and reason; nothing is left."""
    host.status, host.n_missing = status, n_missing
    with pytest.raises(DownloadError, match=reason) as caught:
        public.fetch(tmp_path)
    assert (caught.value.name, caught.value.source) == ("x/a.json", f"{host.url}o/r/c/a%20b.json")
    assert "check the network" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert left(tmp_path) == []


def test_no_network(tmp_path: Path, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a network the command prints one line and what to try; nothing is left."""
    host.close()
    assert cli.run(["experts", "fetch", str(tmp_path)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "cannot download x/a.json" in told
    assert "check the network, then try again" in told
    assert "Traceback" not in told
    assert left(tmp_path) == []


def test_a_full_disk(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full is named with the file and what to do; no part of a file is left."""

    def full(self: object, url: str, output_file: str, store: object) -> None:
        Path(output_file).write_bytes(DATA[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pooch.HTTPDownloader.__call__", full)
    with pytest.raises(PyggmlError, match=r"a\.json: cannot write: No space left.*free some room"):
        public.fetch(tmp_path)
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be(tmp_path: Path, host: Host) -> None:
    """A file where the folder should be is one clear line."""
    (tmp_path / "file").touch()
    with pytest.raises(PyggmlError, match="cannot write"):
        public.fetch(tmp_path / "file" / "traces")
    assert host.asked == []


def test_the_folder_of_the_cache(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder, traces go to the user's cache."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    assert cli.run(["experts", "fetch"]) == 0
    assert left(tmp_path) == ["traces/x/a.json"]


def test_help_needs_no_downloader() -> None:
    """The program and the help of the command start without what downloads."""
    code = "import sys; from pyggml import cli; cli.run(['experts', 'fetch', '--help']); print({'pooch', 'requests'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
