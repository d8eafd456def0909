"""The tiny models of which real llama.cpp recorded logits and copies, written again byte for byte.

Three layers of 256, 16 experts of which 4 are used. Weights are sums of raw PCG64 words, so that the same bytes come on
any machine; the sum of the file is checked.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, quants

from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.types import Type

N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, HEAD, FF, EXPERTS, USED, VOCAB, CTX, SEED = (
    256,
    3,
    4,
    2,
    64,
    512,
    16,
    4,
    320,
    512,
    7,
)
N_FF_EXP = 256
SHA256 = {
    ("llama", "F32"): "0c4528df8ba41e0e0d7297f0707c12b1975636941c1802a718c0cc48ea5e68ce",
    ("qwen3moe", "F32"): "330df5d0d3f9aacfce7cf58f6780ce0b72bd21e9bbe22676f15f00e09edcf97c",
    ("qwen3moe", "Q8_0"): "29deddd48a3f1717ffa80fefeb5b6cbd022c0dcd8cf3e33cf47f7a5a418ee556",
    ("glm4moe", "F32"): "b7efb1412a8ee333a98ba454dc167e023a6b39157ae3c8981b53304072e7495a",
    ("granitemoe", "F32"): "a11260531bddf5c6ba2f73e743a17c339781d2f8f7beb59cadfd2ce7eb438240",
    ("deepseek2", "F32"): "f001f39f50f4c1511c41bdd83c25e842f54500ad8967ba7866f547fee6e92af6",
    ("gpt-oss", "MXFP4"): "bda3cc9d3f387e0005b075b8a9d33a295f3a97d266213b4fbca8c97860e1ea1a",
}
#: Architectures whose logits were recorded with F32 weights.
ARCHITECTURES = ("llama", "qwen3moe", "glm4moe", "granitemoe", "deepseek2")

Shape = tuple[int, ...]
Weight = tuple[str, npt.NDArray[np.float32]]


def _noise(name: str, shape: Shape, std: float, mean: float) -> npt.NDArray[np.float32]:
    """Return nearly normal numbers: four 16-bit pieces of a raw word added up."""
    raw = np.random.PCG64([SEED, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    total = sum(((raw >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.int64) for k in range(4))
    unit = (total - 2 * 65535).astype(np.float32) * np.float32(1.0 / 37837.0)  # sqrt(4 * (65536**2 - 1) / 12)
    return (unit * np.float32(std) + np.float32(mean)).reshape(shape)


def _matrix(name: str, *shape: int, gain: float = 1.0) -> Weight:
    return f"{name}.weight", _noise(name, shape, gain / np.sqrt(np.float32(shape[-1])), 0.0)


def _norm(name: str, n: int) -> Weight:
    return f"{name}.weight", _noise(f"{name}.weight", (n,), 0.1, 1.0)


def _weights(arch: str) -> Iterator[Weight]:
    yield _matrix("token_embd", VOCAB, N_EMBD, gain=float(np.sqrt(np.float32(N_EMBD))))
    yield _norm("output_norm", N_EMBD)
    yield _matrix("output", VOCAB, N_EMBD, gain=2.0)
    for layer in (f"blk.{i}" for i in range(N_LAYER)):
        yield _norm(f"{layer}.attn_norm", N_EMBD)
        for letter, n_head in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV)):
            yield _matrix(f"{layer}.attn_{letter}", n_head * HEAD, N_EMBD)
        yield _matrix(f"{layer}.attn_output", N_EMBD, N_HEAD * HEAD)
        if arch == "qwen3moe":
            yield _norm(f"{layer}.attn_q_norm", HEAD)
            yield _norm(f"{layer}.attn_k_norm", HEAD)
        yield _norm(f"{layer}.ffn_norm", N_EMBD)
        yield _matrix(f"{layer}.ffn_gate_inp", EXPERTS, N_EMBD, gain=2.0)
        yield _matrix(f"{layer}.ffn_gate_exps", EXPERTS, N_FF_EXP, N_EMBD)
        yield _matrix(f"{layer}.ffn_up_exps", EXPERTS, N_FF_EXP, N_EMBD)
        yield _matrix(f"{layer}.ffn_down_exps", EXPERTS, N_EMBD, N_FF_EXP)


def write_tokenizer(writer: GGUFWriter) -> None:
    """Write a vocabulary of bytes and padding."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    types = [2, 3, 3] + [6] * 256
    tokens += [f"<pad{i}>" for i in range(len(tokens), VOCAB)]
    types += [5] * (VOCAB - len(types))
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [0.0] * VOCAB)
    writer.add_array("tokenizer.ggml.token_type", types)
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)


def _metadata(writer: GGUFWriter, arch: str) -> None:
    writer.add_string("general.name", f"tiny-{arch}")
    writer.add_uint32("general.quantization_version", 2)
    ints = {"context_length": CTX, "embedding_length": N_EMBD, "block_count": N_LAYER}
    ints["feed_forward_length"] = N_FF_EXP if arch == "llama" else FF
    ints["attention.head_count"] = N_HEAD
    for key, value in ints.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    more = {
        "vocab_size": VOCAB,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "attention.head_count_kv": N_HEAD_KV,
    }
    more |= {"attention.key_length": HEAD, "attention.value_length": HEAD, "rope.dimension_count": HEAD}
    for key, value in more.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    if arch == "qwen3moe":
        writer.add_uint32(f"{arch}.expert_feed_forward_length", N_FF_EXP)


def write_recorded_model(arch: str, path: Path, type: str = "F32") -> Path:
    """Write a model and return its path; an assertion fails if the bytes are others.

    Llama and qwen3moe are written by hand here, so that `make_moe` has something to be held to.
    """
    if arch not in ("llama", "qwen3moe"):
        sizes = Sizes(layers=N_LAYER, experts=EXPERTS, used=USED)
        written = make_moe(path, Recipe(arch, Type[type], seed=SEED, sizes=sizes))
        assert written.sha256 == SHA256[arch, type], f"the {arch} model is not the recorded one"
        return path
    writer = GGUFWriter(str(path), arch)
    write_tokenizer(writer)
    _metadata(writer, arch)
    for name, values in _weights(arch):
        if type == "F32" or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType[type]
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[arch, type], (
        f"the {arch} model is not the recorded one"
    )
    return path
