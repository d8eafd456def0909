"""Small files of every format, made here: two layers of four experts, two of them used, a prompt of three tokens and two decoded ones."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np

#: ``[token][layer][slot]``
PREFILL = [[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[1, 0], [2, 1]]]
DECODE = [[[3, 1], [0, 2]], [[1, 0], [2, 3]]]


def bigmoeonedge(folder: Path) -> Path:
    """Write format A."""
    lines = ["# route_trace v1", "# model=/x/tiny.gguf arch=mixtral n_layer=2 n_expert=4 n_expert_used=2"]
    lines += [f"# layer={i} expert_bytes={100 * (i + 1)} dense_bytes=7" for i in range(2)]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")
    for phase, start, tokens in ((0, 0, PREFILL), (1, 3, DECODE)):
        for t, token in enumerate(tokens):
            for layer, ids in enumerate(token):
                lines += [
                    f"0,{phase},{start + t},{layer},{slot},{e},{0.75 - slot / 2},0,0" for slot, e in enumerate(ids)
                ]
    path = folder / "a.route.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def onnx_genai(folder: Path) -> Path:
    """Write format G."""
    path = folder / "g.json"
    prompts = {"one": {"prompt_len": 3, "prefill": PREFILL, "decode": DECODE}}
    path.write_text(json.dumps({"model": "tiny", "num_layers": 2, "num_experts": 4, "top_k": 2, "prompts": prompts}))
    return path


def fingerprint(folder: Path) -> Path:
    """Write format T, compressed."""
    path = folder / "t.json.gz"
    layers = [
        {f"layer_{i}": {"selected_experts": ids, "selected_probs": [0.5, 0.5]} for i, ids in enumerate(t)}
        for t in DECODE
    ]
    whole = {
        "row_index": 1,
        "dataset": "d",
        "category": "c",
        "router_data": [{f"token_{7 + i}": x} for i, x in enumerate(layers)],
    }
    path.write_bytes(gzip.compress(json.dumps(whole).encode()))
    return path


def expertflow(folder: Path) -> Path:
    """Write format I."""
    path = folder / "i.jsonl"
    rows = [("prefill", 0, t, token) for t, token in enumerate(PREFILL)] + [
        ("decode", 1 + t, 3 + t, x) for t, x in enumerate(DECODE)
    ]
    entries = [
        {
            "schema_version": "1.0.0", "request_id": "r", "conversation_id": "c", "turn_index": 0, "phase": phase, "forward_id": forward,
            "hook_order": 0, "token_index": t, "token_id": 5, "layer_id": layer, "selected_expert_ids": ids, "selected_expert_weights": None,
            "observed_at_ns": 1,
        }
        for phase, forward, t, token in rows
        for layer, ids in enumerate(token)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def mct1(folder: Path) -> Path:
    """Write llama.cpp's MCT1."""
    data = b"MCT1" + struct.pack("<3i", 2, 2, 1) + struct.pack("<3i", 0, 4, 2) + struct.pack("<2i", 0, 1)
    data += struct.pack("<ddQQQ", 1.0, 1.0, 600, 1000, 32) + struct.pack("<i3Q", 3, 10, 20, 30)
    for layer in range(2):
        ids = [e for token in PREFILL for e in token[layer]]
        data += struct.pack(f"<3i{len(ids)}i", layer, 2, len(ids), *ids)
    for token in DECODE:
        for layer, ids in enumerate(token):
            data += struct.pack("<3i2i", layer, 2, 2, *ids)
    path = folder / "m.mct1"
    path.write_bytes(data)
    return path


def jsonl(folder: Path) -> Path:
    """Write another program's JSON lines behind a first line that describes them."""
    path = folder / "d.jsonl"
    first = {
        "format": "pyggml-routing", "version": 1, "n_layer": 2, "n_expert": 4, "n_used": 2, "projections": ["up", "down"], "expert_bytes": [[60, 40], [120, 80]],
        "fields": {"layer": "layer_idx", "step": "pass", "ids": "selected", "phase": "stage"}, "phases": {"prompt": "prefill", "gen": "decode"},
    }  # fmt: skip
    entries = [
        {"layer_idx": i, "pass": 0, "selected": t[i], "stage": "prompt", "more": 1} for i in range(2) for t in PREFILL
    ]
    entries += [
        {"layer_idx": i, "pass": 1 + t, "selected": ids, "stage": "gen"}
        for t, x in enumerate(DECODE)
        for i, ids in enumerate(x)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [first, *entries]))
    return path


def moe_cache_eval(folder: Path) -> Path:
    """Write format P as its authors do: unions only, the model in a manifest."""
    events = [(0, 0, layer, sorted({e for t in PREFILL for e in t[layer]}), 3) for layer in range(2)]
    events += [(1, 1 + s, layer, sorted(t[layer]), 1) for s, t in enumerate(DECODE) for layer in range(2)]
    sizes = [len(e[3]) for e in events]
    path = folder / "events.npz"
    np.savez(
        path, request_indices=np.zeros(len(events), np.int32), scheduler_steps=np.array([e[1] for e in events], np.int32),
        forward_cycles=np.array([e[1] for e in events], np.int32), phases=np.array([e[0] for e in events], np.uint8),
        layer_ids=np.array([e[2] for e in events], np.int16), token_counts=np.array([e[4] for e in events], np.int32),
        offsets=np.cumsum([0, *sizes]), expert_ids=np.array([i for e in events for i in e[3]], np.int16),
        assignment_counts=np.ones(sum(sizes), np.int32), gate_mass=np.zeros(sum(sizes), np.float32),
    )  # fmt: skip
    path.with_name("manifest.json").write_text(
        json.dumps({"model": {"id": "tiny", "num_layers": 2, "num_experts": 4, "top_k": 2}})
    )
    return path


WRITERS = (bigmoeonedge, onnx_genai, fingerprint, expertflow, mct1, jsonl, moe_cache_eval)
