"""A model whose layers have experts of two types, so that llama.cpp's expert cache has two groups."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.types import Type

__all__ = ["write_mixed"]


def write_mixed(path: Path, plain: Path) -> Path:
    """Write an F32 model again with the experts of layer 1 in F16."""
    writer = GGUFWriter()
    with GGUFFile.open(plain) as file:
        for key in file.metadata:
            entry = file.metadata.entry(key)
            writer.add_raw(key, entry.type, entry.length, file.metadata.raw(key))
        for info in file.tensors.values():
            kind, raw = info.type, np.array(file.data(info.name))
            if info.name.startswith("blk.1.ffn_") and "_exps.weight" in info.name:
                kind, raw = Type.F16, raw.view(np.float32).astype(np.float16)
            n_dims = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            writer.add_tensor(info.name, kind, info.ne[:n_dims], partial(_bytes, raw))
        writer.write(path)
    return path


def _bytes(raw: np.ndarray) -> list[bytes]:
    return [raw.tobytes()]
