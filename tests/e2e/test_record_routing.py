"""`run --record-routing`: the experts of every step, by their strides, with the bytes of the file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pyggml import cli
from pyggml.gguf import GGUFFile
from pyggml.lab import Phase, open_trace

N_PROMPT, N_ANSWER = 40, 5
TOKENS = ",".join(str((i * 53 + 32) % 259) for i in range(N_PROMPT))


def _record(model, path, *words):
    run = [
        "run",
        str(model),
        "--tokens",
        TOKENS,
        "-n",
        str(N_ANSWER),
        "--ignore-eos",
        "--quiet",
        "-c",
        "64",
        "-dev",
        "cpu",
    ]
    assert cli.run([*run, "--record-routing", str(path), *words]) == 0
    return open_trace(path)


def test_every_step_is_recorded_by_its_strides(model, tmp_path):
    """Micro-batches of several tokens have the ids that were used, not those that a flat reading of the view gives."""
    _, path = model
    dumped = tmp_path / "logits.npz"
    trace = _record(path, tmp_path / "r.jsonl", "-ub", "16", "--dump-logits", str(dumped))
    with np.load(dumped) as data:
        topk = data["topk"]
    assert not [f for f in trace.findings if f.phases]
    for i, layer in enumerate(trace.layers):
        rows = np.concatenate([trace.rows(e) for e in np.flatnonzero(trace.layer == layer)])
        assert np.array_equal(rows[:N_PROMPT], topk[i])
        assert len(rows) == N_PROMPT + N_ANSWER - 1


def test_steps_phases_and_bytes(model, tmp_path, capsys):
    """Three micro-batches of the prompt, then a step a token; the bytes of an expert are the file's; both formats hold the same."""
    _, path = model
    trace = _record(path, tmp_path / "r.jsonl", "-ub", "16")
    prefill = trace.phase == Phase.PREFILL
    assert sorted(set(trace.step[prefill].tolist())) == [0, 1, 2]
    assert sorted(set(trace.step[~prefill].tolist())) == [3, 4, 5, 6]
    n_rows = np.diff(trace.first_row)
    assert set(n_rows[trace.step == 0].tolist()) == {16}
    assert set(n_rows[~prefill].tolist()) == {1}
    with GGUFFile.open(path) as file:
        for layer in trace.layers:
            weights = [
                t
                for name, t in file.tensors.items()
                if name.startswith(f"blk.{layer}.ffn_") and name.endswith("_exps.weight")
            ]
            assert sum(t.nbytes // t.ne[2] for t in weights) == trace.bytes_of_layer[layer] > 0
    other = _record(path, tmp_path / "r.npz", "-ub", "16")
    assert np.array_equal(other.ids, trace.ids)
    assert np.array_equal(other.expert_bytes, trace.expert_bytes)
    with np.load(tmp_path / "r.npz") as data:  # what `--routing trace:` reads
        assert data["topk"].shape == (len(trace.layers), N_PROMPT + N_ANSWER - 1, trace.n_used)
    capsys.readouterr()
    assert (
        cli.run(["experts", "compare", str(tmp_path / "r.jsonl"), "--json", "--capacities", "100%", "--phase", "all"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["touches"] - rows[0]["hits"] == len(
        np.unique(np.stack([np.repeat(trace.layer, n_rows).repeat(trace.n_used), trace.ids.ravel()]), axis=1).T
    )


def test_a_flat_reading_would_have_been_found(recorded_models, tmp_path):
    """The same ids read flat from the sorted experts, as a recorder without strides has them, are refused for the prompt."""
    trace = _record(recorded_models["llama"], tmp_path / "r.jsonl", "-ub", "32")
    rng = np.random.default_rng(0)
    flat = tmp_path / "flat.jsonl"
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    made = [lines[0]]
    for line in map(json.loads, lines[1:]):
        n, k = np.shape(line["ids"])
        if n > 1:
            order = np.concatenate([rng.permutation(trace.n_expert) for _ in range(n)])
            line["ids"] = order[: n * k].reshape(n, k).tolist()
        made.append(json.dumps(line))
    flat.write_text("\n".join(made) + "\n")
    assert "strided-ids" in [f.name for f in open_trace(flat).findings]
    assert cli.run(["experts", "compare", str(flat), "--phase", "prefill", "--capacities", "100%"]) == 1
    assert cli.run(["experts", "compare", str(flat), "--phase", "decode", "--capacities", "100%"]) == 0


@pytest.mark.parametrize("placement", [["-dev", "cpu"], ["-dev", "sim:rtx4090-pcie4,cpu", "--cpu-moe"]])
def test_placement_does_not_change_what_is_recorded(placement, recorded_models, tmp_path):
    """Layers on a simulated device choose the experts that the CPU chooses."""
    path = recorded_models["llama"]
    one = _record(path, tmp_path / "a.jsonl")
    assert (
        cli.run(
            [
                "run",
                str(path),
                "--tokens",
                TOKENS,
                "-n",
                str(N_ANSWER),
                "--ignore-eos",
                "--quiet",
                "-c",
                "64",
                *placement,
                "--record-routing",
                str(tmp_path / "b.jsonl"),
            ]
        )
        == 0
    )
    assert np.array_equal(open_trace(tmp_path / "b.jsonl").ids, one.ids)
