"""Graphs equal those of llama.cpp b11434, node for node."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny

from pyggml.models.architectures import build_graph
from pyggml.models.batch import Batch
from pyggml.models.caches import make_cache
from pyggml.models.context import ContextFlags, ContextParams
from pyggml.models.graph import GraphParams, ModelGraph
from pyggml.tensor import Tensor
from pyggml.types import Type

DATA = Path(__file__).parents[2] / "data" / "graphs"
#: file, architecture, type of weights, of the cache, flash attention
CASES = [
    ("llama-F32-16x4", "llama", Type.F32, Type.F32, "off"),
    ("qwen3moe-Q8_0-16x4", "qwen3moe", Type.Q8_0, Type.F32, "off"),
    ("qwen3moe-Q8_0-16x4-flash", "qwen3moe", Type.Q8_0, Type.F16, "on"),
    ("gpt-oss-MXFP4-16x4", "gpt-oss", Type.MXFP4, Type.F32, "off"),
    ("glm4moe-Q4_K-16x4", "glm4moe", Type.Q4_K, Type.F32, "off"),
]


def recorded(name: str) -> list[tuple[dict, list[dict]]]:
    """Return the graphs of a recording: what was decoded, and the nodes."""
    graphs: list[tuple[dict, list[dict]]] = []
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as lines:
        for line in lines:
            entry = json.loads(line)
            if "graph" in entry:
                graphs.append((entry, []))
            else:
                graphs[-1][1].append(entry)
    return graphs


def described(node: Tensor) -> dict:
    """Return a node as recordings have it."""
    out = {
        "op": node.op_desc,
        "name": node.name,
        "type": node.type.ggml_name,
        "ne": list(node.ne[: node.n_dims]),
        "src": [s.name for s in node.src if s is not None],
    }
    params = list(node.op_params)
    while params and not params[-1]:
        params.pop()
    if params:
        out["params"] = params
    if node.view_src is not None:
        out |= {"view_of": node.view_src.name, "at": node.view_offs, "nb": list(node.nb)}
    return out


def build(arch: str, flags: ContextFlags, n_tokens: int, type: Type = Type.F32) -> ModelGraph:
    """Return the graph of the first decode of a context."""
    hp = tiny.hparams(arch)
    params = ContextParams.resolve(flags, hp)
    cache = make_cache(hp, params, v_trans=not params.flash_attn)
    ((part, slot),) = cache.prepare(Batch.of(range(n_tokens), 0, outputs="all"), params.n_ubatch)
    cache.apply(part, slot)
    return build_graph(GraphParams(hp, params, part, part.n_outputs, cache.view(slot)), tiny.weights(hp, type))


@pytest.mark.parametrize(("name", "arch", "type", "type_kv", "flash"), CASES, ids=[c[0] for c in CASES])
def test_graphs_equal_the_recorded_ones(name, arch, type, type_kv, flash):
    """Every node has upstream's op, name, type, shape, sources, parameters, view source, offset and strides."""
    flags = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, type_k=type_kv, type_v=type_kv, flash_attn=flash)
    for head, nodes in recorded(name):
        result = build(arch, flags, head["n_tokens"], type)
        assert len(result.graph.nodes) == head["n_nodes"]
        for i, (node, expected) in enumerate(zip(result.graph.nodes, nodes, strict=True)):
            assert described(node) == expected, f"node {i} of graph {head['graph']}"


def test_only_the_token_path_is_computed():
    """Of the three ways to embed, two are in the graph without the COMPUTE flag."""
    result = build("llama", ContextFlags(n_ctx=512, flash_attn="off"), 4)
    assert [bool(n.flags & 16) for n in result.graph.nodes[:5]] == [True, False, False, False, True]


def test_results_are_outputs():
    """Logits and the last norm are flagged, so that the allocator keeps them."""
    result = build("qwen3moe", ContextFlags(n_ctx=512), 4)
    assert result.logits.flags & 2
    assert result.embd.flags & 2
    assert result.logits.ne == (320, 4, 1, 1)


def test_every_moe_layer_tells_its_choice():
    """The graph names the tensors of chosen experts, in the order of layers."""
    result = build("qwen3moe", ContextFlags(n_ctx=512), 4)
    assert [(t.name, t.ne[:2]) for t in result.topk] == [(f"ffn_moe_topk-{i}", (4, 4)) for i in range(3)]


def test_an_f32_cache_is_cast_for_flash_attention():
    """FLASH_ATTN_EXT reads F16: an F32 cache gets two casts in each layer."""
    flags = ContextFlags(n_ctx=512, type_k=Type.F32, type_v=Type.F32, flash_attn="on")
    names = [n.name for n in build("llama", flags, 4).graph.nodes]
    assert "cache_k_l0 (view) (permuted) (copy)" in names
    assert "cache_v_l2 (view) (permuted) (copy)" in names


def test_a_quantized_cache_is_rotated():
    """A cache of Q8_0 adds a product with the rotation for Q, K, V and the result."""
    flags = ContextFlags(n_ctx=512, type_k=Type.Q8_0, type_v=Type.Q8_0, flash_attn="on")
    result = build("llama", flags, 4)
    assert result.inputs.attn.k_rot is not None
    assert result.inputs.attn.k_rot.ne[:2] == (64, 64)
    rotations = [
        n
        for n in result.graph.nodes
        if n.op_desc == "MUL_MAT" and n.src[0] in (result.inputs.attn.k_rot, result.inputs.attn.v_rot)
    ]
    assert len(rotations) == 4 * 3
