"""Models whose layers keep a state of each sequence: logits of several sequences, parts of prompts and resets are llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from beside_llama import greedy_difference, plan_of_both_graphs
from edited_models import write_edited

from pyggml.errors import AllocError, ComputeError, FormatError
from pyggml.models.batch import Batch
from pyggml.models.recurrent import HybridCache
from pyggml.planning import Planner
from pyggml.session import ContextFlags, PlacementFlags, Session
from pyggml.types import Type

ARCHS = ("qwen3next", "qwen35moe")
#: What only plans are compared of: its recurrent layers are those of qwen35moe.
DENSE = "qwen35-dense"
TOKENS = [(i * 37 + 11) % 300 for i in range(40)]


def batch(*runs: tuple[int, int, int]) -> dict[str, Any]:
    """Return a step that decodes runs of a sequence: (sequence, first position, tokens)."""
    rows = [(seq, pos, (17 * seq + 29 * pos + 5) % 300) for seq, first, n in runs for pos in range(first, first + n)]
    seqs, pos, tokens = (list(column) for column in zip(*rows, strict=True))
    return {"tokens": tokens, "pos": pos, "seqs": seqs}


#: What sequences go through: together, alone, in another order, forgotten and begun again, shared.
STORIES: dict[str, list[dict[str, Any]]] = {
    "together": [batch((0, 0, 9), (1, 0, 9), (2, 0, 9)), batch((0, 9, 1), (1, 9, 1), (2, 9, 1)), batch((1, 10, 4))],
    "one after the other": [batch((2, 0, 7)), batch((0, 0, 12)), batch((2, 7, 1)), batch((0, 12, 1)), batch((1, 0, 3))],
    "of several lengths": [batch((0, 0, 3), (1, 0, 11), (2, 0, 6)), batch((2, 6, 1), (0, 3, 1)), batch((1, 11, 2))],
    "in another order": [batch((0, 0, 4)), batch((1, 0, 4)), batch((2, 0, 4)), batch((2, 4, 2), (0, 4, 2)), batch((1, 4, 2), (2, 6, 2))],
    "forgotten": [batch((0, 0, 8), (1, 0, 8)), {"rm": 0}, batch((1, 8, 2)), batch((0, 0, 5)), {"rm": 1}, batch((1, 0, 6), (0, 5, 6))],
}  # fmt: skip
SHARED = [
    batch((0, 0, 10)),
    {"cp": [0, 1]},
    batch((1, 10, 3)),
    batch((0, 10, 2)),
    {"cp": [1, 2]},
    batch((2, 13, 1), (1, 13, 1)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Give a tiny model of each family."""
    folder = tmp_path_factory.mktemp("recurrent")
    return {arch: write_edited(folder / f"{arch}.gguf", arch) for arch in (*ARCHS, DENSE)}


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory) -> dict[tuple[str, str, bool], np.ndarray]:
    """Give llama.cpp's logits of each story, with a stream for each sequence and with one for all."""
    cases = [(arch, name, unified) for arch in ARCHS for name in STORIES for unified in (False, True)]
    cases += [(arch, "shared", True) for arch in ARCHS]
    jobs = [
        llama_cpp.Job(str(models[arch]), [], 64, steps=STORIES.get(name, SHARED), n_seqs=3, unified=unified, ubatch=16)
        for arch, name, unified in cases
    ]
    return dict(zip(cases, llama_cpp.run_jobs(jobs, tmp_path_factory.mktemp("jobs")), strict=True))


def flags(**changes: Any) -> ContextFlags:
    """Return flags of a small context in single precision."""
    return ContextFlags(
        **({"n_ctx": 256, "n_batch": 64, "type_k": Type.F32, "type_v": Type.F32, "flash_attn": "off"} | changes)
    )


def tell(s: Session, steps: list[dict[str, Any]]) -> np.ndarray:
    """Return the logits of a story."""
    out: list[np.ndarray] = []
    for step in steps:
        if "rm" in step:
            s.rewind(0, seq=step["rm"])
        elif "cp" in step:
            s.cache.seq_cp(*step["cp"])
        else:
            columns = [np.asarray(step[name], np.int32) for name in ("tokens", "pos", "seqs")]
            out.append(s.decode_batch(Batch(*columns, np.ones(len(columns[0]), np.bool_))))
    return np.concatenate(out)


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("arch", ARCHS)
def test_sequences_are_llama_cpps(arch, name, unified, models, expected):
    """However sequences come, together or in turns, in whatever order, each has its own state."""
    with Session.open(models[arch], context=flags(n_ctx=768, n_ubatch=16, n_seq_max=3, kv_unified=unified)) as s:
        assert np.abs(tell(s, STORIES[name]) - expected[arch, name, unified]).max() < 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_a_shared_state_parts_when_a_sequence_goes_on(arch, models, expected):
    """After `seq_cp` each sequence goes on by itself, as in llama.cpp."""
    with Session.open(models[arch], context=flags(n_ctx=768, n_ubatch=16, n_seq_max=3, kv_unified=True)) as s:
        assert np.abs(tell(s, SHARED) - expected[arch, "shared", True]).max() < 1e-3


@pytest.mark.parametrize("devices", [[], ["sim:rtx4090-pcie4"]], ids=["cpu", "sim"])
@pytest.mark.parametrize("arch", ARCHS)
def test_parts_of_a_prompt_and_what_follows(arch, devices, models, tmp_path):
    """A prompt in micro-batches of 8 and the tokens that follow it have llama.cpp's logits, on a device, too."""
    opening = {"devices": devices, "context": flags(n_ubatch=8), "placement": PlacementFlags(cpu_moe=True)}
    assert greedy_difference(models[arch], tmp_path, TOKENS, 6, **opening) < 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_plain_ops_compute_the_same(arch, models, monkeypatch):
    """Where a device lacks GATED_DELTA_NET, the graph of plain ops gives the same logits, in chunks and one by one."""
    with Session.open(models[arch], context=flags(n_ctx=512, n_batch=256, n_ubatch=256)) as s:
        fused = [s.decode(TOKENS * 4, outputs="all"), s.decode(TOKENS[:1])]
        names = {n.op_desc for n in s.source.reserved(16, 1, 1).graph.nodes}
    monkeypatch.setattr(Planner, "_is_on_its_layers", lambda self, n_tokens, n_seqs, nodes: nodes != "delta_nodes")
    with Session.open(models[arch], context=flags(n_ctx=512, n_batch=256, n_ubatch=256)) as s:
        plain = [s.decode(TOKENS * 4, outputs="all"), s.decode(TOKENS[:1])]
        assert not {n.op_desc for n in s.source.reserved(16, 1, 1).graph.nodes} & {"GATED_DELTA_NET"}
    assert "GATED_DELTA_NET" in names
    for a, b in zip(fused, plain, strict=True):
        assert np.abs(a - b).max() < 1e-3


def test_a_reset_begins_with_zeros(models):
    """After `reset` or a rewind to 0, logits are those of a new session."""
    with Session.open(models["qwen35moe"], context=flags()) as s:
        first = s.decode(TOKENS, outputs="all")
        s.reset()
        np.testing.assert_array_equal(s.decode(TOKENS, outputs="all"), first)
        s.rewind(0)
        np.testing.assert_array_equal(s.decode(TOKENS, outputs="all"), first)


def test_what_a_state_cannot_do_is_refused(models):
    """Going back to the middle, or sharing a part, is an error that says why; nothing has changed."""
    with Session.open(models["qwen35moe"], context=flags(n_seq_max=2, kv_unified=True)) as s:
        s.decode(TOKENS)
        assert s.can_rewind(0)
        assert s.can_rewind(40)
        assert not s.can_rewind(20)
        with pytest.raises(AllocError, match="have one state for all tokens"):
            s.rewind(20)
        with pytest.raises(AllocError, match="cannot forget some of its 40 tokens"):
            s.cache.seq_rm(0, 20)
        with pytest.raises(AllocError, match="cannot share some of the 40 tokens"):
            s.cache.seq_cp(0, 1, 0, 20)
        assert s.n_past == 40


def test_a_failure_forgets_the_whole_sequence(models):
    """A micro-batch that is stopped leaves no half of a state: its sequence begins again, the other goes on."""
    with Session.open(models["qwen35moe"], context=flags(n_ctx=512, n_ubatch=8, n_seq_max=2)) as s:
        whole, other = s.decode(TOKENS, outputs="all"), s.decode(TOKENS[:9], seq=1)
        s.rewind(0)
        answers = iter([False, False, True])
        s.abort = lambda: next(answers)
        with pytest.raises(ComputeError, match="aborted"):
            s.decode(TOKENS)
        s.abort = None
        assert s.n_past == 0
        np.testing.assert_array_equal(s.decode(TOKENS, outputs="all"), whole)
        s.rewind(0, seq=1)
        np.testing.assert_array_equal(s.decode(TOKENS[:9], seq=1), other)


def test_a_state_that_is_not_a_number_does_not_stay(models):
    """NaN in a state is an error once; the sequence that begins again starts from zeros."""
    with Session.open(models["qwen35moe"], context=flags()) as s:
        first = s.decode(TOKENS, outputs="all")
        s.reset()
        s.decode(TOKENS[:39])
        assert isinstance(s.cache, HybridCache)
        state = s.cache.states.s[0]
        state.set_array(np.full(state.shape, np.nan, np.float32))
        with pytest.raises(ComputeError, match="contain NaN"):
            s.decode(TOKENS[39:])
        assert s.n_past == 0
        np.testing.assert_array_equal(s.decode(TOKENS, outputs="all"), first)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ssm.inner_size": 48}, "ssm.inner_size.*is 48, with 4 heads of 16"),
        ({"ssm.group_count": 3}, "no multiple of 3 groups"),
        ({"ssm.conv_kernel": 1}, "at least 2"),
        ({"ssm.state_size": None}, "ssm.state_size"),
        ({"attention.recurrent_layers": [True]}, "1 values for 3 layers"),
        ({"rope.dimension_sections": [4, 4]}, "has 2 numbers"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(keys, message, tmp_path):
    """Keys of recurrent layers that do not go together give one line that names one."""
    path = write_edited(tmp_path / "m.gguf", "qwen35moe", keys=keys)
    with pytest.raises(FormatError, match=message):
        Session.open(path, data=False)


@pytest.mark.parametrize(
    "words",
    [["--cpu-moe"], ["-ngl", "2"], ["-ngl", "99"], ["-ngl", "99", "--no-kv-offload"], ["-ngl", "99", "-fa", "on"]],
    ids=" ".join,
)
@pytest.mark.parametrize("arch", [*ARCHS, DENSE])
def test_plans_are_those_of_llama_cpps_graph(arch, words, models, capsys):
    """Over a device, splits, copies and pins are those of the graph that llama.cpp builds, line for line."""
    assert plan_of_both_graphs(models[arch], words, capsys).count("GATED_DELTA_NET"[:10]) >= 4
