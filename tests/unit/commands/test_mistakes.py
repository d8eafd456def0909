"""Typical mistakes: the line that a user sees, which says what to do next, and the exit status."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pyggml import cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.types import Type

SMALL = "sim:custom:1MiB,400GB/s,12GB/s,cpu"
#: The words, the status, what went wrong, what to do next.
MISTAKES = {
    "path": ("splits no/where.gguf", 1, "there is no such file", "`pyggml models` lists"),
    "flag": ("splits MODEL --n-cpu-mo 3", 2, "No such option '--n-cpu-mo'", "'--n-cpu-moe'"),
    "command": ("split MODEL", 2, "No such command 'split'", "'splits'"),
    "two devices in one word": ("splits MODEL -dev 2xrtx3090", 1, "no such device", "name each card: rtx3090,rtx3090"),
    "device": ("splits MODEL -dev rtx309", 1, "no such device", "did you mean rtx3090"),
    "llama.cpp's device": ("splits MODEL -dev CUDA0,cpu", 1, "CUDA0: no such device", "give the card, such as rtx3090"),
    "no models": (
        "models gtp-oss",
        1,
        "no model's name or architecture contains 'gtp-oss'",
        "did you mean gpt-oss-20b",
    ),
    "runs": (
        "calibrate gpt-oss-20b MODEL",
        1,
        "not UTF-8 text at byte",
        "-o json",
    ),
    "model": ("splits gpt-os-120b", 1, "no such model in the table", "such as gpt-oss-120b"),
    "card": (f"run MODEL -p a -dev {SMALL}", 1, "1.0 MiB available", "(-ngl)"),
    "plan": (f"splits MODEL -dev {SMALL} --batches 4", 3, "Does not fit: SIM0 has 1.0 MiB", "are missing"),
    "regex": ("splits MODEL -ot blk.(=CPU", 1, "-ot: 'blk.('", "escape dots and brackets"),
    "list": ("splits MODEL --batches 1,x", 2, "--batches 1,x", "give numbers above 0, separated by commas"),
    "port": ("run MODEL -p a -dev rpc:127.0.0.1:1,cpu", 1, "cannot connect", "is rpc-server running there?"),
    "address": ("splits https://example.com/m.gguf", 1, "there is no such file", "-hf USER/MODEL:QUANT"),
    "no weights": ("run gpt-oss-20b -p a", 1, "no such file", "has no weights"),
    "chosen": ("plan gpt-oss-20b -dev rtx3060 -ctk q8_0", 2, "-ctk: a plan chooses -ctk", "--kv-types"),
    "chosen, too": ("plan gpt-oss-20b -dev rtx3060 -ncmoe 3", 2, "a plan chooses -ncmoe", '--compare "-ncmoe ..."'),
    "compared": ("plan gpt-oss-20b -dev rtx3060 --compare '-ot (=CPU'", 1, "-ot: '('", "escape dots and brackets"),
    "compared context": (
        "plan gpt-oss-20b -dev rtx3060 --compare '-c 512'",
        2,
        "the plan's context is 8192",
        "--context 512",
    ),
    "compared slots": ("plan gpt-oss-20b -dev rtx3060 --compare '-np 4'", 2, "-np is the same for all rows", "splits"),
    "compared draft": ("plan gpt-oss-20b -dev rtx3060 --compare '-md a.gguf'", 2, "does not count it", "--margin GiB"),
    "shares": ("plan gpt-oss-20b -dev rtx3060 --compare '-ts 3/1'", 1, "-ts 3,1 does not fit", "one share for each"),
    "infinite shares": ("plan gpt-oss-20b -dev rtx3060 --compare '-ts inf,1'", 2, "-ts inf,1", "such as 3,1"),
    "infinite margin": ("plan gpt-oss-20b -dev rtx3060 --margin inf", 2, "'--margin'", "'inf' is not a number"),
    "damaged": ("splits DAMAGED", 1, "at byte", "download it again"),
    "extra": ("splits MODEL -dev libggml:CPU,cpu", 1, "no ggml library is installed", "pip install 'libggml-python"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model larger than a MiB, and its beginning."""
    folder = tmp_path_factory.mktemp("mistakes")
    make_moe(
        folder / "moe.gguf", Recipe("llama", Type.F16, sizes=Sizes(layers=2, experts=8, used=2, embd=128, ff_exp=256))
    )
    (folder / "damaged.gguf").write_bytes((folder / "moe.gguf").read_bytes()[:3000])
    return {"MODEL": str(folder / "moe.gguf"), "DAMAGED": str(folder / "damaged.gguf")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_what_to_do_next(
    name: str,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One line, no traceback: what is wrong, and what to try."""
    line, status, wrong, next_step = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYGGML_LIBGGML", raising=False)
    if name == "extra":
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert cli.run([files.get(word, word) for word in shlex.split(line)]) == status
    seen = capsys.readouterr()
    told = " ".join((seen.err if status != 3 else seen.out).split())
    assert wrong in told
    assert next_step in told
    assert "Traceback" not in told
