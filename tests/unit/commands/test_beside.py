"""`pyggml splits` with a draft model and a projector: their memory counts where llama.cpp puts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyggml import Planner
from pyggml.cli import run
from pyggml.gguf import ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.types import Type

MODEL = "qwen3-4b"
DRAFT = "qwen3-0.6b"
LINE = ["splits", MODEL, "-dev", "rtx3060,rtx3060", "-c", "4096", "-b", "1024", "-ub", "256", "--batches", "1"]


def planned(capsys: pytest.CaptureFixture[str], *more: str, status: int = 0) -> dict[str, Any]:
    """Return what `splits --json` says."""
    assert run([*LINE, "--json", *more]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def totals(found: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of each buffer type."""
    return {m["buft"]: m["total"] for m in found["memory"]}


def header(path: Path, arch: str, *ne: int) -> int:
    """Write a GGUF file of one tensor without a model, and return its bytes."""
    writer = GGUFWriter()
    writer.add("general.architecture", ValueType.STRING, arch)
    writer.add_tensor("v.patch_embd.weight", Type.F16, ne, lambda: [bytes(2 * ne[0] * ne[1])])
    writer.write(path)
    return 2 * ne[0] * ne[1]


@pytest.mark.parametrize(
    ("words", "types", "n_gpu_layers", "devices"),
    [
        ((), (Type.F16, Type.F16), -1, 2),
        (("-ctkd", "q8_0", "-ctvd", "q4_0", "-ngld", "3"), (Type.Q8_0, Type.Q4_0), 3, 2),
        (("-devd", "SIM0"), (Type.F16, Type.F16), -1, 1),
        (("-devd", "none"), (Type.F16, Type.F16), -1, 0),
    ],
)
def test_a_draft_model_has_a_context_like_the_models(
    words: tuple[str, ...],
    types: tuple[Type, Type],
    n_gpu_layers: int,
    devices: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, cache and compute buffers of the draft model are added, with its own layers, devices and cache types."""
    alone = totals(planned(capsys))
    found = planned(capsys, "-md", DRAFT, *words)
    context = ContextFlags(n_ctx=4096, n_batch=1024, n_ubatch=256, type_k=types[0], type_v=types[1], n_outputs_max=1)
    names = ["sim:rtx3060-pcie4", "sim:rtx3060-pcie4"][:devices]
    placement = PlacementFlags(n_gpu_layers=n_gpu_layers)
    with Planner.open(DRAFT, devices=names, placement=placement, context=context, data=False) as draft:
        own = {m.buft: m.total for m in draft.memory()}
    assert own["CPU"] > 0
    assert totals(found) == {buft: alone.get(buft, 0) + own.get(buft, 0) for buft in alone}
    (beside,) = found["beside"]
    assert {m["buft"]: m["total"] for m in beside["memory"]} == own


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (("-otd", r"ffn_up_exps=CPU", "-cmoed"), ("ffn_up_exps=CPU", "--cpu-moe")),
        (("--n-cpu-moe-draft", "5"), ("--n-cpu-moe 5",)),
    ],
)
def test_weights_of_a_draft_model_go_where_its_flags_say(
    words: tuple[str, ...], overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The draft model's -ot, -cmoe and -ncmoe place its weights, and not the model's."""
    context = ContextFlags(n_ctx=4096, n_batch=1024, n_ubatch=256, n_outputs_max=1)
    placement = PlacementFlags(overrides=overrides)
    names = ["sim:rtx3060-pcie4", "sim:rtx3060-pcie4"]
    with Planner.open("gpt-oss-20b", devices=names, placement=placement, context=context, data=False) as draft:
        own = {m.buft: m.total for m in draft.memory()}
    (beside,) = planned(capsys, "-md", "gpt-oss-20b", *words)["beside"]
    assert {m["buft"]: m["total"] for m in beside["memory"]} == own
    assert run([*LINE, "-md", "gpt-oss-20b", "-ncmoed", "x"]) == 2


def test_a_projector_is_on_the_first_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights count there, or in host memory if asked for; its compute buffer is said not to."""
    size = header(tmp_path / "mmproj.gguf", "clip", 1024, 512)
    words = ("-mm", str(tmp_path / "mmproj.gguf"))
    alone, on_device = totals(planned(capsys)), totals(planned(capsys, *words))
    assert {k: n - alone[k] for k, n in on_device.items() if n != alone[k]} == {"SIM0": size}
    on_host = totals(planned(capsys, *words, "--no-mmproj-offload"))
    assert {k: n - alone[k] for k, n in on_host.items() if n != alone[k]} == {"CPU": size}
    assert run([*LINE, *words]) == 0
    seen = capsys.readouterr()
    told = " ".join(seen.out.split())
    assert (
        "the projector mmproj.gguf takes 1.0 MiB of SIM0; its compute buffer, which depends on the image, is not"
        in told
    )
    assert "no effect" not in seen.err


def test_what_is_beside_the_model_can_be_too_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that fits alone does not with a draft model of 70 B, in a list of plans either; a small projector fits."""
    path = tmp_path / "mmproj.gguf"
    size = header(path, "clip", 1024, 512)
    assert planned(capsys, "-mm", str(path))["fits"]
    assert planned(capsys, "-md", "llama-3.3-70b", status=3)["fits"] is False
    assert run([*LINE, "-ngl", "10,99", "-o", "json", "-md", "llama-3.3-70b"]) == 3
    assert not any(row["fits"] for row in json.loads(capsys.readouterr().out))
    assert run([*LINE, "-o", "json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    assert run([*LINE, "-o", "json", "--mmproj", str(path)]) == 0
    (beside,) = json.loads(capsys.readouterr().out)
    assert beside["SIM0_bytes"] == alone["SIM0_bytes"] + size


def test_a_draft_model_that_is_not_known_counts_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no graph can be had, the weights count on the first device, and a warning says that the context does not."""
    size = header(tmp_path / "eagle.gguf", "eagle3", 1024, 512)
    found = planned(capsys, "-md", str(tmp_path / "eagle.gguf"))
    assert [m["total"] for m in found["beside"][0]["memory"]] == [size]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-md", "no/such.gguf"], "no such file"),
        (["-md", DRAFT, "-devd", "CUDA7"], "-devd CUDA7: not in the plan, which has SIM0, SIM1"),
        (["--mmproj", "absent.gguf"], "absent.gguf: no such file"),
    ],
)
def test_mistakes_are_named(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file or a device that there is not."""
    assert run([*LINE, *words]) in (1, 2)
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("word", ["-md", "--mmproj", "--mmproj=a.gguf"])
def test_a_plan_says_how_to_keep_their_memory_free(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` does not take them, and names the option that does it."""
    assert run(["plan", MODEL, word, "a.gguf"]) == 2
    assert "--margin GiB" in capsys.readouterr().err
