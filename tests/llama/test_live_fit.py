"""What llama.cpp's own --fit chooses, asked live, equals `pyggml.fit`."""

from __future__ import annotations

from pathlib import Path

import pytest
from builds import BUILDS

from pyggml.advisor.advice import open_machine
from pyggml.catalog import header_path
from pyggml.errors import ModelError
from pyggml.fit import fit_flags
from pyggml.gguf import GGUFFile
from pyggml.llama.live_fit import live_fit
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner
from pyggml.types import Type

HOST = "ddr4-3200x2,cores=8,64GiB"
MODELS = (
    "llama-3.2-3b",
    "llama-3.3-70b",
    "qwen3-8b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "qwen3-30b-a3b",
    "qwen3.6-35b-a3b",
)
CARDS = ("gtx1650", "rtx3060", "rtx3090", "rtx3090,rtx3090", "rtx3060,gtx1650", "gtx1650,rtx3090")
FAST = [
    ("llama-3.2-3b", "rtx3060", 8192), ("llama-3.3-70b", "rtx3090", 8192), ("llama-3.3-70b", "rtx3090,rtx3090", 0),
    ("gpt-oss-20b", "rtx3060", 0), ("gpt-oss-120b", "gtx1650,rtx3090", 8192), ("qwen3.6-35b-a3b", "gtx1650", 4096),
]  # fmt: skip


def check(model: str, cards: str, n_ctx: int, **flags: object) -> None:
    """Compare the flags that both choose."""
    backends, _ = open_machine(cards, HOST)
    context = ContextFlags(**{"n_ctx": n_ctx, "flash_attn": "on", **flags})
    with (
        GGUFFile.open(header_path(model)) as file,
        Planner.open(file, devices=backends[:-1], cpu=backends[-1], context=context, data=False) as planner,
    ):
        live, build = live_fit(file, [b.device for b in backends[:-1]], context)
        own = fit_flags(planner, PlacementFlags(fit=True), context)
    assert build
    assert live.n_tried > 0
    assert (live.placement, live.context) == (own.placement, own.context)


@pytest.mark.parametrize(("model", "cards", "n_ctx"), FAST)
def test_live_equals_our_own(model: str, cards: str, n_ctx: int) -> None:
    """Layers, shares, patterns and context are the same, of dense models and mixtures of experts, on one card and on two."""
    check(model, cards, n_ctx)


def test_what_is_held_meanwhile_counts_as_free() -> None:
    """The answer does not depend on the memory that a planner holds while llama.cpp is asked."""
    devices = [b.device for b in open_machine("rtx3090", HOST)[0][:-1]]
    context = ContextFlags(n_ctx=8192, flash_attn="on")
    with GGUFFile.open(header_path("gpt-oss-120b")) as file:
        alone = live_fit(file, devices, context)
        held = devices[0].buffer_type.alloc_buffer(8 << 30)
        assert live_fit(file, devices, context) == alone
        held.close()


@pytest.mark.slow
@pytest.mark.parametrize("library", BUILDS)
def test_live_equals_our_own_in_other_builds(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in further builds, which have the function in libllama-common."""
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(library))
    for model, cards, n_ctx in FAST:
        check(model, cards, n_ctx)


@pytest.mark.slow
@pytest.mark.parametrize("n_ctx", [0, 32768])
@pytest.mark.parametrize("cards", CARDS)
@pytest.mark.parametrize("model", MODELS)
def test_live_equals_our_own_over_a_table(model: str, cards: str, n_ctx: int) -> None:
    """The same for every model of a table on each of the machines."""
    check(model, cards, n_ctx)


def test_live_equals_our_own_with_other_contexts() -> None:
    """The micro-batch, the type of the cache and a cache in host memory count alike."""
    check("qwen3-30b-a3b", "rtx3060", 16384, n_ubatch=2048, type_k=Type.Q8_0, type_v=Type.Q8_0)
    check("gpt-oss-20b", "gtx1650,rtx3060", 8192, offload_kqv=False)


def test_a_model_that_llama_refuses_is_a_typed_error(tmp_path: object) -> None:
    """The child answers with llama.cpp's refusal, and answers the next question."""
    backends, _ = open_machine("rtx3060", HOST)
    devices = [b.device for b in backends[:-1]]
    with GGUFFile.open(header_path("deepseek-v2-lite")) as file:
        told = ContextFlags(n_ctx=4096, type_k=Type.F32)
        with pytest.raises(ModelError):
            live_fit(file, devices, told)
        assert live_fit(file, devices, ContextFlags(n_ctx=4096))[0].placement.n_gpu_layers == -1
