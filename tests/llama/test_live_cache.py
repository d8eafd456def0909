"""pyggml's expert cache against the one of the installed llama.cpp (b11549: LRU), write for write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle.moe_cache import Difference, read, replay

TESTS = Path(__file__).parents[1]


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
