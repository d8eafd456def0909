"""The expert cache, write for write, against recordings of real llama.cpp (`oracle.moe_cache`).

`PYGGML_MOE_CACHE` names a folder with more recordings.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracle.moe_cache import Difference, main, read, replay

DATA = Path(__file__).parents[1] / "data" / "moe_cache"
MORE = os.environ.get("PYGGML_MOE_CACHE")
FILES = sorted([*DATA.glob("*.json.gz"), *(Path(MORE).glob("*.json.gz") if MORE else ())])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_write_is_as_recorded(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uploads with their slots, slot maps, copies past the cache, and all lines of counts."""
    assert main([str(path)]) == 0
    assert "agree" in capsys.readouterr().out


def _first(notes: list[Any], start: str) -> Any:
    return next(n for batch in notes[2:] for n in batch if str(n[0]).startswith(start))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: _first(d["notes"], "moe_cache.0").__setitem__(1, 0),
        lambda d: _first(d["notes"], "CUDA0#moe_cache")[3].reverse(),
        lambda d: _first(d["notes"], "COPY").__setitem__(0, "CUDA0#blk.0.ffn_up_exps.weight#0"),
        lambda d: _first(d["notes"], "CUDA0#blk.0.ffn_gate_exps.weight").__setitem__(2, 1),
        lambda d: d["notes"][5].remove(_first([[], [], d["notes"][5]], "CUDA0#moe_cache")),
        lambda d: d["log"].pop(),
        lambda d: d.update(log=[line.replace("slots", "slots ", 1).replace("64", "65") for line in d["log"]]),
        lambda d: d.update(budget=d["budget"] // 2),
        lambda d: d["routing"][10]["2"][0].reverse() or d["routing"][11]["1"][0].__setitem__(0, 31),
    ],
)
def test_any_change_is_found(change: Callable[[Any], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording that tells of one other write, map, count, budget or choice differs, and the status says so."""
    data = json.loads(gzip.decompress((DATA / "slru-b11739-3.json.gz").read_bytes()))
    change(data)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(data))
    assert main([str(path)]) == 1
    assert "recorded" in capsys.readouterr().out


def test_the_other_rule_does_not_fit() -> None:
    """Recordings of SLRU are not reproduced by LRU: which rule it is, is seen."""
    with pytest.raises(Difference, match="micro-batch"):
        replay(read(FILES[0]), "lru")


def test_what_is_no_recording_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of another kind is one line on stderr and status 1."""
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert main([str(path)]) == 1
    assert "no recording of an expert cache" in capsys.readouterr().err
