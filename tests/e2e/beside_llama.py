"""A family that is built here, beside llama.cpp: its logits step by step, and its plan beside the captured graph's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from pyggml import cli
from pyggml.session import Session


def greedy_difference(path: Path, folder: Path, tokens: Sequence[int], n: int, **opening: Any) -> float:
    """Decode a prompt in micro-batches of 8 and n chosen tokens; return how far logits are from llama.cpp's at most.

    llama.cpp chooses the same tokens, which is asserted. ``opening`` is what `Session.open` takes besides the path.
    """
    with Session.open(path, **opening) as s:
        parts = [s.decode(tokens, outputs="all")]
        chosen = list(tokens)
        for _ in range(n):
            chosen.append(int(parts[-1][-1].argmax()))
            parts.append(s.decode(chosen[-1:]))
    n_prompt = len(tokens)
    steps = [{"tokens": chosen[:n_prompt], "pos": list(range(n_prompt)), "seqs": [0] * n_prompt}]
    steps += [{"tokens": chosen[i : i + 1], "pos": [i], "seqs": [0]} for i in range(n_prompt, n_prompt + n)]
    (theirs,) = llama_cpp.run_jobs([llama_cpp.Job(str(path), [], 64, steps=steps, ubatch=8)], folder)
    assert [int(row.argmax()) for row in theirs[n_prompt - 1 : n_prompt - 1 + n]] == chosen[n_prompt:]
    return float(np.abs(np.concatenate(parts) - theirs).max())


def plan_of_both_graphs(path: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the plan over a device of the graph built here, which is that of llama.cpp's graph line for line."""
    plan = ["splits", str(path), "--device", "sim:rtx4090-pcie4,cpu", "--batches", "40,1", "-c", "512", "-ub", "64"]
    texts: list[str] = []
    for graph in ("built", "llama"):
        assert cli.run([*plan, *words, "--graph", graph, "--format", "ggml"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    return texts[0]
