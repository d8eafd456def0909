"""pyggml's expert cache against the one of the installed llama.cpp (b11549: LRU), write for write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mixed_model import write_mixed
from oracle.moe_cache import Difference, read, replay

from pyggml.llama import LlamaModel
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.moe_cache import LlamaCache
from pyggml.session import Session

TESTS = Path(__file__).parents[1]


def test_a_model_in_llama_cpp_with_its_cache_computes_the_same(random_model) -> None:
    """`LlamaModel` passes the size of the cache on: the same logits, llama.cpp's own counts, fewer bytes in repeated steps."""
    flags = {"placement": PlacementFlags(cpu_moe=True), "context": ContextFlags(n_ctx=128), "threads": 1}
    found = []
    for n_bytes in (0, 12 << 20):
        with LlamaModel(random_model("qwen3moe"), moe_cache_bytes=n_bytes, **flags) as model:
            found.append([model.decode([i]).tolist() for i in (1, 5, 5, 5, 5)])
            log = model.finish()
        assert bool(log) == bool(n_bytes)
    assert "hit rate" in log[-1]
    assert "hits = 0," not in log[-1]
    for plain, cached in zip(*found, strict=True):
        np.testing.assert_allclose(cached, plain, atol=1e-4)


def test_counts_of_two_groups_are_those_of_live_llama_cpp(random_model, tmp_path) -> None:
    """With experts of two types there are two groups with slots of their own: llama.cpp counts what our LRU counts."""
    path, n_bytes = write_mixed(tmp_path / "mixed.gguf", random_model("qwen3moe")), 9 << 20
    flags = {"placement": PlacementFlags(cpu_moe=True), "context": ContextFlags(n_ctx=128, flash_attn="on")}
    chunks = [[3, 4, 5], *([i % 7] for i in range(1, 15)), list(range(40)), [2], [2]]
    with LlamaModel(path, moe_cache_bytes=n_bytes, threads=1, **flags) as model:
        for chunk in chunks:
            model.decode(chunk)
        log = model.finish()
    rule = LlamaCache(n_bytes, "lru")
    with Session.open(path, devices=["sim:rtx4090-pcie4"], expert_cache=rule, **flags) as session:
        for chunk in chunks:
            session.decode(chunk)
        assert session.expert_cache is not None
        assert [g.n_slots > 0 for g in session.expert_cache.groups] == [True, True]
        assert session.expert_cache.counters.lines() == log[-len(session.expert_cache.counters.lines()) :]


@pytest.mark.parametrize(("arch", "n_bytes", "n_lines"), [("qwen3moe", 6 << 20, 2), ("gpt-oss", 9 << 20, 3)])
def test_every_write_is_that_of_live_llama_cpp(arch, n_bytes, n_lines, random_model, tmp_path) -> None:
    """Slots, uploads, slot maps, copies past the cache and llama.cpp's own lines of counts are those of our LRU; SLRU is refused."""
    out = tmp_path / "recording.json"
    done = subprocess.run(
        [sys.executable, "-m", "oracle.live_moe_cache", str(random_model(arch)), str(out), "--bytes", str(n_bytes)],
        cwd=TESTS, env=os.environ | {"NUMBA_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recording = read(out)
    found = replay(recording, "lru")
    assert found.n_uploads > 50
    assert found.n_maps > 20
    assert found.n_past > 5
    assert len(found.lines) == n_lines
    with pytest.raises(Difference):
        replay(recording, "slru")
    changed = json.loads(out.read_text())
    changed["routing"][5]["1"][0].reverse()
    changed["routing"][6]["0"][0][0] ^= 1
    out.write_text(json.dumps(changed))
    with pytest.raises(Difference):
        replay(read(out), "lru")
