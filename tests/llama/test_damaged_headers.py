"""Damaged headers in the child: an error of the tree or a plan, no hang, no orphan, and nothing left behind."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import pytest
from headers import write_known

from pyggml.errors import FormatError, GraphError, ModelError
from pyggml.gguf import GGUFFile
from pyggml.llama.library import find_llama
from pyggml.llama.process import LlamaProcess
from pyggml.llama.source import about_context, about_placement
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner

ARCHS = ("gemma3", "qwen35moe", "mamba2", "llama4", "bert", "deepseek32")
CONTEXT = ContextFlags(n_ctx=256, n_batch=32, n_ubatch=32)


def _damage(header: bytes, source: random.Random) -> bytes:
    """Return a header with one thing wrong: bytes changed, a piece cut out, put in twice or swapped, or an early end."""
    data = bytearray(header)
    kind = source.choice(("byte", "byte", "bytes", "number", "number", "cut", "twice", "swap", "end", "name", "name"))
    at = source.randrange(8, len(data) - 64)
    n = source.choice((1, 4, 8, 32))
    if kind == "byte":
        data[at] ^= 1 << source.randrange(8)
    elif kind == "bytes":
        data[at : at + n] = source.randbytes(n)
    elif kind == "number":
        data[at : at + 4] = source.choice((0, 1, 2, 3, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)).to_bytes(
            4, "little"
        )
    elif kind == "cut":
        del data[at : at + n]
    elif kind == "twice":
        data[at:at] = data[at : at + n]
    elif kind == "swap":
        data[at : at + n], data[at + 32 : at + 32 + n] = data[at + 32 : at + 32 + n], data[at : at + n]
    elif kind == "end":
        del data[at:]
    else:
        places = [
            i for i in range(len(data) - 8) if data[i : i + 4] in (b"blk.", b"attn", b"ffn_", b"toke", b"leng", b"head")
        ]
        data[source.choice(places) + source.randrange(4)] = source.choice(b"abcxyz._0")
    return bytes(data)


def _children() -> set[int]:
    """Return the processes whose parent this one is."""
    out = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                out.add(int(folder.name))
        except (OSError, IndexError):
            continue
    return out


def _try(numbers: range, folder: Path, process: LlamaProcess) -> dict[str, int]:
    """Plan with damaged headers, and count what they came to."""
    came: dict[str, int] = {}
    headers = {}
    for arch in ARCHS:
        path = write_known(arch, folder)
        with GGUFFile.open(path) as file:
            end = min(info.offset for info in file.tensors.values())
        headers[arch] = (path.read_bytes()[:end], path.stat().st_size - end)
    for number in numbers:
        source = random.Random(number)
        header, n_data = headers[source.choice(ARCHS)]
        path = folder / "damaged.gguf"
        path.write_bytes(_damage(header, source))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + n_data)
        try:
            with Planner.open(path, devices=["mock:CUDA0"], context=CONTEXT, graph="llama", data=False) as planner:
                planner.plan_batch(8)
            kind = "planned"
        except (FormatError, GraphError, ModelError) as error:
            kind = type(error).__name__
        came[kind] = came.get(kind, 0) + 1
        # llama.cpp itself, without what pyggml looks at before
        request = {
            "model": str(path), "placement": about_placement(PlacementFlags(), (), ()),
            "context": about_context(CONTEXT), "do": "facts",
        }  # fmt: skip
        try:
            process.ask(request)
        except ModelError:
            came["by llama.cpp"] = came.get("by llama.cpp", 0) + 1
    return came


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process and its children a folder for temporary files that no other test writes to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def _check(numbers: range, folder: Path, own_cache: Path, process: LlamaProcess) -> None:
    files = {p.name for p in Path(tempfile.gettempdir()).iterdir()}
    before, start = _children(), time.monotonic()
    came = _try(numbers, folder, process)
    process.close()
    assert came["by llama.cpp"] > len(numbers) // 4
    assert sum(n for kind, n in came.items() if kind != "by llama.cpp") == len(numbers)
    assert len(_children() - before) <= 1, "one child that planners share may be alive"
    assert time.monotonic() - start < 10 * len(numbers)
    kept = list((own_cache / "llama").glob("*")) if (own_cache / "llama").exists() else []
    assert all(p.suffix == ".z" for p in kept)
    assert len(kept) <= 2 * came.get("planned", 0)
    left = {p.name for p in Path(tempfile.gettempdir()).iterdir()} - files
    assert not [name for name in left if name.startswith(("tmp", "core"))]


@pytest.mark.usefixtures("own_temporary")
def test_a_few_damaged_headers(tmp_path: Path, own_cache: Path) -> None:
    """Twelve damages: each ends in a plan or in an error of the tree."""
    with LlamaProcess(find_llama(), timeout_s=20) as process:
        _check(range(12), tmp_path, own_cache, process)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("own_temporary")
def test_three_hundred_damaged_headers(tmp_path: Path, own_cache: Path) -> None:
    """Three hundred damages, likewise."""
    with LlamaProcess(find_llama(), timeout_s=20) as process:
        _check(range(300), tmp_path, own_cache, process)
