"""Each trap of a routing trace is named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from samples import bigmoeonedge, jsonl

from pyggml.errors import FormatError
from pyggml.lab import Phase, open_trace
from pyggml.lab.validate import refuse, validated


def _trace(tmp_path, events, *, n_expert=32, n_used=4, **header):
    """Return a trace of (step, layer, rows)."""
    path = tmp_path / "t.jsonl"
    first = {"format": "pyggml-routing", "version": 1, "n_expert": n_expert, "n_used": n_used, **header}
    lines = [first, *({"step": s, "layer": i, "ids": rows} for s, i, rows in events)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_trace(path)


def _names(trace):
    return [finding.name for finding in trace.findings]


def _argsort_rows(rng, n_row, *, is_strided, n_expert=32, n_used=4):
    order = rng.random((n_row, n_expert)).argsort(axis=1)
    return (order[:, :n_used] if is_strided else order.ravel()[: n_row * n_used].reshape(n_row, n_used)).tolist()


@pytest.mark.parametrize("n_row", [2, 8, 40])
def test_ids_read_flat_are_found(n_row, tmp_path):
    """Rows of the sorted experts read without their stride are found, the same rows read with it are not."""
    rng = np.random.default_rng(1)
    for is_strided in (True, False):
        events = [(s, 0, _argsort_rows(rng, n_row, is_strided=is_strided)) for s in range(20)]
        found = "strided-ids" in _names(_trace(tmp_path, events))
        assert found is not is_strided


def test_flat_ids_are_refused_where_they_are_wrong(tmp_path):
    """Replaying the events of several tokens is refused; those of one token are the model's."""
    rng = np.random.default_rng(1)
    events = [(s, 0, _argsort_rows(rng, 16 if s < 4 else 1, is_strided=False)) for s in range(9)]
    trace = _trace(tmp_path, events)
    with pytest.raises(FormatError, match="strided-ids"):
        refuse(trace, np.array([Phase.PREFILL]))
    refuse(trace, np.array([Phase.DECODE]))


def test_cut_experts_are_found(tmp_path):
    """Fewer experts a token than the architecture's models have is told."""
    path = bigmoeonedge(tmp_path)
    assert "experts-cut" not in _names(open_trace(path))
    path.write_text(path.read_text().replace("arch=mixtral", "arch=gpt-oss"))
    assert "experts-cut" in _names(open_trace(path))


def test_missing_rows_of_the_last_layer_are_found(tmp_path):
    """A last layer of fewer rows than the layer before is told."""
    rows = [[0, 1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 5]]
    assert "last-layer-rows" in _names(_trace(tmp_path, [(0, 0, rows), (0, 1, rows[-1:])]))
    assert "last-layer-rows" not in _names(_trace(tmp_path, [(0, 0, rows), (0, 1, rows)]))


def test_duplicates_are_found(tmp_path):
    """An expert twice in a row, and an event that is told twice, are told."""
    trace = _trace(tmp_path, [(0, 0, [[1, 1, 2, 3]])])
    assert "duplicate-ids" in _names(trace)
    with pytest.raises(FormatError, match="duplicate-ids"):
        refuse(trace, trace.phase)
    twice = [(0, 0, [[0, 1, 2, 3]]), (0, 1, [[0, 1, 2, 3]]), (0, 0, [[4, 5, 6, 7]])]
    assert {"duplicate-events", "order"} <= set(_names(_trace(tmp_path, twice)))


def test_order_and_missing_layers_are_found(tmp_path):
    """Steps that go back and steps without some layers are told."""
    row = [[0, 1, 2, 3]]
    assert "order" in _names(_trace(tmp_path, [(1, 0, row), (1, 1, row), (0, 0, row), (0, 1, row)]))
    assert "layers-missing" in _names(_trace(tmp_path, [(0, 0, row), (0, 1, row), (1, 0, row)]))


def test_a_sound_trace_has_no_findings(tmp_path):
    """Nothing is found where nothing is wrong, and looking again finds the same."""
    trace = open_trace(jsonl(tmp_path))
    assert trace.findings == ()
    assert validated(replace(trace)).findings == ()
