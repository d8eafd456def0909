"""Which computing of which graph a record belongs to."""

from __future__ import annotations

from dataclasses import replace

from pyggml.record import AssignRecord, ComputeRecord, CopyRecord, MicroBatchRecord, Record, SplitRecord
from pyggml.viz.runs import Runs


def copy(split: int, tensor: str = "x") -> CopyRecord:
    """Return a copy for a split."""
    return CopyRecord(split, tensor, "CPU", "GPU", 0, 4, 4, "activation", 0.0, 0.0)


def work(split: int, first: str = "y") -> ComputeRecord:
    """Return the work of a split, from a node on."""
    return ComputeRecord(split, "GPU", 1, first, 0.0, 0.0)


def plan(*splits: int, op: str = "ADD") -> list[Record]:
    """Return what is recorded when a graph of so many splits is planned."""
    nodes: list[Record] = [AssignRecord(f"y{i}", op, "GPU", "2.sup", float(i)) for i in splits]
    return nodes + [SplitRecord(i, "GPU", i, i + 1, 1, f"y{i}", op, "2.sup", ()) for i in splits]


def runs_of(*records: Record) -> tuple[list[int], Runs]:
    """Return the run of each record, and what followed them."""
    followed = Runs()
    found = []
    for record in records:
        followed.take(record)
        found.append(followed.run)
    followed.settle()
    return found, followed


def test_sessions_say_where_a_batch_begins() -> None:
    """A batch of tokens is one run, whatever is in it."""
    found, followed = runs_of(MicroBatchRecord(4, 0, 1), copy(0), work(0), work(1), MicroBatchRecord(1, 4, 1), work(0))
    assert found == [0, 0, 0, 0, 1, 1]
    assert [r.batch and r.batch.n_tokens for r in followed.runs] == [4, 1]


def test_a_split_again_is_a_new_run() -> None:
    """Without word of a session a run begins with a split that was computed before, or a copy for it."""
    assert runs_of(copy(0), work(0), copy(1), work(1), copy(0), work(0))[0] == [0, 0, 0, 0, 1, 1]
    assert runs_of(copy(0), copy(0, "z"), work(0), copy(0), copy(0, "z"), work(0))[0] == [0, 0, 0, 1, 1, 1]
    assert runs_of(work(0), work(0), work(0))[0] == [0, 1, 2]


def test_parts_of_a_split_are_one_run() -> None:
    """Under an eval callback a split is computed in parts, which start at different nodes."""
    assert runs_of(work(0, "a"), work(0, "b"), work(1, "c"), work(0, "a"))[0] == [0, 0, 0, 1]


def test_graphs_are_known_once() -> None:
    """A graph that is planned again at another time is the same; one of another kind is not."""
    found, followed = runs_of(*plan(0, 1), work(0), work(1), *plan(0, 1), work(0), *plan(0, op="MUL"), work(0))
    assert found[2:] == [-1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert [r.graph for r in followed.runs] == [0, 0, 1]
    assert [len(g.splits) for g in followed.graphs] == [2, 1]


def test_times_do_not_make_a_graph_another() -> None:
    """When a node was assigned is no part of the graph."""
    first = plan(0)
    later = [replace(r, start_s=9.0, end_s=9.5) if isinstance(r, AssignRecord) else r for r in first]
    _, followed = runs_of(*first, work(0), *later, work(0))
    assert [r.graph for r in followed.runs] == [0, 0]


def test_graphs_that_only_reserved_are_dropped() -> None:
    """What was planned and never computed goes, unless nothing was computed at all."""
    _, followed = runs_of(*plan(0, 1, 2), *plan(0, 1), work(0), work(1))
    followed.forget_unused()
    assert [len(g.splits) for g in followed.graphs] == [2]
    assert [r.graph for r in followed.runs] == [0]
    _, planned = runs_of(*plan(0, 1, 2), *plan(0, 1))
    planned.forget_unused()
    assert [len(g.splits) for g in planned.graphs] == [3, 2]
