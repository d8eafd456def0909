"""Every recorded case in which upstream breaks has a test of our answer, and a recording of upstream's."""

from __future__ import annotations

import pytest

from . import test_better_data, test_better_errors
from .better import BROKEN, CASES, COVERED, case_path, load, replayed


def _outcomes(name: str) -> dict[str, str]:
    """What becomes of a case upstream, by version."""
    case = load(case_path(name))
    return {"0.20.2": case.get("upstream", "ok"), **case.get("upstream_by_version", {})}


NAMES = sorted(path.name.removesuffix(".case.json.gz") for path in CASES.glob("*.case.json.gz"))
BREAKING = [name for name in NAMES if BROKEN & set(_outcomes(name).values())]


def test_every_breaking_case_is_answered() -> None:
    """The tests of the two other files name each case that is wrong, undefined, an abort or a crash, and no other."""
    assert sorted(COVERED) == BREAKING
    for test in COVERED.values():
        assert hasattr(test_better_data, test) or hasattr(test_better_errors, test)


@pytest.mark.parametrize("name", BREAKING)
def test_upstream_breaks_as_recorded(name: str) -> None:
    """Where upstream aborts or crashes, its recorded trace ends so; ours of the same case goes on, or ends with our error."""
    suffixes = {"0.20.2": "trace", "0.21.0": "trace021", "0.26.0": "trace026", "0.27.0": "trace027"}
    dialects = {"0.20.2": "0.20", "0.21.0": "0.21", "0.26.0": "0.26", "0.27.0": "0.27"}
    for version, outcome in _outcomes(name).items():
        path = case_path(name).with_name(f"{name}.{suffixes[version]}.json.gz")
        if outcome in ("abort", "crash") and path.exists():
            assert load(path)["steps"][-1]["abort"]["kind"] == outcome
        ours = replayed(name, dialects[version])
        is_refused = [r for r in ours if "abort" in r]
        assert not is_refused or is_refused == [ours[0]], "only a scheduler that cannot be made ends a replay"
        assert is_refused or len(ours) == len(load(case_path(name))["steps"]) + 1
