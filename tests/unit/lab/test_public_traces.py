"""Published results, from the public traces in the folder that PYGGML_TRACES names; they are other people's files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from pyggml.lab import Trace, open_trace
from pyggml.lab.pools import Capacity, parse_capacities
from pyggml.lab.public import TRACES
from pyggml.lab.replay import Refusal, Result, Setting, lru_begins, replay

FOLDER = Path(os.environ.get("PYGGML_TRACES", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("PYGGML_TRACES"),
    reason="PYGGML_TRACES names no folder of public traces (`pyggml experts fetch FOLDER` downloads them)",
)

#: Per cent of hits, mean of 15 prompts, by slots of 32.
TABLE = {
    6: (54.57, 58.59, 58.20, 65.63, 72.62),
    10: (72.85, 77.22, 76.85, 84.15, 86.33),
    13: (82.73, 85.82, 85.84, 90.90, 91.89),
    16: (89.83, 91.40, 91.62, 94.73, 95.18),
}


@pytest.fixture(scope="module")
def prompts() -> Trace:
    """Give the 15 prompts of gpt-oss-20b as requests of one trace."""
    return Trace.joined([open_trace(path) for path in sorted((FOLDER / "gpt-oss-20b").glob("*.json*"))])


def test_gpt_oss_20b_has_the_published_hits(prompts):
    """Five policies at four sizes, to the printed digit."""
    names = ["lru", "lfu", "lfru", "belady", "belady-bypass"]
    found = {}
    for result in replay(prompts, names, parse_capacities("6,10,13,16")):
        assert isinstance(result, Result)
        found[result.capacity.slots, result.policy.name] = round(100 * result.hit_rate, 2)
    assert found == {
        (slots, name): value for slots, row in TABLE.items() for name, value in zip(names, row, strict=True)
    }


def test_a_global_lru_below_the_sweep_hits_nothing(prompts):
    """23 x 4 slots for 24 layers give no hit, one more does."""
    setting = Setting("global")
    assert lru_begins(prompts, setting)["slots"] == 23 * 4 + 1
    below, above = replay(prompts, ["lru"], parse_capacities("92,93"), setting)
    assert below.hits == 0
    assert above.hits > 0


@pytest.mark.parametrize("model", ["qwen", "gemma", "gptoss"])
def test_bigmoeonedge_curves_to_the_printed_digit(model):
    """All rows of lru, lfu and belady: hit rates over all and over decode, and MiB read; the layer row at 250 MiB is over budget."""
    trace = open_trace(FOLDER / "bigmoeonedge" / f"{model}.route.csv")
    with (FOLDER / "bigmoeonedge" / f"{model}-curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] in ("lru", "lfu", "belady")]
    assert len(rows) == 33
    budgets = [Capacity(n_bytes=int(mib) << 20) for mib in dict.fromkeys(row["budget_mib"] for row in rows)]
    found = {}
    for phase in ("all", "decode"):
        for result in replay(trace, ["lru", "lfu", "belady"], budgets, Setting("global", phase, "bigmoeonedge")):
            assert isinstance(result, Result)
            found[phase, result.policy.name, (result.capacity.n_bytes or 0) >> 20] = result
    for row in rows:
        whole, decode = (found[phase, row["policy"], int(row["budget_mib"])] for phase in ("all", "decode"))
        printed = (
            f"{100 * whole.hits / whole.touches:.3f}",
            f"{100 * decode.hits / decode.touches:.3f}",
            f"{whole.bytes_read / 2**20:.1f}",
        )
        assert printed == (row["hit_pct_cum"], row["hit_pct_decode"], row["read_mib"]), row
    (refused,) = replay(trace, ["lru"], [Capacity(n_bytes=250 << 20)], Setting("layer", "all", "bigmoeonedge"))
    assert isinstance(refused, Refusal)


def test_onnx_genai_page_ins():
    """Misses of oracle, fifo, lru and lfu in one pool, by prompt and share of the experts."""
    trace = open_trace(FOLDER / "onnx-genai" / "moe_expert_trace.json")
    published = json.loads((FOLDER / "onnx-genai" / "moe_cache_sim_results.json").read_text())["workloads"]
    assert list(published) == list(trace.requests)
    n = 0
    for capacity in parse_capacities("10%,25%,50%,75%,90%"):
        for result in replay(trace, ["oracle", "fifo", "lru", "lfu"], [capacity], Setting("global")):
            if isinstance(result, Refusal):
                continue
            for request in result.requests:
                row = published[trace.requests[request.request]][str(capacity.fraction)]
                assert request.touches - request.hits == row["page_ins"][result.policy.name], (
                    capacity,
                    result.policy.name,
                )
                n += 1
    assert n == 60


def test_lfru_beats_lru_on_every_prompt(prompts):
    """At every size from 6 to 16 of 32 slots LFRU has more hits than LRU on each of 15 prompts."""
    lru, lfru = (list(replay(prompts, [name], parse_capacities("6,10,13,16"))) for name in ("lru", "lfru"))
    for a, b in zip(lru, lfru, strict=True):
        assert all(y.hits > x.hits for x, y in zip(a.requests, b.requests, strict=True))


def test_held_out_static_sets_lose_to_lru(prompts):
    """Fitted on 14 prompts and tested on the other, a static set is 8 to 20 points under LRU; fitted on the same prompt it is above."""
    for capacity in parse_capacities("6,10,13,16"):
        lru, static, same = replay(prompts, ["lru", "static", "static-same-trace"], [capacity])
        assert 0.08 < lru.hit_rate - static.hit_rate < 0.2
        assert same.hit_rate > lru.hit_rate


def test_files_have_the_hashes_that_are_fetched():
    """What `pyggml experts fetch` checks is what results were published of."""
    for trace in TRACES:
        path, packed = FOLDER / trace.name, FOLDER / f"{trace.name}.gz"
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        assert hashlib.sha256(data).hexdigest() == trace.sha256, path


def test_public_traces_are_sound():
    """No trap that forbids a replay is found in any public trace."""
    paths = [
        *(FOLDER / "bigmoeonedge").glob("*.route.csv"),
        *(FOLDER / "gpt-oss-20b").glob("*.json*"),
        FOLDER / "onnx-genai/moe_expert_trace.json",
    ]
    assert len(paths) == 19
    for path in paths:
        assert not [f for f in open_trace(path).findings if f.phases], path
