"""`pyggml make-moe`: what it writes, reports and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pyggml.cli import run
from pyggml.commands import make_moe as module
from pyggml.gguf import GGUFFile
from pyggml.makers.make_moe import PRESETS
from pyggml.makers.quantize import QUANTIZABLE
from pyggml.makers.random_model import ARCHS
from pyggml.types import Type


def test_random_with_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes, type and seed decide the bytes; --json tells path, bytes, sum and what was made."""
    out = tmp_path / "m.gguf"
    sizes = ["--layers", "3", "--experts", "16", "--used", "4", "--seed", "7"]
    assert run(["make-moe", str(out), "--arch", "qwen3moe", "--type", "Q8_0", *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sha256"] == "29deddd48a3f1717ffa80fefeb5b6cbd022c0dcd8cf3e33cf47f7a5a418ee556"
    assert report["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (report["path"], report["bytes"]) == (str(out), out.stat().st_size)
    assert (report["arch"], report["type"], report["experts"], report["used"]) == ("qwen3moe", "q8_0", 16, 4)


def test_upcycled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--from makes a mixture of a dense model, 8 experts of which 2 are used unless told otherwise."""
    dense, out = str(tmp_path / "d.gguf"), str(tmp_path / "m.gguf")
    assert run(["make-moe", dense, "--arch", "llama-dense", "--layers", "1", "--type", "q4_1"]) == 0
    assert run(["make-moe", out, "--from", dense, "--arch", "llama"]) == 0
    assert "8 experts, 2 used" in capsys.readouterr().out
    with GGUFFile.open(out) as file:
        assert file.tensors["blk.0.ffn_up_exps.weight"].ne[2] == 8
        assert file.tensors["blk.0.ffn_up_exps.weight"].type is Type.Q4_1


def test_preset_gives_way(tmp_path: Path) -> None:
    """What is given beside a preset wins."""
    out = str(tmp_path / "m.gguf")
    assert run(["make-moe", out, "--preset", "fine-grained", "--layers", "1", "--ff-exp", "64"]) == 0
    with GGUFFile.open(out) as file:
        assert file.metadata["llama.expert_count"] == PRESETS["fine-grained"].sizes.experts == 32
        assert file.tensors["blk.0.ffn_up_exps.weight"].ne == (512, 64, 32, 1)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--from", "absent.gguf"], 1, "no such file"),
        (["--from", "absent.gguf", "--layers", "2"], 2, "--layers does not work with --from"),
        (["--from", "absent.gguf", "--arch", "olmoe"], 2, "--arch does not work with --from"),
        (["--noise", "0.1"], 2, "--noise needs --from"),
        (["--arch", "gpt-5"], 2, "'gpt-5' is not one of"),
        (["--experts", "0"], 2, "0 is not in the range"),
        (["--used", "9"], 1, "9 of 8 experts"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    """Wrong options end with status 2, what cannot be done with 1, each with its reason; nothing is written."""
    assert run(["make-moe", str(tmp_path / "m.gguf"), *words]) == status
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there is one line, and status 1."""
    assert run(["make-moe", str(tmp_path / "absent" / "m.gguf")]) == 1
    assert "make the folder first" in capsys.readouterr().err


def test_dense_model_is_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dense model is not written over."""
    dense = str(tmp_path / "d.gguf")
    assert run(["make-moe", dense, "--arch", "llama-dense", "--layers", "1"]) == 0
    assert run(["make-moe", dense, "--from", dense]) == 2
    assert "the same file" in capsys.readouterr().err


def test_choices_are_the_librarys() -> None:
    """What the help offers is what the library can make; it is spelled out there so that help imports nothing."""
    assert list(ARCHS) == module._ARCHS
    assert [kind.name for kind in sorted(QUANTIZABLE)] == [kind.name for kind in sorted(Type[t] for t in module._TYPES)]
