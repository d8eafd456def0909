"""Plans of a server: slots, and logits for one token of each; plans of very long contexts."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyggml import cli
from pyggml.gguf import GGUFFile, ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.kv_cells import Cells

SIZES = Sizes(
    layers=2, embd=64, heads=2, kv_heads=1, head_dim=32, ff=64, ff_exp=32, experts=4, used=2, ctx=4096, vocab=8192
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a model with a vocabulary that is large beside the rest."""
    path = tmp_path_factory.mktemp("server") / "m.gguf"
    make_moe(path, Recipe("llama", tokenizer="none", sizes=SIZES))
    return path


def plan(model: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return the plan of `splits --json`."""
    common = ["-ub", "1024", "-b", "1024", "-fa", "on", "--batches", "1024,1"]
    assert cli.run(["splits", str(model), "--json", *common, *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def compute(told: dict[str, Any]) -> int:
    """Return the bytes of the device's compute buffer."""
    return int(next(m["compute"] for m in told["memory"] if m["buft"] == "SIM0"))


def test_a_server_reserves_logits_for_its_slots(model, capsys):
    """With -np N logits of N tokens are reserved, not of a whole micro-batch; the context is shared by the slots."""
    alone, one, four = (plan(model, capsys, "-c", "4096", *words) for words in ([], ["-np", "1"], ["-np", "4"]))
    logits = 8192 * 1024 * 4
    assert compute(alone) > logits
    assert compute(alone) - compute(one) > 0.8 * logits
    assert compute(four) < compute(alone)
    cache = [sum(m["cache"] for m in told["memory"]) for told in (alone, one, four)]
    assert cache[0] == cache[1] == cache[2]


def test_slots_may_share_one_cache(model, capsys):
    """-np -1 is llama-server's own choice, four slots over one cache, as -np 4 -kvu is."""
    auto, named = (plan(model, capsys, "-c", "4096", *words) for words in (["-np", "-1"], ["-np", "4", "-kvu"]))
    assert auto["memory"] == named["memory"]
    assert auto["memory"] != plan(model, capsys, "-c", "4096")["memory"]


@pytest.mark.parametrize(("words", "says"), [(["-np", "0"], "at least one slot"), (["-kvu"], "needs -np")])
def test_servers_that_cannot_be(words, says, model, capsys):
    """A server without slots, and one cache for a single sequence, are refused."""
    assert cli.run(["splits", str(model), *words]) == 2
    assert says in capsys.readouterr().err


def test_a_plans_memory_does_not_grow_with_the_context(model, tmp_path):
    """A context of two thousand million tokens, as a damaged header has it, is planned within 2 GiB of address space."""
    writer = GGUFWriter()
    with GGUFFile.open(model) as file:
        for key in file.metadata:
            entry = file.metadata.entry(key)
            if key == "llama.context_length":
                writer.add(key, ValueType.UINT32, 2**31 - 1)
            else:
                writer.add_raw(key, entry.type, entry.length, file.metadata.raw(key))
        for info in file.tensors.values():
            n = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            raw = file.data(info.name).copy()
            writer.add_tensor(info.name, info.type, info.ne[:n], partial(lambda r: [r.tobytes()], raw))
        writer.write(tmp_path / "long.gguf")
    done = subprocess.run(
        [sys.executable, "-m", "pyggml", "splits", str(tmp_path / "long.gguf"), "--batches", "4"],
        capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30,) * 2),
    )  # fmt: skip
    assert done.returncode == 3, done.stderr  # planned, and too large for the device
    assert "Traceback" not in done.stderr


def test_books_of_cells_grow_as_they_are_used():
    """A stream's book has the cells that were asked for, up to the stream's end, and what it held stays."""
    cells = Cells(100_000)
    n_first = len(cells.pos)
    assert n_first < 100_000
    cells.pos[3] = 7
    cells.grow(n_first + 1)
    assert len(cells.pos) == len(cells.seqs) == 2 * n_first
    assert (cells.pos[3], cells.pos[-1], cells.used_end) == (7, -1, 4)
    cells.grow(10**9)
    assert len(cells.copy().pos) == len(cells.pos) == 100_000
    assert cells.copy().n == 100_000
