"""What a device waited for."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pyggml.viz.waits import Activity, device_times, merge, overlap, subtract

SPANS = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda x: (x[0], x[0] + x[1]))
ACTIVITIES = st.builds(
    lambda what, src, dst, span: Activity(what, src, dst if what not in ("compute", "read") else "", *span),
    st.sampled_from(["experts", "weight", "activation", "input", "compute", "read", "plan"]),
    st.sampled_from(["GPU", "CPU", "GPU1"]),
    st.sampled_from(["GPU", "CPU", "GPU1"]),
    SPANS,
)


def moments(intervals: list[tuple[int, int]]) -> set[int]:
    """Return the unit steps that intervals cover."""
    return {t for a, b in intervals for t in range(a, b)}


@given(st.lists(SPANS), st.lists(SPANS))
def test_sets_of_moments(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    """Unions, common parts and differences of intervals are those of the moments in them."""
    p, q = merge(a), merge(b)
    assert moments(p) == moments(a)
    assert all(x[1] < y[0] for x, y in pairwise(p))
    assert moments(overlap(p, q)) == moments(a) & moments(b)
    assert moments(subtract(p, q)) == moments(a) - moments(b)


@given(st.lists(ACTIVITIES, max_size=30), st.lists(SPANS, max_size=4))
def test_parts_add_up(activities: list[Activity], windows: list[tuple[int, int]]) -> None:
    """Computing and waits of a device are the whole of the time that is looked at; it computes while it computes."""
    looked_at = merge(windows)
    for spent in device_times(activities, ["GPU", "CPU"], looked_at):
        assert spent.total == len(moments(looked_at)) == spent.computing + sum(spent.waits.values())
        own = [(a.start, a.end) for a in activities if a.what == "compute" and a.src == spent.backend]
        assert spent.computing == len(moments(own) & moments(looked_at))
        assert all(n > 0 for n in spent.waits.values())


def test_the_nearest_cause_counts() -> None:
    """Of what goes on at once bytes to the device come first, then what is read of it, then the work of others."""
    activities = [
        Activity("compute", "CPU", "", 0, 50),
        Activity("read", "GPU", "", 0, 20),
        Activity("experts", "CPU", "GPU", 0, 10),
        Activity("compute", "GPU", "", 60, 100),
    ]
    (spent,) = device_times(activities, ["GPU"], [(0, 100)])
    assert spent == ("GPU", 100, 40, {"experts": 10, "out": 10, "compute CPU": 30, "host": 10})


def test_copies_elsewhere() -> None:
    """Bytes between others, and those that leave a device, are told apart from those that come to it."""
    activities = [
        Activity("activation", "GPU", "GPU1", 0, 10),
        Activity("activation", "CPU", "GPU1", 10, 30),
        Activity("weight", "CPU", "GPU", 30, 60),
    ]
    spent = {s.backend: s.waits for s in device_times(activities, ["GPU", "GPU1"], [(0, 60)])}
    assert spent == {
        "GPU": {"weight": 30, "out": 10, "elsewhere": 20},
        "GPU1": {"activation": 30, "elsewhere": 30},
    }
