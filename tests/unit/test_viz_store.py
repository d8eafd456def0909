"""Records written into a file and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from pyggml.clock import Span
from pyggml.errors import FormatError
from pyggml.record import (
    AllocRecord,
    AssignRecord,
    CallbackRecord,
    ComputeRecord,
    CopyRecord,
    EventRecord,
    MicroBatchRecord,
    ReadRecord,
    Record,
    SplitInput,
    SplitRecord,
    UsedExpertsRecord,
    WaitRecord,
)
from pyggml.timeline import read_timeline, write_timeline
from pyggml.viz.store import VERSION, pack_records, unpack_records

INPUT = SplitInput(
    "w",
    "experts",
    "CPU",
    "1.wgt0",
    "CPU_Mapped",
    "q8_0",
    (32, 8, 4, 1),
    1088,
    "y",
    "MUL_MAT_ID",
    "1.off",
    2,
    (2, 9, 1, 1),
)
EVERY: list[Record] = [
    MicroBatchRecord(3, 0, 1),
    AssignRecord("y", "MUL_MAT_ID", "GPU", "1.off", 0.5, 0.75, Span(0.0, 0.0)),
    SplitRecord(0, "GPU", 0, 2, 1, "y", "MUL_MAT_ID", "1.off", (INPUT,), (("1.off", 1),)),
    AllocRecord("y", "GPU", "GPU", 4096, "compute", 0.75, 0.875),
    WaitRecord(0, "event_wait", "GPU", 1.0, 1.0, Span(0.0, 0.0), 2),
    UsedExpertsRecord(0, "w", "ids", (1, 3), 4, 272, 1088),
    CopyRecord(0, "w", "CPU", "GPU", 272, 280, 1088, "experts", 1.0, 1.5, Span(0.0, 0.25)),
    ComputeRecord(0, "GPU", 2, "y", 1.5, 2.0, None, (("1.off", 1), ("2.sup", 1))),
    EventRecord(0, "GPU", 2, 2.0, 2.0),
    CallbackRecord(0, "y", True, False, 2.0, 2.5),
    ReadRecord("y", "GPU", 64, 2.5, 3.0, Span(0.25, 0.5)),
    WaitRecord(None, "synchronize", "GPU", 3.0, 3.5),
]


def again(packed: dict[str, Any]) -> list[Record]:
    """Return the records of what JSON made of a packed value."""
    return unpack_records(json.loads(json.dumps(packed)), "a.json")


def test_every_kind_comes_back() -> None:
    """Each kind of record is read back as it was, in the order in which it was written."""
    assert {type(r) for r in EVERY} == set(get_args(Record))
    assert again(pack_records(EVERY)) == EVERY


def test_a_file_has_both(tmp_path: Path) -> None:
    """A timeline has events for Perfetto, and beside them the records and what was said about them."""
    path = tmp_path / "t.json"
    write_timeline(path, EVERY, about={"options": "-c 64"})
    assert read_timeline(path) == (EVERY, {"options": "-c 64"})
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["cat"] for e in events if e["ph"] == "X"} == {"copy", "compute", "read", "wait"}


def test_strings_are_kept_once() -> None:
    """A name that a thousand records have is in the file once."""
    assert (
        json.dumps(pack_records([CallbackRecord(0, "a long name", True, True, 0.0, 0.0)] * 1000)).count("a long name")
        == 1
    )


def test_what_is_new_is_left_out() -> None:
    """Kinds and fields that a later version added do not stop an older one."""
    packed = pack_records(EVERY)
    packed["kinds"].append("DreamRecord")
    packed["columns"]["DreamRecord"] = {"of": [{"s": 0}]}
    packed["order"].insert(1, len(packed["kinds"]) - 1)
    packed["columns"]["MicroBatchRecord"]["mood"] = [1]
    assert again(packed) == EVERY


def test_a_later_layout_is_refused() -> None:
    """A file whose layout is newer says that a newer pyggml wrote it."""
    with pytest.raises(FormatError, match=f"layout {VERSION + 1}.*newer pyggml"):
        again({**pack_records(EVERY), "version": VERSION + 1})


@pytest.mark.parametrize("broken", ["order", "kinds", "strings", "columns", "version"])
def test_a_part_that_is_missing(broken: str) -> None:
    """Records of which a part is missing are an error of ours, not one of Python's."""
    packed = pack_records(EVERY)
    del packed[broken]
    with pytest.raises(FormatError, match=r"^a\.json: its records cannot be read"):
        again(packed)


def test_columns_that_do_not_fit() -> None:
    """Columns of different lengths, values of a wrong kind and fields that are missing are errors of ours."""
    short, wrong, missing = pack_records(EVERY), pack_records(EVERY), pack_records(EVERY)
    short["columns"]["CopyRecord"]["split"] = []
    wrong["columns"]["CopyRecord"]["virtual"] = [7]
    del missing["columns"]["CopyRecord"]["size_bytes"]
    for packed in (short, wrong, missing):
        with pytest.raises(FormatError):
            again(packed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a timeline"),
        ("{}", "not a timeline"),
        ('{"traceEvents": []}', "no records"),
        ('{"traceEvents": [], "pyggml": {"records": 3}}', "no records"),
    ],
)
def test_files_of_others(tmp_path: Path, text: str, said: str) -> None:
    """A file without records says what it is and how to get one."""
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=said):
        read_timeline(path)


def test_files_without_numbers_still_open() -> None:
    """A file of layout 1, whose records carry neither graph nor run, opens, and its records are numbered."""
    packed = json.loads(json.dumps(pack_records(EVERY)))
    packed["version"] = 1
    for columns in packed["columns"].values():
        for name in ("i_graph", "i_run", "i_clock", "i_experts"):
            columns.pop(name, None)
    splits = packed["columns"]["SplitRecord"]
    del splits["causes"], splits["inputs"][0][0][-1]  # fields that came later
    opened = unpack_records(packed, "an old file")
    assert [type(r) for r in opened] == [type(r) for r in EVERY]
    (split,) = [r for r in opened if isinstance(r, SplitRecord)]
    assert (split.causes, split.inputs) == ((), (replace(INPUT, ids_ne=()),))
    assert {(r.i_graph, r.i_run) for r in opened if isinstance(r, ComputeRecord)} == {(0, 0)}
    assert [r.i_experts for r in opened if isinstance(r, CopyRecord)] == [0]
