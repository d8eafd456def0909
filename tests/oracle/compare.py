"""Comparison of a trace with one that was recorded from the real scheduler.

A trace agrees if every step that the real scheduler completed has the same state and the same calls. Where the real one
aborted, crashed or did something undefined, only the steps before count: what follows cannot be compared, and going on
is an improvement.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .traces import MEMORY_CALLS, STATE_SECTIONS

Step = dict[str, Any]

#: Versions of ggml with recorded traces, oldest first, by the end of their files. A case without a trace of a version
#: has that of the version before.
SUFFIXES = {
    "0.20": ".trace.json.gz",
    "0.21": ".trace021.json.gz",
    "0.26": ".trace026.json.gz",
    "0.27": ".trace027.json.gz",
}
FULL_VERSIONS = {"0.20": "0.20.2", "0.21": "0.21.0", "0.26": "0.26.0", "0.27": "0.27.0"}

_STEP_SECTIONS = {"build": ("nodes", "leafs"), "sizes": ("sizes",), "results": ("result",)}
SECTIONS = ("build", *STATE_SECTIONS, "memory_calls", "calls", "results", "aborts")


@dataclass
class Comparison:
    """What differs, by section, and how the replay of a broken case ended."""

    differences: dict[str, str] = field(default_factory=dict)
    #: "same" (both abort), "improved" (only the real one does), "undefined"; None where the real one works
    ending: str | None = None


def load(path: Path) -> Any:
    """Return the JSON value in a file, plain or gzip."""
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)


def recorded(case: Path, version: str) -> Any:
    """Return the trace of a case that was recorded from a version of ggml, or from the latest before it."""
    versions = list(SUFFIXES)
    for v in reversed(versions[: versions.index(version) + 1]):
        trace = case.with_name(case.name.removesuffix(".case.json.gz") + SUFFIXES[v])
        if trace.exists():
            return load(trace)
    raise FileNotFoundError(f"no trace of {case.name}")


def outcome(case: Any, version: str) -> str | None:
    """Return what a version of the real scheduler makes of a case: ok, wrong, abort, ..."""
    by_version = case.get("upstream_by_version", {})
    versions = list(SUFFIXES)
    for v in reversed(versions[: versions.index(version) + 1]):
        if FULL_VERSIONS[v] in by_version:
            found: str = by_version[FULL_VERSIONS[v]]
            return found
    return case.get("upstream")


def compare(expected: Any, got: Any, *, is_undefined: bool = False) -> Comparison:
    """Compare a trace with a recorded one.

    Parameters
    ----------
    is_undefined : bool
        What the real scheduler did in its last step was another thing every time.
    """
    result = Comparison()
    last = len(expected["steps"]) - 1
    for i, step in enumerate(expected["steps"]):
        if i >= len(got["steps"]):
            result.differences["aborts"] = f"step {i} ({step['op']}) is missing"
            break
        ours = got["steps"][i]
        if is_undefined and i == last:
            result.ending = "undefined"
            break
        if "abort" in step:
            result.ending = "same" if "abort" in ours else "improved"
            break
        if "abort" in ours:
            result.differences["aborts"] = f"step {i} ({step['op']}) ended the trace: {ours['abort']}"
            break
        theirs_by_section, ours_by_section = sections(step), sections(ours)
        for name in theirs_by_section.keys() | ours_by_section.keys():
            if name not in result.differences:
                found = difference(theirs_by_section.get(name), ours_by_section.get(name))
                if found is not None:
                    result.differences[name] = f"step {i} ({step['op']}){found}"
    return result


def sections(step: Step) -> dict[str, Any]:
    """Return the parts of a step that are compared, each by itself."""
    state = step.get("state") or {}
    parts: dict[str, Any] = {}
    for name, keys in STATE_SECTIONS.items():
        parts[name] = {key: state[key] for key in keys if key in state}
    for name, keys in _STEP_SECTIONS.items():
        parts.setdefault(name, {}).update({key: step[key] for key in keys if key in step})
    calls = step.get("calls", [])
    parts["memory_calls"] = [call for call in calls if call[0] in MEMORY_CALLS]
    parts["calls"] = [call for call in calls if call[0] not in MEMORY_CALLS]
    return parts


def difference(expected: Any, got: Any) -> str | None:
    """Return where two JSON values differ first, and how."""
    return None if _sorted_text(expected) == _sorted_text(got) else _first_difference(expected, got)


def _sorted_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _first_difference(expected: Any, got: Any) -> str | None:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(k for k in got if k not in expected)]:
            if key not in expected or key not in got:
                return f".{key}: {_short(expected.get(key))} expected, got {_short(got.get(key))}"
            found = _first_difference(expected[key], got[key])
            if found is not None:
                return f".{key}{found}"
        return None
    if isinstance(expected, list) and isinstance(got, list):
        for i, (a, b) in enumerate(zip(expected, got, strict=False)):
            found = _first_difference(a, b)
            if found is not None:
                return f"[{i}]{found}" if isinstance(a, dict) else f"[{i}]: {_short(a)} expected, got {_short(b)}"
        if len(expected) != len(got):
            i = min(len(expected), len(got))
            return f"[{i}]: {_short(expected[i:])} expected, got {_short(got[i:])}"
        return None
    is_same = type(expected) is type(got) and expected == got
    return None if is_same else f": {_short(expected)} expected, got {_short(got)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
