"""What else files of these architectures hold: tied heads, biases, fused projections, rotary scaling, one used expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter
from recorded_models import write_tokenizer

from pyggml.session import ContextFlags, Session
from pyggml.types import Type

N_EMBD, N_LAYER, FF, VOCAB, CTX = 64, 2, 96, 320, 512


@dataclass
class Variant:
    """A tiny model with something uncommon."""

    arch: str = "llama"
    n_head: int = 4
    n_head_kv: int = 2
    head: int = 16
    experts: int = 0
    used: int = 0
    tied: bool = False
    fused: bool = False
    biases: bool = False
    factors: tuple[str, ...] = ()
    keys: dict[str, float | int | str] = field(default_factory=dict)


VARIANTS = {
    "dense": Variant(),
    "tied head": Variant(tied=True),
    "biases": Variant(biases=True),
    "fused qkv": Variant(fused=True),
    "fused qkv with biases": Variant(fused=True, biases=True),
    "rope freqs": Variant(factors=("rope_freqs",)),
    "heads of 128, all for k": Variant(n_head=2, n_head_kv=2, head=128),
    "one used expert": Variant(experts=4, used=1),
    "all experts used": Variant(experts=4, used=4),
    "qwen3": Variant(arch="qwen3"),
    "qwen3 with biases, tied": Variant(arch="qwen3", tied=True),
    "qwen3moe": Variant(arch="qwen3moe", experts=6, used=3),
    "linear scaling": Variant(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    "yarn": Variant(
        keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    ),
    "no scaling, other base": Variant(keys={"rope.scaling.type": "none", "rope.freq_base": 500000.0}),
    "long rope": Variant(
        factors=("rope_factors_long", "rope_factors_short"),
        keys={
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 256,
            "rope.scaling.attn_factor": 1.2,
        },
    ),
}


def write(path: Path, v: Variant) -> Path:
    """Write a model of random weights."""
    rng = np.random.default_rng(5)
    writer = GGUFWriter(str(path), v.arch)
    write_tokenizer(writer)
    numbers = {
        "context_length": CTX, "embedding_length": N_EMBD, "block_count": N_LAYER, "feed_forward_length": FF,
        "attention.head_count": v.n_head, "attention.head_count_kv": v.n_head_kv, "attention.key_length": v.head,
        "attention.value_length": v.head, "rope.dimension_count": v.head, "vocab_size": VOCAB,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    if v.experts:
        numbers |= {"expert_count": v.experts, "expert_used_count": v.used, "expert_feed_forward_length": FF}
    for key, value in (numbers | v.keys).items():
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        kind(f"{v.arch}.{key}", value)

    def add(name: str, *shape: int, mean: float = 0.0) -> None:
        scale = 0.1 if len(shape) == 1 else 1.0 / np.sqrt(shape[-1])
        writer.add_tensor(name, (mean + scale * rng.standard_normal(shape)).astype(np.float32))

    add("token_embd.weight", VOCAB, N_EMBD)
    add("output_norm.weight", N_EMBD, mean=1.0)
    if not v.tied:
        add("output.weight", VOCAB, N_EMBD)
    for name in v.factors:
        writer.add_tensor(f"{name}.weight", rng.uniform(1, 3, v.head // 2).astype(np.float32))
    for i in range(N_LAYER):
        _layer(v, f"blk.{i}", add)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _layer(v: Variant, layer: str, add) -> None:
    q, kv = v.n_head * v.head, v.n_head_kv * v.head
    add(f"{layer}.attn_norm.weight", N_EMBD, mean=1.0)
    add(f"{layer}.ffn_norm.weight", N_EMBD, mean=1.0)
    parts = {"attn_qkv": q + 2 * kv} if v.fused else {"attn_q": q, "attn_k": kv, "attn_v": kv}
    for name, n in parts.items():
        add(f"{layer}.{name}.weight", n, N_EMBD)
    if v.biases:
        for name, n in {"attn_q": q, "attn_k": kv, "attn_v": kv}.items():
            add(f"{layer}.{name}.bias", n)
        add(f"{layer}.attn_output.bias", N_EMBD)
        for name, n in {"ffn_gate": FF, "ffn_up": FF, "ffn_down": N_EMBD}.items():
            add(f"{layer}.{name}.bias", n)
    add(f"{layer}.attn_output.weight", N_EMBD, q)
    if v.arch.startswith("qwen3"):
        add(f"{layer}.attn_q_norm.weight", v.head, mean=1.0)
        add(f"{layer}.attn_k_norm.weight", v.head, mean=1.0)
    if v.experts:
        add(f"{layer}.ffn_gate_inp.weight", v.experts, N_EMBD)
    e = (v.experts,) if v.experts else ()
    for name, n, m in (("ffn_gate", FF, N_EMBD), ("ffn_up", FF, N_EMBD), ("ffn_down", N_EMBD, FF)):
        add(f"{layer}.{name}{'_exps' if e else ''}.weight", *e, n, m)


TOKENS = [(i * 37 + 11) % 300 for i in range(48)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """Give each variant's file and llama.cpp's logits of it; one child process does them all."""
    folder = tmp_path_factory.mktemp("variants")
    paths = [write(folder / f"{i}.gguf", variant) for i, variant in enumerate(VARIANTS.values())]
    found = llama_cpp.run_jobs([llama_cpp.Job(str(path), TOKENS, 24) for path in paths], folder)
    return dict(zip(VARIANTS, zip(paths, found, strict=True), strict=True))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_give_llama_cpps_logits(name, expected):
    """Logits of each variant equal live llama.cpp's."""
    path, logits = expected[name]
    context = ContextFlags(n_ctx=256, n_batch=64, type_k=Type.F32, type_v=Type.F32, flash_attn="off")
    with Session.open(path, context=context) as s:
        found = np.concatenate([s.decode(TOKENS[i : i + 24], outputs="all") for i in (0, 24)])
    assert np.abs(found - logits).max() < 1e-3
