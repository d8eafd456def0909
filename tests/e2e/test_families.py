"""Logits, graphs and placement of every family, in each form that its files have, compared with live llama.cpp."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from edited_models import SIZES, write_edited
from families import FAMILIES, GEMMA2, GLM4

from pyggml import cli
from pyggml.errors import FormatError
from pyggml.models.architectures import ARCHITECTURES
from pyggml.models.placement import PlacementFlags
from pyggml.session import ContextFlags, Session
from pyggml.types import Type

TOKENS = [(i * 37 + 11) % 300 for i in range(48)]

Decoded = tuple[np.ndarray, str]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, tuple[Path, Decoded, Decoded]]:
    """Give each file and what llama.cpp makes of it, without and with flash attention, in one child process.

    That is the logits, and what the scheduler printed of the first decode.
    """
    folder = tmp_path_factory.mktemp("families")
    paths = [write_edited(folder / f"{i}.gguf", arch, **how) for i, (arch, how) in enumerate(FAMILIES.values())]
    jobs = [llama_cpp.Job(str(path), TOKENS, 24) for path in paths]
    jobs += [llama_cpp.Job(str(path), TOKENS, 24, "F16", flash=True) for path in paths]
    found = llama_cpp.run_jobs_with_logs(jobs, folder)
    n = len(paths)
    return dict(zip(FAMILIES, zip(paths, found[:n], found[n:], strict=True), strict=True))


def decode(path: Path, kv: Type, flash: str, *, kv_offload: bool = True, **options) -> np.ndarray:
    """Return the logits of all tokens, in batches of 24."""
    context = ContextFlags(n_ctx=256, n_batch=64, type_k=kv, type_v=kv, flash_attn=flash, offload_kqv=kv_offload)
    with Session.open(path, context=context, **options) as s:
        return np.concatenate([s.decode(TOKENS[i : i + 24], outputs="all") for i in (0, 24)])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_are_llama_cpps(name, expected):
    """Logits equal live llama.cpp's; with flash attention and an F16 cache nearly so, but where a router just flips."""
    path, (plain, _), (flash, _) = expected[name]
    # upstream looks GELU up in a table of F16
    most = 5e-3 if name.startswith("gemma") else 1e-3
    assert np.abs(decode(path, Type.F32, "off") - plain).max() < most
    error = np.square(decode(path, Type.F16, "on") - flash).sum(1) / np.square(flash).sum(1)
    # activations that are rounded to 8 bits carry what a half more or less makes of them
    assert np.mean(error < (1e-3 if "NVFP4" in name else 1e-4)) > 0.95


@pytest.mark.parametrize("flash", [False, True], ids=["softmax", "flash attention"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_graphs_are_llama_cpps(name, flash, expected, capsys):
    """Node for node, with names, sizes, use counts and sources, as live llama.cpp prints its first graph.

    Gpt-oss chooses the rows of outputs after its last layer since b11434, which a recorded graph holds; builds before
    do so in the last layer, so that only what comes before that is compared.
    """
    path, *found = expected[name]
    kv = "f16" if flash else "f32"
    words = ["splits", str(path), "--device", "none", "--batches", "24", "--outputs", "all", "--format", "ggml"]
    words += ["-c", "256", "-b", "64", "-ub", "64", "-ctk", kv, "-ctv", kv, "-fa", "on" if flash else "off"]
    assert cli.run(words) == 0
    printed = [line for line in capsys.readouterr().out.split("\n") if line and not line.startswith("# batch")]
    _, log = found[flash]
    wanted = [line for line in log.split("\n") if line.startswith(("node #", "## SPLIT"))]
    if name.startswith("gpt-oss"):
        n = next(i for i, line in enumerate(printed) if " ffn_inp-2 " in line)
        printed, wanted = printed[:n], wanted[:n]
    assert printed == wanted
    assert len(printed) > 60


@pytest.mark.parametrize("name", [n for n in FAMILIES if n in ARCHITECTURES or n == "deepseek2, gates and ups in one"])
@pytest.mark.parametrize(
    "placement",
    [PlacementFlags(cpu_moe=True), PlacementFlags(n_gpu_layers=2), PlacementFlags(n_cpu_moe=2)],
    ids=["cpu-moe", "two layers", "two layers' experts"],
)
def test_placement_changes_no_bit(name, placement, expected):
    """Over [sim, cpu], however the weights are placed, logits equal those of the CPU alone bit for bit."""
    path, _, _ = expected[name]
    found = decode(path, Type.F16, "on", devices=["sim:rtx4090-pcie4"], placement=placement)
    np.testing.assert_array_equal(found, decode(path, Type.F16, "on"))


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek2", "qwen35moe"])
@pytest.mark.parametrize("flash", ["off", "on"])
@pytest.mark.parametrize("devices", [["sim"], ["sim", "sim"]], ids=["one device", "two devices"])
def test_caches_of_other_kinds_may_stay_on_the_host(name, flash, devices, expected):
    """With a cache of windows or of latent vectors in host memory, or over two devices, no bit changes."""
    path, _, _ = expected[name]
    plain = decode(path, Type.F16, flash)
    for kv_offload in (True, False):
        np.testing.assert_array_equal(decode(path, Type.F16, flash, devices=devices, kv_offload=kv_offload), plain)


def test_layers_that_predict_further_count_in_placement(expected):
    """`-ngl` counts the layer that nothing runs, as in llama.cpp; its weights are not loaded."""
    path, _, _ = expected["glm4moe with a layer that predicts further"]
    context = ContextFlags(n_ctx=256)
    options = {"devices": ["mock:CUDA0"], "data": False, "context": context}
    with Session.open(path, placement=PlacementFlags(n_gpu_layers=4), **options) as s:
        names = [device.name for device in s.placement.layers]
        assert names == ["CPU", "CUDA0", "CUDA0", "CUDA0"]
        assert not [w for w in s.placement.weights if w.spec.layer == 3]
        assert len(s.cache.k) == 3
    with Session.open(path, placement=PlacementFlags(n_gpu_layers=5), **options) as s:
        assert s.placement.is_full_offload
    found, without = (decode(p, Type.F32, "off") for p in (path, expected["glm4moe"][0]))
    np.testing.assert_array_equal(found, without)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "gates and ups in one" in name])
def test_cpu_moe_moves_gates_and_ups_in_one(name, expected):
    """Where gates and ups are one weight, it and the downs of every layer with experts are on the CPU."""
    path, _, _ = expected[name]
    flags = PlacementFlags(cpu_moe=True)
    with Session.open(path, placement=flags, devices=["mock:CUDA0"], data=False, context=ContextFlags(n_ctx=256)) as s:
        moved = {w.spec.name for w in s.placement.weights if w.buft.name == "CPU" and w.spec.layer >= 0}
    layers = (1, 2) if name.startswith("deepseek2") else (0, 1, 2)
    moved = {n for n in moved if n.endswith(".weight")}  # scales of experts go along
    assert moved == {f"blk.{i}.ffn_{kind}_exps.weight" for i in layers for kind in ("gate_up", "down")}


def test_a_recorded_routing_counts_layers_with_experts(expected, tmp_path):
    """What was recorded of a model whose first layer is dense plans it: the first choice is the second layer's."""
    path, _, _ = expected["glm4moe"]
    words = ["--device", "sim:rtx4090-pcie4,cpu", "--cpu-moe"]
    recorded = str(tmp_path / "routing.npz")
    run = ["run", str(path), *words, "-n", "1", "--prompt", "x" * 40, "--record-routing", recorded]
    assert cli.run(run) == 0
    with np.load(recorded) as data:
        assert data["topk"].shape == (2, 40, 3)
    assert cli.run(["splits", str(path), *words, "--batches", "40", "--routing", f"trace:{recorded}"]) == 0


@pytest.mark.parametrize(
    ("arch", "how", "message"),
    [
        ("gpt-oss", {"keys": {"attention.sliding_window_pattern": [True]}}, "1 values for 3 layers"),
        ("gpt-oss", {"keys": {"attention.sliding_window": None}}, "no key 'gpt-oss.attention.sliding_window'"),
        ("gpt-oss", {"keys": {"attention.key_length_swa": 8}}, "is 8, another size"),
        ("gpt-oss", {"without": ("output.weight",)}, "'output.weight' is missing"),
        ("gpt-oss", {"without": ("attn_sinks.weight",)}, "attn_sinks.weight' is missing"),
        ("glm4moe", {"keys": {"nextn_predict_layers": 3}}, "is 3 of 3 layers"),
        ("glm4moe", {"keys": {"leading_dense_block_count": 9}}, "is 9 of 3 layers"),
        ("glm4moe", {"keys": {"expert_gating_func": 7}}, "is 7; known are 1, 2, 3"),
        ("glm4moe", {"keys": {"rope.dimension_sections": [8, 4, 4]}}, "several positions"),
        ("glm4moe", {"keys": {"rope.dimension_count": 7}}, "is 7"),
        ("granitemoe", {"keys": {"logit_scale": None}}, "no key 'granitemoe.logit_scale'"),
        ("granitemoe", {"keys": {"logit_scale": 0.0}}, "logits are divided by it"),
        ("olmoe", {"keys": {"expert_count": 0, "expert_used_count": 0}}, "has experts"),
        ("llama-dense", {**GEMMA2, "keys": {"final_logit_softcapping": 0.0}}, "what it bounds is divided by it"),
        ("llama-dense", {**GEMMA2, "keys": {"attn_logit_softcapping": 0.0}}, "what it bounds is divided by it"),
        ("llama-dense", {**GLM4, "keys": {"rope.dimension_sections": [4, 4]}}, "has 2 numbers, 4 are needed"),
        ("qwen2moe", {"without": ("output.weight",)}, "'output.weight' is missing"),
        ("deepseek2", {"keys": {"attention.key_length_mla": None}}, "converted before MLA"),
        ("deepseek2", {"keys": {"attention.kv_lora_rank": 64}}, "is 64, which does not go with"),
        ("deepseek2", {"keys": {"expert_group_count": 3, "expert_group_used_count": 1}}, "is 3, of which 1 are used"),
        ("deepseek2", {"keys": {"attention.temperature_scale": 0.1}}, "not supported"),
        ("glm4moe", {"renamed_arch": "dots1", "keys": {"expert_gating_func": None}}, "is 0; known are 1, 2, 3"),
        ("glm4moe", {"renamed_arch": "ernie4_5-moe", "keys": {"interleave_moe_layer_step": 2}}, "only 1 is supported"),
        ("glm4moe", {"tensors": {"blk.1.odd.weight": (64,)}}, "odd.weight"),
        ("glm4moe", {"tensors": {"blk.1.ffn_up_exps.scale": (8,)}}, r"ffn_up_exps\.scale"),
        ("deepseek2", {"tensors": {"blk.1.attn_q_a.scale": (1,)}}, r"attn_q_a\.scale"),
        ("qwen3moe", {"tensors": {"cls.output.weight": (2, 64)}}, r"cls\.output"),
        ("qwen3moe", {"tensors": {"output.scale": (1,)}}, r"output\.scale"),
        ("qwen3moe", {"tensors": {"blk.0.ffn_up_exps.scale": (4,)}}, r"\[4, 1, 1, 1\].*\[8, 1, 1, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(arch, how, message, tmp_path):
    """A file whose keys and tensors do not fit together gives one line that names what is wrong."""
    path = write_edited(tmp_path / "m.gguf", arch, **how)
    with pytest.raises(FormatError, match=message):
        Session.open(path, data=False)


def test_an_unknown_architecture_is_refused_with_what_is_known(tmp_path):
    """The error names the architecture and lists those that there are."""
    path = write_edited(tmp_path / "m.gguf", "olmoe", renamed_arch="mamba")
    with pytest.raises(FormatError, match="'mamba' is not supported") as caught:
        Session.open(path, data=False, graph="built")
    assert all(arch in str(caught.value) for arch in ARCHITECTURES)


def test_the_readme_lists_every_architecture():
    """The table of what works names each architecture, and every one has a case here."""
    rows = (Path(__file__).parents[2] / "README.md").read_text().split("\n")
    row = next(row for row in rows if row.startswith("| models | "))
    assert all(f"`{arch}`" in row for arch in ARCHITECTURES)
    made = {how.get("renamed_arch", arch.removesuffix("-dense")) for arch, how in FAMILIES.values()}
    assert made | {"qwen3"} == set(ARCHITECTURES)  # qwen3 is in test_variants.py


def test_sizes_of_the_test_are_those_of_the_added_tensors():
    """The tensors that tests add have the sizes of the models they are added to."""
    assert (SIZES.embd, SIZES.experts, SIZES.ff_exp, SIZES.heads * SIZES.head_dim) == (64, 8, 32, 64)
