"""Compare two traces of a case, section by section (``FORMAT.md``, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["DECISIONS", "SECTIONS", "differences"]

#: Calls that are compared apart from the others, as the order between the two kinds is free.
MEMORY_CALLS = {"alloc", "free", "event_new", "event_free"}
STATE_SECTIONS = {
    "assign": ("tensor_backend",),
    "splits": ("n_splits", "splits"),
    "copies": ("n_copies", "cur_copy", "next_copy", "graph_inputs", "rewritten", "copies", "flags_changed"),
    "graph_copy": ("copy_nodes", "copy_leafs"),
    "sizes": ("buffer_sizes", "chunk_sizes"),
    "offsets": ("alloc",),
}
SECTIONS = ("build", *STATE_SECTIONS, "memory_calls", "calls", "results")
#: The sections that tell what was decided, without the calls made.
DECISIONS = ("build", *STATE_SECTIONS, "results")

#: A step's record: JSON values.
Record = Mapping[str, Any]


def _section(record: Record, section: str) -> Any:  # JSON values
    if section in STATE_SECTIONS:
        state = record.get("state", {})
        part = {key: state.get(key) for key in STATE_SECTIONS[section]}
        if section == "sizes":
            part["sizes"] = record.get("sizes")
        if section == "copies":
            part["synchronized"] = record.get("next_copy")
        return part
    if section == "build":
        return {key: record.get(key) for key in ("nodes", "leafs")}
    if section == "results":
        return record.get("result")
    calls = record.get("calls", ())
    if section == "memory_calls":
        return [call for call in calls if call[0] in MEMORY_CALLS]
    # where a host source lies is not a decision: the sixth entry of a write
    return [call[:5] if call[0] in ("set_async", "buf_set") else call for call in calls if call[0] not in MEMORY_CALLS]


def differences(want: Sequence[Record], got: Sequence[Record], sections: Sequence[str] = SECTIONS) -> list[str]:
    """Return a line for the first difference of each section of the first step that differs.

    Parameters
    ----------
    want, got : sequence of dict
        Records of the steps. Where ``want`` ends with an abort the comparison ends.

    Returns
    -------
    list of str
        Empty if they agree.
    """
    for i, expected in enumerate(want):
        if "abort" in expected:
            return []
        if i >= len(got):
            return [f"step {i} ({expected['op']}) is missing"]
        if "abort" in got[i]:
            return [f"step {i} ({expected['op']}) ended: {got[i]['abort']}"]
        lines = []
        for section in sections:
            first = next(_differences(_section(expected, section), _section(got[i], section), ""), None)
            if first is not None:
                where, a, b = first
                lines.append(f"step {i} ({expected['op']}) {section}{where}: expected {a!r}, got {b!r}")
        if lines:
            return lines
    return [] if len(got) <= len(want) else [f"{len(got) - len(want)} steps too many"]


def _differences(want: Any, got: Any, path: str) -> Iterator[tuple[str, Any, Any]]:  # JSON values
    if isinstance(want, Mapping) and isinstance(got, Mapping):
        for key in [*want, *(k for k in got if k not in want)]:
            if key in want and key in got:
                yield from _differences(want[key], got[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}", want.get(key, "<absent>"), got.get(key, "<absent>")
    elif isinstance(want, list) and isinstance(got, list):
        for i in range(max(len(want), len(got))):
            a = want[i] if i < len(want) else "<end>"
            b = got[i] if i < len(got) else "<end>"
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                yield from _differences(a, b, f"{path}[{i}]")
            elif a != b:
                yield f"{path}[{i}]", a, b
    elif want != got:
        yield path, want, got
