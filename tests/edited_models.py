"""Tiny models with keys and tensors changed, as files of the same family differ from each other."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pyggml.gguf import GGUFFile, TensorInfo, ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.makers.quantize import dequantize
from pyggml.tokenizer.words import bytes_of
from pyggml.types import Type

_KINDS = {
    bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING,
    np.int32: ValueType.INT32, np.uint64: ValueType.UINT64, np.float64: ValueType.FLOAT64,
}  # fmt: skip
#: Types whose codebooks libggml searches long.
_RANDOM = (Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.IQ1_M, Type.IQ1_S)
#: Small enough to be written and run in a moment.
SIZES = Sizes(layers=3, embd=64, heads=4, kv_heads=2, head_dim=16, ff=96, ff_exp=32, experts=8, used=3)

#: A vocabulary of byte pairs.
SPELLED = [char for char in map(chr, range(0x144)) if len(bytes_of(char)) == 1][:256]
END = "<|end|>"
WORDS = ["he", "ll", "hell", "hello", "Ġw", "or", "ld", "Ġwor", "Ġworld", "lo"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "l d", "Ġw or", "Ġwor ld", "l o"]


def byte_pairs(tokens: list[str], merges: list[str], pre: str = "gpt-2") -> dict[str, Any]:
    """Return the keys of a byte-pair vocabulary of 320 tokens, whose last is special."""
    tokens = [*tokens, *(f"<unused{i}>" for i in range(319 - len(tokens))), END]
    kinds = [5 if token.startswith("<unused") else 3 if token == END else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.scores": None,
        "tokenizer.ggml.bos_token_id": 319, "tokenizer.ggml.eos_token_id": 319, "tokenizer.ggml.unknown_token_id": None,
    }  # fmt: skip


def write_edited(
    path: Path,
    arch: str,
    *,
    sizes: Sizes = SIZES,
    keys: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    renamed_arch: str | None = None,
    full_keys: Mapping[str, Any] | None = None,
    retyped: Mapping[str, Type] | None = None,
) -> Path:
    """Write a random model in F32 that differs from what `make_moe` writes.

    Parameters
    ----------
    keys : mapping
        Of the architecture, without its name: values that are set, in numpy's types where Python's
        do not say which; None takes the key away.
    without : tuple of str
        Tensors that are left out, by their names with or without ``blk.N.``.
    tensors : mapping of str to tuple of int
        Tensors that are added, with their shapes in numpy's order; vectors are near 1.
    renamed_arch : str, optional
        The architecture that the file says it is of.
    full_keys : mapping
        As ``keys``, by their whole names.
    retyped : mapping of str to Type
        Tensors that become random blocks of a type, by their whole names.
    """
    plain = path.with_suffix(".plain")
    make_moe(plain, Recipe(arch, Type.F32, seed=11, sizes=sizes))
    rng = np.random.default_rng(4)
    arch = arch.removesuffix("-dense")
    name = renamed_arch or arch
    keys = {f"{arch}.{key}": value for key, value in (keys or {}).items()} | dict(full_keys or {})
    writer = GGUFWriter()
    with GGUFFile.open(plain) as file:
        for key in file.metadata:
            if key == "general.architecture":
                writer.add(key, ValueType.STRING, name)
            elif key not in keys:
                entry = file.metadata.entry(key)
                own = key.replace(f"{arch}.", f"{name}.", 1) if key.startswith(f"{arch}.") else key
                writer.add_raw(own, entry.type, entry.length, file.metadata.raw(key))
        for key, value in keys.items():
            key = key.replace(f"{arch}.", f"{name}.", 1)
            if isinstance(value, list):
                kind = _KINDS[type(value[0])] if value else ValueType.STRING
                writer.add_array(key, ValueType.INT32 if key.endswith("token_type") else kind, value)
            elif value is not None:
                writer.add(key, _KINDS[type(value)], value)
        for info in file.tensors.values():
            if info.name in without or info.name.endswith(tuple(f".{name}" for name in without)):
                continue
            n_dims = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            kind, raw = info.type, file.data(info.name).copy()
            if info.name in (retyped or {}):
                assert retyped is not None
                kind = retyped[info.name]
                rows = info.ne[1] * info.ne[2] * info.ne[3]
                raw = _random_rows(kind, (rows, kind.row_size(info.ne[0])), 0.05)
            writer.add_tensor(info.name, kind, info.ne[:n_dims], partial(_bytes, raw))
        for name, shape in (tensors or {}).items():
            scale = 0.1 if len(shape) == 1 else 1.0 / np.sqrt(shape[-1])
            values = (float(len(shape) == 1) + scale * rng.standard_normal(shape)).astype(np.float32)
            writer.add_tensor(name, Type.F32, shape[::-1], partial(_bytes, values))
        writer.write(path)
    plain.unlink()
    return path


def write_retyped(path: Path, plain: Path, change: Callable[[TensorInfo, np.ndarray], tuple[Type, np.ndarray]]) -> Path:
    """Write a model again; ``change`` returns the type and the bytes of each tensor, given what it was."""
    writer = GGUFWriter()
    with GGUFFile.open(plain) as file:
        for key in file.metadata:
            entry = file.metadata.entry(key)
            writer.add_raw(key, entry.type, entry.length, file.metadata.raw(key))
        for info in file.tensors.values():
            n_dims = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            kind, raw = change(info, file.data(info.name).copy())
            writer.add_tensor(info.name, kind, info.ne[:n_dims], partial(_bytes, raw))
        writer.write(path)
    return path


def write_quantized(path: Path, plain: Path, kind: Type) -> Path:
    """Write a model again with its Q8_0 matrices in another type.

    Libggml makes them, all columns alike to it; where it would think for seconds, they are random blocks of the same
    spread.
    """
    folder = Path(str(importlib.util.find_spec("libggml").origin)).parent / "lib64"
    chunk = ctypes.CDLL(str(folder / "libggml-base.so")).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantized(info: TensorInfo, raw: np.ndarray) -> tuple[Type, np.ndarray]:
        if info.type is not Type.Q8_0:
            return info.type, raw
        values = dequantize(raw.reshape(-1, info.type.row_size(info.ne[0])), info.type)
        rows = np.zeros((len(values), kind.row_size(info.ne[0])), np.uint8)
        if kind in _RANDOM:
            rows[:] = _random_rows(kind, rows.shape, float(values.std()))
        else:
            even = np.ones(info.ne[0], np.float32)
            chunk(kind, values.ctypes.data, rows.ctypes.data, 0, *values.shape, even.ctypes.data)
        return kind, rows

    return write_retyped(path, plain, quantized)


def _random_rows(kind: Type, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Return rows of random blocks: uint8, of a shape."""
    rows = np.random.default_rng(int(kind)).integers(0, 256, shape, np.uint8)
    blocks = rows.reshape(-1, kind.type_size)

    def put(d: float) -> None:
        bits = int(np.float16(d).view(np.uint16))
        if kind is not Type.IQ1_M:
            blocks[:, :2] = bits & 255, bits >> 8
        for i in range(4 if kind is Type.IQ1_M else 0):  # four bits in each of its last four words
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4

    if kind is Type.NVFP4:  # four small scales, then codes
        blocks[:, :4] = 20 + blocks[:, :4] % 8
        return rows
    put(1.0)
    put(spread / float(dequantize(rows, kind).std()))
    return rows


def _bytes(values: np.ndarray) -> list[bytes]:
    return [values.tobytes()]
