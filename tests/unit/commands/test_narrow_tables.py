"""Commands in terminals of 50 to 80 columns: no line is too wide, and no number is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyggml.cli import group
from pyggml.commands import _console
from pyggml.lab.formats import save_trace
from pyggml.lab.trace import Phase, TraceBuilder

MACHINE = "-dev rtx3090 --host ddr4-3200x2,cores=8,64GiB"
COMMANDS = {
    "lists": f"splits gpt-oss-120b {MACHINE} -ncmoe 20,24 -c 8192 -ub 2048 -p 2048 -n 128",
    "splits": f"splits gpt-oss-20b {MACHINE} -ncmoe 12 -c 4096",
    "virtual": "splits gpt-oss-20b -ncmoe 12 -c 4096 --batches 64,1 --generate 4 --moe-cache-mib 2000",
    "savings": "savings gpt-oss-20b --batches 1,64",
    "compare": "experts compare TRACE --capacities 4,8",
    "usage": "experts usage TRACE",
    "plan": f"plan gpt-oss-20b {MACHINE} -c 4096 --plans 2",
}
#: Lines that are pasted, and one of times.
ELSE = ("llama-server", "pyggml splits", "settings predicted", "Replayed")
#: A number with its unit.
NUMBER = re.compile(r"(?<![\w.-])\d[\d,.]*\d(?: (?:[KMGT]iB|B|ms|s|µs|of \d+)\b|%)?")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routing trace of two layers."""
    builder = TraceBuilder("made")
    for step in range(12):
        for layer in range(2):
            builder.add(0, step, Phase.DECODE, layer, [[step % 8, (step + 1 + layer) % 8]])
    path = tmp_path_factory.mktemp("traces") / "trace.jsonl"
    save_trace(builder.finish(n_layer=2, n_expert=8, n_used=2), path)
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_are_whole_in_narrow_terminals(name: str, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of the wide tables is in those of 80, 60 and 50 columns, with its unit; only command lines are longer."""
    told: dict[int, str] = {}
    for width in (160, 80, 60, 50):
        monkeypatch.setattr(_console, "PIPE_WIDTH", width)
        done = CliRunner().invoke(group, COMMANDS[name].replace("TRACE", str(trace)).split())
        assert done.exit_code in (0, 3), done.output
        lines = [line for line in done.stdout.splitlines() if not any(word in line for word in ELSE)]
        assert all(len(line) <= width for line in lines), max(lines, key=len)
        told[width] = "\n".join(lines)
    start = told[160].index("\n")
    for width in (80, 60, 50):
        lost = set(NUMBER.findall(told[160][start:])) - set(NUMBER.findall(" ".join(told[width].split())))
        assert not lost, (width, lost)
