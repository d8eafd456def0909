"""Tables for people: aligned, whole numbers, bars that give way, plain text where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

import pyggml as ggml
from pyggml.commands import _console
from pyggml.commands._tables import memory_table, too_large
from pyggml.memory_rows import Memory
from pyggml.plan_report import memory_fits


def printed(made: Table, width: int, *, is_terminal: bool = False) -> list[str]:
    """Return the lines of a table, as a console of some width prints it."""
    console = _console.report()
    console.file, console.width = io.StringIO(), width
    console._force_terminal = is_terminal
    console.print(made)
    return console.file.getvalue().split("\n")


@pytest.fixture
def made() -> Table:
    """A table of numbers, a bar, and words."""
    made = _console.table("Title", "layer", "copied", "", "names", right=("layer", "copied"), free=("", "names"))
    made.add_row("0", "1,234.5 MiB", _console.Bar(0.5), "blk.0.ffn_up_exps.weight and blk.0.ffn_gate_exps.weight")
    made.add_row("12", "2.0 KiB", _console.Bar(0.0), "x")
    return made


def test_wide(made: Table) -> None:
    """With room for all, numbers stand to the right, and a bar is ten columns long."""
    assert printed(made, 120) == [
        "Title",
        "layer       copied              names",
        "    0  1,234.5 MiB  █████░░░░░  blk.0.ffn_up_exps.weight and blk.0.ffn_gate_exps.weight",
        "   12      2.0 KiB  ░░░░░░░░░░  x",
        "",
    ]


def test_words_and_bars_give_way_to_numbers(made: Table) -> None:
    """With little room words are folded and bars left out, but no number is."""
    lines = printed(made, 46)
    assert max(map(len, lines)) <= 46
    assert lines[2].startswith("    0  1,234.5 MiB")
    assert len(lines) > 6
    text = "".join(line[18:].strip() for line in lines[2:])
    assert "blk.0.ffn_gate_exps.weight" in text.replace(" ", "")


def test_a_row_becomes_a_paragraph(made: Table) -> None:
    """With too little room for whole numbers and words each row is a paragraph of names and values; bars are left out."""
    assert printed(made, 40) == [
        "Title", "layer: 0  copied: 1,234.5 MiB", "  names: blk.0.ffn_up_exps.weight and", "  blk.0.ffn_gate_exps.weight",
        "layer: 12  copied: 2.0 KiB  names: x", "",
    ]  # fmt: skip
    assert max(map(len, printed(made, 24))) <= 24


def test_narrower_forms_of_a_table() -> None:
    """Headers are folded first, then gaps are narrower, then what is equal in all rows is said in the title."""
    made = _console.table("T", "model", "of device", "fits", right=("of device",))
    for share in ("10.5%", "100.0%"):
        made.add_row("gpt", share, "yes")
    assert printed(made, 23)[:3] == ["T", "model  of device  fits", "gpt        10.5%  yes"]
    assert printed(made, 19)[1:4] == ["           of", "model  device  fits", "gpt     10.5%  yes"]
    assert printed(made, 17)[1:4] == ["          of", "model device fits", "gpt    10.5% yes"]
    assert printed(made, 16) == ["T", "model: gpt", "fits: yes", "    of", "device", " 10.5%", "100.0%", ""]
    assert "10.5%" in printed(made, 12)[-3]


@pytest.mark.parametrize(("width", "text"), [(10, "████░░░░░░"), (5, "██░░░"), (4, ""), (0, "")])
def test_bars_are_shorter_or_not_there(width: int, text: str) -> None:
    """A bar keeps to its room, and says nothing where that is too little to tell a share."""
    assert _console.Bar(0.42).text(width) == text


def test_bars_end_where_their_room_does() -> None:
    """A share above 1 or below 0 fills its bar or leaves it empty."""
    assert _console.Bar(1.7).text(10) == "█" * 10
    assert _console.Bar(-1.0).text(10) == "░" * 10


def test_no_spaces_at_the_ends_of_lines(made: Table) -> None:
    """What goes to a file has no spaces at the ends of its lines, and no colours; a terminal gets the whole table."""
    lines = printed(made, 120)
    assert lines == [line.rstrip() for line in lines]
    assert "\x1b" not in "".join(lines)
    assert printed(made, 120, is_terminal=True)[1] != lines[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.0, "12.00 s"), (1.0, "1.00 s"), (0.0042, "4.20 ms"), (2.5e-6, "2.50 µs"), (0.0, "0.00 µs")],
)
def test_times(seconds: float, text: str) -> None:
    """A time has the unit in which people read it."""
    assert _console.n_seconds(seconds) == text


def test_memory_against_the_device() -> None:
    """Memory is shown as a part of the device's own; the CPU's counts only where its size is stated."""
    backends = [ggml.Sim("rtx4090-pcie4", data=False), ggml.CPU(threads=1)]
    rows = [Memory("SIM0", 3 << 30, 2 << 30, 1 << 30), Memory("CPU", 1 << 30, 0, 0)]
    assert printed(memory_table(memory_fits(rows, backends)), 120)[2:4] == [
        "SIM0         3.0 GiB   2.0 GiB  1.0 GiB  6.0 GiB      25.0%  ██░░░░░░░░",
        "CPU          1.0 GiB         -        -  1.0 GiB          -",
    ]
    alone = memory_table(memory_fits(rows[1:], backends))
    assert printed(alone, 120)[2].split() == ["CPU", "1.0", "GiB", "-", "-", "1.0", "GiB", "-"]
    assert "50.0%" in printed(memory_table(memory_fits(rows, backends, host_bytes=2 << 30)), 120)[3]


def test_memory_that_does_not_fit() -> None:
    """A device or a stated host that is too small is named with the bytes that are missing; what exactly fits, fits."""
    backends = [ggml.Sim("rtx4090-pcie4", data=False), ggml.CPU(threads=1)]
    fits = memory_fits([Memory("SIM0", 24 << 30, 1 << 30, 1 << 30), Memory("CPU", 1 << 40, 0, 0)], backends)
    assert too_large(fits) == ["Does not fit: SIM0 has 24.0 GiB, the plan needs 26.0 GiB: 2.0 GiB are missing."]
    told = [f.as_dict() for f in fits]
    assert [(m["backend"], m["fits"], m["missing_bytes"]) for m in told] == [("SIM0", False, 2 << 30), ("CPU", None, 0)]
    assert too_large(memory_fits([Memory("SIM0", 24 << 30, 0, 0)], backends)) == []
    (line,) = too_large(memory_fits([Memory("CPU", 3 << 30, 0, 0)], backends, host_bytes=2 << 30))
    assert line.startswith("Does not fit: CPU has 2.0 GiB")


@pytest.mark.parametrize(("total", "is_shown"), [(None, False), (8, True)])
def test_progress_counts_what_has_an_end(total: int | None, is_shown: bool) -> None:
    """Without a known end there is no count; "0/?" would say nothing."""
    bar = _console.progress()
    bar.add_task("working", total=total)
    console = _console.report()
    console.file, console.width = io.StringIO(), 80
    console.print(bar.get_renderable())
    assert ("0/8" in console.file.getvalue()) is is_shown
    assert "0/?" not in console.file.getvalue()
