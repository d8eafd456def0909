"""Headers of large models: GGUF files with every tensor's name, type and offset, but without data.

The files are sparse: a model of 130 GB needs some kilobytes on disk. `splits` needs no more::

    python -m pyggml.testing.headers gpt-oss-20b gpt.gguf
    pyggml splits gpt.gguf --cpu-moe
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..types import Type

__all__ = ["SHAPES", "ModelShape", "write_header"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model of the architecture qwen3moe or gpt-oss."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_vocab: int
    expert_type: str
    dense_type: str
    n_ctx: int = 32768
    arch: str = "qwen3moe"


SHAPES = {
    "qwen3-235b": ModelShape(94, 4096, 64, 4, 128, 128, 8, 1536, 151936, "q4_k", "q8_0"),
    "gpt-oss-20b": ModelShape(24, 2880, 64, 8, 64, 32, 4, 2880, 201088, "mxfp4", "q8_0", 131072, "gpt-oss"),
    "gpt-oss-120b": ModelShape(36, 2880, 64, 8, 64, 128, 4, 2880, 201088, "mxfp4", "q8_0", 131072, "gpt-oss"),
}


def write_header(path: Path, shape: ModelShape) -> None:
    """Write a file with a model's sizes, without data.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

    s = shape
    writer = GGUFWriter(str(path), s.arch)
    writer.add_name(path.stem)
    writer.add_block_count(s.n_layer)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_feed_forward_length(s.n_ff_exp)
    writer.add_expert_feed_forward_length(s.n_ff_exp)
    writer.add_expert_count(s.n_expert)
    writer.add_expert_used_count(s.n_expert_used)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_key_length(s.head)
    writer.add_value_length(s.head)
    writer.add_layer_norm_rms_eps(1e-6)
    if s.arch == "gpt-oss":
        writer.add_sliding_window(128)
        writer.add_rope_freq_base(150000.0)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)
    else:
        writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(s.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    total = 0
    for name, type_name, ne in _tensors(s):
        type_ = Type.of(type_name)
        n_bytes = type_.row_size(ne[0]) * int(np.prod(ne[1:], dtype=np.int64))
        raw = GGMLQuantizationType(int(type_))
        bytes_shape = (*reversed(ne[1:]), type_.row_size(ne[0]))
        if type_name == "f32":
            writer.add_tensor_info(name, tuple(reversed(ne)), np.dtype(np.float32), n_bytes)
        else:
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), n_bytes, raw)
        total += -(-n_bytes // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // writer.data_alignment) * writer.data_alignment
    with path.open("r+b") as file:
        file.truncate(start + total)


def _tensors(s: ModelShape) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, type and ``ne`` of each tensor."""
    rows: list[tuple[str, str, tuple[int, ...]]] = [
        ("token_embd.weight", s.dense_type, (s.n_embd, s.n_vocab)),
        ("output_norm.weight", "f32", (s.n_embd,)),
        ("output.weight", s.dense_type, (s.n_embd, s.n_vocab)),
    ]
    for i in range(s.n_layer):
        layer: list[tuple[str, str, tuple[int, ...]]] = [
            ("attn_norm", "f32", (s.n_embd,)),
            ("attn_q", s.dense_type, (s.n_embd, s.n_head * s.head)),
            ("attn_k", s.dense_type, (s.n_embd, s.n_head_kv * s.head)),
            ("attn_v", s.dense_type, (s.n_embd, s.n_head_kv * s.head)),
            ("attn_output", s.dense_type, (s.n_head * s.head, s.n_embd)),
            *(_gpt_oss_attention(s) if s.arch == "gpt-oss" else _qwen3moe_attention(s)),
            ("ffn_gate_inp", "f32", (s.n_embd, s.n_expert)),
            ("ffn_gate_exps", s.expert_type, (s.n_embd, s.n_ff_exp, s.n_expert)),
            ("ffn_up_exps", s.expert_type, (s.n_embd, s.n_ff_exp, s.n_expert)),
            ("ffn_down_exps", s.expert_type, (s.n_ff_exp, s.n_embd, s.n_expert)),
        ]
        rows += [(f"blk.{i}.{name}.weight", type_name, ne) for name, type_name, ne in layer]
        if s.arch == "gpt-oss":
            rows += [(f"blk.{i}.{name}.bias", "f32", ne) for name, ne in _gpt_oss_biases(s)]
    return rows


def _qwen3moe_attention(s: ModelShape) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        ("attn_q_norm", "f32", (s.head,)),
        ("attn_k_norm", "f32", (s.head,)),
        ("ffn_norm", "f32", (s.n_embd,)),
    ]


def _gpt_oss_attention(s: ModelShape) -> list[tuple[str, str, tuple[int, ...]]]:
    return [("attn_sinks", "f32", (s.n_head,)), ("post_attention_norm", "f32", (s.n_embd,))]


def _gpt_oss_biases(s: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    return [
        ("attn_q", (s.n_head * s.head,)),
        ("attn_k", (s.n_head_kv * s.head,)),
        ("attn_v", (s.n_head_kv * s.head,)),
        ("attn_output", (s.n_embd,)),
        ("ffn_gate_inp", (s.n_expert,)),
        ("ffn_gate_exps", (s.n_ff_exp, s.n_expert)),
        ("ffn_up_exps", (s.n_ff_exp, s.n_expert)),
        ("ffn_down_exps", (s.n_embd, s.n_expert)),
    ]


def main(args: list[str]) -> Any:
    """Write the header of a named shape."""
    if len(args) != 2 or args[0] not in SHAPES:
        return f"usage: python -m pyggml.testing.headers {'|'.join(SHAPES)} OUT.gguf"
    write_header(Path(args[1]), SHAPES[args[0]])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
