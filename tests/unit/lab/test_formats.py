"""Routing traces of other programs, read into the one form."""

from __future__ import annotations

import gzip
import random
import shutil
from contextlib import suppress

import numpy as np
import pytest
from samples import DECODE, PREFILL, WRITERS, bigmoeonedge, fingerprint, jsonl, mct1, moe_cache_eval

from pyggml.errors import FormatError
from pyggml.lab import Phase, open_trace, save_trace
from pyggml.lab.formats import moe_cache_eval as npz


def _decoded(trace):
    events = np.flatnonzero(trace.phase == Phase.DECODE)
    return [trace.rows(int(e)).tolist() for e in events]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_format_gives_the_same_decode_events(write, tmp_path):
    """Decode has one event a step and layer, ids in slot order, whatever the format."""
    trace = open_trace(write(tmp_path))
    expected = [[ids] for token in DECODE for ids in token]
    if write is moe_cache_eval:  # its ids are ascending
        expected = [[sorted(ids)] for token in DECODE for ids in token]
    got = [[[i for i in row if i >= 0] for row in event] for event in _decoded(trace)]
    assert got == expected
    assert trace.layers == [0, 1]
    assert trace.n_used == 2
    assert trace.n_expert == 4 or write is fingerprint


@pytest.mark.parametrize(
    "write", [w for w in WRITERS if w not in (fingerprint, moe_cache_eval)], ids=lambda w: w.__name__
)
def test_prefill_is_one_event_a_layer(write, tmp_path):
    """All tokens of a prompt are rows of one event a layer."""
    trace = open_trace(write(tmp_path))
    events = np.flatnonzero(trace.phase == Phase.PREFILL)
    assert [trace.rows(int(e)).tolist() for e in events] == [[t[layer] for t in PREFILL] for layer in range(2)]


def test_sizes_and_weights_are_kept(tmp_path):
    """Bytes by layer and projection, and the router's weights, come along where the format has them."""
    assert open_trace(bigmoeonedge(tmp_path)).bytes_of_layer.tolist() == [100, 200]
    assert open_trace(mct1(tmp_path)).projections == ("gate", "up", "down")
    assert open_trace(mct1(tmp_path)).bytes_of_layer.tolist() == [60, 60]
    assert open_trace(jsonl(tmp_path)).expert_bytes.tolist() == [[60, 40], [120, 80]]
    weights = open_trace(bigmoeonedge(tmp_path)).weights
    assert weights is not None
    assert weights[0].tolist() == [0.75, 0.25]


@pytest.mark.parametrize("suffix", ["jsonl", "npz"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_what_is_exported_reads_back(write, suffix, tmp_path):
    """JSON lines and NPZ hold all of a trace."""
    trace = open_trace(write(tmp_path))
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    out = tmp_path / f"out.{suffix}"
    save_trace(trace, out)
    again = open_trace(out)
    for column in ("request", "step", "phase", "layer", "first_row", "sequence", "ids", "bytes_of_layer"):
        assert np.array_equal(getattr(again, column), getattr(trace, column)), column
    assert (again.n_layer, again.n_expert, again.n_used) == (trace.n_layer, trace.n_expert, trace.n_used)
    if trace.weights is not None:
        np.testing.assert_allclose(again.weights, trace.weights, rtol=1e-5)


def test_npz_has_its_authors_columns(tmp_path):
    """The NPZ has the columns of moe-cache-eval: distinct experts ascending, how many rows chose each, the weights summed."""
    save_trace(open_trace(bigmoeonedge(tmp_path)), tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert file["offsets"].tolist()[:2] == [0, 3]
        assert file["expert_ids"][:3].tolist() == [0, 1, 2]
        assert file["assignment_counts"][:3].tolist() == [2, 3, 1]
        assert file["gate_mass"][:3].tolist() == [1.0, 1.75, 0.25]
        assert file["token_counts"][0] == 3


def test_a_missing_manifest_is_found(tmp_path):
    """Without the model's shape the number of experts is the largest id seen, and the trace says so."""
    path = moe_cache_eval(tmp_path)
    path.with_name("manifest.json").unlink()
    assert "experts-not-told" in [f.name for f in open_trace(path).findings]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_damaged_files_are_refused_with_their_path(write, tmp_path):
    """Whatever bytes are wrong or missing, the file is read or refused by `FormatError`, never something else."""
    path = write(tmp_path)
    whole = path.read_bytes()
    text = gzip.decompress(whole) if path.suffix == ".gz" else whole
    rng = random.Random(7)
    for _ in range(150):
        data = bytearray(text)
        for _ in range(rng.randint(0, 3)):
            data[rng.randrange(len(data))] = rng.choice(b'\x00\xff[]{},"9-eN' + bytes([rng.randrange(256)]))
        data = data[: rng.choice([len(data), rng.randrange(len(data))])]
        path.write_bytes(gzip.compress(bytes(data)) if path.suffix == ".gz" and rng.random() < 0.8 else bytes(data))
        with suppress(FormatError):  # any other error fails the test
            open_trace(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no known format"),
        ('{"format": "pyggml-routing", "version": 1}\n', "no routing"),
        ('{"format": "pyggml-routing", "version": 2}\n', "version 1"),
        ('{"format": "pyggml-routing", "version": 1, "n_expert": 4}\n{"layer": 0, "ids": [9]}\n', "id 9 is not in 0..3"),
        ('{"format": "pyggml-routing", "version": 1}\n{"layer": -1, "ids": [1]}\n', "layer is -1"),
        ('{"format": "pyggml-routing", "version": 1}\n{"layer": 99999, "ids": [1]}\n', "layers"),
        ('{"format": "pyggml-routing", "version": 1}\n{"layer": 0, "ids": [1.5]}\n', "not a list of expert ids"),
        ('{"format": "pyggml-routing", "version": 1}\n' + "[" * 100_000, "not JSON"),
        ("# route_trace v1\n0,2,0,0,0,1,0.5,0,0\n", "phase 2"),
        ("# route_trace v1\n0,0,0,0,x,1,0.5,0,0\n", "'x' is not a whole number"),
        ('{"num_layers": 2, "num_experts": 4, "top_k": 2, "prompts": {"p": {"decode": [[[1]]]}}}', "no list of 2 layers"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(text, said, tmp_path):
    """A refusal names the place and what is there."""
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(FormatError, match=said.replace("..", r"\.\.").replace("[", r"\[")):
        open_trace(path)


def test_a_bomb_is_not_unpacked(tmp_path):
    """An array that claims more than its file holds is refused before memory is asked for."""
    path = moe_cache_eval(tmp_path)
    import zipfile

    shutil.copy(path, tmp_path / "good.npz")
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (4000000000000,), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("layer_ids.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(FormatError, match="claims shape"):
        npz.read(path)


def test_requests_of_several_files_follow_each_other(tmp_path):
    """Joined traces keep their requests apart."""
    from pyggml.lab import Trace

    one = open_trace(jsonl(tmp_path))
    two = Trace.joined([one, one])
    assert two.n_event == 2 * one.n_event
    assert sorted(set(two.request.tolist())) == [0, 1]
    assert two.rows(one.n_event).tolist() == one.rows(0).tolist()
