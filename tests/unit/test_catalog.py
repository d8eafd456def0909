"""The table of models: sizes of files that are known, headers, names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pyggml.catalog import MODELS, ModelSizes, find_model, header_path, parse_quant, shapes, type_tensors, write_header
from pyggml.cli import run
from pyggml.errors import FormatError, GraphError
from pyggml.gguf import GGUFFile
from pyggml.models.context import ContextFlags
from pyggml.planning import Planner
from pyggml.types import Type

#: GiB of all tensors, as llama.cpp prints it of published files.
_KNOWN = [
    ("qwen3-30b-a3b", "Q4_K_M", 17.28), ("qwen3-30b-a3b-2507", "Q3_K_M", 13.70), ("llama-2-7b", "Q4_0", 3.56),
    ("gpt-oss-120b", "MXFP4", 59.02), ("gpt-oss-20b", "MXFP4", 11.27), ("glm-4-32b", "IQ4_XS", 16.382),
    ("qwen3-235b-a22b", "Q6_K", 179.754), ("qwen3-235b-a22b", "Q8_0", 232.769), ("qwen3.6-35b-a3b", "UD-Q4_K_M", 20.61),
    ("llama-3-8b", "Q4_K_M", 4.58), ("llama-3-70b", "Q4_K_M", 39.59), ("llama-3-8b", "F16", 14.96),
]  # fmt: skip
#: User-made mixes, whose size decides which tensors were raised.
_MIXES = [
    ("qwen3.6-35b-a3b", "UD-Q5_K_XL", 24.76), ("qwen3.5-122b-a10b", "UD-Q5_K_XL", 85.6),
    ("glm-4.5-air", "UD-Q4_K_XL", 68.01), ("llama-4-scout", "UD-Q4_K_XL", 57.73), ("mixtral-8x7b", "Q3_K_L", 19.03),
    ("minimax-m2.7", "UD-Q3_K_S", 87.2), ("qwen3.8-27b", "UD-Q4_K_M", 15.32), ("gemma-4-26b-a4b", "UD-Q4_K_XL", 15.9),
]  # fmt: skip


def _gib(name: str, quant: str, given: float | None = None) -> float:
    s = MODELS[name]
    tensors = type_tensors(s, shapes(s), quant, file_bytes=None if given is None else given * 2**30)
    return sum(t.nbytes for t in tensors) / 2**30


@pytest.mark.parametrize(("name", "quant", "gib"), _KNOWN)
def test_rules_give_the_size_of_files(name: str, quant: str, gib: float) -> None:
    """llama.cpp's rules alone come within 0.5 % of published files."""
    assert _gib(name, quant) == pytest.approx(gib, rel=0.005)


@pytest.mark.parametrize(("name", "quant", "gib"), _MIXES)
def test_mixes_take_their_stated_size(name: str, quant: str, gib: float) -> None:
    """A mix whose size is stated comes within 0.5 % of it."""
    assert _gib(name, quant, gib) == pytest.approx(gib, rel=0.005)


def test_rules_name_single_tensors() -> None:
    """Of Q4_K_M: more bits for some ffn_down and attn_v, Q6_K for the output, F32 for norms and routers."""
    s = MODELS["qwen3-30b-a3b"]
    types = {t.name: t.type for t in type_tensors(s, shapes(s), "Q4_K_M")}
    assert types["output.weight"] is Type.Q6_K
    assert types["token_embd.weight"] is Type.Q4_K
    assert types["blk.0.ffn_gate_inp.weight"] is Type.F32
    assert types["blk.0.attn_q_norm.weight"] is Type.F32
    downs = [types[f"blk.{i}.ffn_down_exps.weight"] for i in range(12)]
    assert downs == [Type.Q6_K] * 6 + [Type.Q4_K] * 2 + [Type.Q6_K] + [Type.Q4_K] * 2 + [Type.Q6_K]


def test_rows_that_blocks_do_not_divide_fall_back() -> None:
    """Rows of 2880 take Q8_0 and MXFP4; rows of 896, which 256 does not divide, take Q5_0 for Q4_K."""
    s = MODELS["qwen2.5-0.5b"]
    types = {t.name: t.type for t in type_tensors(s, shapes(s), "Q4_K_M")}
    assert types["blk.0.attn_q.weight"] is Type.Q5_0
    assert types["blk.10.ffn_down.weight"] in (Type.Q4_K, Type.Q6_K)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen3.8-27B (qwen35 dense, 64 layers)", "qwen3.8-27b"), ("LLaMA-7B", "llama-2-7b"),
        ("GLM-Z1-32B-0414 (dense)", "glm-4-32b"), ("Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b-2507"),
        ("Meta-Llama-3.3-70B-Instruct", "llama-3.3-70b"), ("DeepSeek-V4-Flash-0731 (deepseek4, 284B)", "deepseek-v4-flash"),
        ("Llama-4-Scout-17B-16E (109B.A17B)", "llama-4-scout"), ("DeepSeek-R1-0528", "deepseek-r1"),
    ],
)  # fmt: skip
def test_names_as_people_write_them(text: str, name: str) -> None:
    """Brackets, case, makers' suffixes and dates do not hide a model."""
    found = find_model(text)
    assert found is not None
    assert found.name == name


def test_unknown_names(tmp_path: Path) -> None:
    """A model or a quantisation that is not known is refused with what is."""
    assert find_model("not stated in the comment") is None
    with pytest.raises(FormatError, match="no such model"):
        header_path("gpt-oss-7b")
    with pytest.raises(GraphError, match="no quantisation"):
        parse_quant("Q9_Z")
    with pytest.raises(FormatError, match="no such model"):
        Planner.open(tmp_path / "missing.gguf", data=False)


def test_a_missing_file_is_not_planned_by_its_name() -> None:
    """A mistyped path is an error that names the model of the table, not a plan of a file that is not there."""
    with pytest.raises(FormatError, match="no such file") as caught:
        header_path("models/gpt-oss-20b-mxfp4.gguf")
    assert "gpt-oss-20b" in caught.value.hint


def test_every_header_opens(tmp_path: Path) -> None:
    """Each of the models has a header that parses, with all tensors, and takes little space of the disk."""
    assert len(MODELS) >= 40
    seen = set()
    for s in MODELS.values():
        if s.arch in seen:
            continue
        seen.add(s.arch)
        path = tmp_path / f"{s.name}.gguf"
        write_header(s, s.quant, path)
        with GGUFFile.open(path) as file:
            assert list(file.tensors) == [row.name for row in shapes(s)]
            assert file.metadata[f"{s.arch}.block_count"] == s.n_layer + s.n_nextn


_FIRST = list({s.arch: s for s in reversed(MODELS.values())}.values())


@pytest.mark.parametrize("sizes", _FIRST, ids=[s.arch for s in _FIRST])
def test_every_architecture_is_planned(sizes: ModelSizes, tmp_path: Path) -> None:
    """Headers have all that llama.cpp asks for: a prompt and a token of each architecture's first layers are planned."""
    path = tmp_path / f"{sizes.name}.gguf"
    write_header(replace(sizes, n_layer=sizes.n_layer if sizes.n_layer < 28 else 8), sizes.quant, path)  # some go by it
    context = ContextFlags(n_ctx=512)
    with Planner.open(path, devices=["sim:rtx3090-pcie4"], context=context, data=False) as planner:
        assert all(graph.plan.splits for n in (512, 1) for graph in planner.plan_batch(n))


@pytest.mark.parametrize("home", ["", "/dev/null"])
def test_names_need_no_folder_to_keep_headers_in(home: str) -> None:
    """Where the cache cannot be written, a header lasts as long as the process."""
    code = "from pyggml.catalog import header_path as h; p = h('qwen3-0.6b'); print(p, p.stat().st_size > 1 << 20)"
    environment = {**os.environ, "PYGGML_CACHE_DIR": "", "XDG_CACHE_HOME": home, "HOME": home}
    if not home:
        environment["PYGGML_CACHE_DIR"] = "/dev/null/cache"
    path, is_whole = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    assert is_whole == "True"
    assert "pyggml-headers-" in path
    assert not Path(path).exists()


def test_planner_opens_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a name has the weights of the published file."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    with Planner.open("qwen3-0.6b:Q8_0", devices=["sim:rtx4090-pcie4"], data=False) as planner:
        assert planner.hparams.n_layer == 28
        total = sum(m.weights for m in planner.memory())
    s = MODELS["qwen3-0.6b"]
    # tied embeddings are kept twice: on the device for the output, in host memory for the rows of tokens
    embeddings = Type.Q8_0.row_size(s.n_embd) * s.n_vocab
    assert total == pytest.approx(sum(t.nbytes for t in type_tensors(s, shapes(s), "Q8_0")) + embeddings, rel=1e-3)


def test_commands_take_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`models` lists what `splits` and `savings` take."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    assert run(["models", "olmoe", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["n_expert_used"]) == ("olmoe-1b-7b", 8)
    assert row["n_params"] == pytest.approx(6.92e9, rel=0.01)
    assert row["n_params_active"] == pytest.approx(1.18e9, rel=0.05)
    assert run(["splits", "olmoe-1b-7b", "--cpu-moe", "--batches", "1", "-c", "512", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"]
    assert run(["savings", "olmoe-1b-7b:Q8_0", "--batches", "1,64", "--json"]) == 0
    one, many = json.loads(capsys.readouterr().out)
    assert one["used_mean"] == 8
    assert one["bytes_copied"] < many["bytes_copied"] < many["bytes_full"]
