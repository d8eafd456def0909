"""Public files, fetched by hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import urllib.request

import pytest

from pyggml.errors import FormatError, PyggmlError
from pyggml.lab import public


def test_fetched_files_are_checked(tmp_path, monkeypatch):
    """A file with another hash is refused and not kept; the right one is kept, and not fetched again; no network is one line."""
    data = b'{"a": 1}'
    good = public.PublicTrace("x/a.json.gz", "o/r/c/a b.json", hashlib.sha256(data).hexdigest())
    asked = []
    monkeypatch.setattr(public, "TRACES", (good,))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(answers.pop()))
    answers = [data, b"other"]
    with pytest.raises(FormatError, match="another file"):
        public.fetch(tmp_path)
    assert not (tmp_path / "x").exists()
    (path,) = public.fetch(tmp_path)
    assert gzip.decompress(path.read_bytes()) == data
    public.fetch(tmp_path)
    assert asked == ["https://raw.githubusercontent.com/o/r/c/a%20b.json"] * 2
    path.unlink()

    def refuse(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(PyggmlError, match="no route"):
        public.fetch(tmp_path)
