"""`-hf`: the header of a model on a hub, here one of this process, is read by ranges; errors say what to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyggml.catalog import header_path
from pyggml.catalog.hub import _chosen
from pyggml.cli import group
from pyggml.errors import FormatError, PyggmlError
from pyggml.gguf import GGUFFile

REPO = "someone/Small-GGUF"


class Hub(ThreadingHTTPServer):
    """Files of one repository, and how many bytes of them were asked for."""

    files: dict[str, Path]
    n_sent = 0


class Answers(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the tree, information on paths, and ranges of files."""

    server: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _entry(self, path: str) -> dict[str, Any]:
        size = self.server.files[path].stat().st_size
        return {"type": "file", "path": path, "size": size, "oid": f"{size:040x}"}

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        """Answer paths-info."""
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = [self._entry(p) for p in self.server.files if p in text]
        self._answer(json.dumps(found).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        """Answer a tree, a repository, or a range."""
        path = self.path.partition("?")[0]
        if REPO not in path:
            self._answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            self._answer(
                json.dumps([self._entry(p) for p in self.server.files]).encode(), Content_Type="application/json"
            )
        elif path.startswith("/api/"):
            self._answer(
                json.dumps({"id": REPO, "sha": "a" * 40, "siblings": []}).encode(), Content_Type="application/json"
            )
        else:
            data = self.server.files[path.rpartition("/")[2]].open("rb")
            with data:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                data.seek(int(first))
                body = data.read(int(last) - int(first) + 1)
            self.server.n_sent += len(body)
            size = self.server.files[path.rpartition("/")[2]].stat().st_size
            self._answer(body, 206, Content_Range=f"bytes {first}-{last}/{size}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Return a hub with two quantisations of a model of the table, and a file that is none."""
    made = {f"small-{q}.gguf": header_path(f"qwen3-0.6b:{q}") for q in ("Q8_0", "Q4_K_M")}
    broken = tmp_path / "broken"
    broken.write_bytes(b"<html>" * 100)
    server = Hub(("127.0.0.1", 0), Answers)
    server.files = {"mmproj-Q8_0.gguf": broken, "broken-Q2_K.gguf": broken, **made}
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("tag", "name"), [("", "small-Q4_K_M.gguf"), (":q8_0", "small-Q8_0.gguf")])
def test_only_the_header_is_read_and_kept(hub: Hub, tag: str, name: str) -> None:
    """The local file has all tensors and the size of the whole; a second request reads nothing; llama.cpp's default is Q4_K_M."""
    path = header_path(f"hf:{REPO}{tag}")
    assert path.name == name
    assert path.stat().st_size == hub.files[name].stat().st_size
    with GGUFFile.open(path) as kept, GGUFFile.open(hub.files[name]) as whole:
        assert {n: (t.type, t.ne, t.offset) for n, t in kept.tensors.items()} == {
            n: (t.type, t.ne, t.offset) for n, t in whole.tensors.items()
        }
        assert dict(kept.metadata) == dict(whole.metadata)
    n_sent = hub.n_sent
    assert 0 < n_sent <= 4 << 20 < path.stat().st_size
    assert header_path(f"hf:{REPO}{tag}") == path
    assert hub.n_sent == n_sent


def test_a_header_longer_than_the_first_range(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """More is read until the header ends."""
    monkeypatch.setattr("pyggml.catalog.hub._FIRST_BYTES", 1000)
    with GGUFFile.open(header_path(f"hf:{REPO}")) as kept:
        assert len(kept.tensors) > 100


def test_plan_and_splits_take_it(hub: Hub) -> None:
    """`plan -hf` recommends command lines with -hf; `splits -hf` plans the same model."""
    line = [
        "plan",
        "-hf",
        f"{REPO}:Q8_0",
        "-dev",
        "gtx1650",
        "--host",
        "ddr4-3200x2,cores=8,64GiB",
        "-c",
        "4096",
        "--json",
    ]
    result = CliRunner().invoke(group, line)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)["plans"][0]
    assert made["command"].startswith(f"llama-server -hf {REPO}:Q8_0 -c 4096")
    line = ["splits", "-hf", f"{REPO}:Q8_0", "-dev", "sim:rtx4090-pcie4,cpu", "-c", "4096", "--batches", "1", "--json"]
    result = CliRunner().invoke(group, line)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["memory"]
    assert CliRunner().invoke(group, ["plan", "qwen3-0.6b", "-hf", REPO]).exit_code == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [(f"{REPO}:IQ1_S", "small-Q4_K_M.gguf"), (f"{REPO}:Q2_K", "no GGUF"), ("no/such", "no such repository")],
)
def test_what_is_not_there(hub: Hub, name: str, says: str) -> None:
    """A quantisation, file or repository that does not exist is an error with what to do."""
    with pytest.raises(FormatError, match=r".") as error:
        header_path(f"hf:{name}")
    assert says in f"{error.value} {error.value.hint}"


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer is one clear error with what to do instead."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PyggmlError, match="cannot be reached") as error:
        header_path(f"hf:{REPO}")
    assert "pyggml models" in error.value.hint
    with pytest.raises(PyggmlError, match="cannot be reached") as error:
        header_path("hf:unsloth/gpt-oss-20b-GGUF:Q8_0")
    assert error.value.hint == "plan with its published sizes: gpt-oss-20b:Q8_0"


def test_all_parts_of_a_split_model_are_wanted() -> None:
    """The first part stands for all; one that is missing is named."""
    parts = [f"Q8_0/m-Q8_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert _chosen("r", ["m-Q4_0.gguf", *reversed(parts)], "Q8_0") == parts
    with pytest.raises(FormatError, match="lacks Q8_0/m-Q8_0-00002"):
        _chosen("r", [parts[0], parts[2]], "")
