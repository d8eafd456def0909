"""A real Gemma 3: logits, text and graphs as llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from real_gemma3 import fetch_gemma3

from pyggml.commands._fetch import cache_folder
from pyggml.models.placement import PlacementFlags
from pyggml.plan_report import ggml_text
from pyggml.planning import Planner
from pyggml.session import ContextFlags, Session
from pyggml.tokenizer import Tokenizer
from pyggml.types import Type

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"


@pytest.fixture(scope="module")
def gemma3() -> Path:
    """Give the file, fetched once."""
    return fetch_gemma3(cache_folder())


def test_logits_and_text(gemma3: Path, tmp_path: Path) -> None:
    """Logits of a prompt are near llama.cpp's, the likeliest token is nearly always the same, and the text goes on."""
    context = ContextFlags(n_ctx=1024, n_batch=64, flash_attn="off", type_k=Type.F32, type_v=Type.F32)
    with Session.open(gemma3, context=context) as s:
        tokenizer = Tokenizer.from_gguf(s.file)
        tokens = tokenizer.encode(TEXT)
        assert tokens[0] == 2, "a prompt begins with BOS"
        ours = s.decode(tokens, outputs="all")
        assert tokenizer.decode([int(ours[-1].argmax())]) == " Madrid"
    (theirs,) = llama_cpp.run_jobs([llama_cpp.Job(str(gemma3), tokens, len(tokens))], tmp_path)
    error = np.square(ours - theirs).sum(1) / np.square(theirs).sum(1)
    # of Q4_K to Q6_K weights: llama.cpp quantises what it multiplies them with in other blocks
    assert error.max() < 2e-2
    assert np.median(error) < 5e-3
    assert np.mean(ours.argmax(1) == theirs.argmax(1)) > 0.9


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_graphs(gemma3: Path, flash_attn: str) -> None:
    """Plans of the graphs that are built here equal those of llama.cpp's graphs, past the window of 512 tokens, too."""
    context = ContextFlags(n_ctx=2048, n_ubatch=512, flash_attn=flash_attn)
    texts = []
    for graph in ("built", "llama"):
        with Planner.open(
            gemma3, devices=["mock:CUDA0:offload=32"], placement=PlacementFlags(n_gpu_layers=9), context=context,
            graph=graph, data=False,
        ) as planner:  # fmt: skip
            texts.append([ggml_text(planner, p) for n in (1200, 1) for p in planner.plan_batch(n)])
            sizes = planner.memory()
            texts.append([(m.buft, m.weights, m.cache, m.compute) for m in sizes])
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]
