"""What commands do with files that are not models, with outputs that would destroy something, and with names that hide escapes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pyggml import cli
from pyggml.errors import FormatError, visible
from pyggml.gguf import GGUFFile, ValueType, require_model
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.types import Type

SIZES = Sizes(layers=1, embd=64, heads=2, kv_heads=1, head_dim=32, ff=64, ff_exp=32, experts=4, used=2)
RUN = ["--tokens", "5,6,7", "-n", "1", "--device", "none", "-t", "1"]
ESCAPE = "\x1b]0;PWNED\x07\x1b[2J"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tiny model."""
    path = tmp_path_factory.mktemp("files") / "tiny.gguf"
    make_moe(path, Recipe("llama", sizes=SIZES))
    return path


# -- what is no model ---------------------------------------------------------

#: Keys, tensors: what the error calls the file.
MISTAKEN: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "mmproj": ({"general.type": "mmproj", "general.architecture": "clip"}, ("v.blk.0.attn_q.weight",), "mmproj"),
    "older mmproj": ({"general.architecture": "clip"}, ("v.blk.0.attn_q.weight",), "mmproj"),
    "LoRA": ({"general.type": "adapter", "general.architecture": "llama"}, ("blk.0.attn_q.weight.lora_a",), "LoRA adapter"),
    "older LoRA": ({"general.architecture": "llama"}, ("blk.0.attn_q.weight.lora_a",), "LoRA adapter"),
    "imatrix": ({"general.type": "imatrix"}, ("blk.0.attn_q.weight.in_sum2",), "importance matrix"),
    "older imatrix": ({"imatrix.datasets": "text"}, ("blk.0.attn_q.weight.in_sum2",), "importance matrix"),
    "vocabulary": ({"general.architecture": "llama"}, (), "vocabulary without weights"),
    "control vector": ({"general.architecture": "controlvector"}, ("direction.1",), "control vector"),
    "image model": ({"general.architecture": "flux"}, ("img_in.weight",), "image or video model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKEN)
@pytest.mark.parametrize("words", [["run", "-p", "hi"], ["run", "-i"], ["splits"]], ids=" ".join)
def test_files_of_other_kinds_are_called_what_they_are(kind, words, tmp_path, capsys):
    """A projector, an adapter, an importance matrix and the like given as a model is one line that says what it is."""
    keys, tensors, says = MISTAKEN[kind]
    writer = GGUFWriter()
    for key, value in keys.items():
        writer.add(key, ValueType.STRING, value)
    for name in tensors:
        writer.add_tensor(name, Type.F32, (32,), partial(lambda: [np.ones(32, np.float32).tobytes()]))
    path = tmp_path / "f.gguf"
    writer.write(path)
    assert cli.run([words[0], str(path), *words[1:], "--device", "none"]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert "not a language model" in error
    assert "incomplete" not in error


def test_models_are_models(model):
    """A model is nothing else."""
    with GGUFFile.open(model) as file:
        require_model(file)


# -- outputs ------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--html", "--timeline", "--dump-logits", "--record-routing"])
@pytest.mark.parametrize("link", [False, True], ids=["by name", "by link"])
def test_the_model_is_never_written(option, link, model, tmp_path, capsys):
    """An output that is the model, by whatever name, is refused before anything is computed; the model stays as it is."""
    own = tmp_path / "own.gguf"
    shutil.copy(model, own)
    path = own
    if link:
        path = tmp_path / "link"
        path.symlink_to(own)
    assert cli.run(["run", str(own), *RUN, option, str(path)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert own.read_bytes() == model.read_bytes()


def test_parts_of_the_model_are_never_written(model, tmp_path, capsys):
    """Nor are the other parts of a model of several files."""
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    for part in (first, second):
        shutil.copy(model, part)
    assert cli.run(["splits", str(first), "--html", str(second)]) == 2
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "plan IN -dev rtx3060 --html IN",
        "viz IN -o IN",
        "viz other.json IN -o IN",
        "calibrate qwen3-0.6b IN -o IN",
        "calibrate IN runs -o IN",
        "replay IN --trace IN",
    ],
)
def test_what_a_command_reads_is_never_written(line, model, tmp_path, capsys):
    """A model, a timeline or measurements stay as they are, and a folder is no file."""
    own = tmp_path / "in"
    shutil.copy(model, own)
    assert cli.run([str(own) if word == "IN" else word for word in line.split()]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert own.read_bytes() == model.read_bytes()
    words = [str(own) if word == "IN" else word for word in line.split()]
    assert cli.run([*words[:-1], str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_two_outputs_need_two_files(model, tmp_path, capsys):
    """Two outputs in one file, of which one would be lost, are refused."""
    path = tmp_path / "out"
    for other in (path, tmp_path / "." / "out"):
        assert cli.run(["run", str(model), *RUN, "--html", str(path), "--timeline", str(other)]) == 2
        assert "given for two outputs" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--timeline", "--dump-logits"])
def test_a_full_disk_leaves_what_was_there(option, model, tmp_path, monkeypatch, capsys):
    """If writing fails, the older file stays, no half one is left, the error has the path, and the report is printed."""
    path = tmp_path / "out.npz"
    path.write_text("older")

    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    assert cli.run(["run", str(model), *RUN, option, str(path)]) == 1
    told = capsys.readouterr()
    assert f"{path}: cannot write: No space left on device" in told.err
    assert path.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
    if option != "--dump-logits":
        assert "3 tokens" in told.out or "prompt" in told.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_device_is_named(model, capsys):
    """What is no regular file is written itself, and its error has the path."""
    assert cli.run(["run", str(model), *RUN, "--html", "/dev/full"]) == 1
    told = capsys.readouterr()
    assert "/dev/full: cannot write: No space left" in told.err
    assert "prompt" in told.out


# -- names with escapes -------------------------------------------------------


def named(model: Path, path: Path, where: str) -> Path:
    """Write a model with an escape sequence in one of its names."""
    writer = GGUFWriter()
    with GGUFFile.open(model) as file:
        for key in file.metadata:
            entry = file.metadata.entry(key)
            if where == "name" and key == "general.name":
                continue
            if where == "architecture" and key == "general.architecture":
                continue
            writer.add_raw(key, entry.type, entry.length, file.metadata.raw(key))
        if where == "name":
            writer.add("general.name", ValueType.STRING, ESCAPE)
        if where == "architecture":
            writer.add("general.architecture", ValueType.STRING, ESCAPE)
        if where == "key":
            writer.add(ESCAPE, ValueType.STRING, "x")
            writer.add_array("llama.attention.head_count_kv" + ESCAPE, ValueType.STRING, ["x"])
        for info in file.tensors.values():
            n = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            writer.add_tensor(
                info.name, info.type, info.ne[:n], partial(lambda r: [r.tobytes()], file.data(info.name).copy())
            )
        if where == "tensor":
            writer.add_tensor(ESCAPE, Type.F32, (32,), lambda: [np.ones(32, np.float32).tobytes()])
        writer.write(path)
    return path


@pytest.mark.parametrize("where", ["name", "architecture", "key", "tensor"])
def test_escapes_in_names_do_not_reach_a_terminal(where, model, tmp_path):
    """On a terminal, escape sequences in names of a file are spelled out, in reports and in errors."""
    path = named(model, tmp_path / "m.gguf", where)
    seen: list[bytes] = []

    def read(fd: int) -> bytes:
        seen.append(os.read(fd, 1 << 16))
        return b"."

    pty.spawn(
        [sys.executable, "-m", "pyggml", "splits", str(path), "--batches", "4", "--graph", "built", "--device", "none"],
        read,
    )
    told = b"".join(seen)
    assert b"\x1b]0;" not in told
    assert b"\x07" not in told
    if where in ("name", "tensor"):
        assert rb"\x1b]0;PWNED" in told


def test_escapes_in_json_are_escaped(model, tmp_path, capsys):
    """JSON spells them as JSON does."""
    path = named(model, tmp_path / "m.gguf", "name")
    assert cli.run(["splits", str(path), "--batches", "4", "--device", "none", "--json"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert json.loads(text)["model"]["name"] == ESCAPE


def test_control_characters_are_spelled_out():
    """Escapes, bells, carriage returns, C1 controls and lone surrogates are spelled; letters of any script stay."""
    assert visible("a\x1b[2J\x07\r\x9b\udcff") == r"a\x1b[2J\x07\r\x9b\udcff"
    assert visible("日本語 é\n\tx") == "日本語 é\n\tx"
    assert str(FormatError("f\x1b", "m")) == r"f\x1b: m"


@pytest.mark.parametrize(
    "words", [["savings", "a\u200d\x1b[2J" + "x" * 300], ["splits", "--no-\x1b[2J"], ["sp\x1b[2J"]]
)
def test_escapes_in_what_is_typed_do_not_reach_a_terminal(words, capsys):
    """A name that is too long for a file, an option and a command are spelled out where an error repeats them."""
    assert cli.run(words) in (1, 2)
    told = capsys.readouterr().err
    assert r"\x1b[2J" in told
    assert not {c for c in told if not c.isprintable() and c != "\n"}
