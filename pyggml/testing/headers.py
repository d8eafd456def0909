"""Headers of large models: GGUF files that have every tensor's name, type and place, and no byte of data.

The files are sparse: 130 GB of a model take some kilobytes of a disk. `splits` needs no more::

    python -m pyggml.testing.headers gpt-oss-20b-experts gpt.gguf
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
    """Sizes of a model of the architecture qwen3moe."""

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


SHAPES = {
    "qwen3-235b": ModelShape(94, 4096, 64, 4, 128, 128, 8, 1536, 151936, "q4_k", "q8_0"),
    # the experts of gpt-oss-20b; attention is that of qwen3moe in its sizes, without windows, sinks and biases
    "gpt-oss-20b-experts": ModelShape(24, 2880, 64, 8, 64, 32, 4, 2880, 201088, "mxfp4", "q8_0"),
}


def write_header(path: Path, shape: ModelShape) -> None:
    """Write a file of a model's sizes without data.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    s = shape
    writer = GGUFWriter(str(path), "qwen3moe")
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
            ("attn_q_norm", "f32", (s.head,)),
            ("attn_k_norm", "f32", (s.head,)),
            ("ffn_norm", "f32", (s.n_embd,)),
            ("ffn_gate_inp", "f32", (s.n_embd, s.n_expert)),
            ("ffn_gate_exps", s.expert_type, (s.n_embd, s.n_ff_exp, s.n_expert)),
            ("ffn_up_exps", s.expert_type, (s.n_embd, s.n_ff_exp, s.n_expert)),
            ("ffn_down_exps", s.expert_type, (s.n_ff_exp, s.n_embd, s.n_expert)),
        ]
        rows += [(f"blk.{i}.{name}.weight", type_name, ne) for name, type_name, ne in layer]
    return rows


def main(args: list[str]) -> Any:
    """Write the header of a named shape."""
    if len(args) != 2 or args[0] not in SHAPES:
        return f"usage: python -m pyggml.testing.headers {'|'.join(SHAPES)} OUT.gguf"
    write_header(Path(args[1]), SHAPES[args[0]])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
